"""GGUF files: llama, qwen2, qwen3, gemma3 and phi3 architectures, tokenizer included.

Tensors stay as they lie in the mapped file; rows of a quantized one are turned to float32 by the
`gguf` package when they are asked for, bit for bit as that package does it. What GGUF changed of
a Hugging Face checkpoint is changed back (rotary order of the llama architecture, fused Phi-3
projections) or said in the config (Gemma's norm weights already hold their offset of one).

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; llama.cpp's
convert_hf_to_gguf.py for what is changed on the way in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from edgeq.errors import FormatError, MissingDependencyError, UnsupportedError, unknown
from edgeq.importers.gguf_file import GgufFile, open_gguf
from edgeq.importers.gguf_names import gguf_name
from edgeq.importers.gguf_tokenizer import end_tokens, tokenizer_files
from edgeq.importers.lazy import half_split
from edgeq.model import Model, ModelConfig, RopeScaling
from edgeq.reference import rope_frequencies
from edgeq.tensor import FloatTensor, FloatType, Tensor

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3", "phi3")
_FLOATS: dict[str, Any] = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_GLOBAL_EVERY = 6
"""Gemma 3: one layer in six attends to everything, where a file does not say otherwise."""

Dequantize = Callable[[NDArray[np.uint8], str], NDArray[np.float32]]


@dataclass(frozen=True, eq=False)
class GgufTensor:
    """A quantized matrix in a mapped GGUF file.

    Args:
        type: GGUF's name of its type, as "Q4_K".
        data: uint8 [N, bytes of a row], a view of the file.
        columns: K, the weights of a row.
        dequantize: turns rows of bytes to float32.
    """

    type: str
    data: NDArray[np.uint8]
    columns: int
    dequantize: Dequantize

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.data.shape[0], self.columns

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.data.nbytes

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows ``start:stop`` as float32; no others are touched."""
        part = self.data[start:stop]
        if not len(part):
            return np.empty((0, self.columns), np.float32)
        return self.dequantize(part, self.type)

    def numpy(self) -> NDArray[np.float32]:
        """The whole matrix as float32."""
        return self.rows(0, self.data.shape[0])


def load(path: str | Path, *, headers_only: bool = False) -> Model:
    """Open a GGUF file.

    Args:
        path: the file.
        headers_only: make no tokenizer of its vocabulary, and do not ask for the package that
            reads quantized tensors before one is read.

    Raises:
        FormatError: the file is truncated or damaged, or a key or tensor is missing.
        UnsupportedError: an architecture, tensor type, tokenizer or option edgeq does not know.
        MissingDependencyError: quantized tensors, and no `gguf` package.
    """
    path = Path(path)
    file = open_gguf(path)
    keys = _Keys(path, file.metadata)
    architecture = keys.text("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UnsupportedError(
            f"{path}: {unknown('GGUF architecture', architecture, ARCHITECTURES)}"
        )
    if keys.number("split.count", 1) > 1:
        raise UnsupportedError(
            f"{path} is one of {keys.number('split.count'):.0f} parts; "
            "join them with llama-gguf-split --merge"
        )
    source = _Tensors(path, file)
    if source.quantized and not headers_only:
        _gguf()
    config = _config(keys, architecture, source)
    files: dict[str, bytes] = {}
    if not headers_only:
        files, vocabulary = tokenizer_files(file.metadata)
        if vocabulary is not None:
            ends = end_tokens(file.metadata, vocabulary)
            config = replace(config, bos=vocabulary.bos, eos=ends)
    tensors = _tensors(config, architecture, source)
    model = Model(config, tensors, files, {"source": path.name})
    model.validate()
    return model


