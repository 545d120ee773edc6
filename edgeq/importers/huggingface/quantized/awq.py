"""AWQ's gemm layout, of AutoAWQ and AutoRound.

    qweight  int32 [K, N / 8]   field i of a word is column (0 2 4 6 1 3 5 7)[i] of eight
    qzeros   int32 [G, N / 8]   in the same order
    scales   float16 [G, N]

A weight is ``scale * (code - zero_point)``, which AutoAWQ computes in float16; edgeq computes the
same product in float32 and does not round it.

Source: AutoAWQ awq/modules/linear/gemm.py and awq/utils/packing_utils.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import FormatError
from edgeq.importers.huggingface.quantized.layout import FLOATS, Parts, Settings, check_shape
from edgeq.importers.huggingface.quantized.stored import (
    KeptMatrix,
    StoredRows,
    exact_half,
    grouping,
    unpack_fields,
)

_FIELD_OF_COLUMN = np.array([0, 4, 1, 5, 2, 6, 3, 7])
"""Column c of eight lies in this field of its word."""


@dataclass(frozen=True)
class Awq:
    """AWQ's gemm layout.

    Args:
        group_size: weights of a group, -1 for a row.
    """

    group_size: int

    def matrix(self, parts: Parts) -> KeptMatrix | None:
        """The matrix of a layer, or None where the layer is not quantized."""
        if parts.type_of("qweight") is None:
            return None
        qweight = parts.get("qweight", ("I32", "U32"))
        qzeros = parts.get("qzeros", ("I32", "U32"))
        scales = parts.get("scales", FLOATS)
        k, words = qweight.values.shape
        n = words * 8
        if not k or not n:
            raise FormatError(f"tensor {qweight.name} is empty")
        groups = grouping(qweight.name, self.group_size, k)
        check_shape(scales, (groups.stored, n), "the codes and group_size")
        check_shape(qzeros, (groups.stored, words), "the codes and group_size")
        scheme = groups.scheme(4, symmetric=False)

        def read(start: int, stop: int) -> StoredRows:
            half = exact_half(scales.values[:, start:stop].T, scales.dtype, scales.name)
            zeros = _columns(qzeros.values, start, stop)
            return StoredRows(
                _columns(qweight.values, start, stop),
                groups.spread(half, scheme, k),
                groups.spread(zeros, scheme, k),
            )

        nbytes = qweight.values.nbytes + qzeros.values.nbytes + scales.values.nbytes
        return KeptMatrix(f"AWQ {scheme}", scheme, (n, k), nbytes, qweight.values, read)


def _columns(words: NDArray[Any], start: int, stop: int) -> NDArray[np.uint8]:
    """Columns ``start:stop`` as rows, uint8 [stop - start, len(words)]."""
    first = start // 8
    part = words[:, first : -(-stop // 8)]
    fields = unpack_fields(part, 4, part.shape[1] * 8).reshape(len(words), -1, 8)
    usual = fields[:, :, _FIELD_OF_COLUMN].reshape(len(words), -1)
    return np.ascontiguousarray(usual[:, start - 8 * first : stop - 8 * first].T)


def read_awq(settings: Settings) -> Awq:
    """Read the settings of AutoAWQ.

    Raises:
        FormatError, UnsupportedError: a setting is damaged, or may change the arithmetic.
    """
    settings.whole("bits", (4,))
    group_size = settings.whole("group_size")
    settings.one_of("version", ("gemm",), "gemm", "save it with AutoAWQ's version GEMM")
    settings.one_of("format", ("gemm",), "gemm", "save it with AutoAWQ's version GEMM")
    settings.one_of("checkpoint_format", ("gemm",), "gemm", "save it with AutoAWQ's version GEMM")
    settings.flag("zero_point", True)  # qzeros are stored in any case
    settings.ignore(
        "modules_to_not_convert", "backend", "do_fuse", "fuse_max_seq_len", "modules_to_fuse",
        "exllama_config", "dataset", "sym", "desc_act", "method", "lm_head", "pack_dtype", "meta",
    )  # fmt: skip
    settings.check_all_read()
    return Awq(group_size)
