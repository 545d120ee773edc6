"""A GGUF file's metadata as a `ModelConfig`.

A key means what it means to llama.cpp, whose converters write them. What no key says is assumed as
llama.cpp assumes it (`edgeq.importers.gguf.architecture`).

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; llama.cpp's llama-model.cpp for
what is assumed where a key is absent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from edgeq.core.errors import FormatError, UnsupportedError
from edgeq.importers.gguf.architecture import MULTIPLIERS, SOFTCAPS, Architecture
from edgeq.importers.gguf.keys import Keys
from edgeq.importers.gguf.rope import TensorSource, read_rope
from edgeq.importers.gguf.value_heads import is_tiled
from edgeq.importers.unread import shown
from edgeq.model.block import BlockSpec, DeltaSpec, ExpertsSpec
from edgeq.model.config import ModelConfig
from edgeq.model.rope_spec import RopeSpec

_WINDOW = "{arch}.attention.sliding_window"
_PATTERN = "{arch}.attention.sliding_window_pattern"
_KV_HEADS = "{arch}.attention.head_count_kv"
_TAPS = "{arch}.shortconv.l_cache"
_GATING = "{arch}.expert_gating_func"
_LEADING_DENSE = "{arch}.leading_dense_block_count"
_GATINGS = {"softmax": 1, "sigmoid": 2}
"""Scores of experts -> llama.cpp's numbers for them."""
_SECTIONS = "{arch}.rope.dimension_sections"
_AHEAD = "{arch}.nextn_predict_layers"


