"""Which models llama.cpp would compute otherwise, and what it assumes of the others."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from edgeq.converters.gguf.rope import rope_is_known
from edgeq.converters.mixers import check_uniform
from edgeq.core.errors import UnsupportedError
from edgeq.importers.gguf.architecture import SOFTCAPS, Architecture
from edgeq.importers.huggingface.families import FAMILIES
from edgeq.model.config import ModelConfig
from edgeq.model.model import Model
from edgeq.model.rope_spec import RopeSpec


def check_family(model: Model) -> None:
    """Refuse a model that llama.cpp would compute otherwise.

    Raises:
        UnsupportedError: names what differs.
    """
    c = model.config
    arch = architecture(c)
    check_uniform(c, "llama.cpp")
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
    _check_yarn(c)
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
        "attention sinks": (
            {block.sinks for block in attending} - {arch.sinks} != set(),
            not arch.sinks,
        ),
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
    if arch.biases_required and (missing := sorted(set(arch.biases) - biased)):
        raise UnsupportedError(
            f"the model has no biases on {', '.join(missing)}, and llama.cpp's {arch.name} does "
            "not run without them"
        )
    if foreign := sorted(biased - set(arch.biases)):
        raise UnsupportedError(
            f"the model has biases on {', '.join(foreign)}, and llama.cpp's {arch.name} has none "
            "there"
        )


def _check_yarn(c: ModelConfig) -> None:
    """Refuse yarn whose limits are not rounded, as those of gpt-oss.

    Raises:
        UnsupportedError: says what to change to get what llama.cpp computes.
    """
    scalings = (rope.scaling for rope in c.block_ropes)
    if any(s is not None and s.kind == "yarn" and not s.truncate for s in scalings):
        raise UnsupportedError(
            "the model stretches rotary positions by yarn with limits that are not rounded "
            "(truncate false), and llama.cpp rounds them, which moves some frequencies by a few "
            "percent; for a file of what llama.cpp computes, as its own converter writes it, set "
            "truncate to true in rope_scaling of config.json and convert again"
        )


def _foreign_deltas(c: ModelConfig) -> bool:
    """Whether llama.cpp computes other gated delta nets, or in other layers.

    Its keys and values have one size.
    """
    blocks = {block for block in c.blocks if block.delta}
    if not architecture(c).delta_net:
        return bool(blocks)
    sizes = [block.delta for block in blocks if block.delta]
    fit = all(d.key_dim == d.value_dim for d in sizes)
    return len(blocks) != 1 or not fit or attention_interval(c) is None


def attention_interval(c: ModelConfig) -> int | None:
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


def period(c: ModelConfig) -> int | None:
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
    return kind in ("period", "optional") and (first_window(c) is None or period(c) is None)


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
        f"{'with' if c.experts.choice_bias else 'without'} a bias to choose, "
        f"{'with' if c.experts.biases else 'without'} biases of the matrices) in {len(where)} of "
        f"{c.layers} layers from layer {where[0]}"
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
        or experts.biases != arch.expert_biases
    )
