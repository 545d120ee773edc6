"""Packages made: what they hold, that they are the same again, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeq.core.errors import EdgeqError, UsageError
from edgeq.packaging.build import package
from edgeq.packaging.license import License, given, license_of
from edgeq.packaging.platforms import PLATFORMS
from edgeq.packaging.verify import verify_package
from tests.families import random_model, tiny_config
from tests.packaging.conftest import need_runtimes
from tests.packaging.twice import built_twice, contents
from tests.paths import DEMO


def test_a_package_for_a_pi_has_everything_and_verifies(rpi_made: Path) -> None:
    names = set(contents(rpi_made))
    assert {
        "README.md", "manifest.json", "model-card.md", "requirements.txt", "install.sh", "run.sh",
        "healthcheck.sh", "tale.service", "model/tale.edgeq", "tokenizer/tokenizer.json",
        "golden/prompts.json", "golden/edgeq.json", "certificates/edgeq.json",
    } <= names  # fmt: skip
    report = verify_package(rpi_made)
    assert report.passed, report.fault
    assert [check for check, _ in report.checks] == [
        "manifest", "signature", "files", "certificate of edgeq", "tokenizer",
        "golden tests of edgeq",
    ]  # fmt: skip


def test_golden_prompts_are_twenty_with_rendered_conversations(rpi_made: Path) -> None:
    prompts = json.loads((rpi_made / "golden/prompts.json").read_text("utf-8"))["prompts"]
    assert len(prompts) == 20
    talks = [prompt for prompt in prompts if "messages" in prompt]
    assert len(talks) == 10
    assert all(talk["rendered"].endswith("[2026-01-01]") for talk in talks)
    results = json.loads((rpi_made / "golden/edgeq.json").read_text("utf-8"))["results"]
    assert all(len(one["tokens"]) == len(one["logits"]) == 4 for one in results)
    assert all(
        str(token) == max(logits, key=logits.__getitem__)
        for one in results
        for token, logits in zip(one["tokens"], one["logits"], strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize("platform", sorted(PLATFORMS))
@pytest.mark.parametrize("kind", ["model", "graph"])
def test_the_same_bytes_elsewhere_and_on_another_day(
    platform: str, kind: str, chat_artifact: Path, small_graph: Path, tmp_path: Path
) -> None:
    need_runtimes(platform)
    source = chat_artifact if kind == "model" else small_graph
    options = ["--ctx-size", "128"] if kind == "model" else []
    _, again = built_twice(source, platform, options, tmp_path)
    report = verify_package(again)
    assert report.passed, report.fault
    assert not report.not_run


@pytest.mark.parametrize("platform", ["rpi", "ort-mobile"])
def test_a_graph_with_samples_is_computed_in_integers(
    platform: str, small_graph: Path, samples: list[dict[str, Any]], tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    made = package(small_graph, platform, tmp_path / "out", data=samples)
    assert made.manifest.kind == "graph"
    assert made.manifest.variants[0].scheme == "int8"
    assert "w8a8-static" in made.manifest.variants[0].why[-1]
    runs = json.loads((tmp_path / "out/golden/inputs.json").read_text("utf-8"))["runs"]
    assert [run["from"] for run in runs] == ["samples given"] * 5
    given = np.fromfile(tmp_path / "out/golden/run1-in0.bin", "<f4").reshape(1, 3, 8, 8)
    assert np.array_equal(given, samples[0]["x"])
    assert verify_package(tmp_path / "out").passed


def test_a_graph_that_computes_something_else_fails_its_golden_tests(
    small_graph: Path, tmp_path: Path
) -> None:
    from edgeq.packaging import golden_graph

    pytest.importorskip("onnxruntime")
    package(small_graph, "rpi", tmp_path / "out")
    runs = golden_graph.read_golden(tmp_path / "out")

    class Wrong:
        def __init__(self, change: Any) -> None:
            self.change = change

        def __call__(self, feeds: Any) -> Any:
            run = next(r for r in runs if all(np.array_equal(r["inputs"][n], feeds[n])
                                              for n in feeds))  # fmt: skip
            return {name: self.change(value) for name, value in run["outputs"].items()}

    allowed = dict.fromkeys(runs[0]["outputs"], 1e-3)
    right: Any = Wrong(lambda value: value)
    assert golden_graph.first_fault(right, runs, allowed) is None
    for change, words in (
        (lambda value: value * 1.01, "differs from the golden one"),
        (lambda value: value * np.nan, "not finite"),
        (lambda value: value[:, :3], "another shape"),
    ):
        wrong: Any = Wrong(change)
        assert words in str(golden_graph.first_fault(wrong, runs, allowed))


@pytest.mark.parametrize("name", ["with space", "", "a_b", "Upper", "1st", "x" * 64])
def test_impossible_names_are_refused(name: str, chat_artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="name of the package"):
        package(chat_artifact, "rpi", tmp_path / "out", name=name)
    assert not list(tmp_path.iterdir())


def test_refusals_come_before_any_work(
    chat_artifact: Path, small_graph: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not delete")
    (tmp_path / "file").write_text("x")
    before = sorted(tmp_path.rglob("*"))

    def refused(words: str, source: Any, platform: str, out: str, **more: Any) -> None:
        with pytest.raises(EdgeqError, match=words):
            package(source, platform, tmp_path / out, **more)

    refused("unknown platform 'wii'", chat_artifact, "wii", "out")
    refused("unknown form", chat_artifact, "rpi", "out", forms=["coreml"])
    refused("forms is", chat_artifact, "rpi", "out", forms="edgeq")
    refused("overwriting it would delete its files", chat_artifact, "rpi", "mine", force=True)
    refused("is a file", chat_artifact, "rpi", "file", force=True)
    refused("does not exist", chat_artifact, "rpi", "no/such/out")
    refused("for graphs", chat_artifact, "rpi", "out", data=[])
    refused("for language models", small_graph, "rpi", "out", context=128)
    refused("context is 3", chat_artifact, "rpi", "out", context=3)
    refused("no tokenizer", random_model(tiny_config("llama")), "rpi", "out")
    refused("does not exist", tmp_path / "nothing", "rpi", "out")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_package_is_replaced_only_if_asked(
    chat_artifact: Path, rpi: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="already exists"):
        package(chat_artifact, "rpi", rpi)
    made = package(chat_artifact, "rpi", rpi, force=True, context=64, name="other")
    assert made.manifest.variants[0].context == 64
    assert (rpi / "model/other.edgeq").exists()
    assert not (rpi / "model/tale.edgeq").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rpi"]


@pytest.mark.parametrize("strange", [".git/HEAD", "notes.txt", "model/empty/", "link"])
def test_what_someone_put_into_a_package_is_not_deleted(
    strange: str, chat_artifact: Path, rpi: Path
) -> None:
    place = rpi / strange
    if strange == "link":
        place.symlink_to(chat_artifact)
    elif strange.endswith("/"):
        place.mkdir()
    else:
        place.parent.mkdir(exist_ok=True)
        place.write_text("mine")
    with pytest.raises(UsageError, match=f"holds {strange.rstrip('/')}, which does not belong"):
        package(chat_artifact, "rpi", rpi, force=True)
    assert place.exists()


def test_a_manifest_of_another_program_makes_no_package(
    chat_artifact: Path, tmp_path: Path
) -> None:
    (tmp_path / "web").mkdir()
    (tmp_path / "web/manifest.json").write_text('{"name": "a web app"}')
    with pytest.raises(UsageError, match="is a folder that is not a package"):
        package(chat_artifact, "rpi", tmp_path / "web", force=True)
    assert (tmp_path / "web/manifest.json").exists()


def test_a_source_within_the_package_that_is_replaced_is_refused(rpi: Path) -> None:
    with pytest.raises(UsageError, match="overwriting would delete"):
        package(rpi / "model/tale.edgeq", "rpi", rpi, force=True, name="other")
    assert (rpi / "model/tale.edgeq").exists()


def test_what_is_not_known_of_the_license_is_said(
    chat_artifact: Path, rpi_made: Path, tmp_path: Path
) -> None:
    assert "unknown" in (rpi_made / "README.md").read_text("utf-8").split("## License")[1]
    package(chat_artifact, "rpi", tmp_path / "out", license="mit", base_model="me/tale")
    told = (tmp_path / "out/README.md").read_text("utf-8").split("## License")[1]
    assert "mit" in told
    assert "me/tale" in told
    for value in ("mit\n# Heading", "\x1b[31mred", " mit", "", "x" * 201):
        with pytest.raises(UsageError, match="give one line of text"):
            package(chat_artifact, "rpi", tmp_path / "new", license=value)
        with pytest.raises(UsageError, match="base_model is"):
            package(chat_artifact, "rpi", tmp_path / "new", base_model=value)
    assert not (tmp_path / "new").exists()


def test_who_said_what_is_kept_apart() -> None:
    said = License("mit", "me/base", "README.md", "README.md")
    told = given(said, "apache-2.0", None)
    assert (told.license, told.base_model) == ("apache-2.0", "me/base")
    assert told.license_said_by == "whoever made this package"
    assert told.base_model_said_by == "README.md"


def test_texts_of_files_are_one_line(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: mit\x1b[31m\x07 [x](http://y)\n---\n")
    assert license_of(tmp_path).license == "mit [31m [x](http://y)"


def test_licenses_are_read_from_cards(tmp_path: Path) -> None:
    assert license_of(DEMO).license == "apache-2.0"
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: mit\nbase_model:\n- me/base\n---\ntext\nlicense: other\n")
    assert license_of(tmp_path) == License("mit", "me/base", "README.md", "README.md")
    card.write_text("license: mit\n")
    assert license_of(tmp_path) == License()


def test_float_weights_are_quantized_by_the_preset(tmp_path: Path) -> None:
    made = package(DEMO, "rpi", tmp_path / "out", preset="w4-g32")
    assert made.manifest.variants[0].scheme == "w4-g32"
    assert made.manifest.model["license"] == "apache-2.0"
    assert verify_package(tmp_path / "out").passed
