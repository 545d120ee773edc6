"""The commands end to end on the model that comes with edgeq, so that no other data is needed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgeq import importers
from edgeq.cli import main
from edgeq.importers.shapes import parameters
from edgeq.runtime.engine import Engine
from edgeq.runtime.tokenizer import Tokenizer
from tests.cli.conftest import Said
from tests.conftest import DEMO, clear_settings
from tests.greedy import assert_reference_choices

PROMPT = "Once upon a time"


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    clear_settings(monkeypatch, "EDGEQ_CACHE")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "demo.edgeq"
    assert main(["quantize", str(DEMO), "-o", str(out), "--bits", "8"]) == 0
    return out


def test_run_says_what_the_engine_chooses_and_the_reference_would(packed: Path, said: Said) -> None:
    model = importers.load(packed)
    tokenizer = Tokenizer(model.files)
    prompt = tokenizer.encode(PROMPT)
    with Engine(model, threads=1) as engine:
        first = int(engine.forward(prompt).argmax())
        chosen = [first, *engine.greedy(first, 39)]
    # activations and the cache are in 8 bits
    assert_reference_choices(model, prompt, chosen, near=0.5)
    text = said("run", packed, "-p", PROMPT, "-n", 40, "--temp", 0, "-t", 1)
    assert text.rstrip("\n") == tokenizer.decode([*prompt, *chosen]).rstrip("\n")
    assert "tok/s" in said.err


@pytest.mark.parametrize("more", [["--backend", "numpy"], ["-ctk", "f16"]])
def test_variants_begin_alike(packed: Path, said: Said, more: list[str]) -> None:
    plain = said("run", packed, "-p", PROMPT, "-n", 8, "--temp", 0, "-t", 1)
    assert said("run", packed, "-p", PROMPT, "-n", 8, "--temp", 0, "-t", 1, *more) == plain


def test_a_story_ends_at_a_stop_text(packed: Path, said: Said) -> None:
    whole = said("run", packed, "-p", PROMPT, "-n", 40, "--temp", 0, "-t", 1)
    before, named, _ = whole.partition(" named")
    assert named
    out = said("run", packed, "-p", PROMPT, "-n", 40, "--temp", 0, "-t", 1, "--stop", " named")
    assert out == before + "\n"
    assert "end: stop" in said.err


def test_the_context_is_a_limit(packed: Path, said: Said) -> None:
    said("run", packed, "-p", "word " * 100, "-c", 16, "-t", 1, code=1)
    assert "the context holds 16" in said.err
    said("run", packed, "-p", PROMPT, "-n", -1, "-c", 32, "--temp", 0, "-t", 1)
    assert "end: length" in said.err


def test_inspect_counts_what_the_file_holds(packed: Path, said: Said) -> None:
    found = json.loads(said("inspect", packed, "--format", "json"))
    down = next(t for t in found["tensors"] if t["name"] == "model.layers.0.mlp.down_proj.weight")
    assert (down["scheme"], down["shape"]) == ("w8-channel", [256, 512])
    assert down["nbytes"] == 256 * 512 + 2 * 256
    assert found["nbytes"] == sum(t["nbytes"] for t in found["tensors"])


def test_perplexity_of_unseen_stories(packed: Path, said: Said, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text((DEMO / "heldout.txt").read_text("utf-8")[:2500], "utf-8")
    found = json.loads(
        said("perplexity", packed, "-f", text, "--kl-base", DEMO, "--format", "json", "-t", 1)
    )
    assert found["kl_mean"] < 0.01
    assert 0.5 < found["bits_per_byte"] < 1.5


def test_bench_times_it(packed: Path, said: Said) -> None:
    rows = json.loads(
        said("bench", packed, "-p", 16, "-n", 8, "-t", 1, "-r", 2, "--format", "json")
    )
    assert [row["test"] for row in rows] == ["pp16", "tg8"]
    weights = parameters(importers.load(DEMO).config)
    assert all(row["avg_ts"] > 0 and row["model_n_params"] == weights for row in rows)
