"""Hugging Face checkpoint folders: config.json, safetensors (one or sharded), tokenizer files.

Nothing but headers is read; every tensor is a view of its memory-mapped shard. Phi-3's fused
projections become views of their rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgeq.errors import FormatError, UnsupportedError
from edgeq.importers.hf_config import read_config, read_json
from edgeq.importers.safetensors_file import SafetensorsFile, open_safetensors
from edgeq.importers.sentencepiece_model import tokenizer_files
from edgeq.model import Model, ModelConfig
from edgeq.tensor import FloatTensor, Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
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
    found = _Checkpoint(folder, config.prefix)
    tensors: dict[str, Tensor] = {}
    model = config.model
    fused = _fused(model) if model.family == "phi3" else {}
    names = [name for name, _ in (*model.linears(), *model.norms())]
    for name, _ in model.biases():
        if name.split(".")[-2] in config.biases:
            names.append(name)
    for name in names:
        tensors[name] = fused[name].of(found) if name in fused else found.tensor(name)
    files = {} if headers_only else _files(folder)
    result = Model(model, tensors, files, {"source": folder.resolve().name})
    result.validate()
    return result


class _Checkpoint:
    """The tensors of one or several safetensors files under their usual names."""

    def __init__(self, folder: Path, prefix: str) -> None:
        self.folder = folder
        self.where: dict[str, tuple[SafetensorsFile, str]] = {}
        for file, names in _shards(folder):
            for name in names if names is not None else file.tensors:
                if name not in file.tensors:
                    raise FormatError(
                        f"{folder / INDEX} puts tensor {name} in {file.path.name}, "
                        "which does not hold it; fetch the checkpoint again"
                    )
                self.where[_usual(name, prefix)] = (file, name)

    def tensor(self, name: str) -> FloatTensor:
        try:
            file, stored = self.where[name]
        except KeyError:
            raise FormatError(
                f"tensor {name} is missing from {self.folder}; "
                "config.json asks for it: is this the whole checkpoint?"
            ) from None
        return file.tensor(stored)


def _shards(folder: Path) -> list[tuple[SafetensorsFile, list[str] | None]]:
    """Each file with the tensors the index expects there (None: whatever it holds)."""
    if (folder / SINGLE).exists() and not (folder / INDEX).exists():
        return [(open_safetensors(folder / SINGLE), None)]
    if not (folder / INDEX).exists():
        others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pth", ".pt"))
        if others:
            raise UnsupportedError(
                f"{folder} holds PyTorch weights ({others[0]}), not safetensors; "
                "convert them with Transformers' save_pretrained"
            )
        raise FormatError(f"{folder} holds neither {SINGLE} nor {INDEX}")
    index = read_json(folder / INDEX)
    placed = index.get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(v, str) for v in placed.values()):
        raise FormatError(f"{folder / INDEX} has no weight_map from tensors to files")
    by_file: dict[str, list[str]] = {}
    for name, file in placed.items():
        if Path(file).name != file:
            raise FormatError(f"{folder / INDEX} names {file!r}, which lies outside the folder")
        by_file.setdefault(file, []).append(name)
    missing = [file for file in sorted(by_file) if not (folder / file).exists()]
    if missing:
        raise FormatError(
            f"{folder} lacks {len(missing)} of {len(by_file)} shards: {', '.join(missing)}; "
            "fetch the missing files"
        )
    return [(open_safetensors(folder / file), names) for file, names in sorted(by_file.items())]


def _usual(name: str, prefix: str) -> str:
    """Strip what vision-language checkpoints put around their decoder's names."""
    if not prefix:
        return name
    # written before Transformers 4.52: language_model.model.X; since then model.language_model.X
    if name.startswith("model." + prefix):
        return "model." + name.removeprefix("model." + prefix)
    return name.removeprefix(prefix)


@dataclass(frozen=True)
class _Part:
    """Rows of a fused projection."""

    source: str
    start: int
    stop: int
    height: int

    def of(self, found: _Checkpoint) -> FloatTensor:
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
