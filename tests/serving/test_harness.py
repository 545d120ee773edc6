"""Scores as lm-evaluation-harness asks for them: its `local-completions` client scores a prompt.

Of a batch of prompts, given as token ids, it asks for one more token than it needs, drops that, and
adds up the log-probabilities after the question; an answer is greedy where each token has the
largest of the log-probabilities that are listed. `benchmarks/serving/harness.py` runs the client
itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeq
from edgeq.evaluation.tasks import Item, read_items
from tests.paths import DEMO
from tests.serving.plain_http import ask

STORIES = [
    ("Once upon a time, there was a little", ["girl", "dog", "stone", "the"], 0),
    ("Tom was very", ["happy", "under", "sad", "lamp"], 2),
    ("The cat sat on the", ["sky", "mat", "ran", "bed"], 1),
    ("Lily saw a big", ["box", "very", "and", "tree in the garden"], 3),
]


def scored(
    server: edgeq.Server, item: Item, tokenizer: edgeq.Tokenizer
) -> list[tuple[float, bool]]:
    """The log-likelihood of each choice after the question, and whether it is greedy."""
    head = len(tokenizer.encode(item.prompt, add_eos=False))
    prompts = [tokenizer.encode(item.prompt + text, add_eos=False) for text in item.choices]
    assert all(len(ids) > head for ids in prompts)
    body = {
        "model": "tale", "prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1,
        "seed": 1234, "echo": True,
    }  # fmt: skip
    reply = ask(server, "/v1/completions", body)
    assert reply.status == 200
    found = []
    choices: list[Any] = sorted(reply.json["choices"], key=lambda choice: choice["index"])
    for ids, choice in zip(prompts, choices, strict=True):
        logs = choice["logprobs"]
        lists = [logs[name] for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")]
        assert [len(one) for one in lists] == [len(ids) + 1] * 4
        given = logs["token_logprobs"][head:-1]
        tops = [max(top.values()) for top in logs["top_logprobs"][head:-1]]
        assert all(log <= top for log, top in zip(given, tops, strict=True))
        found.append((sum(given), given == tops))
    return found


def test_choices_have_the_log_likelihoods_of_edgeq_eval(
    server: edgeq.Server, tmp_path: Path
) -> None:
    path = tmp_path / "stories.jsonl"
    path.write_text(
        "".join(
            json.dumps({"activity_label": "Story", "ctx_a": ctx, "ctx_b": "", "endings": endings,
                        "label": str(label)}) + "\n"
            for ctx, endings, label in STORIES
        )
    )  # fmt: skip
    _, items = read_items(str(path), "hellaswag", None)
    tokenizer = edgeq.Tokenizer(edgeq.load(DEMO))
    logs = [[log for log, _ in scored(server, item, tokenizer)] for item in items]
    sizes = [[len(text.encode()) for text in item.choices] for item in items]
    right = [int(item.answer) for item in items]
    want = edgeq.evaluate(DEMO, path, layout="hellaswag", context=256, threads=1)
    lengths = [[len(text) - 1 for text in item.choices] for item in items]  # without the space
    per_character = [np.divide(row, n) for row, n in zip(logs, lengths, strict=True)]

    def accuracy(rows: list[Any]) -> float:
        return float(np.mean([np.argmax(row) == i for row, i in zip(rows, right, strict=True)]))

    assert (want.accuracy, want.accuracy_normalized) == (accuracy(logs), accuracy(per_character))
    total = sum(row[i] for row, i in zip(logs, right, strict=True))
    assert want.nll_per_byte == pytest.approx(
        -total / sum(size[i] for size, i in zip(sizes, right, strict=True)), rel=1e-5
    )


def test_greedy_answers_are_those_of_edgeq_eval(server: edgeq.Server, tmp_path: Path) -> None:
    tokenizer = edgeq.Tokenizer(edgeq.load(DEMO))
    body = {"model": "tale", "prompt": "Once upon a time", "temperature": 0, "max_tokens": 12}
    greedy = ask(server, "/v1/completions", body).json["choices"][0]["text"]
    texts = ["Once upon a time" + greedy.rsplit(" ", 1)[0], "Once upon a time there was a zebra"]
    path = tmp_path / "words.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    _, items = read_items(str(path), "lambada", None)
    right = [scored(server, item, tokenizer)[0][1] for item in items]
    assert right == [True, False]
    assert edgeq.evaluate(DEMO, path, layout="lambada", context=256, threads=1).accuracy == 0.5
