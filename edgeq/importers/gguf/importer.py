"""GGUF files: llama, qwen2, qwen3, gemma3 and phi3 architectures, tokenizer included.

Tensors stay as they lie in the mapped file; rows of a quantized one are turned to float32 by the
`gguf` package when they are asked for, bit for bit as that package does it. What GGUF changed of
a Hugging Face checkpoint is changed back (rotary order of the llama architecture, fused Phi-3
projections) or said in the config (Gemma's norm weights already hold their offset of one).

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; llama.cpp's
convert_hf_to_gguf.py for what is changed on the way in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import FormatError, MissingDependencyError, UnsupportedError
from edgeq.formats.tensor import FloatTensor, FloatType, Tensor
from edgeq.importers.gguf.config import Keys, read_config
from edgeq.importers.gguf.file import GgufFile, open_gguf
from edgeq.importers.gguf.names import gguf_name
from edgeq.importers.gguf.tokenizer import end_tokens, tokenizer_files
from edgeq.importers.lazy import half_split
from edgeq.importers.unread import listed
from edgeq.model.config import ModelConfig
from edgeq.model.model import Model

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3", "phi3")
_FLOATS: dict[str, Any] = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}

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
    keys = Keys(path, file.metadata)
    kind = keys.get("general.type", "model")
    if kind != "model":
        raise UnsupportedError(
            f"{path} is a GGUF file of type {kind!r} and no model; give the model's own file (a "
            "LoRA adapter is merged into its model by llama-export-lora)"
        )
    architecture = keys.text("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UnsupportedError(
            f"{path}: general.architecture is {architecture!r}, which edgeq does not run; it runs "
            f"{', '.join(ARCHITECTURES)}"
        )
    if keys.number("split.count", 1) > 1:
        raise UnsupportedError(
            f"{path} is one of {keys.number('split.count'):.0f} parts; "
            "join them with llama-gguf-split --merge"
        )
    source = Tensors(path, file)
    if source.quantized and not headers_only:
        _gguf()
    config = read_config(keys, architecture, source)
    files: dict[str, bytes] = {}
    if not headers_only:
        files, vocabulary = tokenizer_files(file.metadata)
        if vocabulary is not None:
            if len(vocabulary.tokens) > config.vocab:
                raise FormatError(
                    f"{path} lists {len(vocabulary.tokens)} tokens and its embeddings hold "
                    f"{config.vocab}; the two are of different models"
                )
            ends = end_tokens(file.metadata, vocabulary)
            config = replace(config, bos=vocabulary.bos, eos=ends)
    tensors = _tensors(config, architecture, source)
    source.check_all_read(config)
    model = Model(config, tensors, files, {"source": path.name})
    model.validate()
    return model


class Tensors:
    """A file's tensors by GGUF's names, as edgeq's."""

    def __init__(self, path: Path, file: GgufFile) -> None:
        self.path = path
        self.file = file
        self.quantized = any(entry.type not in _FLOATS for entry in file.tensors.values())
        self._read: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self.file.tensors

    def __len__(self) -> int:
        return len(self.file.tensors)

    def __getitem__(self, name: str) -> FloatTensor | GgufTensor:
        entry = self.file.tensors.get(name)
        if entry is None:
            raise FormatError(f"{self.path}: tensor {name} is missing")
        self._read.add(name)
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

    def check_all_read(self, config: ModelConfig) -> None:
        """Refuse tensors that nothing has read.

        Raises:
            UnsupportedError: says how many there are, and names the first.
        """
        left = [name for name in self.file.tensors if name not in self._read]
        if left:
            raise UnsupportedError(
                f"{self.path} holds {len(left)} tensors that edgeq's {config.family} decoder of "
                f"{config.layers} layers does not use: {listed(left)}; the model that was trained "
                "with them computes something else than edgeq would"
            )

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


def _tensors(config: ModelConfig, architecture: str, source: Tensors) -> dict[str, Tensor]:
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
    # some files of the phi3 architecture hold q, k and v apart
    apart = "blk.0.attn_qkv.weight" not in source
    tensors: dict[str, Tensor] = {}
    for name in names:
        stored = gguf_name(name, plain)
        part = stored.split(".")[-2]
        if architecture == "phi3" and part in fused and not (apart and part.startswith("attn")):
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
