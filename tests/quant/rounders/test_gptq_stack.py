"""The groups of a convolution are rounded as each of them would be by itself."""

from __future__ import annotations

import numpy as np
import pytest

from edgeq.core.errors import UsageError
from edgeq.formats.schemes import parse_scheme
from edgeq.quant.rounders.gptq import round_gptq
from edgeq.quant.rounders.gptq_stack import round_stack_of_matrices
from edgeq.quant.rounders.hessian import Hessian
from edgeq.quant.rounders.qparams import group_view
from edgeq.quant.rounders.rounding import find_shared

MATRICES = 7


def drawn(rows: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights [M * R, K] and Hessians [M, K, K], one of a matrix without inputs."""
    rng = np.random.default_rng(10 * k + rows)
    mixed = rng.normal(size=(MATRICES, 60, k)) @ rng.normal(size=(MATRICES, k, k))
    x = np.maximum(0.3 * mixed + rng.normal(size=mixed.shape), 0)
    hessians = (np.einsum("mtk,mtl->mkl", x, x) / 60).astype(np.float32)
    hessians[3] = 0
    hessians[4, 2], hessians[4, :, 2] = 0, 0
    return rng.normal(size=(MATRICES * rows, k)).astype(np.float32), hessians


@pytest.mark.parametrize(
    "text",
    ["w8-channel", "w4-channel-asym", "w4-channel-palette", "w8-tensor", "w4-tensor-palette"],
)
@pytest.mark.parametrize(("rows", "k"), [(1, 9), (2, 25), (5, 50)])
def test_matrices_are_rounded_as_each_by_itself(text: str, rows: int, k: int) -> None:
    scheme = parse_scheme(text)
    w, hessians = drawn(rows, k)
    shared = find_shared([group_view(w, scheme)], scheme, "mse", k)
    palette = shared.palette if shared.params is None else shared.params.palette
    given = {"params": shared.params, "palette": palette}
    found = round_stack_of_matrices(w, scheme, hessians, **given)
    pairs = zip(np.split(w, MATRICES), hessians, strict=True)
    apart = [round_gptq(part, scheme, Hessian.of(matrix), **given) for part, matrix in pairs]
    codes = np.concatenate([part.codes for part in apart])
    # sums in another order may turn a tie
    assert (found.codes != codes).mean() < 0.01
    scales = np.concatenate([part.row_scales for part in apart])
    assert (found.row_scales != scales).mean() < 0.05


def test_it_makes_up_for_errors_of_columns_before() -> None:
    scheme = parse_scheme("w4-channel")
    w, hessians = drawn(2, 25)
    plain = round_stack_of_matrices(w, scheme, hessians * np.eye(25, dtype=np.float32))
    made_up = round_stack_of_matrices(w, scheme, hessians)

    def error(found: np.ndarray) -> float:
        missed = (w - found).reshape(MATRICES, -1, 25)
        return float(np.einsum("mrk,mkl,mrl->", missed, hessians, missed))

    values = [found.packed(scheme).numpy() for found in (plain, made_up)]
    assert error(values[1]) < 0.8 * error(values[0])


def test_a_singular_hessian_is_refused_by_name() -> None:
    w, hessians = drawn(1, 9)
    hessians[2] = -np.eye(9)
    with pytest.raises(UsageError, match=r"conv1\.weight"):
        round_stack_of_matrices(w, parse_scheme("w8-channel"), hessians, name="conv1.weight")