def read_config(keys: Keys, family: str, arch: Architecture, source: TensorSource) -> ModelConfig:
    """Read the hyperparameters, and check that no key is left unread that may change them.

    Args:
        keys: the metadata.
        family: the family that files of the architecture are read as.
        arch: what llama.cpp computes for the architecture.
        source: the tensors, for the vocabulary's size and Llama 3.1's rotary factors.

    Raises:
        FormatError: a key or tensor is missing or impossible.
        UnsupportedError: a key or tensor that edgeq does not compute with.
    """
    if not len(source):
        raise FormatError(
            f"{keys.path} holds a vocabulary and no tensors; give the file with the model's weights"
        )
    ahead = layers_ahead(keys, arch)
    layers = keys.count("{arch}.block_count") - ahead
    for layer in range(layers, layers + ahead):
        if f"blk.{layer}.nextn.eh_proj.weight" not in source:
            raise FormatError(
                f"{keys.path}: {keys.name(_AHEAD)} is {ahead}, and tensor "
                f"blk.{layer}.nextn.eh_proj.weight of a layer that guesses tokens is missing"
            )
    if layers > len(source):
        raise FormatError(f"{keys.path} claims {layers} layers and holds {len(source)} tensors")
    hidden, heads = keys.count("{arch}.embedding_length"), keys.count("{arch}.attention.head_count")
    head_dim = keys.count("{arch}.attention.key_length", hidden // heads or 1)
    value_dim = keys.count("{arch}.attention.value_length", head_dim)
    if value_dim != head_dim:
        raise UnsupportedError(
            f"{keys.path}: {arch.name}.attention.value_length is {value_dim} and key_length is "
            f"{head_dim}; edgeq computes models whose keys and values have one length"
        )
    context = keys.count("{arch}.context_length")
    kv_heads, attends = _read_kv_heads(keys, arch, layers, heads)
    scale = arch.query_dim(layers, hidden, heads, head_dim) ** -0.5
    if "attn_scale" not in arch.multipliers:
        _check_scale(keys, scale)
    numbers = {
        "embed_scale": hidden**0.5 if arch.scaled_embeddings else 1.0,
        "attn_scale": scale,
        **_numbers(keys, arch),
    }
    config = ModelConfig(
        family=family,
        hidden=hidden,
        ffn=keys.count("{arch}.feed_forward_length"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=source["token_embd.weight"].shape[0],
        context=context,
        blocks=_read_blocks(keys, arch, source, attends, head_dim, context),
        norm_eps=keys.number("{arch}.attention.layer_norm_rms_epsilon"),
        activation=arch.activation,
        **numbers,
        tied="output.weight" not in source,
    )
    keys.check_unread()
    return config


def _read_blocks(
    keys: Keys,
    arch: Architecture,
    source: TensorSource,
    attends: Sequence[bool],
    head_dim: int,
    context: int,
) -> tuple[BlockSpec, ...]:
    layers = len(attends)
    rope = read_rope(keys, arch, source, head_dim, context)
    local = rope
    if arch.local_rope_base is not None:
        base = keys.number("{arch}.rope.freq_base_swa", arch.local_rope_base)
        local = RopeSpec(base, rope.dim)
    elif arch.local_unscaled:
        local = replace(rope, scaling=None)
    window = _window(keys, arch, layers, context)
    where = _window_layers(keys, arch, layers, window)
    experts = _read_experts(keys, arch, source, layers)
    dense = int(keys.number(_LEADING_DENSE, 0)) if arch.leading_dense else 0
    mixtures = tuple(experts if i >= dense else None for i in range(layers))
    other = None
    if arch.short_conv:
        other = BlockSpec(mixer="short_conv", rope=None, window=keys.count(_TAPS))
    elif arch.delta_net:
        other = _delta_net(keys)
        _check_sections(keys, rope.dim)
        interval = keys.count("{arch}.full_attention_interval", 4)
        attends = [(i + 1) % interval == 0 for i in range(layers)]
    return tuple(
        replace(other, experts=mixtures[i])
        if other and not attends[i]
        else BlockSpec(
            norm_before=arch.norm_before,
            norm_after=arch.norm_after,
            qk_norm=arch.qk_norm,
            qk_norm_last=arch.qk_norm_last,
            rope=(local if where[i] else rope) if arch.rope_layers(i, layers) else None,
            window=window if where[i] else None,
            experts=mixtures[i],
            output_gate=arch.output_gate,
            sinks=arch.sinks,
        )
        for i in range(layers)
    )


def _read_experts(
    keys: Keys, arch: Architecture, source: TensorSource, layers: int
) -> ExpertsSpec | None:
    """The experts of an architecture that has them; it divides their weights by their sum."""
    if arch.expert_score is None:
        return None
    kind = keys.number(_GATING, 0)
    if kind not in (0, _GATINGS[arch.expert_score]):
        raise UnsupportedError(
            f"{keys.path}: {keys.name(_GATING)} is {kind:g}; edgeq computes this architecture with "
            f"{_GATINGS[arch.expert_score]}, {arch.expert_score}"
        )
    normalized = keys.get("{arch}.expert_weights_norm", True)
    if normalized is not True:
        raise UnsupportedError(
            f"{keys.path}: {keys.name('{arch}.expert_weights_norm')} is {shown(normalized)}, and "
            "llama.cpp divides the weights of experts by their sum in this architecture"
        )
    scale = keys.number("{arch}.expert_weights_scale", 0.0)
    if scale not in (0, 1):
        raise UnsupportedError(
            f"{keys.path}: {keys.name('{arch}.expert_weights_scale')} is {scale:g}; edgeq computes "
            "this architecture with 1"
        )
    shared = keys.number("{arch}.expert_shared_feed_forward_length", 0)
    if shared:
        raise UnsupportedError(
            f"{keys.path}: the model has a shared expert of {shared:g}, which edgeq does not "
            "compute in this architecture"
        )
    chosen = keys.count("{arch}.expert_used_count")
    ffn = keys.count("{arch}.feed_forward_length")
    if arch.expert_ffn:
        ffn = keys.count("{arch}.expert_feed_forward_length", max(ffn // chosen, 1))
    return ExpertsSpec(
        count=keys.count("{arch}.expert_count"),
        chosen=chosen,
        ffn=ffn,
        score=arch.expert_score,
        choice_bias=any(f"blk.{i}.exp_probs_b.bias" in source for i in range(layers)),
        normalize=True,
        biases=arch.expert_biases,
    )


def layers_ahead(keys: Keys, arch: Architecture) -> int:
    """How many layers of a file guess tokens ahead; they follow the others."""
    return int(keys.number(_AHEAD, 0)) if arch.delta_net else 0


def _check_sections(keys: Keys, dim: int) -> None:
    """Check that every pair rotates by one of the three axes on which a text has its position.

    The pairs take turns; one past the number of its axis rotates by a fourth, which a text has not.
    """
    sections = keys.get(_SECTIONS) or [0]
    good = isinstance(sections, list) and all(type(n) is int and n >= 0 for n in sections)
    if good and not any(sections):
        return
    if not good or not all(
        pair % sum(sections) < 3 * [*sections, 0, 0][pair % sum(sections) % 3]
        for pair in range(dim // 2)
    ):
        raise UnsupportedError(
            f"{keys.path}: {keys.name(_SECTIONS)} is {shown(sections)}, by which not all of "
            f"{dim // 2} pairs rotate by the position of a text; edgeq computes with it for all"
        )


def _delta_net(keys: Keys) -> BlockSpec:
    """The layers that are gated delta nets."""
    size, key_heads = keys.count("{arch}.ssm.state_size"), keys.count("{arch}.ssm.group_count")
    heads, width = keys.count("{arch}.ssm.time_step_rank"), keys.count("{arch}.ssm.inner_size")
    if width != size * heads:
        raise FormatError(
            f"{keys.path}: {keys.name('{arch}.ssm.inner_size')} is {width}; it must be "
            f"{heads} heads of {size}"
        )
    if heads % key_heads:
        raise FormatError(
            f"{keys.path}: {keys.name('{arch}.ssm.group_count')} is {key_heads} and there are "
            f"{heads} value heads; these must be a multiple of it"
        )
    sizes = DeltaSpec(key_heads=key_heads, value_heads=heads, key_dim=size, value_dim=size)
    return BlockSpec(
        mixer="gated_delta_net",
        rope=None,
        window=keys.count("{arch}.ssm.conv_kernel"),
        delta=replace(sizes, tiled_out=is_tiled(sizes)),
    )


def _numbers(keys: Keys, arch: Architecture) -> dict[str, float]:
    """The multipliers and soft caps that the file states; llama.cpp leaves those at 0 out."""
    found = {}
    for name in arch.multipliers:
        assumed = None if arch.multipliers_required else 0.0
        value = keys.number(f"{{arch}}.{MULTIPLIERS[name]}", assumed)
        if value:
            found[name] = 1 / value if name == "logit_scale" else value
    if arch.softcaps:
        for name, (key, default) in SOFTCAPS.items():
            cap = keys.number(f"{{arch}}.{key}", default)
            if not cap:
                raise UnsupportedError(
                    f"{keys.path}: {keys.name('{arch}.' + key)} is {cap:g}, by which llama.cpp "
                    "divides; remove the key if the model was trained with the usual "
                    f"{default:g}"
                )
            found[name] = cap
    return found


def _read_kv_heads(
    keys: Keys, arch: Architecture, layers: int, heads: int
) -> tuple[int, list[bool]]:
    """Key/value heads of a layer with attention, and which layers have it.

    A file of an architecture with short convolutions says it in an array, with 0 for those.
    """
    numbers = keys.get(_KV_HEADS)
    if not (arch.short_conv and isinstance(numbers, list)):
        return keys.count(_KV_HEADS, heads), [True] * layers
    kinds = set(numbers) - {0}
    whole = all(type(number) is int and 0 <= number <= heads for number in numbers)
    if not whole or len(numbers) != layers or len(kinds) != 1:
        raise FormatError(
            f"{keys.path}: {keys.name(_KV_HEADS)} is {shown(numbers)}; expected one number for "
            f"each of {layers} layers, 0 for those without attention and the same for all others"
        )
    return kinds.pop(), [number > 0 for number in numbers]


def _check_scale(keys: Keys, assumed: float) -> None:
    scale = keys.number("{arch}.attention.scale", 0.0)
    if scale and not math.isclose(scale, assumed, rel_tol=1e-5):
        raise UnsupportedError(
            f"{keys.path}: {keys.name('{arch}.attention.scale')} is {scale:g}; edgeq computes this "
            f"architecture with {assumed:g}, as llama.cpp does"
        )


def _window(keys: Keys, arch: Architecture, layers: int, context: int) -> int | None:
    """The sliding window.

    Phi-3's is applied as Transformers applies it and as the model was trained, although llama.cpp
    leaves it off.
    """
    has = arch.windows_of(layers) != "none"
    window = int(keys.number(_WINDOW, arch.default_window if has else 0)) or None
    if window is None or has:
        return window
    if window < context:
        raise UnsupportedError(
            f"{keys.path}: {keys.name(_WINDOW)} is {window}, and llama.cpp runs this architecture "
            "without a window; import the Hugging Face checkpoint if the model was trained with "
            "one, or remove the key (gguf-new-metadata --remove-metadata) if it was not"
        )
    return None


def _window_layers(
    keys: Keys, arch: Architecture, layers: int, window: int | None
) -> tuple[bool, ...]:
    """Which layers have a window: all, or all but every so-many-th, or as an array says."""
    if arch.windows_of(layers) in ("none", "all"):
        return (window is not None,) * layers
    pattern = keys.get(_PATTERN)
    if window is None:
        return (False,) * layers
    if isinstance(pattern, list):
        if len(pattern) != layers or not all(isinstance(one, bool) for one in pattern):
            raise FormatError(
                f"{keys.path}: {keys.name(_PATTERN)} is {shown(pattern)}; expected a bool for each "
                "layer"
            )
        return tuple(pattern)
    period = keys.count(_PATTERN, arch.window_period)
    return tuple((i + 1) % period != 0 for i in range(layers))
