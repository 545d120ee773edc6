"""The tensors and metadata of a GGUF file, and which models llama.cpp would compute wrongly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from edgeq._version import __version__
from edgeq.converters.encoding import Container, encode
from edgeq.converters.gguf.blocks import exact_type
from edgeq.converters.gguf.bytes import Kind, TensorEntry, minimum_is_exact
from edgeq.converters.gguf.rope import factor_tensors, rope_in_file, rope_is_known, rope_keys
from edgeq.converters.options import Options
from edgeq.converters.validate.kernels import GGML_BLOCK
from edgeq.core.errors import UnsupportedError
from edgeq.formats.packing import round_up
from edgeq.formats.schemes import FLOAT_TAGS
from edgeq.formats.tensor import FloatTensor, QuantTensor
from edgeq.importers.gguf.architecture import MULTIPLIERS, SOFTCAPS, Architecture
from edgeq.importers.huggingface.families import FAMILIES
from edgeq.importers.sentence_modules import gguf_pooling_type
from edgeq.model.block import (
    DOWN_PROJ,
    GATE_PROJ,
    Q_PROJ,
    UP_PROJ,
    RopeSpec,
    expert_part,
    of_any_expert,
    tensor_name,
)
from edgeq.model.config import ModelConfig
from edgeq.model.model import Model

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


def check_family(model: Model) -> None:
    """Refuse a model that llama.cpp would compute otherwise.

    Raises:
        UnsupportedError: names what differs.
    """
    c = model.config
    arch = architecture(c)
    attending = [block for block in c.blocks if block.mixer == "attention"]
    taps = {block.window for block in c.blocks if block.mixer == "short_conv"}
    qk_norms = {block.qk_norm for block in attending}
    last = {block.qk_norm_last for block in attending}
    norms = {(block.norm_before, block.norm_after) for block in c.blocks}
    rope, window = full_rope(c), first_window(c)
    rotating = [block.rope is not None for block in attending]
    rotates = [
        arch.rope_layers(i, c.layers)
        for i, block in enumerate(c.blocks)
        if block.mixer == "attention"
    ]
    embed_scale = math.sqrt(c.hidden) if arch.scaled_embeddings else 1.0
    # name -> whether llama.cpp computes with another value, and the model's value
    wrong: dict[str, tuple[bool, Any]] = {
        "activation": (c.activation != arch.activation, c.activation),
        "qk_norm": (qk_norms != {arch.qk_norm}, qk_norms),
        "qk_norm_last": (last != {arch.qk_norm_last}, last),
        "norm_before, norm_after": (norms != {(arch.norm_before, arch.norm_after)}, norms),
        "embed_scale": (
            "embed_scale" not in arch.multipliers
            and not math.isclose(c.embed_scale, embed_scale, rel_tol=1e-4),
            c.embed_scale,
        ),
        "residual_scale": (
            "residual_scale" not in arch.multipliers and c.residual_scale != 1,
            c.residual_scale,
        ),
        "logit_scale": (
            "logit_scale" not in arch.multipliers and c.logit_scale != 1,
            c.logit_scale,
        ),
        **{
            name: ((getattr(c, name) is not None) != arch.softcaps, getattr(c, name))
            for name in SOFTCAPS
        },
        "attn_scale": (
            qk_norms == {None} and not math.isclose(c.attn_scale, assumed_scale(c)),
            c.attn_scale,
        ),
        "choice of the layers that rotate": (
            rotating != rotates,
            [int(rotates) for rotates in rotating],
        ),
        "rope dim": (not arch.partial_rope and rope.dim != c.head_dim, rope.dim),
        "rope scaling": (not rope_is_known(c, arch), [rope.scaling for rope in c.block_ropes]),
        "query temperature": (bool(rope.temperature) and not arch.temperature, rope.temperature),
        "rope": (_foreign_ropes(c), list(c.block_ropes)),
        "window": (_foreign_pattern(c), window),
        "head_dim": (arch.heads_span_hidden and c.heads * c.head_dim != c.hidden, c.head_dim),
        "tied": ((arch.untied and c.tied) or (arch.tied and not c.tied), c.tied),
        "mixture of experts": (
            _foreign_experts(c, arch),
            _experts_in_words(c),
        ),
        "number of taps of short convolutions": (len(taps) != int(arch.short_conv), taps),
        "output gate": (
            {block.output_gate for block in attending} - {arch.output_gate} != set(),
            not arch.output_gate,
        ),
        "gated delta net": (_foreign_deltas(c), [block.delta for block in c.blocks]),
    }
    for name, (is_wrong, value) in wrong.items():
        if is_wrong:
            raise UnsupportedError(
                f"llama.cpp's {arch.name} computes with another {name} than {value}"
            )
    biased = {n.split(".")[-2] for n, _ in c.biases() if n in model.tensors}
    if foreign := sorted(biased - set(arch.biases)):
        raise UnsupportedError(
            f"the model has biases on {', '.join(foreign)}, and llama.cpp's {arch.name} has none "
            "there"
        )


def _foreign_deltas(c: ModelConfig) -> bool:
    """Whether llama.cpp computes other gated delta nets, or in other layers.

    Its keys and values have one size. Where a key head serves several value heads, its order of
    these is another one, which edgeq does not write.
    """
    blocks = {block for block in c.blocks if block.delta}
    if not architecture(c).delta_net:
        return bool(blocks)
    sizes = [block.delta for block in blocks if block.delta]
    fit = all(d.key_heads == d.value_heads and d.key_dim == d.value_dim for d in sizes)
    return len(blocks) != 1 or not fit or _attention_interval(c) is None


def _attention_interval(c: ModelConfig) -> int | None:
    """n if every n-th layer has attention and no other; None if there is no such number."""
    for n in range(1, c.layers + 1):
        if all((b.mixer == "attention") == ((i + 1) % n == 0) for i, b in enumerate(c.blocks)):
            return n
    return None


def architecture(c: ModelConfig) -> Architecture:
    """What llama.cpp computes for the family of a model.

    Raises:
        UnsupportedError: llama.cpp does not have the family.
    """
    family = FAMILIES.get(c.family)
    if family is None or family.gguf is None:
        known = [name for name, family in FAMILIES.items() if family.gguf]
        raise UnsupportedError(
            f"edgeq writes GGUF files of {', '.join(known)}; the model is {c.family}"
        )
    return family.gguf


def assumed_scale(c: ModelConfig) -> float:
    """The factor on attention scores that llama.cpp computes with."""
    if "attn_scale" in architecture(c).multipliers:
        return c.attn_scale
    dim = architecture(c).query_dim(c.layers, c.hidden, c.heads, c.head_dim)
    return float(dim**-0.5)


def full_rope(c: ModelConfig) -> RopeSpec:
    """The rotary embedding of the layers without a window, or of the first layer."""
    ropes = [block.rope for block in c.blocks if block.rope and block.window is None]
    return ropes[0] if ropes else c.ropes[0]


def first_window(c: ModelConfig) -> int | None:
    """The sliding window of the layers that have one."""
    windows = (block.window for block in c.blocks if block.mixer == "attention")
    return next((window for window in windows if window), None)


def file_context(c: ModelConfig, options: Options) -> int:
    """The context that the file states: what is asked for, as far as llama.cpp computes it."""
    return min(c.context, options.context or c.context, foreign_window(c) or c.context)


def _period(c: ModelConfig) -> int | None:
    """The period of the layers that see all positions; None if these are not every n-th."""
    for period in range(2, c.layers + 2):
        if all((b.window is None) == ((i + 1) % period == 0) for i, b in enumerate(c.blocks)):
            return period
    return None


def _foreign_pattern(c: ModelConfig) -> bool:
    """Whether llama.cpp cannot give windows to the layers that have them."""
    kind = architecture(c).windows_of(c.layers)
    if kind == "optional" and first_window(c) is None:
        return False
    return kind in ("period", "optional") and (first_window(c) is None or _period(c) is None)


def _foreign_ropes(c: ModelConfig) -> bool:
    """Whether llama.cpp cannot rotate the layers with a window otherwise than the others."""
    arch = architecture(c)
    if arch.local_unscaled:
        plain = replace(full_rope(c), scaling=None)
        return any(block.rope != plain for block in c.blocks if block.rope and block.window)
    return len(c.block_ropes) > (1 if arch.local_rope_base is None else 2)


def foreign_window(c: ModelConfig) -> int | None:
    """The sliding window of a family that llama.cpp runs without one."""
    kind = architecture(c).windows_of(c.layers)
    return None if kind in ("period", "optional") else first_window(c)


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
        stacked = len(names) if of_any_expert(names[0])[1] else 0
        entry = TensorEntry(target, kind, (sum(heights), k), stacked)
        by_head = c.heads if arch.output_gate and len(names) > 1 else 0
        heads = tuple(_heads(c, n) for n in names)
        placed.append(Placed(entry, tuple(names), tuple(heights), heads, by_head))
    vectors = [(n, s) for n, s in c.norms()]
    vectors += [(n, s) for n, s in c.biases() if n in model.tensors]
    vectors += list(c.choice_biases())
    for name, shape in vectors:
        entry = TensorEntry(arch.tensor_name(name), "F32", shape)
        placed.append(Placed(entry, (name,), shape, (_heads(c, name),)))
    for name, (channels, _, taps) in c.convolutions():
        entry = TensorEntry(arch.tensor_name(name), "F32", (channels, taps))
        placed.append(Placed(entry, (name,), (channels,), (0,)))
    for name, size in c.delta_vectors():
        placed.append(Placed(TensorEntry(arch.tensor_name(name), "F32", size), (name,), size, (0,)))
    for name, factors in factor_tensors(full_rope(c)).items():
        placed.append(Placed(TensorEntry(name, "F32", factors.shape), (), (), ()))
    return placed


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
        ours["attention.sliding_window_pattern"] = _period(c)
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


def leading_dense(c: ModelConfig) -> int:
    """How many layers there are before the first with experts."""
    return next(i for i, block in enumerate(c.blocks) if block.experts is not None)


def _experts_in_words(c: ModelConfig) -> str:
    """The experts of a model and the layers that have them, for a message."""
    if c.experts is None:
        return "none"
    where = [i for i, block in enumerate(c.blocks) if block.experts is not None]
    kind = f"{c.experts.score}, {'' if c.experts.normalize else 'not '}divided by their sum"
    return (
        f"{c.experts.chosen} of {c.experts.count} ({kind}, times {c.experts.scale:g}, "
        f"{'with' if c.experts.choice_bias else 'without'} a bias) in {len(where)} of {c.layers} "
        f"layers from layer {where[0]}"
    )


def _foreign_experts(c: ModelConfig, arch: Architecture) -> bool:
    """Whether llama.cpp would weight or place the experts otherwise, or has none."""
    experts = c.experts
    if experts is None or arch.expert_score is None:
        return (experts is None) != (arch.expert_score is None)
    first = leading_dense(c) if arch.leading_dense else 0
    return (
        any((block.experts is None) != (i < first) for i, block in enumerate(c.blocks))
        or (experts.score, experts.normalize, experts.scale) != (arch.expert_score, True, 1)
        or experts.choice_bias != (experts.score == "sigmoid")
    )


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
        "full_attention_interval": _attention_interval(c),
        "rope.dimension_sections": [first, second, pairs - first - second, 0],
    }
