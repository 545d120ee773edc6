"""Palettes: tables of 4, 8 or 16 numbers that a tensor's weights, divided by their scale, round to.

Weights crowd around zero, so numbers that lie closer together there err less than evenly spaced
ones. The table is found by weighted k-means in one dimension, in turn with the scales:

    scales   least squares for the table so far                        (`edgeq.quant.rounders.mse`)
    table    the best one for these scales: exact, by dynamic programming over half steps

The numbers are int8 and the largest in magnitude is 127, so they make full use of their bits. A
sample of the groups is looked at; which ones depends on nothing but their number.

Source: the dynamic program is that of Wang & Song 2011, "Ckmeans.1d.dp: optimal k-means
clustering in one dimension by dynamic programming", The R Journal 3(2), on a histogram.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from edgeq.formats.schemes import QuantScheme
from edgeq.quant.kernels.products import total
from edgeq.quant.rounders.mse import fit_mse
from edgeq.quant.rounders.qparams import (
    HALVES,
    Groups,
    Scratch,
    half_steps,
    squared_error,
    to_levels,
)

SAMPLE = 1 << 15
"""Weights looked at, at least (if there are so many), and at most about twice that."""
ROUNDS = 8
"""Times that scales and table are found in turn, at most."""
CONVERGED = 1e-3
"""A round that gains less than this part of the error is the last."""


def find_palette(
    chunks: Iterable[Groups], scheme: QuantScheme, name: str, importance: Groups | None
) -> NDArray[np.int8]:
    """The palette of one tensor.

    Args:
        chunks: float32 [R, G, S], all the tensor's; gone through once.
        scheme: has a codebook.
        name: the tensor, for messages.
        importance: float32 [1, G, S]: weights of the squared errors, 0 for padding; None if all
            are alike.

    Returns:
        int8 [2**bits], ascending.

    Raises:
        SchemeError: a scale is beyond float16.
    """
    w, weights = _sample(chunks, importance)
    scratch = Scratch()
    table = _even(scheme)
    best, least = table, np.inf
    for _ in range(ROUNDS):
        params = fit_mse([w], scheme, name, scratch, importance=weights, palette=table)
        steps, rounded = to_levels(w, params, scheme, scratch)
        positions = half_steps(steps).ravel(), steps.ravel().astype(np.float64)
        costs = (weights * np.square(params.scales)[:, :, None]).ravel().astype(np.float64)
        error = total(squared_error(steps, rounded, params, weights))
        if error < least:
            best = table
        if not error < (1 - CONVERGED) * least:
            break
        least = error
        table = _full_range(_clustered(*positions, costs, scheme.n_codes))
    return best


def _sample(chunks: Iterable[Groups], importance: Groups | None) -> tuple[Groups, Groups]:
    """Every so many'th group of a tensor, and its importance: float32 [1, n, S] each."""
    kept: list[tuple[int, Groups]] = []
    stride, seen, sampled = 1, 0, 0
    for w in chunks:
        if importance is None:
            importance = np.ones((1, *w.shape[1:]), np.float32)
        count = w.shape[0] * w.shape[1]
        first = -seen % stride
        part = w.reshape(count, -1)[first::stride].copy()
        kept.append((seen + first, part))
        sampled += part.size
        seen += count
        while sampled > 2 * SAMPLE:
            odd = [at // stride % 2 for at, _ in kept]
            kept = [(at + i * stride, p[i::2]) for i, (at, p) in zip(odd, kept, strict=True)]
            stride *= 2
            sampled = sum(p.size for _, p in kept)
    assert importance is not None  # a tensor has weights
    index = np.concatenate([at + stride * np.arange(len(p)) for at, p in kept])
    return np.concatenate([p for _, p in kept])[None], importance[:, index % importance.shape[1]]


def _even(scheme: QuantScheme) -> NDArray[np.int8]:
    return np.rint(np.linspace(-127, 127, scheme.n_codes)).astype(np.int8)


def _full_range(table: NDArray[np.float64]) -> NDArray[np.int8]:
    """Stretched so that the largest in magnitude is 127."""
    top = np.abs(table).max()
    return np.rint(table * (127 / top if top else 1)).astype(np.int8)


def _clustered(
    halves: NDArray[np.intp],
    positions: NDArray[np.float64],
    costs: NDArray[np.float64],
    n_codes: int,
) -> NDArray[np.float64]:
    """Means of the clusters that cost least, float64 [n_codes], ascending.

    Args:
        halves: the half step each weight lies in.
        positions: its value in steps.
        costs: what a squared step of error costs.
        n_codes: how many clusters.
    """
    bins = np.clip(halves, 0, HALVES - 1)
    mass, first, second = (
        np.concatenate([[0.0], np.cumsum(np.bincount(bins, m, HALVES))])
        for m in (costs, costs * positions, costs * positions * positions)
    )
    # of the bins i .. j-1 taken together, for all i < j: their mean and the error around it, at
    # [j, i], so that the best i is looked for along rows
    m, f, error = (c[:, None] - c[None, :] for c in (mass, first, second))
    mean = np.divide(f, m, out=np.zeros_like(f), where=m > 0)
    error -= np.multiply(mean, f, out=f)
    np.maximum(error, 0, out=error)
    error[np.triu_indices(HALVES + 1, 1)] = np.inf
    np.fill_diagonal(error, 0)  # a cluster may be empty
    total, cuts = error[:, 0], []
    through = m
    for _ in range(n_codes - 1):
        np.add(total[None, :], error, out=through)
        cut = through.argmin(axis=1)
        cuts.append(cut)
        total = through[np.arange(HALVES + 1), cut]
    table, stop = [], HALVES
    for cut in (*reversed(cuts), np.zeros(HALVES + 1, np.intp)):
        start = int(cut[stop])
        if mass[stop] > mass[start]:
            table.append(float(mean[stop, start]))
        stop = start
    # empty clusters repeat the last number: a table has its full length
    table += [table[-1] if table else 0.0] * (n_codes - len(table))
    return np.sort(np.array(table))
