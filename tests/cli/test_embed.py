"""`edgeq embed` and `edgeq rerank`: what they print, and wrong usage."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import edgeq
from edgeq.cli.app import main
from tests.families import random_model, tiny_config
from tests.paths import DEMO
from tests.sentence_models import TEXTS, write_tokenizer

SETTINGS = ["-t", "1", "-c", "64"]


def test_vectors_and_cosines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edgeq.quantize(DEMO, tmp_path / "q.edgeq", "w4-g32", threads=1)
    (tmp_path / "texts.txt").write_text("The sun is warm.\n\nShe ate a cake.\n")
    texts = ["The sun is warm.", "She ate a cake."]
    how = ["--pooling", "mean", "--dimensions", "16", "--prefix", "Story: ", *SETTINGS]
    named = ["embed", str(tmp_path / "q.edgeq"), "--file", str(tmp_path / "texts.txt"), *how]
    assert main([*named, "--base", str(DEMO), "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    settings = {"pooling": "mean", "dimensions": 16, "prompt": "Story: ", "threads": 1,
                "context": 64}  # fmt: skip
    ours = edgeq.embed(tmp_path / "q.edgeq", texts, **settings)  # type: ignore[arg-type]
    base = edgeq.embed(DEMO, texts, **settings)  # type: ignore[arg-type]
    assert found["dimensions"] == 16
    assert np.array_equal(np.array(found["embeddings"], np.float32), ours)
    cosines = (ours * base).sum(axis=1)
    assert found["cosines_to_base"] == pytest.approx(cosines.tolist(), abs=1e-6)
    assert main(["embed", str(DEMO), *texts, *how]) == 0
    said = capsys.readouterr().out
    assert "2 vectors of 16 numbers" in said
    assert f"{float(base[0] @ base[1]):.4f}" in said


def test_documents_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tokenizer(tmp_path)
    model = random_model(tiny_config("qwen3", context=1024, vocab=300))
    files = {"tokenizer.json": (tmp_path / "tokenizer.json").read_bytes()}
    edgeq.save(edgeq.Model(model.config, model.tensors, files), tmp_path / "r.edgeq")
    want = edgeq.rerank(tmp_path / "r.edgeq", "warm?", TEXTS, threads=1)
    order = sorted(range(len(TEXTS)), key=lambda number: -want[number])
    named = ["rerank", str(tmp_path / "r.edgeq"), "warm?", *TEXTS, "-t", "1"]
    assert main([*named, "--format", "json", "--top-n", "2"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert [one["index"] for one in results] == order[:2]
    assert main(named) == 0
    assert f"{want[order[0]]:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["embed", str(DEMO)], "give each TEXT as an argument, or all of them with --file"),
        (["embed", str(DEMO), "a", "--file", __file__], "give each TEXT as an argument"),
        (["embed", str(DEMO), "a", "--dimensions", "0"], "0 is not in the range"),
        (["embed", str(DEMO), "a", "--dimensions", "999"], "vectors of this model have 1 to 256"),
        (["embed", str(DEMO), "a", "--prompt-name", "q"], "the model's files have no prompts"),
        (["rerank", str(DEMO), "q"], "give each DOCUMENT as an argument"),
        (["rerank", str(DEMO), "q", "a"], "edgeq reranks with models of qwen3"),
    ],
)
def test_wrong_usage(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) in (1, 2)
    assert words in " ".join(capsys.readouterr().err.split())
