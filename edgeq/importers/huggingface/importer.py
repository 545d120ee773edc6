"""Hugging Face checkpoint folders: config.json, safetensors (one or sharded), tokenizer files.

Nothing but headers is read, but for a head stored beside the embeddings it is said to be tied to;
every tensor is a view of its memory-mapped shard. Phi-3's fused projections become views of their
rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from edgeq.core.errors import FormatError
from edgeq.formats.tensor import FloatTensor, Tensor
from edgeq.importers.huggingface.checkpoint import Checkpoint
from edgeq.importers.huggingface.config import read_config
from edgeq.importers.tokenizer.sentencepiece_model import tokenizer_files
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
    found = Checkpoint(folder, config.prefix)
    model = replace(config.model, tied=config.model.tied and found.tie_head())
    tensors: dict[str, Tensor] = {}
    fused = _fused(model) if model.family == "phi3" else {}
    names = [name for name, _ in (*model.linears(), *model.norms())]
    for name, _ in model.biases():
        if name.split(".")[-2] in config.biases:
            names.append(name)
    for name in names:
        tensors[name] = fused[name].of(found) if name in fused else found.tensor(name)
    found.check_all_read(model)
    files = {} if headers_only else _files(folder)
    result = Model(model, tensors, files, {"source": folder.resolve().name})
    result.validate()
    return result


@dataclass(frozen=True)
class _Part:
    """Rows of a fused projection."""

    source: str
    start: int
    stop: int
    height: int

    def of(self, found: Checkpoint) -> FloatTensor:
        whole = found.tensor(self.source)
        if whole.shape[:1] != (self.height,):
            raise FormatError(
                f"tensor {self.source} has shape {list(whole.shape)}; "
                f"the config says {self.height} rows"
            )
        return FloatTensor(whole.dtype, whole.data[self.start : self.stop])


def _fused(config: ModelConfig) -> dict[str, _Part]:
    """Where each of Phi-3's split projections lies."""
    q, kv, ffn = config.heads * config.head_dim, config.kv_heads * config.head_dim, config.ffn
    parts = {}
    for i in range(config.layers):
        attention, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        qkv, gate_up = attention + "qkv_proj.weight", mlp + "gate_up_proj.weight"
        ends = (0, q, q + kv, q + 2 * kv)
        for name, start, stop in zip("qkv", ends, ends[1:], strict=False):
            parts[f"{attention}{name}_proj.weight"] = _Part(qkv, start, stop, ends[-1])
        parts[mlp + "gate_proj.weight"] = _Part(gate_up, 0, ffn, 2 * ffn)
        parts[mlp + "up_proj.weight"] = _Part(gate_up, ffn, 2 * ffn, 2 * ffn)
    return parts


def _files(folder: Path) -> dict[str, bytes]:
    """Tokenizer and chat files, a tokenizer.json being made from tokenizer.model if need be."""
    files = {
        name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()
    }
    for template in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        files[f"{template.parent.name}/{template.name}"] = template.read_bytes()
    sentencepiece = folder / "tokenizer.model"
    if "tokenizer.json" not in files and sentencepiece.is_file():
        return files | tokenizer_files(sentencepiece)
    return files
