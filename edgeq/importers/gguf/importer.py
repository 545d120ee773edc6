"""GGUF files of the architectures that families name, tokenizer included.

Tensors are views of the mapped file. The integers of quantized ones are kept as they are
(`edgeq.importers.gguf.blocks`). What GGUF changed of
a Hugging Face checkpoint is changed back (rotary order of the llama architecture, fused Phi-3
projections) or stated in the config (Gemma's norm weights already include their offset of one).

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; llama.cpp's
convert_hf_to_gguf.py for what is changed on the way in.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import FormatError, UnsupportedError
from edgeq.formats.kept import KeptTensor
from edgeq.formats.schemes import FloatType
from edgeq.formats.tensor import FloatTensor, QuantTensor, Tensor
from edgeq.importers.gguf.architecture import Architecture, may_be_separate, separate_name
from edgeq.importers.gguf.blocks import TYPES, quant_rows
from edgeq.importers.gguf.config import layers_ahead, read_config
from edgeq.importers.gguf.file import GgufFile, open_gguf
from edgeq.importers.gguf.keys import Keys
from edgeq.importers.gguf.tokenizer import end_tokens, tokenizer_files
from edgeq.importers.gguf.value_heads import file_rows
from edgeq.importers.huggingface.families import GGUF_FAMILIES
from edgeq.importers.lazy import GatheredRows, by_head_order, half_split, half_split_order
from edgeq.importers.sentence_modules import pooling_of_gguf
from edgeq.importers.unread import listed
from edgeq.model.config import ModelConfig
from edgeq.model.model import Model

_FLOATS: dict[str, tuple[FloatType, Any]] = {
    "F32": ("float32", "<f4"), "F16": ("float16", "<f2"), "BF16": ("bfloat16", "<u2"),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class GgufTensor(KeptTensor):
    """A quantized matrix in a mapped GGUF file.

    Args:
        data: uint8 [N, bytes of a row], a view of the file.
        order: int [N], which row of ``data`` each row is; None for that order.
    """

    data: NDArray[np.uint8]
    order: NDArray[np.intp] | None = None

    @property
    def source_format(self) -> str:
        """GGUF, whatever the type."""
        return "GGUF"

    def part(self, start: int, stop: int) -> GgufTensor:
        """Rows ``start:stop`` as a matrix of their own."""
        data = self.data[start:stop]
        return replace(self, shape=(len(data), self.shape[1]), nbytes=data.nbytes, data=data)

    def quantized(self, start: int, stop: int) -> QuantTensor:
        """Rows ``start:stop``, packed; no others are read."""
        part = self.data[start:stop] if self.order is None else self.data[self.order[start:stop]]
        return quant_rows(self.source_type, part, self.shape[1])


def load(path: str | Path, *, headers_only: bool = False) -> Model:
    """Open a GGUF file.

    Args:
        path: the file.
        headers_only: make no tokenizer of its vocabulary.

    Raises:
        FormatError: the file is truncated or damaged, or a key or tensor is missing.
        UnsupportedError: an architecture, tensor type, tokenizer or option edgeq does not know.
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
    name = keys.text("general.architecture")
    if name not in GGUF_FAMILIES:
        raise UnsupportedError(
            f"{path}: general.architecture is {name!r}, which edgeq does not run; it runs "
            f"{', '.join(GGUF_FAMILIES)}"
        )
    family = GGUF_FAMILIES[name]
    architecture = family.gguf
    assert architecture is not None  # by which it is listed
    if keys.number("split.count", 1) > 1:
        raise UnsupportedError(
            f"{path} is one of {keys.number('split.count'):.0f} parts; "
            "join them with llama-gguf-split --merge"
        )
    source = GgufTensors(path, file)
    config = read_config(keys, family.name, architecture, source)
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
            files |= pooling_of_gguf(keys.get("{arch}.pooling_type"))
    tensors = _tensors(config, architecture, source)
    ahead = source.check_all_read(config, layers_ahead(keys, architecture))
    provenance: dict[str, Any] = {"source": path.name}
    if ahead:
        provenance["left_out"] = [f"{ahead} tensors of layers that only guess tokens ahead"]
    model = Model(config, tensors, files, provenance)
    model.validate()
    return model


