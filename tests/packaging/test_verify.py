"""Damage to a package: found and named, whatever it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from edgeq.core.errors import FormatError
from edgeq.graph.onnx.save import write_onnx
from edgeq.packaging import tree
from edgeq.packaging.build import package
from edgeq.packaging.verify import verify_package
from tests.graph_made import cnn
from tests.packaging.conftest import Apps
from tests.packaging.damages import damaged, edited, sealed_again
from tests.packaging.test_manifest import resealed


@pytest.mark.parametrize("name", ["rpi model", "rpi graph"])
def test_two_hundred_random_damages_are_found_and_named(
    name: str, apps: Apps, tmp_path: Path
) -> None:
    pytest.importorskip("cryptography")
    found = damaged(apps[name], tmp_path)
    assert len(found) == 200
    assert [(one.damage.name, one.place, one.fault) for one in found if not one.named] == []


def test_a_forged_tokenizer_template_or_model_fails_the_golden_tests(rpi: Path) -> None:
    """The manifest agrees with the files, so that only what they do tells them apart."""

    def exchanged(data: Any) -> None:
        vocab = data["model"]["vocab"]
        a, b = [token for token, i in vocab.items() if 400 <= i <= 401]
        vocab[a], vocab[b] = vocab[b], vocab[a]

    name = "tokenizer/tokenizer.json"
    right = (rpi / name).read_bytes()
    sealed_again(rpi, **{name: edited(rpi, name, exchanged)})
    report = verify_package(rpi)
    assert report.place == "tokenizer"
    assert "tokenizer gives other ids" in str(report.fault)

    def shouted(data: Any) -> None:
        data["chat_template"] += "!"

    config = "tokenizer/tokenizer_config.json"
    sealed_again(rpi, **{name: right})
    assert verify_package(rpi).passed
    sealed_again(rpi, **{config: edited(rpi, config, shouted)})
    assert "chat template renders" in str(verify_package(rpi).fault)


def test_other_weights_fail_the_golden_tests(
    rpi: Path, chat_artifact: Path, tmp_path: Path
) -> None:
    model = rpi / "model/tale.edgeq"
    data = bytearray(model.read_bytes())
    half = len(data) // 2
    data[half : half + 200_000] = bytes(reversed(data[half : half + 200_000]))
    sealed_again(rpi, **{"model/tale.edgeq": bytes(data)})
    report = verify_package(rpi)
    assert report.place == "model/tale.edgeq"
    assert "golden" in str(report.fault)
    assert verify_package(rpi, run=False).passed


def test_a_graph_with_other_weights_fails_the_golden_tests(apps: Apps, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(apps["rpi graph"], tmp_path / "copy"))
    write_onnx(cnn(seed=1), tmp_path / "other.onnx")
    package(tmp_path / "other.onnx", "rpi", tmp_path / "other", name="tale-teller")
    name = "model/tale-teller.onnx"
    sealed_again(folder, **{name: (tmp_path / "other" / name).read_bytes()})
    report = verify_package(folder)
    assert report.place == name
    assert "differs from the golden one" in str(report.fault)


def test_a_certificate_of_other_files_is_named(rpi: Path) -> None:
    def other(data: Any) -> None:
        data["files"]["model/tale.edgeq"]["sha256"] = "0" * 64

    def failed(data: Any) -> None:
        data["passed"] = False

    name = "certificates/edgeq.json"
    right = (rpi / name).read_bytes()
    for change, words in ((other, "certifies another"), (failed, "does not say")):
        (rpi / name).write_bytes(right)
        content = edited(rpi, name, change)
        (rpi / name).write_bytes(content)
        data = json.loads((rpi / "manifest.json").read_text("utf-8"))
        entry = tree.entry_of(rpi / name)
        data["files"][name] = {"sha256": entry.sha256, "bytes": entry.nbytes}
        (rpi / "manifest.json").write_bytes(resealed(data))
        report = verify_package(rpi, run=False)
        assert report.place == name
        assert words in str(report.fault)


def test_a_certificate_that_names_no_runtime_is_a_fault_and_no_crash(rpi: Path) -> None:
    name = "certificates/edgeq.json"
    sealed_again(rpi, **{name: edited(rpi, name, lambda data: data.pop("runtime"))})
    report = verify_package(rpi, run=False)
    assert report.place == name
    assert "is not a certificate" in str(report.fault)


def test_golden_prompts_that_no_model_takes_are_a_fault_and_no_crash(rpi: Path) -> None:
    def too_many(data: Any) -> None:
        data["prompts"][0] |= {"cut": True, "ids": []}

    def huge(data: Any) -> None:
        for step in data["results"]:
            step["tokens"] = [10**30] * 4

    for name, change in (("golden/prompts.json", too_many), ("golden/edgeq.json", huge)):
        right = (rpi / name).read_bytes()
        sealed_again(rpi, **{name: edited(rpi, name, change)})
        assert verify_package(rpi).fault
        sealed_again(rpi, **{name: right})
    shutil.rmtree(rpi / "golden")
    (rpi / "golden").mkdir()
    sealed_again(rpi, **{"golden/edgeq.json": b"[" * 100_000})
    assert "golden/prompts.json" in str(verify_package(rpi).fault)


def test_golden_inputs_outside_of_the_package_are_not_read(
    small_graph: Path, samples: list[dict[str, Any]], tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    folder = tmp_path / "out"
    package(small_graph, "rpi", folder, data=samples)

    def outside(data: Any) -> None:
        data["runs"][0]["inputs"]["x"]["file"] = "/dev/zero"

    name = "golden/inputs.json"
    sealed_again(folder, **{name: edited(folder, name, outside)})
    assert "not a file of the package" in str(verify_package(folder).fault)


def test_golden_files_that_say_nothing_are_a_fault_and_no_crash(rpi: Path) -> None:
    for name in ("golden/prompts.json", "golden/edgeq.json"):
        right = (rpi / name).read_bytes()
        for content in (b"{}", b"[]", b"7", b"{", b'{"prompts": [{}], "results": [{}]}'):
            sealed_again(rpi, **{name: content})
            report = verify_package(rpi)
            assert not report.passed, content
        sealed_again(rpi, **{name: right})
    assert verify_package(rpi).passed


def test_what_is_no_package_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="not a folder"):
        verify_package(tmp_path / "nothing")
    with pytest.raises(FormatError, match=r"no manifest\.json"):
        verify_package(tmp_path)
