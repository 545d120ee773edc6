"""A GGUF file's metadata as a `ModelConfig`.

A key means what it means to llama.cpp, whose converters write them. Every key of the architecture
(``llama.*`` in a llama file) is read here, known to leave the arithmetic alone, at the value that
switches it off, or refused by its name.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; llama.cpp's llama-model.cpp for
what is assumed where a key is absent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import FormatError, UnsupportedError
from edgeq.formats.tensor import Tensor
from edgeq.importers.unread import is_harmless, refusal, shown
from edgeq.model.block import BlockSpec, RopeScaling, RopeSpec
from edgeq.model.config import ModelConfig
from edgeq.model.formulas import rope_frequencies

_GLOBAL_EVERY = 6
"""Gemma 3: one layer in six attends to everything, where a file does not say otherwise."""
_LOCAL_THETA = 10_000.0
_NO_WINDOW = ("llama", "qwen2", "qwen3")
"""Architectures that have no sliding window in llama.cpp, whatever a file says."""
_SCALING_TYPE, _SCALING_FACTOR = "{arch}.rope.scaling.type", "{arch}.rope.scaling.factor"
_OLD_FACTOR = "{arch}.rope.scale_linear"
_WINDOW = "{arch}.attention.sliding_window"
_PATTERN = "{arch}.attention.sliding_window_pattern"
_HARMLESS = frozenset(
    (
        "vocab_size",
        "pooling_type",
        "rope.scaling.original_context_length",
        "rope.scaling.finetuned",
        "decoder_start_token_id",
    )
)
_ONLY: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "tensor_data_layout": ("Meta AI original pth", "reference"),
}
"""Keys that are harmless at these values alone."""
_ORIGINAL_CONTEXTS = tuple(1 << power for power in range(4, 21))


class Tensors(Protocol):
    """A file's tensors by GGUF's names."""

    def __contains__(self, name: str) -> bool:
        """Whether there is a tensor of that name."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of that name."""


class Keys:
    """Checked access to metadata; ``{arch}`` in a key stands for the architecture.

    Attributes:
        path: the file, for messages.
        metadata: its keys.
        read: the keys that have been asked for.
    """

    def __init__(self, path: Path, metadata: Mapping[str, Any]) -> None:
        self.path = path
        self.metadata = metadata
        self.read: set[str] = set()

    def name(self, key: str) -> str:
        """The key as it stands in the file."""
        return key.replace("{arch}", str(self.metadata.get("general.architecture")))

    def get(self, key: str, default: Any = None) -> Any:
        """The value, or a default where the key is absent."""
        self.read.add(self.name(key))
        return self.metadata.get(self.name(key), default)

    def text(self, key: str) -> str:
        """A value that must be text."""
        value = self.get(key)
        if not isinstance(value, str):
            self._refuse(key, value, "text")
        return str(value)

    def number(self, key: str, default: float | None = None) -> float:
        """A number, finite and not negative; of a per-layer array, the one all layers share."""
        value = self.get(key, default)
        if isinstance(value, list) and len({str(part) for part in value}) == 1:
            value = value[0]
        elif isinstance(value, list):
            raise UnsupportedError(
                f"{self.path}: {self.name(key)} differs from layer to layer, which edgeq does not "
                "compute; it computes models whose layers have one size"
            )
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not 0 <= value < math.inf
        ):
            self._refuse(key, value, "a number")
        return float(value) if isinstance(value, float) else value

    def count(self, key: str, default: int | None = None) -> int:
        """A positive whole number."""
        value = self.number(key, default)
        if value != int(value) or not 0 < value < 1 << 31:
            self._refuse(key, value, "a positive whole number")
        return int(value)

    def check_unread(self) -> None:
        """Refuse keys of the architecture that nothing has read and that may change arithmetic.

        Raises:
            UnsupportedError: names them and their values.
        """
        start = self.name("{arch}.")
        offenders = {}
        for key, value in self.metadata.items():
            if not key.startswith(start) or key in self.read:
                continue
            own = key.removeprefix(start)
            if own in _ONLY:
                harmless = value in _ONLY[own]
            else:
                harmless = own in _HARMLESS or is_harmless(own, value)
            if not harmless:
                offenders[key] = value
        if offenders:
            raise UnsupportedError(f"{self.path}: {refusal(offenders)}")

    def _refuse(self, key: str, value: Any, expected: str) -> None:
        name = self.name(key)
        if value is None:
            raise FormatError(f"{self.path}: {name} is missing; it must be {expected}")
        raise FormatError(f"{self.path}: {name} is {shown(value)}; it must be {expected}")


