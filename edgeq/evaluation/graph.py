"""Accuracy of a graph on labeled samples, and its distance from another graph.

A runner takes inputs by name and gives outputs by name: onnxruntime, LiteRT, a Core ML package.

    top-1, top-5   how often the label is the largest score, or among the five largest
    AUC            area under the ROC curve: of two classes or one score, the second's; of more,
                   the mean over the classes of each against the rest, on probabilities
    confusion      labels x largest scores, counts
    cosine         between the outputs of two runners, mean over the samples
    agreement      how often both runners' largest score is the same
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import FormatError, UsageError, unknown
from edgeq.core.progress import Progress
from edgeq.graph.feeds import Feeds

Runner = Callable[[Feeds], Mapping[str, NDArray[Any]]]

TOP = 5
"""Largest scores among which the label may be, for top-5."""


@dataclass(frozen=True)
class GraphEvaluation:
    """What was measured; None is "not measured".

    Args:
        output: the output that was looked at.
        n: samples.
        top1, top5: fraction of the samples; top-5 only if there are more scores than five.
        auc: 0.5 is chance; None if a class of two, or all but one of more, has no samples.
        confusion: counts [labels, largest scores].
        classes: their names, if they are known.
        cosine, cosine_least: of the output with the reference's, mean and least.
        agreement: fraction of samples with the same largest score; None without scores.
        base_top1: of the reference.
    """

    output: str
    n: int
    top1: float | None = None
    top5: float | None = None
    auc: float | None = None
    confusion: tuple[tuple[int, ...], ...] | None = None
    classes: tuple[str, ...] = ()
    cosine: float | None = None
    cosine_least: float | None = None
    agreement: float | None = None
    base_top1: float | None = None

    @property
    def stderr(self) -> float | None:
        """Standard error of ``top1``."""
        return None if self.top1 is None else math.sqrt(self.top1 * (1 - self.top1) / self.n)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary with these names as keys."""
        return asdict(self) | {"stderr": self.stderr}


def evaluate_graph(
    runner: Runner,
    samples: Iterable[tuple[Feeds, int | None]],
    *,
    output: str | None = None,
    against: Runner | None = None,
    classes: Sequence[str] = (),
    total: int = 0,
    progress: Progress | None = None,
) -> GraphEvaluation:
    """Run samples through a graph, and through another one if there is one.

    Args:
        runner: the graph.
        samples: inputs of one sample each, with their labels; all labeled or none.
        output: which output holds the scores or the embedding; the first if None.
        against: what cosine and agreement are measured against, with outputs of the same names.
        classes: names of the labels.
        total: how many samples there are, if that is known, for ``progress``.
        progress: called with ("samples", done, total).

    Raises:
        UsageError: no samples, an unknown output, some labels missing or out of range, or
            nothing to measure: neither labels nor another runner.
        FormatError: outputs that are not finite.
    """
    scores: list[NDArray[np.float32]] = []
    base: list[NDArray[np.float32]] = []
    labels: list[int] = []
    for done, (feeds, label) in enumerate(samples, 1):
        name, row = _scores(runner(feeds), output, "the model", done)
        scores.append(row)
        if against is not None:
            base.append(_scores(against(feeds), name, "the reference", done)[1])
        if label is not None:
            labels.append(_checked(label, row.size, done))
        if progress:
            progress("samples", done, max(total, done))
    _check(len(scores), len(labels), against is not None)
    rows = np.stack(scores)
    measured: dict[str, Any] = {"output": name, "n": len(rows)}
    if labels:
        measured |= _against_labels(rows, np.array(labels)) | {"classes": tuple(classes)}
    if base:
        measured |= _against_base(rows, np.stack(base), np.array(labels))
    return GraphEvaluation(**measured)


def _scores(
    outputs: Mapping[str, NDArray[Any]], output: str | None, who: str, sample: int
) -> tuple[str, NDArray[np.float32]]:
    name = next(iter(outputs)) if output is None else output
    if name not in outputs:
        raise UsageError(unknown("output", name, outputs))
    row = np.asarray(outputs[name], np.float32).reshape(-1)
    if not np.isfinite(row).all():
        raise FormatError(f"{who} gives {name!r} that is not finite for sample {sample}")
    return name, row


