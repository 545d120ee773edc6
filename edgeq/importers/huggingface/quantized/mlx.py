"""MLX's affine layout: the weights of mlx-lm's quantized models.

    weight  uint32 [N, K * bits / 32]   a stream of bits along each row
    scales  float16 or bfloat16 [N, G]
    biases  the same [N, G]

A weight is ``scale * code + bias``, which MLX computes in the type of the scales; edgeq computes it
in float32.

Source: MLX's quantize and dequantize (mlx/ops.cpp, backend/cpu/quantized.cpp).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgeq.core.errors import FormatError
from edgeq.importers.huggingface.quantized.layout import FLOATS, Parts, Settings, check_shape
from edgeq.importers.huggingface.quantized.stored import (
    KeptMatrix,
    StoredRows,
    exact_half,
    grouping,
    unpack_fields,
)

BITS = (2, 3, 4, 5, 6, 8)


@dataclass(frozen=True)
class Mlx:
    """MLX's affine layout.

    Args:
        bits: of a code.
        group_size: weights of a group.
        overrides: layers -> their own (bits, group_size), or None for float ones.
    """

    bits: int
    group_size: int
    overrides: Mapping[str, tuple[int, int] | None]

    def matrix(self, parts: Parts) -> KeptMatrix | None:
        """The matrix of a layer, or None where the layer is not quantized."""
        if parts.type_of("weight") != "U32":
            return None
        settings = self.overrides.get(parts.module, (self.bits, self.group_size))
        if settings is None:
            raise FormatError(
                f"tensor {parts.module}.weight is quantized; the quantization in config.json says "
                "that it is not"
            )
        bits, group_size = settings
        weight = parts.get("weight", ("U32",))
        scales, biases = parts.get("scales", FLOATS), parts.get("biases", FLOATS)
        n, words = weight.values.shape
        k = words * 32 // bits
        if words * 32 % bits or not n or not k:
            raise FormatError(
                f"tensor {weight.name} has shape {[n, words]}, which holds no whole rows of "
                f"{bits}-bit codes"
            )
        groups = grouping(weight.name, group_size, k)
        check_shape(scales, (n, groups.stored), "the codes and group_size")
        check_shape(biases, (n, groups.stored), "the codes and group_size")
        scheme = groups.scheme(bits, symmetric=False, minimum=True)

        def read(start: int, stop: int) -> StoredRows:
            half = exact_half(scales.values[start:stop], scales.dtype, scales.name)
            lowest = exact_half(biases.values[start:stop], biases.dtype, biases.name)
            return StoredRows(
                unpack_fields(weight.values[start:stop], bits, k),
                groups.spread(half, scheme, k),
                minimums=groups.spread(lowest, scheme, k),
            )

        nbytes = weight.values.nbytes + scales.values.nbytes + biases.values.nbytes
        return KeptMatrix(f"MLX {scheme}", scheme, (n, k), nbytes, weight.values, read)


def read_mlx(settings: Settings) -> Mlx:
    """Read the ``quantization`` of mlx-lm.

    Raises:
        FormatError, UnsupportedError: a setting is damaged, or may change the arithmetic.
    """
    bits, group_size = _sizes(settings)
    overrides: dict[str, tuple[int, int] | None] = {}
    for key, value in settings.raw.items():
        if value is False:
            settings.ignore(key)
            overrides[key] = None
        elif isinstance(value, dict):
            settings.ignore(key)
            own = Settings(f"{settings.where} {key}", value)
            overrides[key] = _sizes(own)
            own.check_all_read()
    settings.check_all_read()
    return Mlx(bits, group_size, overrides)


def _sizes(settings: Settings) -> tuple[int, int]:
    fix = "quantize it with mlx_lm.convert and the mode affine"
    settings.one_of("mode", ("affine",), "affine", fix)
    return settings.whole("bits", BITS), settings.whole("group_size", (32, 64, 128))
