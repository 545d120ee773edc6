"""Hugging Face checkpoint folders: config.json, safetensors (one or sharded), tokenizer files.

Only headers are read, except for a head that is stored although it is tied to the embeddings;
every tensor is a view of its memory-mapped shard. Projections that are stored as one matrix become
views of its rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgeq.core.errors import FormatError
from edgeq.formats.tensor import FloatTensor, Tensor
from edgeq.importers.huggingface.checkpoint import Checkpoint
from edgeq.importers.huggingface.config import read_config
from edgeq.importers.huggingface.family import Family
from edgeq.importers.huggingface.mtp import read_mtp
from edgeq.importers.huggingface.quantized.stored import KeptMatrix, Tensors
from edgeq.importers.huggingface.stacked_experts import StackedPart, stacked_parts
from edgeq.importers.lazy import GatheredRows, by_head_order, half_split, half_split_order
from edgeq.importers.sentence_modules import module_files
from edgeq.importers.tokenizer.sentencepiece_model import tokenizer_files
from edgeq.model.block import K_NORM, K_PROJ, V_PROJ, tensor_name
from edgeq.model.config import ModelConfig
from edgeq.model.model import Model

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
"""Small files beside the weights that a model's `files` keep."""


def load(path: str | Path, *, headers_only: bool = False) -> Model:
    """Open a checkpoint folder.

    Args:
        path: a folder with config.json, model.safetensors or its shards, and tokenizer files.
        headers_only: leave the tokenizer files unread.

    Returns:
        a model whose tensors are lazy views.

    Raises:
        FormatError: a file is missing or damaged, or a tensor is missing or of another shape
            than the configuration says.
        UnsupportedError: an unknown family, rotary type, option or tensor type.
    """
    folder = Path(path)
    config = read_config(folder)
    checkpoint = Checkpoint(folder, config.prefix, config.layout, config.family.renamed)
    model = replace(config.model, tied=config.model.tied and checkpoint.tie_head())
    tensors: dict[str, Tensor] = {}
    fused: dict[str, _Part | _HeadPart | StackedPart] = {
        **_fused(model, config.family.fused),
        **_fused_by_head(model, config.family.fused_by_head),
        **stacked_parts(model, config.family, checkpoint),
    }
    names = [name for name, _ in (*model.linears(), *model.floats())]
    for name, _ in model.biases():
        if _stored_part(config.family, name) in config.biases:
            names.append(name)
    convolutions = dict(model.convolutions())
    for name in names:
        part = fused.get(name)
        if part is not None:
            tensors[name] = part.read(checkpoint)
            continue
        tensor = checkpoint.tensor(config.family.stored_name(name))
        if name in convolutions:
            tensor = _channels_first(tensor, convolutions[name])
        tensors[name] = _half_split(tensor, name, model) if config.family.interleaved else tensor
    if config.family.mtp and (head := read_mtp(checkpoint, model, config.family)) is not None:
        model = replace(model, mtp=head.block)
        tensors |= head.tensors
    left_out = checkpoint.check_all_read(model, {**config.family.left_out, **_unread_keys(model)})
    files = {} if headers_only else folder_files(folder)
    provenance: dict[str, Any] = {"source": folder.resolve().name}
    if left_out:
        provenance["left_out"] = [
            f"{count} tensor{'s' * (count > 1)} of the {kind}" for kind, count in left_out.items()
        ]
    result = Model(model, tensors, files, provenance)
    result.validate()
    return result


def _unread_keys(config: ModelConfig) -> dict[str, str]:
    """`Family.left_out` of the keys and values of layers that read those of another layer."""
    return {
        f"layers.{i}.{part}.": "layers whose keys and values are those of another"
        for i, block in enumerate(config.blocks)
        if block.kv_from is not None
        for part in (K_PROJ, V_PROJ, K_NORM, "self_attn.v_norm")
    }


def _stored_part(family: Family, name: str) -> str:
    """The last part of the name of the stored tensor that holds a bias, as "q_proj"."""
    part = ".".join(name.split(".")[-3:-1])
    whole = (stored for stored, parts in family.fused_by_head.items() if part in parts)
    return next(whole, part).split(".")[-1]


def _half_split(tensor: Tensors, name: str, config: ModelConfig) -> Tensor:
    """A tensor, its rows in half-split rotary order if they are those of q or k."""
    heads = {"q_proj": config.heads, "k_proj": config.kv_heads}.get(name.split(".")[-2])
    if heads is None or tensor.shape[0] != heads * config.head_dim:
        return tensor  # of another shape than the configuration says, which is refused later
    rope = config.blocks[int(name.split(".")[2])].rope
    rotated = 0 if rope is None else rope.dim
    if isinstance(tensor, KeptMatrix):
        return replace(tensor, order=half_split_order(tensor.shape[0], heads, rotated))
    return half_split(tensor, heads, rotated)


