"""All compiled functions of quantization as one LLVM module."""

from __future__ import annotations

from llvmlite import ir

from edgeq.quant.kernels import gemm, histograms, rounding, vectors
from edgeq.quant.kernels.shapes import GRIDS, LANES, Registers


def module(registers: Registers) -> ir.Module:
    """The module, in the shape that suits a processor's registers; its results are the same."""
    mod = ir.Module("quantization")
    for dtype in LANES:
        gemm.define(mod, dtype, registers.tile)
    gemm.define_stack(mod)
    histograms.define_histogram(mod)
    histograms.define_rounding_errors(mod)
    for grid in GRIDS:
        rounding.define_round(mod, grid, registers.rows)
    rounding.define_cost(mod, registers.rows)
    rounding.define_fit(mod, registers.rows)
    vectors.define_row_products(mod, "edgeq_row_products", wide=False)
    vectors.define_row_products(mod, "edgeq_row_products64", wide=True)
    vectors.define_column_sums(mod, "edgeq_column_sums", square=False)
    vectors.define_column_sums(mod, "edgeq_column_squares", square=True)
    vectors.define_softmax_rows(mod)
    vectors.define_activation(mod)
    vectors.define_tanh(mod)
    vectors.define_cholesky(mod)
    vectors.define_upper_inverse(mod)
    return mod