class GgufTensors:
    """A file's tensors by GGUF's names, as edgeq's."""

    def __init__(self, path: Path, file: GgufFile) -> None:
        self.path = path
        self.file = file
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
        shape = entry.shape
        axes = 3 if name.endswith("_exps.weight") else 2 if name.endswith("_exps.bias") else 0
        if len(shape) == axes:
            # of experts, one below the other
            shape = (shape[0] * shape[1], *shape[2:])
        if entry.type in _FLOATS:
            dtype, number = _FLOATS[entry.type]
            return FloatTensor(dtype, self.file.mapping.array(number, shape, entry.start))
        if len(shape) != 2:
            raise FormatError(
                f"{self.path}: tensor {name} {list(shape)} is not a matrix and has type "
                f"{entry.type}; expected F32"
            )
        n, k = shape
        data = self.file.mapping.array(np.uint8, (n, entry.row_bytes), entry.start)
        return GgufTensor(entry.type, TYPES[entry.type].scheme, (n, k), data.nbytes, data)

    def check_all_read(self, config: ModelConfig, layers_ahead: int = 0) -> int:
        """Refuse tensors that nothing has read.

        Args:
            config: of the model.
            layers_ahead: layers after those of the model, which only guess tokens ahead.

        Returns:
            How many tensors those layers have.

        Raises:
            UnsupportedError: says how many there are, and names the first.
        """
        after = tuple(f"blk.{config.layers + i}." for i in range(layers_ahead))
        unread = [name for name in self.file.tensors if name not in self._read]
        left = [name for name in unread if not name.startswith(after)] if after else unread
        if left:
            raise UnsupportedError(
                f"{self.path} holds {len(left)} tensors that edgeq's {config.family} decoder of "
                f"{config.layers} layers does not use: {listed(left)}; the model that was trained "
                "with them computes something else than edgeq would"
            )
        return len(unread)

    def part(self, name: str, start: int, stop: int, height: int) -> Tensor:
        """Rows ``start:stop`` of a fused matrix of ``height`` rows."""
        whole = self[name]
        if whole.shape[0] != height:
            raise FormatError(
                f"{self.path}: tensor {name} has {whole.shape[0]} rows; the config says {height}"
            )
        if isinstance(whole, GgufTensor):
            return whole.part(start, stop)
        return replace(whole, data=whole.data[start:stop])


def _tensors(config: ModelConfig, arch: Architecture, source: GgufTensors) -> dict[str, Tensor]:
    rows = {name: shape[0] for name, shape in config.linears()}
    stored_together: dict[str, list[str]] = {}
    for name in rows:
        stored_together.setdefault(arch.tensor_name(name), []).append(name)
    tensors: dict[str, Tensor] = {}
    for stored, names in stored_together.items():
        if len(names) == 1:
            tensors[names[0]] = _alone(names[0], stored, config, arch, source)
            continue
        if stored not in source and all(map(may_be_separate, names)):
            for name in names:
                tensors[name] = _alone(name, separate_name(name), config, arch, source)
            continue
        if arch.output_gate:
            for number, name in enumerate(names):
                tensors[name] = _by_head(name, number, len(names), stored, config, source)
            continue
        height, start = sum(rows[name] for name in names), 0
        for name in names:
            tensors[name] = source.part(stored, start, start + rows[name], height)
            start += rows[name]
    for name, _ in config.norms():
        tensors[name] = source[arch.tensor_name(name)]
    for name, shape in config.convolutions():
        tensors[name] = _taps(arch.tensor_name(name), source, shape)
    for name, _ in (*config.choice_biases(), *config.sinks()):
        tensors[name] = source[arch.tensor_name(name)]
    tensors |= _expert_biases(config, arch, source)
    for name, size in config.delta_vectors():
        tensors[name] = _delta_vector(name, size, source[arch.tensor_name(name)])
    for name, _ in config.biases():
        if may_be_separate(name) and separate_name(name) in source:
            tensors[name] = _alone(name, separate_name(name), config, arch, source)
    for name, tensor in tensors.items():
        order = file_rows(config, name)
        if order is not None and tensor.shape[0] == len(order):  # or it is refused later
            tensors[name] = _in_order(tensor, order)
    return tensors