class _Keys:
    """Checked access to metadata; ``{arch}`` in a key stands for the architecture."""

    def __init__(self, path: Path, metadata: Mapping[str, Any]) -> None:
        self.path = path
        self.metadata = metadata

    def get(self, key: str, default: Any = None) -> Any:
        arch = self.metadata.get("general.architecture")
        return self.metadata.get(key.replace("{arch}", str(arch)), default)

    def text(self, key: str) -> str:
        value = self.get(key)
        if not isinstance(value, str):
            raise FormatError(f"{self.path}: {key} is {value!r}; expected text")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number, finite and not negative; of a per-layer array, the one all layers share."""
        value = self.get(key, default)
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]
        elif isinstance(value, list):
            raise UnsupportedError(f"{self.path}: {key} differs from layer to layer")
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not 0 <= value < math.inf
        ):
            raise FormatError(f"{self.path}: {key} is {value!r}; expected a number")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        value = self.number(key, default)
        if value != int(value) or not 0 < value < 1 << 31:
            raise FormatError(f"{self.path}: {key} is {value!r}; expected a positive whole number")
        return int(value)


class _Tensors:
    """A file's tensors by GGUF's names, as edgeq's."""

    def __init__(self, path: Path, file: GgufFile) -> None:
        self.path = path
        self.file = file
        self.quantized = any(entry.type not in _FLOATS for entry in file.tensors.values())

    def __contains__(self, name: str) -> bool:
        return name in self.file.tensors

    def __getitem__(self, name: str) -> FloatTensor | GgufTensor:
        entry = self.file.tensors.get(name)
        if entry is None:
            raise FormatError(f"{self.path}: tensor {name} is missing")
        if entry.type in _FLOATS:
            data = self.file.mapping.array(_FLOATS[entry.type], entry.shape, entry.start)
            return FloatTensor(cast(FloatType, entry.type), data)
        if len(entry.shape) != 2:
            raise FormatError(
                f"{self.path}: tensor {name} {list(entry.shape)} is not a matrix and has type "
                f"{entry.type}; expected F32"
            )
        n, k = entry.shape
        data = self.file.mapping.array(np.uint8, (n, entry.row_bytes), entry.start)
        return GgufTensor(entry.type, data, k, _dequantize)

    def part(self, name: str, start: int, stop: int, height: int) -> Tensor:
        """Rows ``start:stop`` of a fused matrix of ``height`` rows."""
        whole = self[name]
        if whole.shape[0] != height:
            raise FormatError(
                f"{self.path}: tensor {name} has {whole.shape[0]} rows; the config says {height}"
            )
        if isinstance(whole, GgufTensor):
            return replace(whole, data=whole.data[start:stop])
        return replace(whole, data=whole.data[start:stop])


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as err:
        raise MissingDependencyError("gguf", "gguf", "to read quantized GGUF tensors") from err
    return gguf


def _dequantize(data: NDArray[np.uint8], kind: str) -> NDArray[np.float32]:
    gguf = _gguf()
    with np.errstate(all="ignore"):  # a NaN scale is found by whoever uses the values
        values = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    return cast("NDArray[np.float32]", values)


def _window_layers(keys: _Keys, layers: int, window: int | None) -> tuple[bool, ...]:
    """Which layers of Gemma see a window: all but every so-many-th, or as an array says."""
    key = "{arch}.attention.sliding_window_pattern"
    pattern = keys.get(key)
    if window is None:
        return (False,) * layers
    if isinstance(pattern, list):
        if len(pattern) != layers or not all(isinstance(one, bool) for one in pattern):
            raise FormatError(f"{keys.path}: {key} is {pattern!r}; expected a bool for each layer")
        return tuple(pattern)
    period = keys.count(key, _GLOBAL_EVERY)
    return tuple((i + 1) % period != 0 for i in range(layers))


