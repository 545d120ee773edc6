"""compressed-tensors: integers packed in words, or one in each byte (llm-compressor, vLLM).

    pack-quantized  weight_packed      int32 [N, ceil(K * bits / 32)]  a stream of bits along a row
                    weight_shape       int64 [2]                       N, K
                    weight_zero_point  int32 [ceil(N * bits / 32), G]  a stream down each column
    int-quantized   weight             int8 [N, K]
                    weight_zero_point  int8 [N, G]
    both            weight_scale       [N, G], [N, 1] or [1]

Integers are signed; packed ones are stored with ``2 ** (bits - 1)`` added. A weight is ``scale *
(integer - zero_point)``, which the library computes in the type of the scales; edgeq computes it in
float32. Dynamic rounding of activations to 8 bits is the runtime's own business, as everywhere in
edgeq; static scales of activations are refused.

Source: compressed_tensors/compressors/pack_quantized and naive_quantized, quant_args.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import FormatError, UnsupportedError
from edgeq.importers import unread
from edgeq.importers.huggingface.quantized.layout import (
    FLOATS,
    Part,
    Parts,
    Settings,
    check_shape,
)
from edgeq.importers.huggingface.quantized.stored import (
    Grouping,
    KeptMatrix,
    StoredRows,
    exact_half,
    grouping,
    unpack_fields,
)

BITS = (2, 3, 4, 5, 6, 8)
FORMATS = ("pack-quantized", "int-quantized")


@dataclass(frozen=True)
class WeightGroup:
    """An entry of ``config_groups``.

    Args:
        targets: names of classes or layers, or patterns of layers after "re:".
        bits: of an integer.
        group_size: weights of a group, -1 for a row, 0 for the whole tensor.
        symmetric: whether there are no zero points.
        packed: whether integers are packed in words.
    """

    targets: tuple[str, ...]
    bits: int
    group_size: int
    symmetric: bool
    packed: bool


@dataclass(frozen=True)
class CompressedTensors:
    """The layouts of compressed-tensors.

    Args:
        groups: how the layers are stored.
    """

    groups: tuple[WeightGroup, ...]

    def matrix(self, parts: Parts) -> KeptMatrix | None:
        """The matrix of a layer, or None where the layer is not quantized."""
        packed = parts.type_of("weight_packed") is not None
        if not packed and parts.type_of("weight") != "I8":
            return None
        group = self._group(parts.module)
        if group.packed != packed:
            raise FormatError(
                f"layer {parts.module} is stored in the format {FORMATS[not packed]}; the "
                f"quantization_config says {FORMATS[not group.packed]}"
            )
        scales = parts.get("weight_scale", FLOATS, 0)
        if packed:
            weight = parts.get("weight_packed", ("I32",))
            shape = parts.get("weight_shape", ("I64", "I32"), 1)
            check_shape(shape, (2,), "matrices")
            n, k = (int(size) for size in shape.values)
            if n < 1 or k < 1:
                raise FormatError(f"tensor {shape.name} says [{n}, {k}]; sizes are positive")
            check_shape(weight, (n, -(-k * group.bits // 32)), "weight_shape and num_bits")
        else:
            weight = parts.get("weight", ("I8",))
            n, k = weight.values.shape
        self._check_order(parts, k, group)
        groups = grouping(weight.name, group.group_size or -1, k)
        table = _table(scales, n, groups)
        scheme = groups.scheme(group.bits, symmetric=group.symmetric)
        zeros = None if group.symmetric else _zero_points(parts, group, n, groups)

        def read(start: int, stop: int) -> StoredRows:
            rows = weight.values[start:stop]
            if packed:
                codes = unpack_fields(rows, group.bits, k)
            else:
                codes = _unsigned(rows, group.bits, weight.name)
            half = exact_half(table[start:stop], scales.dtype, scales.name)
            half = groups.spread(half, scheme, k)
            if zeros is None:
                return StoredRows(codes, half)
            if packed:
                first = start // 32 * 32  # a row that begins a word
                words = zeros.values[first * group.bits // 32 : -(-stop * group.bits // 32)]
                fields = unpack_fields(np.ascontiguousarray(words.T), group.bits, stop - first)
                points = fields[:, start - first :].T
            else:
                packed_points = _table(zeros, n, groups)[start:stop]
                points = _unsigned(packed_points, group.bits, zeros.name)
            return StoredRows(codes, half, groups.spread(points, scheme, k))

        nbytes = weight.values.nbytes + scales.values.nbytes + (zeros.values.nbytes if zeros else 0)
        kind = f"compressed-tensors {scheme}"
        return KeptMatrix(kind, scheme, (n, k), nbytes, weight.values, read)

    def _check_order(self, parts: Parts, k: int, group: WeightGroup) -> None:
        if parts.type_of("weight_g_idx") is None:
            return
        index = parts.get("weight_g_idx", ("I32", "I64"), 1)
        check_shape(index, (k,), "the codes")
        if group.group_size > 0 and not np.array_equal(
            index.values, np.arange(k) // group.group_size
        ):
            raise UnsupportedError(
                f"tensor {index.name} puts columns into groups in another order (actorder "
                "'group'); edgeq's groups are runs of columns; quantize the float checkpoint with "
                "edgeq quantize, or with actorder 'weight'"
            )

    def _group(self, module: str) -> WeightGroup:
        matching = [g for g in self.groups if any(_matches(t, module) for t in g.targets)]
        if len(matching) != 1 and len(self.groups) == 1:
            matching = list(self.groups)
        kinds = {(g.bits, g.group_size, g.symmetric, g.packed) for g in matching}
        if len(kinds) != 1:
            raise UnsupportedError(
                f"{len(matching)} of the config_groups describe layer {module}, differently; edgeq "
                "reads checkpoints where one does"
            )
        return matching[0]


def _matches(target: str, module: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], module) is not None
    return target in ("Linear", module)


def _unsigned(values: NDArray[Any], bits: int, name: str) -> NDArray[np.uint8]:
    """Signed integers -> codes."""
    mid = 1 << (bits - 1)
    wide = values.astype(np.int16) + mid
    if wide.size and (wide.min() < 0 or wide.max() >= 2 * mid):
        raise FormatError(
            f"tensor {name} holds integers from {wide.min() - mid} to {wide.max() - mid}; "
            f"{bits} bits hold {-mid} to {mid - 1}"
        )
    return wide.astype(np.uint8)


def _table(part: Part, n: int, groups: Grouping) -> NDArray[Any]:
    """Scales of the tensor, of rows or of groups, as [N, G]."""
    values = part.values
    if values.size == 1:
        return np.broadcast_to(values.reshape(1, 1), (n, groups.stored))
    if values.shape == (n,) and groups.stored == 1:
        return values[:, None]
    check_shape(part, (n, groups.stored), "the codes and the strategy")
    return values


def _zero_points(parts: Parts, group: WeightGroup, n: int, groups: Grouping) -> Part:
    if not group.packed:
        return parts.get("weight_zero_point", ("I8",), 0)
    zeros = parts.get("weight_zero_point", ("I32",))
    check_shape(zeros, (-(-n * group.bits // 32), groups.stored), "the codes and the strategy")
    return zeros


def read_compressed_tensors(settings: Settings) -> CompressedTensors:
    """Read the settings of compressed-tensors.

    Raises:
        FormatError, UnsupportedError: a setting is damaged, or may change the arithmetic.
    """
    fix = "compress it with llm-compressor in one of these, or quantize the float checkpoint"
    form = settings.one_of("format", (*FORMATS, "mixed-precision"), "", fix)
    settings.one_of("quantization_status", ("compressed",), "compressed", fix)
    settings.only_off("kv_cache_scheme", "transform_config", "moe_sparsity_config")
    sparsity = settings.mapping("sparsity_config")
    if sparsity.get("format", "dense") != "dense":
        raise UnsupportedError(
            f"{settings.where}: sparsity_config has the format "
            f"{unread.shown(sparsity['format'])}; edgeq reads dense ones"
        )
    settings.ignore("ignore", "global_compression_ratio", "version")
    groups = []
    for name, value in settings.mapping("config_groups").items():
        if not isinstance(value, dict):
            raise UnsupportedError(
                f"{settings.where}: config_groups {name} is {unread.shown(value)}; it must be an "
                "object with weights"
            )
        groups.append(_read_group(Settings(f"{settings.where} {name}", value), form, fix))
    settings.check_all_read()
    if not groups:
        raise FormatError(f"{settings.where} has no config_groups")
    return CompressedTensors(tuple(groups))


def _read_group(settings: Settings, form: str, fix: str) -> WeightGroup:
    own = settings.one_of("format", FORMATS, form, fix)
    targets = settings.get("targets", [])
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        raise FormatError(f"{settings.where}: targets must be a list of names")
    for target in targets:
        try:
            re.compile(target.removeprefix("re:"))
        except re.error as err:
            raise FormatError(f"{settings.where}: target {target!r}: {err}") from err
    settings.only_off("output_activations")
    inputs = settings.mapping("input_activations")
    if inputs and (inputs.get("dynamic") is not True or inputs.get("num_bits") != 8
                   or inputs.get("type", "int") != "int"):  # fmt: skip
        raise UnsupportedError(
            f"{settings.where}: input_activations is {unread.shown(dict(inputs))}; edgeq rounds "
            "activations to 8 bits while it runs, so it takes dynamic int 8 or none"
        )
    weights = Settings(f"{settings.where} weights", settings.mapping("weights"))
    settings.check_all_read()
    weights.one_of("type", ("int",), "int", fix)
    bits = weights.whole("num_bits", BITS)
    symmetric = weights.flag("symmetric", True)
    size = weights.get("group_size")
    strategy = weights.one_of(
        "strategy", ("group", "channel", "tensor"), "group" if size else "tensor", fix
    )
    weights.only_off("block_structure", "dynamic")
    weights.ignore("observer", "observer_kwargs", "actorder", "scale_dtype", "zp_dtype")
    group_size = weights.whole("group_size") if strategy == "group" else -1
    weights.check_all_read()
    return WeightGroup(tuple(targets), bits, group_size, symmetric, own == "pack-quantized")