def _expert_biases(
    config: ModelConfig, arch: Architecture, source: GgufTensors
) -> dict[str, Tensor]:
    """The biases of routers, and of experts, of which a file holds one for each expert as one."""
    sizes = dict(config.expert_biases())
    together: dict[str, list[str]] = {}
    for name in sizes:
        together.setdefault(arch.tensor_name(name), []).append(name)
    tensors: dict[str, Tensor] = {}
    for stored, names in together.items():
        (size,) = sizes[names[0]]
        for number, name in enumerate(names):
            first = number * size
            tensors[name] = source.part(stored, first, first + size, len(names) * size)
    return tensors


def _in_order(tensor: Tensor, order: NDArray[np.intp]) -> Tensor:
    """The rows of a tensor of a gated delta net, each from its place in the file."""
    if isinstance(tensor, GgufTensor):
        return replace(tensor, order=order)
    if len(tensor.shape) == 2:
        return GatheredRows(tensor, order)
    return FloatTensor("float32", tensor.numpy()[order])


def _by_head(
    name: str, number: int, count: int, stored: str, config: ModelConfig, source: GgufTensors
) -> Tensor:
    """One of the matrices that a file stores as one, head by head."""
    whole, n = source[stored], config.heads * config.head_dim
    if whole.shape[0] != n * count:
        raise FormatError(
            f"{source.path}: tensor {stored} has {whole.shape[0]} rows; {name} and others take "
            f"{n * count}, as the config says"
        )
    order = by_head_order(n, config.heads, number, count)
    if isinstance(whole, GgufTensor):
        shape = (n, whole.shape[1])
        return replace(whole, shape=shape, nbytes=whole.nbytes // count, order=order)
    return GatheredRows(whole, order)


def _delta_vector(name: str, size: tuple[int], tensor: Tensor) -> Tensor:
    """A vector of a gated delta net; files hold -e ** A_log."""
    if not name.endswith("A_log") or tuple(tensor.shape) != size:
        return tensor  # of another shape than the config says, which is refused later
    values = tensor.numpy()
    if not (values < 0).all():
        raise FormatError(f"{name} of the file is not below 0, as -e ** A_log is")
    return FloatTensor("float32", np.log(-values.astype(np.float64)).astype(np.float32))


def _taps(stored: str, source: GgufTensors, shape: tuple[int, int, int]) -> Tensor:
    """The weight of a depthwise convolution, which a file stores as [channels, taps]."""
    tensor, (channels, _, taps) = source[stored], shape
    if not isinstance(tensor, FloatTensor) or tensor.shape != (channels, taps):
        raise FormatError(
            f"{source.path}: tensor {stored} has shape {list(tensor.shape)} and must hold floats "
            f"{[channels, taps]}, as the config says"
        )
    return replace(tensor, data=tensor.data.reshape(shape))


def _alone(
    name: str, stored: str, config: ModelConfig, arch: Architecture, source: GgufTensors
) -> Tensor:
    """A tensor that is stored by itself, its rows in half-split rotary order."""
    tensor = source[stored]
    if not arch.is_interleaved(name):
        return tensor
    heads = config.heads if name.split(".")[-2] == "q_proj" else config.kv_heads
    if tensor.shape[0] != heads * config.head_dim:
        raise FormatError(
            f"{source.path}: tensor {stored} has {tensor.shape[0]} rows; "
            f"the config says {heads} heads of {config.head_dim}"
        )
    rope = config.ropes[0]  # of such architectures all layers that rotate do so alike
    if isinstance(tensor, GgufTensor):
        return replace(tensor, order=half_split_order(tensor.shape[0], heads, rope.dim))
    return half_split(tensor, heads, rope.dim)