def _checked(label: int, n: int, sample: int) -> int:
    most = max(n, 2)  # one score is that of the second class of two
    if not 0 <= label < most:
        raise UsageError(
            f"sample {sample} has the label {label} and the model gives {n} scores; labels count "
            f"from 0 to {most - 1}"
        )
    return label


def _check(n: int, labeled: int, compared: bool) -> None:
    if not n:
        raise UsageError("there are no samples; give at least one")
    if 0 < labeled < n:
        raise UsageError(f"{labeled} of {n} samples have labels; give all of them one, or none")
    if not labeled and not compared:
        raise UsageError(
            "the samples have no labels, so there is nothing to measure; give labeled samples, "
            "or a model to compare with (--base)"
        )


def _against_labels(rows: NDArray[np.float32], labels: NDArray[np.int64]) -> dict[str, Any]:
    n = rows.shape[1]
    if n == 1:
        return {"auc": auc(rows[:, 0], labels == 1)}
    ranks = _ranks(rows, labels)
    confusion = np.zeros((n, n), np.int64)
    np.add.at(confusion, (labels, rows.argmax(axis=1)), 1)
    return {
        "top1": float((ranks < 1).mean()),
        "top5": float((ranks < TOP).mean()) if n > TOP else None,
        "auc": auc_of_classes(rows, labels),
        "confusion": tuple(tuple(map(int, row)) for row in confusion),
    }


def _ranks(rows: NDArray[np.float32], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many scores come before the label's; of equal ones the first comes first."""
    own = rows[np.arange(len(rows)), labels][:, None]
    before = np.arange(rows.shape[1]) < labels[:, None]
    return cast("NDArray[np.int64]", ((rows > own) | ((rows == own) & before)).sum(axis=1))


def _against_base(
    rows: NDArray[np.float32], base: NDArray[np.float32], labels: NDArray[np.int64]
) -> dict[str, Any]:
    if rows.shape != base.shape:
        raise UsageError(
            f"the model has {rows.shape[1]} outputs per sample and the base model {base.shape[1]}; "
            "compare models with the same outputs"
        )
    cosines = cosine(rows, base)
    measured: dict[str, Any] = {"cosine": float(cosines.mean()),
                                "cosine_least": float(cosines.min())}  # fmt: skip
    if rows.shape[1] > 1:
        top = base.argmax(axis=1)
        measured["agreement"] = float((rows.argmax(axis=1) == top).mean())
        if labels.size:
            measured["base_top1"] = float((top == labels).mean())
    return measured


def cosine(a: NDArray[np.floating], b: NDArray[np.floating]) -> NDArray[np.float64]:
    """Cosine of the rows of [n, d] with those of another, float64 [n]; 0 for a row of zeros."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    size = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return cast("NDArray[np.float64]", (x * y).sum(axis=1) / np.where(size > 0, size, 1.0))


def auc(scores: NDArray[np.floating], positive: NDArray[np.bool_]) -> float | None:
    """Area under the ROC curve: how often a positive sample scores above a negative one.

    Equal scores count half. None if one of the two kinds is missing.

    Source: Mann and Whitney 1947, the U statistic over the product of the counts.
    """
    n, m = int(positive.sum()), int((~positive).sum())
    if not n or not m:
        return None
    _, places, counts = np.unique(scores, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks = (last - (counts - 1) / 2)[places]  # the mean rank of equal scores, from 1
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * m))


def auc_of_classes(rows: NDArray[np.float32], labels: NDArray[np.int64]) -> float | None:
    """AUC of the second of two classes; of more, the mean of each against the rest.

    Scores of different samples compare only as probabilities, so those that are none are taken
    through a softmax. Classes without samples are left out.

    Args:
        rows: scores [n, classes].
        labels: int [n].
    """
    chances = rows.astype(np.float64)
    if chances.min() < 0 or np.abs(chances.sum(axis=1) - 1).max() > 0.05:
        chances = np.exp(chances - chances.max(axis=1, keepdims=True))
        chances /= chances.sum(axis=1, keepdims=True)
    columns = [1] if rows.shape[1] == 2 else range(rows.shape[1])
    areas = [auc(chances[:, c], labels == c) for c in columns]
    measured = [value for value in areas if value is not None]
    return float(np.mean(measured)) if measured else None
