"""GPTQ's layout, of AutoGPTQ, GPTQModel and AutoRound.

    qweight  int32 [K * bits / 32, N]   a stream of bits down each column
    qzeros   int32 [G, N * bits / 32]   a stream along each row; version 1 stores zero_point - 1
    scales   float16 [G, N]
    g_idx    int32 [K]                  the group of each column

A weight is ``scale * (code - zero_point)``, which the libraries compute in the type of the scales;
edgeq computes the same product in float32 and does not round it to float16.

Source: AutoGPTQ qlinear_cuda_old.py; GPTQModel nn_modules/qlinear; AutoRound qlinear_torch(_zp).py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from edgeq.core.errors import FormatError, UnsupportedError
from edgeq.importers.huggingface.quantized.layout import FLOATS, Parts, Settings, check_shape
from edgeq.importers.huggingface.quantized.stored import (
    KeptMatrix,
    StoredRows,
    exact_half,
    grouping,
    unpack_fields,
)

BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class Gptq:
    """GPTQ's layout.

    Args:
        bits: of a code.
        group_size: weights of a group, -1 for a row.
        symmetric: whether every zero point is ``2 ** (bits - 1)``.
        subtracted: whether ``zero_point - 1`` is stored.
        overrides: pattern of names -> settings of these layers.
    """

    bits: int
    group_size: int
    symmetric: bool
    subtracted: bool
    overrides: Mapping[str, Mapping[str, Any]]

    def matrix(self, parts: Parts) -> KeptMatrix | None:
        """The matrix of a layer, or None where the layer is not quantized."""
        if parts.type_of("qweight") is None:
            return None
        return self._of(parts.module)._matrix(parts)

    def _of(self, module: str) -> Gptq:
        for pattern, values in self.overrides.items():
            if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), module):
                return replace(
                    self,
                    bits=values.get("bits", self.bits),
                    group_size=values.get("group_size", self.group_size),
                    symmetric=values.get("sym", self.symmetric),
                )
        return self

    def _matrix(self, parts: Parts) -> KeptMatrix:
        bits = self.bits
        qweight = parts.get("qweight", ("I32", "U32"))
        qzeros = parts.get("qzeros", ("I32", "U32"))
        scales = parts.get("scales", FLOATS)
        words, n = qweight.values.shape
        k = words * 32 // bits
        if words * 32 % bits or n * bits % 32 or k == 0 or n == 0:
            raise FormatError(
                f"tensor {qweight.name} has shape {[words, n]}, which holds no whole rows of "
                f"{bits}-bit codes"
            )
        groups = grouping(qweight.name, self.group_size, k)
        check_shape(scales, (groups.stored, n), "the codes and group_size")
        check_shape(qzeros, (groups.stored, n * bits // 32), "the codes and group_size")
        if parts.type_of("g_idx") is not None:
            index = parts.get("g_idx", ("I32", "I64"), 1)
            check_shape(index, (k,), "the codes")
            if not np.array_equal(index.values, np.arange(k) // (k // groups.stored)):
                raise UnsupportedError(
                    f"tensor {index.name} puts columns into groups in another order (desc_act): "
                    "a group's columns are not neighbors, and edgeq's groups are runs of columns; "
                    "quantize the float checkpoint with edgeq quantize, or with desc_act=False"
                )
        scheme = groups.scheme(bits, symmetric=self.symmetric)
        each = 32 // bits if 32 % bits == 0 else 32
        per = each * bits // 32  # words that hold whole codes

        def read(start: int, stop: int) -> StoredRows:
            codes = unpack_fields(qweight.values[:, start:stop].T, bits, k)
            # zero points are read from a whole number of words
            first = start // each * per
            last = -(-stop // each) * per
            stream = qzeros.values[:, first:last]
            zeros = unpack_fields(stream, bits, stream.shape[1] * 32 // bits)
            zeros = zeros[:, start - start // each * each :][:, : stop - start].T
            if self.subtracted:
                if (zeros == (1 << bits) - 1).any():
                    raise UnsupportedError(
                        f"tensor {qzeros.name} holds {(1 << bits) - 1}, a zero point minus one "
                        "that libraries read in different ways; save the checkpoint in GPTQModel's "
                        "format gptq_v2, or quantize the float checkpoint"
                    )
                zeros = zeros + np.uint8(1)
            half = exact_half(scales.values[:, start:stop].T, scales.dtype, scales.name)
            half = groups.spread(half, scheme, k)
            if self.symmetric:
                if (zeros != scheme.mid).any():
                    raise FormatError(
                        f"tensor {qzeros.name} holds the zero point "
                        f"{zeros[zeros != scheme.mid][0]}; the settings say sym, which is "
                        f"{scheme.mid}; is checkpoint_format the one that was written?"
                    )
                return StoredRows(codes, half)
            return StoredRows(codes, half, groups.spread(zeros, scheme, k))

        nbytes = qweight.values.nbytes + qzeros.values.nbytes + scales.values.nbytes
        return KeptMatrix(f"GPTQ {scheme}", scheme, (n, k), nbytes, qweight.values, read)


def read_gptq(settings: Settings) -> Gptq:
    """Read the settings of AutoGPTQ and GPTQModel.

    Raises:
        FormatError, UnsupportedError: a setting is damaged, or may change the arithmetic.
    """
    bits = settings.whole("bits", BITS)
    group_size = settings.whole("group_size")
    fix = "save it as gptq or gptq_v2 with GPTQModel"
    default = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    form = settings.one_of("format", ("gptq", "gptq_v2"), default, fix)
    if settings.get("checkpoint_format") is not None:
        form = settings.one_of("checkpoint_format", ("gptq", "gptq_v2"), "gptq", fix)
    settings.one_of("method", ("gptq",), "gptq", "use a GPTQ checkpoint")
    settings.one_of("pack_dtype", ("int32",), "int32", "pack it in int32")
    settings.flag("desc_act", False)  # g_idx says what it means
    settings.only_off("is_marlin_format", "planar", "rotation", "adapter", "lora")
    settings.ignore(
        "model_name_or_path", "model_file_base_name", "true_sequential", "static_groups", "meta",
        "dataset", "batch_size", "block_name_to_quantize", "modules_in_block_to_quantize",
        "backend", "lm_head", "damp_percent", "damp_auto_increment", "cache_block_outputs",
        "exllama_config",
        "use_exllama", "max_input_length", "model_seqlen", "module_name_preceding_first_block",
        "pad_token_id", "use_cuda_fp16", "tokenizer", "disable_exllama", "act_group_aware",
        "hyb_act", "mse", "fail_safe", "failsafe", "hessian", "gptaq", "foem",
        "offload_to_disk", "gc_mode",
        "parallel_packing", "mock_quantization", "hessian_chunk_size", "hessian_chunk_bytes",
    )  # fmt: skip
    symmetric = settings.flag("sym", True)
    overrides = _overrides(settings)
    settings.check_all_read()
    return Gptq(bits, group_size, symmetric, form == "gptq", overrides)


def _overrides(settings: Settings) -> Mapping[str, Mapping[str, Any]]:
    overrides = settings.mapping("dynamic")
    for pattern, values in overrides.items():
        place = f"{settings.where}: dynamic {pattern!r}"
        try:
            re.compile(pattern.removeprefix("+:").removeprefix("-:"))
        except re.error as err:
            raise FormatError(f"{place} is no regular expression: {err}") from err
        if pattern.startswith("-:"):
            continue
        if not isinstance(values, dict):
            raise FormatError(f"{place} is {values!r}; it must be an object")
        own = Settings(place, values)
        if "bits" in values:
            own.whole("bits", BITS)
        if "group_size" in values:
            own.whole("group_size")
        own.flag("sym", True)
        own.flag("desc_act", False)
        own.ignore("mse", "damp_percent", "static_groups", "true_sequential")
        own.check_all_read()
    return overrides
