"""MXFP4: floats of 4 bits in blocks of 32 that share a power of two, as gpt-oss stores its experts.

    {name}_blocks  uint8 [..., N, K / 32, 16]   two codes a byte, the earlier one in the low half
    {name}_scales  uint8 [..., N, K / 32]       the exponent of a block's scale plus 127

A weight is the scale times 0, 0.5, 1, 1.5, 2, 3, 4, 6 or the negative of one of these. edgeq keeps
the codes, with the table of GGUF's MXFP4 (doubled values, so that it is one of integers) and half
the scale in float16.

Source: the OCP Microscaling Formats specification; integrations/mxfp4.py of Transformers 5.24.
"""

from __future__ import annotations

import numpy as np

from edgeq.core.errors import FormatError
from edgeq.importers.gguf.blocks import TYPES, mxfp4_scales
from edgeq.importers.huggingface.quantized.layout import Part, Parts, Settings, check_shape
from edgeq.importers.huggingface.quantized.stored import KeptMatrix, StoredRows, unpack_fields

_FORM = TYPES["MXFP4"]
_BLOCK = 32
_BYTES = 16


class Mxfp4:
    """The layout: no matrix has it but those of experts, which `stacked_experts` reads."""

    def matrix(self, parts: Parts) -> KeptMatrix | None:
        """No matrix that is stored alone is quantized."""
        del parts
        return None


def read_mxfp4(settings: Settings) -> Mxfp4:
    """Read the settings; the names of the tensors say which are quantized.

    Raises:
        UnsupportedError: a setting that may change the arithmetic.
    """
    settings.ignore("modules_to_not_convert", "dequantize")
    settings.check_all_read()
    return Mxfp4()


def stacked_matrix(blocks: Part, scales: Part, shape: tuple[int, int, int]) -> KeptMatrix:
    """Matrices [E, N, K] that lie one below the other, as one of [E * N, K].

    Args:
        blocks, scales: as they are stored.
        shape: E, N and K by the configuration.

    Raises:
        FormatError: an array has another shape, or rows are no whole blocks.
    """
    count, n, k = shape
    if k % _BLOCK:
        raise FormatError(
            f"tensor {blocks.name} is MXFP4, in blocks of {_BLOCK} weights of a row, and by "
            f"config.json a row has {k} weights; hidden_size and intermediate_size must be "
            f"multiples of {_BLOCK}"
        )
    check_shape(blocks, (count, n, k // _BLOCK, _BYTES), "the sizes in config.json")
    check_shape(scales, (count, n, k // _BLOCK), "the sizes in config.json")
    codes = blocks.values.reshape(count * n, -1)
    exponents = scales.values.reshape(count * n, -1)

    def read(start: int, stop: int) -> StoredRows:
        packed = np.ascontiguousarray(codes[start:stop])
        unpacked = unpack_fields(packed.view("<u4"), 4, k)
        return StoredRows(unpacked, mxfp4_scales(exponents[start:stop], unpacked))

    nbytes = codes.nbytes + exponents.nbytes
    return KeptMatrix(
        "MXFP4", _FORM.scheme, (count * n, k), nbytes, codes, read, palette=_FORM.palette
    )