def _channels_first(tensor: Tensors, shape: tuple[int, int, int]) -> Tensors:
    """The weight of a depthwise convolution, which MLX stores as [channels, taps, 1]."""
    channels, one, taps = shape
    if isinstance(tensor, FloatTensor) and tensor.shape == (channels, taps, one):
        return FloatTensor(tensor.dtype, tensor.data.reshape(shape))
    return tensor


@dataclass(frozen=True)
class _Part:
    """Rows ``start:stop`` of a fused matrix of ``height`` rows."""

    fused: str
    start: int
    stop: int
    height: int

    def read(self, checkpoint: Checkpoint) -> Tensor:
        whole = checkpoint.tensor(self.fused)
        if isinstance(whole, FloatTensor) and len(whole.shape) == 3:  # an axis for the experts
            whole = FloatTensor(whole.dtype, whole.data.reshape(-1, whole.shape[2]))
        if whole.shape[:1] != (self.height,):
            raise FormatError(
                f"tensor {self.fused} has shape {list(whole.shape)}; "
                f"the config says {self.height} rows"
            )
        if isinstance(whole, KeptMatrix):
            return whole.part(self.start, self.stop)
        return FloatTensor(whole.dtype, whole.data[self.start : self.stop])


@dataclass(frozen=True)
class _HeadPart:
    """One of the parts of a matrix or bias that holds them head by head."""

    fused: str
    rows: int
    heads: int
    part: int
    parts: int

    def read(self, checkpoint: Checkpoint) -> Tensor:
        whole = checkpoint.tensor(self.fused)
        if whole.shape[:1] != (self.rows * self.parts,):
            raise FormatError(
                f"tensor {self.fused} has shape {list(whole.shape)}; "
                f"the config says {self.rows * self.parts} rows"
            )
        order = by_head_order(self.rows, self.heads, self.part, self.parts)
        if isinstance(whole, KeptMatrix):
            shape = (self.rows, whole.shape[1])
            return replace(whole, shape=shape, nbytes=whole.nbytes // self.parts, order=order)
        return GatheredRows(whole, order)


def _fused_by_head(
    config: ModelConfig, fused: Mapping[str, tuple[str, ...]]
) -> dict[str, _HeadPart]:
    """The rows of each matrix and bias that a family stores with others, head by head."""
    rows = {name: shape[0] for name, shape in (*config.linears(), *config.biases())}
    parts: dict[str, _HeadPart] = {}
    for i in range(config.layers):
        for whole, members in fused.items():
            for end in ("weight", "bias"):
                names = [tensor_name(i, member).removesuffix("weight") + end for member in members]
                if not all(name in rows for name in names):
                    continue  # a layer of another kind
                stored = tensor_name(i, whole).removesuffix("weight") + end
                for number, name in enumerate(names):
                    parts[name] = _HeadPart(stored, rows[name], config.heads, number, len(names))
    return parts


def _fused(config: ModelConfig, fused: Mapping[str, tuple[str, ...]]) -> dict[str, _Part]:
    """The rows of each matrix that a family stores as part of another: name -> part."""
    rows = {name: shape[0] for name, shape in config.linears()}
    parts: dict[str, _Part] = {}
    for i in range(config.layers):
        for whole, members in fused.items():
            experts = config.blocks[i].experts
            numbers = range(experts.count if experts else 0) if "*" in members[0] else (0,)
            names = [
                tensor_name(i, member.replace("*", str(number)))
                for number in numbers
                for member in members
            ]
            if not names or not all(name in rows for name in names):
                continue  # a layer of another kind
            height, start = sum(rows[name] for name in names), 0
            for name in names:
                stop = start + rows[name]
                parts[name] = _Part(tensor_name(i, whole), start, stop, height)
                start = stop
    return parts


def folder_files(folder: Path) -> dict[str, bytes]:
    """Files of tokenizer, chat, embeddings; a missing tokenizer.json is made of tokenizer.model."""
    files = {
        name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()
    }
    files |= module_files(folder)
    for template in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        files[f"{template.parent.name}/{template.name}"] = template.read_bytes()
    sentencepiece = folder / "tokenizer.model"
    if "tokenizer.json" not in files and sentencepiece.is_file():
        return files | tokenizer_files(sentencepiece)
    return files
