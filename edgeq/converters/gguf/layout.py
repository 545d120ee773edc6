"""The tensors and metadata of a GGUF file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from edgeq._version import __version__
from edgeq.converters.encoding import Container, encode
from edgeq.converters.gguf.blocks import exact_type
from edgeq.converters.gguf.bytes import BLOCK_WEIGHTS, Kind, TensorEntry, minimum_is_exact
from edgeq.converters.gguf.family import (
    architecture,
    assumed_scale,
    attention_interval,
    first_window,
    foreign_window,
    full_rope,
    leading_dense,
    period,
)
from edgeq.converters.gguf.names import MOVED_COLUMNS
from edgeq.converters.gguf.rope import factor_tensors, rope_in_file, rope_keys
from edgeq.converters.options import Options
from edgeq.converters.validate.kernels import GGML_BLOCK
from edgeq.core.errors import UnsupportedError
from edgeq.formats.packing import round_up
from edgeq.formats.schemes import FLOAT_TAGS
from edgeq.formats.tensor import FloatTensor, QuantTensor
from edgeq.importers.gguf.architecture import MULTIPLIERS, SOFTCAPS, Architecture
from edgeq.importers.gguf.value_heads import moved_columns
from edgeq.importers.sentence_modules import gguf_pooling_type
from edgeq.model.block import (
    DELTA_OUT,
    DOWN_PROJ,
    GATE_PROJ,
    Q_PROJ,
    UP_PROJ,
    expert_part,
    of_any_expert,
    tensor_name,
)
from edgeq.model.config import ModelConfig
from edgeq.model.model import Model
from edgeq.model.rope_spec import RopeSpec

_CONTAINERS: dict[Kind, Container] = {
    "Q4_0": Container(4, groups=(GGML_BLOCK,), folds=True),
    "Q4_1": Container(4, groups=(GGML_BLOCK,), asymmetric=True),
    "Q5_0": Container(5, groups=(GGML_BLOCK,), folds=True),
    "Q8_0": Container(8, groups=(GGML_BLOCK,), folds=True),
}
"""What types of GGUF hold of edgeq's own schemes; `exact_type` says which hold those of others."""
_FILE_TYPES = {
    "F32": 0, "F16": 1, "BF16": 32, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9,
    "Q2_K": 10, "Q3_K": 12, "Q4_K": 15, "Q5_K": 17, "Q6_K": 18, "IQ4_NL": 25, "IQ4_XS": 30,
    "MXFP4": 38, "TQ2_0": 37,
}  # fmt: skip
"""The type of most bytes -> what llama.cpp calls such a file."""


@dataclass(frozen=True)
class Placed:
    """A tensor of the file: one of the model's tensors, or several of them concatenated by rows.

    Args:
        entry: as the header announces it.
        names: our tensors.
        rows: rows each takes, padding included.
        heads: how many heads each has whose rows are interleaved, or 0.
        by_head: how many heads the tensors have that follow one another head by head; 0 where the
            tensors follow one another as wholes.
    """

    entry: TensorEntry
    names: tuple[str, ...]
    rows: tuple[int, ...]
    heads: tuple[int, ...]
    by_head: int = 0


def file_context(c: ModelConfig, options: Options) -> int:
    """The context that the file states: what is asked for, as far as llama.cpp computes it."""
    return min(c.context, options.context or c.context, foreign_window(c) or c.context)


def layout(model: Model) -> list[Placed]:
    """The file's tensors, in the order a decoder reads them.

    Raises:
        UnsupportedError: a tensor that no type holds.
    """
    c = model.config
    arch = architecture(c)
    shapes = dict(c.linears())
    groups: dict[str, list[str]] = {}
    for name in shapes:
        groups.setdefault(arch.tensor_name(name), []).append(name)
    placed = []
    for target, names in groups.items():
        inner = _inner(model, names[0])
        heights = [inner if _is_part(n, GATE_PROJ, UP_PROJ) else shapes[n][0] for n in names]
        k = inner if _is_part(names[0], DOWN_PROJ) else shapes[names[0]][1]
        kind = _type(model, names, k)
        if (delta := moved_columns(c, names[0])) is not None:
            _check_columns(names[0], kind, delta.value_dim)
        stacked = len(names) if of_any_expert(names[0])[1] else 0
        entry = TensorEntry(target, kind, (sum(heights), k), stacked)
        by_head = c.heads if arch.output_gate and len(names) > 1 else 0
        heads = tuple(_heads(c, n) for n in names)
        placed.append(Placed(entry, tuple(names), tuple(heights), heads, by_head))
    vectors = [(n, s) for n, s in c.norms()]
    vectors += [(n, s) for n, s in c.biases() if n in model.tensors]
    vectors += [*c.choice_biases(), *c.sinks()]
    for name, shape in vectors:
        entry = TensorEntry(arch.tensor_name(name), "F32", shape)
        placed.append(Placed(entry, (name,), shape, (_heads(c, name),)))
    placed += _expert_biases(model, arch)
    for name, (channels, _, taps) in c.convolutions():
        entry = TensorEntry(arch.tensor_name(name), "F32", (channels, taps))
        placed.append(Placed(entry, (name,), (channels,), (0,)))
    for name, size in c.delta_vectors():
        placed.append(Placed(TensorEntry(arch.tensor_name(name), "F32", size), (name,), size, (0,)))
    for name, factors in factor_tensors(full_rope(c)).items():
        placed.append(Placed(TensorEntry(name, "F32", factors.shape), (), (), ()))
    return placed