def read_config(keys: Keys, architecture: str, source: Tensors) -> ModelConfig:
    """Read the hyperparameters, and check that no key is left unread that may change them.

    Args:
        keys: the metadata.
        architecture: one that edgeq runs.
        source: the tensors, for the vocabulary's size and Llama 3.1's rotary factors.

    Raises:
        FormatError: a key or tensor is missing or impossible.
        UnsupportedError: a key or tensor that edgeq does not compute with.
    """
    if not len(source):
        raise FormatError(
            f"{keys.path} holds a vocabulary and no tensors; give the file with the model's weights"
        )
    layers = keys.count("{arch}.block_count")
    if layers > len(source):
        raise FormatError(f"{keys.path} claims {layers} layers and holds {len(source)} tensors")
    hidden, heads = keys.count("{arch}.embedding_length"), keys.count("{arch}.attention.head_count")
    head_dim = keys.count("{arch}.attention.key_length", hidden // heads or 1)
    value_dim = keys.count("{arch}.attention.value_length", head_dim)
    if value_dim != head_dim:
        raise UnsupportedError(
            f"{keys.path}: {architecture}.attention.value_length is {value_dim} and key_length is "
            f"{head_dim}; edgeq computes models whose keys and values have one length"
        )
    gemma = architecture == "gemma3"
    context = keys.count("{arch}.context_length")
    window = _window(keys, architecture, context)
    # Gemma 3 27B alone scales its queries by other than the head's size; no key says so
    scale_dim = hidden / heads if gemma and layers == 62 else head_dim
    _check_scale(keys, scale_dim**-0.5)
    # a Gemma 3 file must say its base: the model's is 1e6 and llama.cpp assumes 1e4
    base = keys.number("{arch}.rope.freq_base", None if gemma else 1e4) or 1e4
    local_base = keys.number("{arch}.rope.freq_base_swa", _LOCAL_THETA) if gemma else None
    rope = RopeSpec(base, keys.count("{arch}.rope.dimension_count", head_dim), _rope_scaling(keys))
    local = rope if local_base is None else RopeSpec(local_base, rope.dim)
    windows = _window_layers(keys, layers, window) if gemma else (window is not None,) * layers
    blocks = tuple(
        BlockSpec(
            norm_after=gemma,
            qk_norm="head" if architecture in ("qwen3", "gemma3") else None,
            rope=local if windowed else rope,
            window=window if windowed else None,
        )
        for windowed in windows
    )
    config = ModelConfig(
        family=architecture,
        hidden=hidden,
        ffn=keys.count("{arch}.feed_forward_length"),
        heads=heads,
        kv_heads=keys.count("{arch}.attention.head_count_kv", heads),
        head_dim=head_dim,
        vocab=source["token_embd.weight"].shape[0],
        context=context,
        blocks=blocks,
        norm_eps=keys.number("{arch}.attention.layer_norm_rms_epsilon"),
        activation="gelu_tanh" if gemma else "silu",
        embed_scale=hidden**0.5 if gemma else 1.0,
        attn_scale=scale_dim**-0.5,
        tied="output.weight" not in source,
    )
    if architecture != "phi3" and rope.dim != head_dim:
        raise UnsupportedError(
            f"{keys.path}: {architecture}.rope.dimension_count is {rope.dim} and heads have "
            f"{head_dim} dimensions; in the {architecture} architecture all of them rotate"
        )
    keys.check_unread()
    return _with_rope_tensors(keys, architecture, config, source)


def _check_scale(keys: Keys, assumed: float) -> None:
    scale = keys.number("{arch}.attention.scale", 0.0)
    if scale and not math.isclose(scale, assumed, rel_tol=1e-5):
        raise UnsupportedError(
            f"{keys.path}: {keys.name('{arch}.attention.scale')} is {scale:g}; edgeq computes this "
            f"architecture with {assumed:g}, as llama.cpp does"
        )


def _window(keys: Keys, architecture: str, context: int) -> int | None:
    """The sliding window.

    Phi-3's is applied as Transformers applies it and as the model was trained, although llama.cpp
    leaves it off.
    """
    window = int(keys.number(_WINDOW, 0)) or None
    if window is None or architecture not in _NO_WINDOW:
        return window
    if window < context:
        raise UnsupportedError(
            f"{keys.path}: {keys.name(_WINDOW)} is {window}, and llama.cpp runs this architecture "
            "without a window; import the Hugging Face checkpoint if the model was trained with "
            "one, or remove the key (gguf-new-metadata --remove-metadata) if it was not"
        )
    return None


def _window_layers(keys: Keys, layers: int, window: int | None) -> tuple[bool, ...]:
    """Which layers of Gemma see a window: all but every so-many-th, or as an array says."""
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
    period = keys.count(_PATTERN, _GLOBAL_EVERY)
    return tuple((i + 1) % period != 0 for i in range(layers))


def _rope_scaling(keys: Keys) -> RopeScaling | None:
    """Linear stretching; where a factor is given without a type, the type is linear."""
    kind = keys.get(_SCALING_TYPE, "linear")
    old = keys.number(_OLD_FACTOR, 0.0)
    factor = keys.number(_SCALING_FACTOR, old)
    if kind == "none":
        return None
    if kind != "linear":
        raise UnsupportedError(
            f"{keys.path}: {keys.name(_SCALING_TYPE)} is {shown(kind)}, which edgeq does not "
            "compute; it computes none and linear"
        )
    return RopeScaling("linear", factor) if factor not in (0.0, 1.0) else None


def _with_rope_tensors(
    keys: Keys, architecture: str, config: ModelConfig, source: Tensors
) -> ModelConfig:
    for name in ("rope_factors_long.weight", "rope_factors_short.weight"):
        if name in source:
            raise UnsupportedError(
                f"{keys.path}: the tensor {name} stretches rotary positions by the longrope "
                "method, which edgeq does not compute; it computes none, linear and Llama 3.1's"
            )
    if "rope_freqs.weight" not in source or architecture != "llama":
        return config  # in another architecture llama.cpp reads no such tensor, and nor do we
    factors = source["rope_freqs.weight"].numpy()
    (rope,) = config.ropes
    scaling = _llama3_scaling(rope, factors)
    if scaling is not None and rope.scaling is not None:
        raise UnsupportedError(
            f"{keys.path} stretches rotary positions twice, by {keys.name(_SCALING_FACTOR)} and by "
            "the tensor rope_freqs.weight; edgeq computes one of them"
        )
    whole = factors.shape == (rope.dim // 2,)
    if scaling is None and not (whole and (factors == 1).all()):
        raise UnsupportedError(
            f"{keys.path}: rope_freqs.weight holds frequency factors other than those of Llama 3.1;"
            " import the Hugging Face checkpoint instead"
        )
    if scaling is None:
        return config
    rope = replace(rope, scaling=scaling)
    return replace(config, blocks=tuple(replace(block, rope=rope) for block in config.blocks))


def _llama3_scaling(rope: RopeSpec, factors: NDArray[np.float32]) -> RopeScaling | None:
    """Find Llama 3.1's numbers behind the frequency divisors that GGUF stores instead."""
    if factors.shape != (rope.dim // 2,) or not np.isfinite(factors).all():
        return None
    if (factors == 1).all() or factors.max() <= 0:
        return None
    plain = rope_frequencies(replace(rope, scaling=None))
    # most files are of Llama 3.1 itself
    for original in sorted(_ORIGINAL_CONTEXTS, key=lambda context: context != 8192):
        scaling = RopeScaling("llama3", float(factors.max()), original_context=original)
        stretched = rope_frequencies(replace(rope, scaling=scaling))
        if np.allclose(plain / stretched, factors, rtol=1e-4):
            return scaling
    return None
