"""``edgeq eval`` with a real model and tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edgeq.api.evaluate import EngineAnswers
from edgeq.cli import main
from edgeq.evaluation.tasks import LAYOUTS
from edgeq.evaluation.text import log_softmax
from edgeq.importers import load
from edgeq.model.reference import Reference
from edgeq.runtime.engine import Engine
from edgeq.runtime.tokenizer import Tokenizer
from tests.paths import DEMO

STORIES = [
    ("Once upon a time, there was a little girl named Lily. Lily loved to play", ["outside",
     "wherefore", "parliament", "quantum"], 0),
    ("The dog was very happy. He wagged his", ["umbrella", "tail", "teacher", "seven"], 1),
]  # fmt: skip


def written(folder: Path) -> Path:
    rows = [
        {"activity_label": "Story", "ctx_a": a, "ctx_b": "", "endings": b, "label": c}
        for a, b, c in STORIES
    ]
    path = folder / "set.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.mark.parametrize("backend", ["numba", "numpy"])
def test_engine_scores_are_the_reference_s(backend: str) -> None:
    model = load(DEMO)
    tokenizer = Tokenizer(model.files)
    prompt = tokenizer.encode("Once upon a time, there was")
    follows = tokenizer.encode(" a little girl", add_bos=False)
    whole = np.array([*prompt, *follows])
    want = log_softmax(Reference(model).forward(whole)[len(prompt) - 1 : -1])
    with Engine(model, context=64, threads=1, kv_bits=16, backend=backend) as engine:  # type: ignore[arg-type]
        asked = EngineAnswers(engine, tokenizer)
        for _ in range(2):  # the second time the prompt is in the cache
            got = log_softmax(asked.scores(prompt, follows))
            np.testing.assert_allclose(got, want, atol=0.15)
        one = log_softmax(asked.scores(prompt, follows[:1]))
        np.testing.assert_allclose(one, want[:1], atol=0.15)
        said = list(asked.generate(prompt, 5))
        assert said == list(asked.generate(prompt, 5))
        assert len(said) == 5


def test_a_story_model_knows_how_stories_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["eval", str(DEMO), "--task", str(written(tmp_path)), "--format", "json", "-t", "1"]
    assert main(args) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layout"] in LAYOUTS
    assert found["n"] == 2
    assert found["accuracy"] == 1.0
    assert found["flips"] is None


def test_a_base_is_asked_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = str(written(tmp_path))
    assert main(["eval", str(DEMO), "--task", task, "--base", str(DEMO), "-t", "1"]) == 0
    out = capsys.readouterr().out
    assert "answers changed     0: 0 from wrong to correct" in out
    assert "zero-shot" in out


def test_a_file_that_is_no_set_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "no.jsonl"
    path.write_text('{"a": 1}\n')
    assert main(["eval", str(DEMO), "--task", str(path)]) == 1
    assert "no known layout" in capsys.readouterr().err
