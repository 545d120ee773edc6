"""What the compiled functions are called and take; read without the compiler."""

from __future__ import annotations

from dataclasses import dataclass

K_BLOCK = 256
"""Products of a matrix product that are summed up before they are added to those of earlier
blocks: part of the result."""
N_BLOCK = 768
"""Rows of B packed at once: with `K_BLOCK`, most of a second-level cache of 1 MiB."""
LANES = {"float32": 16, "float64": 8}
"""Numbers of a vector; part of the order of sums."""

GEMM = (
    "a", "a_row", "a_column", "b", "b_row", "b_column", "c", "c_row",
    "m", "n", "k", "accumulate", "negate", "scratch",
)  # fmt: skip
"""Addresses, strides in bytes, sizes, and two flags."""
GEMMS = (*GEMM, "count", "a_step", "b_step", "c_step")
"""The first of some products, their number, and the bytes from one to the next."""
ROUND = (
    "target", "target_row", "levels", "levels_row", "scales", "scales_trial", "scales_column",
    "zeros", "mix", "pivots", "columns", "trials", "first", "last", "table", "limits",
    "cost", "winner", "scratch",
)  # fmt: skip
"""Addresses, strides in bytes and sizes of `rounding`."""
COST = (
    "target", "target_row", "levels", "levels_row", "scales", "scales_column",
    "mix", "pivots", "columns", "first", "last", "cost", "scratch",
)  # fmt: skip
FIT = (
    "target", "target_row", "levels", "levels_row",
    "mix", "pivots", "columns", "first", "last", "along", "square",
)  # fmt: skip
GRIDS = ("even", "zeros", "palette")
"""Kinds of levels."""

SYMBOLS: dict[str, int] = {
    "edgeq_gemm_float32": len(GEMM),
    "edgeq_gemm_float64": len(GEMM),
    "edgeq_gemms_float32": len(GEMMS),
    **{f"edgeq_round_{grid}": len(ROUND) for grid in GRIDS},
    "edgeq_cost": len(COST),
    "edgeq_fit": len(FIT),
    "edgeq_row_products": 7,
    "edgeq_row_products64": 7,
    "edgeq_column_sums": 5,
    "edgeq_column_squares": 5,
    "edgeq_histogram": 5,
    "edgeq_rounding_errors": 8,
    "edgeq_softmax_rows": 3,
    "edgeq_activation": 3,
    "edgeq_tanh": 2,
    "edgeq_cholesky64": 4,
    "edgeq_upper_inverse64": 3,
}
"""Compiled functions -> how many 64-bit integers they take."""


@dataclass(frozen=True)
class Tile:
    """What of a product's result is in registers at once.

    Args:
        rows: of the result.
        vectors: of 16 float32 or 8 float64, along its columns.
    """

    rows: int
    vectors: int


@dataclass(frozen=True)
class Registers:
    """What suits a processor's vector registers; results do not depend on it.

    Args:
        name: for the cache.
        cpu: LLVM's name of the processor to compile for; None for the one that is there.
        tile: of matrix products.
        rows: vectors of 16 rows that are rounded side by side.
    """

    name: str
    cpu: str | None
    tile: Tile
    rows: int


def gemm_scratch(tile: Tile) -> int:
    """Bytes of working memory of one product."""
    width = 16 * tile.vectors
    return 8 * (K_BLOCK * (N_BLOCK + width + tile.rows) + tile.rows * width)