def _config(keys: _Keys, architecture: str, source: _Tensors) -> ModelConfig:
    for key in ("{arch}.expert_count", "{arch}.final_logit_softcapping"):
        if keys.number(key, 0):
            raise UnsupportedError(
                f"{keys.path}: {key.replace('{arch}', architecture)} is set, which edgeq cannot run"
            )
    layers = keys.count("{arch}.block_count")
    if layers > len(source.file.tensors):
        raise FormatError(
            f"{keys.path} claims {layers} layers and holds {len(source.file.tensors)} tensors"
        )
    hidden, heads = keys.count("{arch}.embedding_length"), keys.count("{arch}.attention.head_count")
    head_dim = keys.count("{arch}.attention.key_length", hidden // heads or 1)
    gemma = architecture == "gemma3"
    window = int(keys.number("{arch}.attention.sliding_window", 0)) or None
    # Gemma 3 27B alone scales its queries by other than the head's size; no key says so
    scale_dim = hidden / heads if gemma and layers == 62 else head_dim
    config = ModelConfig(
        family=architecture,
        hidden=hidden,
        ffn=keys.count("{arch}.feed_forward_length"),
        layers=layers,
        heads=heads,
        kv_heads=keys.count("{arch}.attention.head_count_kv", heads),
        head_dim=head_dim,
        vocab=source["token_embd.weight"].shape[0],
        context=keys.count("{arch}.context_length"),
        norm_eps=keys.number("{arch}.attention.layer_norm_rms_epsilon"),
        activation="gelu_tanh" if gemma else "silu",
        rope_theta=keys.number("{arch}.rope.freq_base", 1e6 if gemma else 1e4) or 1e4,
        rope_theta_local=keys.number("{arch}.rope.freq_base_swa", 1e4) if gemma else None,
        rope_dim=keys.count("{arch}.rope.dimension_count", head_dim),
        rope_scaling=_rope_scaling(keys),
        window=window,
        window_layers=_window_layers(keys, layers, window) if gemma else (),
        qk_norm=architecture in ("qwen3", "gemma3"),
        post_norms=gemma,
        embed_scale=hidden**0.5 if gemma else 1.0,
        attn_scale=scale_dim**-0.5,
        tied="output.weight" not in source,
    )
    if architecture == "llama" and config.rope_dim != head_dim:
        raise UnsupportedError(
            f"{keys.path}: only {config.rope_dim} of {head_dim} dimensions rotate, "
            "which no Llama checkpoint does"
        )
    for name in ("rope_factors_long.weight", "rope_factors_short.weight"):
        if name in source:
            raise UnsupportedError(
                f"{keys.path}: {name}: rope type 'longrope' is not supported "
                "(known: default, linear, llama3)"
            )
    if "rope_freqs.weight" in source:
        factors = source["rope_freqs.weight"].numpy()
        return replace(config, rope_scaling=_llama3_scaling(keys.path, config, factors))
    return config


def _rope_scaling(keys: _Keys) -> RopeScaling | None:
    kind = keys.get("{arch}.rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind != "linear":
        raise UnsupportedError(
            f"{keys.path}: {unknown('rope scaling type', str(kind), ('none', 'linear'))}"
        )
    factor = keys.number("{arch}.rope.scaling.factor", 1.0)
    return RopeScaling("linear", factor) if factor not in (0.0, 1.0) else None


def _llama3_scaling(
    path: Path, config: ModelConfig, factors: NDArray[np.float32]
) -> RopeScaling | None:
    """Find Llama 3.1's numbers behind the frequency divisors that GGUF stores instead."""
    if factors.shape == (config.rope_dim // 2,) and np.isfinite(factors).all():
        if (factors == 1).all():
            return config.rope_scaling
        scaling = RopeScaling("llama3", float(factors.max()))
        plain = rope_frequencies(replace(config, rope_scaling=None), False)
        with np.errstate(all="ignore"):
            stretched = rope_frequencies(replace(config, rope_scaling=scaling), False)
            if np.allclose(plain / stretched, factors, rtol=1e-4):
                return scaling
    raise UnsupportedError(
        f"{path}: rope_freqs.weight holds frequency factors other than those of Llama 3.1; "
        "import the Hugging Face checkpoint instead"
    )


def _tensors(config: ModelConfig, architecture: str, source: _Tensors) -> dict[str, Tensor]:
    # Phi-3's fused matrices are taken apart below, by the names they have elsewhere
    plain = "gemma3" if architecture == "gemma3" else "llama"
    names = [name for name, _ in (*config.linears(), *config.norms())]
    names += [n for n, _ in config.biases() if gguf_name(n, plain) in source]
    q, kv, ffn = config.heads * config.head_dim, config.kv_heads * config.head_dim, config.ffn
    fused = {  # Phi-3
        "attn_q": ("attn_qkv", 0, q, q + 2 * kv),
        "attn_k": ("attn_qkv", q, q + kv, q + 2 * kv),
        "attn_v": ("attn_qkv", q + kv, q + 2 * kv, q + 2 * kv),
        "ffn_gate": ("ffn_up", 0, ffn, 2 * ffn),
        "ffn_up": ("ffn_up", ffn, 2 * ffn, 2 * ffn),
    }
    tensors: dict[str, Tensor] = {}
    for name in names:
        stored = gguf_name(name, plain)
        part = stored.split(".")[-2]
        if architecture == "phi3" and part in fused:
            whole, start, stop, height = fused[part]
            tensors[name] = source.part(stored.replace(part, whole), start, stop, height)
        elif architecture == "llama" and part in ("attn_q", "attn_k"):
            heads = config.heads if part == "attn_q" else config.kv_heads
            tensor = source[stored]
            if tensor.shape[0] != heads * config.head_dim:
                raise FormatError(
                    f"{source.path}: tensor {stored} has {tensor.shape[0]} rows; "
                    f"the config says {heads} heads of {config.head_dim}"
                )
            tensors[name] = half_split(tensor, heads)
        else:
            tensors[name] = source[stored]
    return tensors
