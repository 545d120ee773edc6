"""``edgeq quantize`` and ``edgeq inspect`` with recipes, texts and quality cards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from edgeq.cli import main
from edgeq.model.artifact import load, save
from edgeq.quant import METHODS
from edgeq.quant.decoder.quality_report import QualityReport
from edgeq.quant.presets import presets_for
from tests.conftest import clear_settings
from tests.families import random_model, tiny_config
from tests.paths import DEMO

HELDOUT = DEMO / "heldout.txt"
Run = Callable[..., str]


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    clear_settings(monkeypatch)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*args: object, code: int = 0) -> str:
        assert main([str(arg) for arg in args]) == code, capsys.readouterr().err
        out, err = capsys.readouterr()
        return err if code else out

    return call


@pytest.fixture
def calib(tmp_path: Path) -> Path:
    path = tmp_path / "calib.txt"
    path.write_text(HELDOUT.read_text("utf-8")[:6000], "utf-8")
    return path


@pytest.fixture
def rest(tmp_path: Path) -> Path:
    path = tmp_path / "rest.txt"
    path.write_text(HELDOUT.read_text("utf-8")[6000:10000], "utf-8")
    return path


def test_the_list_names_all_there_is(run: Run) -> None:
    lines = run("quantize", "--list").partition("Presets for graphs")[0].splitlines()
    rows = {line.split()[0]: line for line in lines if line}
    assert set(presets_for("decoder")) <= set(rows)
    assert set(METHODS) <= set(rows)
    assert "4.50" in rows["w4-g32"]
    assert "calibration text" in rows["w4-g32-gptq"]
    assert "calibration text" not in rows["w4-g32-mse"]
    assert rows["w3-g32-distill"].endswith("train")
    assert "static int8 activations" in rows["w8a8-static"]


def test_a_card_without_asking(tmp_path: Path, run: Run) -> None:
    out = tmp_path / "m.edgeq"
    said = run("quantize", DEMO, "-o", out, "--fast")
    assert "quality: perplexity " in said
    assert "tokens of edgeq's built-in text" in said
    assert "disjoint windows of 256 tokens" in said
    quality = QualityReport.from_dict(load(out).provenance["quality"])
    assert quality.evaluation is not None
    assert quality.evaluation.n_tokens > 1000
    assert len(quality.hidden_sqnr_db) == 6
    shown = run("inspect", out)
    assert f"KL {quality.evaluation.kl_mean:.5f} nats per token mean" in shown
    assert "were correct before" in shown
    assert quality.evaluation.protocol not in shown
    assert quality.evaluation.protocol in run("inspect", out, "--tensors")


def test_a_text_of_the_user_s_own(tmp_path: Path, rest: Path, run: Run) -> None:
    out = tmp_path / "m.edgeq"
    args = ("quantize", DEMO, "-o", out, "--fast", "--eval-text", rest, "--format", "json")
    found = json.loads(run(*args))
    assert found["quality"] == load(out).provenance["quality"]
    assert found["quality"]["text"] == "rest.txt"
    # stories are what the model is for
    assert found["quality"]["ppl"] < 25
    assert found["card_seconds"] < found["seconds"]


def test_the_default_learns_from_a_text_of_its_own(tmp_path: Path, rest: Path, run: Run) -> None:
    kl = {}
    for option in ("--fast", "--force"):
        out = tmp_path / "m.edgeq"
        args = ("quantize", DEMO, "-o", out, option, "--eval-text", rest, "--format", "json")
        found = json.loads(run(*args))
        out.unlink()
        kl[option] = found["quality"]["kl_mean"]
    assert found["recipe"]["method"] == "gptq"
    assert kl["--force"] < 0.5 * kl["--fast"]


def test_no_card(tmp_path: Path, run: Run) -> None:
    out = tmp_path / "m.edgeq"
    said = run("quantize", DEMO, "-o", out, "--fast", "--no-card")
    assert "quality: not measured: skipped with --no-card" in said
    assert "not measured: skipped with --no-card" in run("inspect", out)


def test_a_source_without_tokenizer(tmp_path: Path, run: Run) -> None:
    save(random_model(tiny_config("llama")), tmp_path / "float.edgeq")
    out = tmp_path / "m.edgeq"
    said = run("quantize", tmp_path / "float.edgeq", "-o", out)
    assert "quality: not measured: the model has no tokenizer.json" in said
    text = tmp_path / "t.txt"
    text.write_text("once")
    args = ("quantize", tmp_path / "float.edgeq", "-o", tmp_path / "n.edgeq", "--calib", text)
    assert "no tokenizer.json" in run(*args, code=1)
    assert not (tmp_path / "n.edgeq").exists()


def test_a_text_that_is_empty_is_named(tmp_path: Path, run: Run) -> None:
    (tmp_path / "blank.txt").touch()
    args = ("quantize", DEMO, "-o", tmp_path / "m.edgeq", "--eval-text", tmp_path / "blank.txt")
    assert "blank.txt is empty" in run(*args, code=1)


def test_a_card_that_memory_does_not_allow(tmp_path: Path, run: Run) -> None:
    from edgeq.core.memory import rss_bytes

    rss = rss_bytes()
    if rss is None:
        pytest.skip("resident memory cannot be read here")
    args = ("quantize", DEMO, "-o", tmp_path / "m.edgeq", "--max-ram", rss + (60 << 20))
    assert "allowed (--max-ram)" in run(*args, "--fast")


def test_gptq_by_its_preset(tmp_path: Path, calib: Path, rest: Path, run: Run) -> None:
    kl = []
    for preset in ("w3-g32", "w3-g32-gptq"):
        out = tmp_path / f"{preset}.edgeq"
        said = run(
            "quantize", DEMO, "-o", out, "--preset", preset, "--calib", calib,
            "--calib-windows", 12, "--calib-context", 128, "--eval-text", rest, "--format", "json",
        )  # fmt: skip
        kl.append(json.loads(said)["quality"]["kl_mean"])
    assert kl[1] < 0.6 * kl[0]
    seen = load(out).provenance["calibration"]
    assert (seen["windows"], seen["context"]) == (12, 128)
    assert "calibration" in run("inspect", out)


def test_a_recipe_file(tmp_path: Path, run: Run) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('default = "w4-g64"\nmethod = "mse"\nrules = [["q_proj", "w8-g32"]]\n')
    args = ("quantize", DEMO, "-o", tmp_path / "m.edgeq", "--recipe", recipe, "--no-card")
    run(*args, "--tensor-type", "o_proj=w3-g32")
    held = {n: getattr(t, "scheme", None) for n, t in load(tmp_path / "m.edgeq").tensors.items()}
    layer = "model.layers.0."
    assert str(held[layer + "self_attn.q_proj.weight"]) == "w8-g32"
    assert str(held[layer + "self_attn.o_proj.weight"]) == "w3-g32"
    assert str(held[layer + "mlp.up_proj.weight"]) == "w4-g64"
    assert "--recipe replaces --preset" in run(*args, "--force", "--preset", "w4-g32", code=2)


def test_a_target(tmp_path: Path, calib: Path, run: Run) -> None:
    out = tmp_path / "m.edgeq"
    found = json.loads(
        run(
            "quantize", DEMO, "-o", out, "--target-size", "1900K", "--calib", calib,
            "--calib-windows", 2, "--calib-context", 64, "--method", "mse", "--no-card",
            "--format", "json",
        )
    )  # fmt: skip
    assert 1850 * 1024 < out.stat().st_size <= 1900 * 1024
    assert found["recipe"]["target"] == {"bytes": 1900 * 1024}
    assert len({t["scheme"] for t in found["tensors"]}) > 2


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--preset", "w4-g32", "--fast"], 2, "--fast is the same as --preset w4-g32"),
        (["--bits", "8", "--fast"], 2, "leave out --fast or those"),
        (["--target-bpw", "4", "--target-size", "1M"], 2, "cannot be used together"),
        (["--preset", "w4gptq"], 1, "unknown preset 'w4gptq'"),
        (["--method", "gtpq"], 1, "did you mean 'gptq'"),
        (["--eval-text", "no such file"], 2, "does not exist"),
    ],
)
def test_what_cannot_be_is_said(
    options: list[str], code: int, words: str, tmp_path: Path, run: Run
) -> None:
    assert words in run("quantize", DEMO, "-o", tmp_path / "m.edgeq", *options, code=code)
    assert not list(tmp_path.iterdir())


def test_calibration_text_as_held_out_text_is_refused(
    tmp_path: Path, calib: Path, run: Run
) -> None:
    out = tmp_path / "m.edgeq"
    args = ("quantize", DEMO, "-o", out, "--calib", calib, "--eval-text", calib)
    assert "which is also the calibration text" in run(*args, code=1)
    calib.write_bytes(b"\xff\xfe")
    assert "not UTF-8" in run(*args, code=1)
    assert not out.exists()


def test_the_model_card(tmp_path: Path, run: Run) -> None:
    out, card = tmp_path / "tale.edgeq", tmp_path / "README.md"
    run("quantize", DEMO, "-o", out, "--fast")
    assert run("inspect", out, "--card", card) == f"{card}\n"
    text = card.read_text("utf-8")
    assert text.startswith("---\n")
    assert "# tale.edgeq" in text
    assert "--force" in run("inspect", out, "--card", card, code=1)
    run("inspect", out, "--card", card, "--force")