def _expert_biases(model: Model, arch: Architecture) -> list[Placed]:
    """The biases of routers and experts, those of all experts of a layer in one tensor."""
    sizes, groups = dict(model.config.expert_biases()), dict[str, list[str]]()
    for name in sizes:
        groups.setdefault(arch.tensor_name(name), []).append(name)
    placed = []
    for target, names in groups.items():
        (size,) = sizes[names[0]]
        if _is_part(names[0], GATE_PROJ, UP_PROJ):
            size = _expert_ffn(model)
        stacked = len(names) if of_any_expert(names[0])[1] else 0
        entry = TensorEntry(target, "F32", (size * len(names),), stacked)
        placed.append(Placed(entry, tuple(names), (size,) * len(names), (0,) * len(names)))
    return placed


def _check_columns(name: str, kind: str, size: int) -> None:
    """Refuse a type whose blocks are larger than the columns of a value head, which are moved."""
    if size % BLOCK_WEIGHTS[kind]:
        raise UnsupportedError(
            f"llama.cpp has the value heads of {name} in another order, and a block of {kind} "
            f"holds {BLOCK_WEIGHTS[kind]} weights, more than the {size} of a head; use a scheme "
            f"with groups of {GGML_BLOCK} for it (--tensor-type), or keep it floating point"
        )


def _is_part(name: str, *parts: str) -> bool:
    """Whether a tensor is one of some parts of a layer, of the feed-forward or of an expert."""
    return name.rpartition(".")[0].endswith(tuple(part.rpartition(".")[2] for part in parts))


def _inner(model: Model, name: str) -> int:
    """The inner length in the file of the feed-forward that a matrix may be of."""
    return _expert_ffn(model) if of_any_expert(name)[1] else _ffn(model)


def _heads(c: ModelConfig, name: str) -> int:
    if not architecture(c).is_interleaved(name):
        return 0
    return c.heads if _is_part(name, Q_PROJ) else c.kv_heads


def _ffn(model: Model) -> int:
    """The feed-forward's length in the file: whole blocks, where a matrix of it has blocks."""
    c = model.config
    if c.experts is not None and not architecture(c).expert_ffn:
        return _expert_ffn(model)  # one key says both
    dense = (i for i, block in enumerate(c.blocks) if block.experts is None)
    blocks = any(isinstance(model.tensors[tensor_name(i, DOWN_PROJ)], QuantTensor) for i in dense)
    return round_up(c.ffn, GGML_BLOCK) if blocks else c.ffn


def _expert_ffn(model: Model) -> int:
    """The inner length of experts in the file, likewise."""
    c = model.config
    assert c.experts is not None  # or no matrix is of an expert
    blocks = any(
        isinstance(model.tensors[tensor_name(i, expert_part(e, DOWN_PROJ))], QuantTensor)
        for i, block in enumerate(c.blocks)
        if block.experts is not None
        for e in range(c.experts.count)
    )
    return round_up(c.experts.ffn, GGML_BLOCK) if blocks else c.experts.ffn


def _type(model: Model, names: Sequence[str], k: int) -> str:
    """The type that holds these tensors of K columns, padding included."""
    tensors = [model.tensors[name] for name in names]
    quantized = [t for t in tensors if isinstance(t, QuantTensor)]
    if not quantized:
        floats = {t.dtype if isinstance(t, FloatTensor) else "float32" for t in tensors}
        return FLOAT_TAGS[floats.pop()].upper() if len(floats) == 1 else "F32"
    if len(quantized) < len(tensors):
        raise UnsupportedError(
            f"llama.cpp stores {_listed(names)} in one tensor; quantize all of them or none"
        )
    if k % GGML_BLOCK:
        raise UnsupportedError(
            f"llama.cpp stores whole blocks of {GGML_BLOCK} weights, but a row of {names[0]} has "
            f"{k}; keep it floating point with --tensor-type"
        )
    kinds = {_kind(name, t) for name, t in zip(names, quantized, strict=True)}
    if len(kinds) == 1:
        return kinds.pop()
    if kinds - set(_CONTAINERS) or any(t.scheme.minimum for t in quantized):
        raise UnsupportedError(
            f"llama.cpp stores {_listed(names)} in one tensor, and these are "
            f"{' and '.join(sorted({str(t.scheme) for t in quantized}))}; quantize all of them "
            "alike"
        )
    # tensors that share one: the wider type holds both, zero points folded away
    return "Q8_0" if "Q8_0" in kinds else "Q5_0"


def _listed(names: Sequence[str]) -> str:
    """Names for a message, of which the middle ones are left out where they are many."""
    if len(names) <= 3:
        return " and ".join(names)
    return f"{names[0]} to {names[-1]}"


