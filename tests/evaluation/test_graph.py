"""Measuring graphs on samples: known figures, edge cases and refusals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeq.core.errors import FormatError, UsageError
from edgeq.evaluation.graph import auc, auc_of_classes, cosine, evaluate_graph


def table(rows: Any, name: str = "scores") -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """A runner that looks its answer up."""
    held = np.asarray(rows, np.float32)
    return lambda feeds: {name: held[int(feeds["i"][0])][None]}


def numbered(labels: list[int | None]) -> list[tuple[dict[str, Any], int | None]]:
    return [({"i": np.array([i])}, label) for i, label in enumerate(labels)]


ROWS = [[0.7, 0.2, 0.1], [0.1, 0.2, 0.7], [0.3, 0.4, 0.3], [0.2, 0.3, 0.5]]


def test_labels_are_counted() -> None:
    found = evaluate_graph(table(ROWS), numbered([0, 2, 1, 1]), classes=("a", "b", "c"))
    assert (found.n, found.top1, found.top5, found.output) == (4, 0.75, None, "scores")
    assert found.confusion == ((1, 0, 0), (0, 1, 1), (0, 0, 1))
    assert found.classes == ("a", "b", "c")
    assert found.auc == 1.0  # each class's own samples score it above all others
    assert found.cosine is None
    assert found.agreement is None
    assert found.to_dict()["stderr"] == pytest.approx(np.sqrt(0.75 * 0.25 / 4))


def test_top_five_and_ties() -> None:
    rows = [[5, 4, 3, 2, 1, 0], [5, 4, 3, 2, 1, 0], [1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]
    found = evaluate_graph(table(rows), numbered([4, 5, 0, 5]))
    assert found.top1 == 0.25  # of equal scores the first is the largest, as in argmax
    assert found.top5 == 0.5


def test_another_runner_is_compared_with() -> None:
    other = [[0.9, 0.1, 0.0], [0.1, 0.2, 0.7], [0.4, 0.3, 0.3], [0.0, 0.0, 1.0]]
    found = evaluate_graph(table(ROWS), numbered([0, 2, 1, 1]), against=table(other))
    assert found.agreement == 0.75
    assert found.base_top1 == 0.5
    want = cosine(np.array(ROWS), np.array(other))
    assert found.cosine == pytest.approx(want.mean())
    assert found.cosine_least == pytest.approx(want.min())
    alone = evaluate_graph(table(ROWS), numbered([None] * 4), against=table(ROWS))
    assert (alone.top1, alone.agreement, alone.cosine) == (None, 1.0, pytest.approx(1.0))


def test_one_score_has_an_auc_only() -> None:
    found = evaluate_graph(table([[0.1], [0.4], [0.35], [0.8]]), numbered([0, 0, 1, 1]))
    assert (found.auc, found.top1, found.confusion) == (0.75, None, None)


def test_auc_of_known_cases() -> None:
    scores, truth = np.array([1.0, 2.0, 3.0]), np.array([False, False, True])
    assert auc(scores, truth) == 1.0
    assert auc(-scores, truth) == 0.0
    assert auc(np.ones(3), truth) == 0.5
    assert auc(scores, np.ones(3, bool)) is None
    two = np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8]], np.float32)
    assert auc_of_classes(two, np.array([0, 1, 1])) == 1.0
    assert auc_of_classes(two, np.array([0, 0, 0])) is None


def test_logits_become_probabilities_first() -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((50, 4)).astype(np.float32)
    labels = rng.integers(0, 4, 50)
    chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    offset = rng.standard_normal((50, 1)).astype(np.float32) * 10  # changes no probability
    assert auc_of_classes(logits + offset, labels) == pytest.approx(auc_of_classes(chances, labels))


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=30))
def test_auc_is_the_share_of_pairs_in_order(pairs: list[tuple[int, bool]]) -> None:
    scores = np.array([score for score, _ in pairs], float)
    truth = np.array([kind for _, kind in pairs])
    good, bad = scores[truth], scores[~truth]
    found = auc(scores, truth)
    if not good.size or not bad.size:
        assert found is None
        return
    over = good[:, None] > bad
    assert found == pytest.approx((over + 0.5 * (good[:, None] == bad)).mean())


@pytest.mark.parametrize(
    ("rows", "labels", "settings", "words"),
    [
        (ROWS, [], {}, "no samples"),
        (ROWS, [0, None, 1], {}, "2 of 3 samples have labels"),
        (ROWS, [None, None], {}, "nothing to measure"),
        (ROWS, [0, 3], {}, "sample 2 has the label 3 and the model gives 3 scores"),
        (ROWS, [-1], {}, "the label -1"),
        ([[0.5]], [2], {}, "labels count from 0 to 1"),
        (ROWS, [0], {"output": "score"}, "did you mean 'scores'"),
        (ROWS, [0], {"against": table([[1.0]])}, "has 3 outputs per sample and the base model 1"),
        (ROWS, [0], {"against": table(ROWS, "other")}, "unknown output 'scores'"),
    ],
)
def test_samples_that_cannot_be_scored_are_refused(
    rows: Any, labels: Any, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        evaluate_graph(table(rows), numbered(labels), **settings)


def test_numbers_that_are_none_are_refused() -> None:
    with pytest.raises(FormatError, match=r"'scores' that is not finite for sample 2"):
        evaluate_graph(table([[0.0, 1.0], [np.nan, 0.0]]), numbered([0, 1]))


def test_progress_is_reported() -> None:
    told: list[tuple[str, int, int]] = []
    evaluate_graph(table(ROWS), numbered([0, 0]), total=2, progress=lambda *line: told.append(line))
    assert told == [("samples", 1, 2), ("samples", 2, 2)]