def _kind(name: str, tensor: QuantTensor) -> Kind:
    if exact := exact_type(tensor):
        return exact
    encoding = encode(
        name, tensor.scheme, tensor.shape[1], tuple(_CONTAINERS.values()), "llama.cpp"
    )
    if encoding.container.asymmetric:
        zeros = cast("NDArray[np.uint8]", tensor.zero_points).astype(np.int16)
        minimum_fits = minimum_is_exact(tensor.scales.astype(np.float32), zeros)
        return "Q4_1" if minimum_fits else "Q5_0"
    return next(kind for kind, container in _CONTAINERS.items() if container == encoding.container)


def metadata(model: Model, options: Options, parts: Sequence[Placed]) -> dict[str, Any]:
    """The keys that describe the model, but for its tokenizer."""
    c = model.config
    arch = architecture(c)
    sizes: dict[str, int] = {}
    for placed in parts:
        sizes[placed.entry.type] = sizes.get(placed.entry.type, 0) + placed.entry.nbytes
    context = file_context(c, options)
    rope = rope_in_file(full_rope(c), context)
    ours: dict[str, Any] = {
        "context_length": context,
        "embedding_length": c.hidden,
        "block_count": c.layers,
        "feed_forward_length": _ffn(model),
        "vocab_size": c.vocab,
        "attention.head_count": c.heads,
        "attention.head_count_kv": c.kv_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "attention.layer_norm_rms_epsilon": float(c.norm_eps),
        "rope.dimension_count": rope.dim,
        "rope.freq_base": float(rope.base),
    }
    if arch.short_conv:
        attends = [block.mixer == "attention" for block in c.blocks]
        ours["attention.head_count_kv"] = [c.kv_heads if attend else 0 for attend in attends]
        ours["shortconv.l_cache"] = c.blocks[attends.index(False)].window
    if c.experts is not None:
        ours |= _expert_keys(model, arch)
    if arch.delta_net:
        ours |= _delta_keys(c, rope)
    for name in arch.multipliers:
        value = getattr(c, name)
        ours[MULTIPLIERS[name]] = float(1 / value if name == "logit_scale" else value)
    if arch.softcaps:
        ours |= {key: float(getattr(c, name)) for name, (key, _) in SOFTCAPS.items()}
    if first_window(c) is not None and foreign_window(c) is None:
        ours["attention.sliding_window"] = first_window(c)
        ours["attention.sliding_window_pattern"] = period(c)
    if arch.local_rope_base is not None:
        local = next(block.rope for block in c.blocks if block.window)
        ours["rope.freq_base_swa"] = float((local or rope).base)
    ours |= rope_keys(rope, arch)
    if (pooling := gguf_pooling_type(model.files)) is not None:
        ours["pooling_type"] = pooling
    general = {
        "general.architecture": arch.name,
        "general.name": str(model.provenance.get("source") or c.family),
        "general.quantization_version": 2,
        "general.file_type": _FILE_TYPES[max(sizes, key=lambda kind: sizes[kind])],
        "edgeq.version": __version__,
        "edgeq.feed_forward": c.ffn,
        "edgeq.query_scale": c.attn_scale / assumed_scale(c),
    }
    if c.experts is not None:
        general["edgeq.expert_feed_forward"] = c.experts.ffn
    if any(moved_columns(c, tensor_name(i, DELTA_OUT)) for i in range(c.layers)):
        general[MOVED_COLUMNS] = 1
    return general | {f"{arch.name}.{key}": value for key, value in ours.items()}


def _expert_keys(model: Model, arch: Architecture) -> dict[str, Any]:
    experts = model.config.experts
    assert experts is not None  # by which it is called
    keys: dict[str, Any] = {
        "expert_count": experts.count,
        "expert_used_count": experts.chosen,
    }
    if arch.expert_ffn:
        keys["expert_feed_forward_length"] = _expert_ffn(model)
    if experts.score == "sigmoid":
        keys["expert_gating_func"] = 2  # llama.cpp's number for it
    if arch.leading_dense:
        keys["leading_dense_block_count"] = leading_dense(model.config)
    return keys


def _delta_keys(c: ModelConfig, rope: RopeSpec) -> dict[str, Any]:
    """The keys of gated delta nets, and of the sections of a rotation over three axes.

    A text has the same position on all three, so that any sections that fill the rotation do.
    """
    block = next(block for block in c.blocks if block.delta)
    assert block.delta is not None  # for which it was chosen
    pairs = rope.dim // 2
    first, second = -(-pairs // 3), -(-(pairs - 1) // 3)
    return {
        "ssm.conv_kernel": block.window,
        "ssm.inner_size": block.delta.values,
        "ssm.state_size": block.delta.value_dim,
        "ssm.time_step_rank": block.delta.value_heads,
        "ssm.group_count": block.delta.key_heads,
        "full_attention_interval": attention_interval(c),
        "rope.dimension_sections": [first, second, pairs - first - second, 0],
    }
