"""The safetensors files of a Hugging Face folder, their tensors under the usual names.

Which files are read is what Transformers reads: ``model.safetensors`` where it is there, and else
the shards that the index lists, each with all that it holds. Every tensor must be used by the model
or be known to have no part in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from edgeq.core.errors import FormatError, UnsupportedError
from edgeq.formats.safetensors_file import SafetensorsFile, open_safetensors
from edgeq.importers.huggingface.quantized.layout import Layout, Part
from edgeq.importers.huggingface.quantized.stored import Tensors
from edgeq.importers.json_object import read_json
from edgeq.importers.unread import listed
from edgeq.model.config import ModelConfig

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_config.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_COMPARED_BYTES = 1 << 24
_NO_PART = re.compile(r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
"""Rotary tables that old versions of Transformers saved; they are computed from the config."""
_CODES = ("qweight", "weight_packed", "weight_scale", "scales")
_SETTINGS_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Files beside config.json in which older libraries keep what it holds now."""
_OTHER_TOWERS = re.compile(r"^(model\.)?(vision_tower|multi_modal_projector)\.")


class Checkpoint:
    """The tensors of one or several safetensors files under their usual names.

    Args:
        folder: the checkpoint's folder.
        prefix: what a vision-language model puts around its decoder's names, or nothing.
        layout: how quantized weights are stored, or None where there are none.
        renamed: `Family.renamed`.

    Raises:
        FormatError: a file is missing or damaged, or two files hold different tensors of one name.
        UnsupportedError: the weights are a LoRA adapter or not in safetensors files.
    """

    def __init__(
        self,
        folder: Path,
        prefix: str,
        layout: Layout | None = None,
        renamed: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.layout = layout
        self.prefix = prefix
        self._where: dict[str, tuple[SafetensorsFile, str]] = {}
        self._read: set[str] = set()
        self._misplaced: dict[str, str] = {}
        for file in self._open_files():
            for name in file.tensors:
                self._add(_as_before(_usual(name, prefix), renamed or {}), file, name)
        if not any(name.startswith("model.") for name in self._where):
            # the base model was saved without its head, and its names begin one level lower
            self._where = {
                name if name == HEAD else "model." + name: at for name, at in self._where.items()
            }

    def tensor(self, name: str) -> Tensors:
        """A tensor by its usual name, its integers kept if it is quantized.

        Raises:
            FormatError: it is missing.
            UnsupportedError: its type is none that edgeq computes with.
        """
        if self.layout is not None and name.endswith(".weight"):
            matrix = self.layout.matrix(_LayerParts(self, name.removesuffix(".weight")))
            if matrix is not None:
                return matrix
        file, stored = self.find(name)
        return file.tensor(stored)

    def part(self, name: str, dtype: str) -> Part:
        """A tensor of codes or scales, as it is stored.

        Raises:
            FormatError: it is missing or has another type, or config.json does not say that
                weights are quantized.
        """
        file, stored = self.find(name)
        entry = file.tensors[stored]
        if entry.dtype != dtype:
            raise FormatError(
                f"{file.path}: tensor {stored} is {entry.dtype}; its layout asks for {dtype}"
            )
        return Part(stored, entry.dtype, file.array(stored))

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def names(self) -> Iterator[str]:
        """The usual names of all tensors."""
        yield from self._where

    def type_of(self, name: str) -> str | None:
        """The type of a tensor, or None where there is none."""
        if name not in self._where:
            return None
        file, stored = self._where[name]
        return file.tensors[stored].dtype

    def find(self, name: str) -> tuple[SafetensorsFile, str]:
        """The file that holds a tensor and its name there; the tensor counts as read.

        Raises:
            FormatError: it is missing.
        """
        if name not in self._where:
            if name in self._misplaced:
                raise FormatError(
                    f"{self.folder / INDEX} puts tensor {name} in {self._misplaced[name]}, "
                    "which does not hold it; fetch the checkpoint again"
                )
            self._refuse_other_layout(name)
            raise FormatError(
                f"tensor {name} is missing from {self.folder}; "
                "config.json asks for it: is this the whole checkpoint?"
            )
        self._read.add(name)
        return self._where[name]

    def _refuse_other_layout(self, name: str) -> None:
        """Say that a matrix is quantized where config.json does not."""
        module = name.removesuffix(".weight")
        stored = next((f"{module}.{end}" for end in _CODES if f"{module}.{end}" in self), None)
        if self.layout is None and stored is not None:
            own = next((file for file in _SETTINGS_FILES if (self.folder / file).exists()), None)
            raise FormatError(
                f"the weights of {self.folder} are quantized ({stored}), and config.json has no "
                "quantization_config that says how; put it there"
                + (f"; {own} may hold it, without its quant_method" if own else "")
            )

    def tie_head(self) -> bool:
        """Whether the head is the embedding matrix, in a model that says they are tied.

        As in Transformers: one that is stored serves as both, and two that differ are not tied.
        Two equal ones are read through to their end.
        """
        if HEAD not in self._where:
            return True
        if EMBEDDING not in self._where:
            self._where[EMBEDDING] = self._where.pop(HEAD)
            return True
        if not _same(self._where[EMBEDDING], self._where[HEAD]):
            return False
        self._read.add(HEAD)
        return True

    def check_all_read(
        self, config: ModelConfig, left_out: Mapping[str, str] | None = None
    ) -> dict[str, int]:
        """Refuse tensors that nothing has read and that are not known to have no part in the model.

        Biases of zeros have none.

        Args:
            config: of the model.
            left_out: `Family.left_out`.

        Returns:
            How many tensors are left out by each description.

        Raises:
            UnsupportedError: says how many there are, and names the first.
        """
        kinds: dict[str, str] = {}
        for name in self._where:
            for beginning, kind in (left_out or {}).items():
                beginnings = (beginning, "model." + beginning)
                if name.startswith(beginnings) and name not in self._read:
                    kinds[name] = kind
        unread = [
            name
            for name in self._where
            if name not in self._read
            and name not in kinds
            and not _NO_PART.search(name)
            and not (self.prefix and _OTHER_TOWERS.match(name))
            and not self._adds_nothing(name)
        ]
        if unread:
            raise UnsupportedError(
                f"{self.folder} holds {len(unread)} tensors that a {config.family} model of "
                f"{config.layers} layers does not use: {listed(unread)}; the model that was "
                "trained with them computes something else than edgeq would"
            )
        found = list(kinds.values())
        return {kind: found.count(kind) for kind in (left_out or {}).values() if kind in found}

    def _adds_nothing(self, name: str) -> bool:
        """Whether a tensor is a bias of zeros, as AutoGPTQ writes beside every matrix."""
        file, stored = self._where[name]
        entry = file.tensors[stored]
        if not name.endswith(".bias") or len(entry.shape) != 1:
            return False
        return not file.mapping.array(np.uint8, (entry.stop - entry.start,), entry.start).any()

    def _add(self, name: str, file: SafetensorsFile, stored: str) -> None:
        old = self._where.setdefault(name, (file, stored))
        if old != (file, stored) and not _same(old, (file, stored)):
            raise FormatError(
                f"{self.folder} holds two different tensors {name}, in {old[0].path.name} and "
                f"{file.path.name}; remove the file that is left over from another checkpoint"
            )

    def _open_files(self) -> list[SafetensorsFile]:
        if (self.folder / ADAPTER).exists():
            raise UnsupportedError(adapter_message(self.folder))
        if (self.folder / SINGLE).exists():
            return [open_safetensors(self.folder / SINGLE)]
        if not (self.folder / INDEX).exists():
            _refuse_other_weights(self.folder)
        placed = _weight_map(self.folder)
        names = sorted(set(placed.values()))
        missing = [file for file in names if not (self.folder / file).exists()]
        if missing:
            raise FormatError(
                f"{self.folder} lacks {len(missing)} of {len(names)} shards: "
                f"{', '.join(missing)}; fetch the missing files"
            )
        files = {name: open_safetensors(self.folder / name) for name in names}
        for name, file in placed.items():
            if name not in files[file].tensors:
                self._misplaced[_usual(name, self.prefix)] = file
        return list(files.values())


class _LayerParts:
    """The stored tensors of one linear layer of a checkpoint."""

    def __init__(self, checkpoint: Checkpoint, module: str) -> None:
        self._checkpoint = checkpoint
        self.module = module

    def type_of(self, end: str) -> str | None:
        return self._checkpoint.type_of(f"{self.module}.{end}")

    def get(self, end: str, dtypes: tuple[str, ...], axes: int = 2) -> Part:
        file, stored = self._checkpoint.find(f"{self.module}.{end}")
        entry = file.tensors[stored]
        if entry.dtype not in dtypes or (axes and len(entry.shape) != axes):
            wanted = f"{axes} axes" if axes else "any shape"
            raise FormatError(
                f"{file.path}: tensor {stored} is {entry.dtype} {list(entry.shape)}; its layout "
                f"asks for {' or '.join(dtypes)} with {wanted}"
            )
        return Part(stored, entry.dtype, file.array(stored))


def adapter_message(folder: Path) -> str:
    """The message for a folder that holds a LoRA adapter."""
    return (
        f"{folder} holds a LoRA adapter ({ADAPTER}), which edgeq does not apply; merge it into its "
        "base model (merge_and_unload of the peft package), save that, and give its folder; if "
        f"the weights are merged already, remove {ADAPTER}"
    )


def _weight_map(folder: Path) -> dict[str, str]:
    placed = read_json(folder / INDEX).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(v, str) for v in placed.values()):
        raise FormatError(f"{folder / INDEX} has no weight_map from tensors to files")
    for file in placed.values():
        if not file or Path(file).name != file:
            raise FormatError(f"{folder / INDEX} names {file!r}, which lies outside the folder")
    return placed


def _refuse_other_weights(folder: Path) -> None:
    names = sorted(path.name for path in folder.iterdir())
    others = [name for name in names if name.endswith((".bin", ".pth", ".pt"))]
    if others:
        raise UnsupportedError(
            f"{folder} holds PyTorch weights ({others[0]}), not safetensors; "
            "convert them with Transformers' save_pretrained"
        )
    others = [name for name in names if name.endswith(".safetensors")]
    has = f"; it holds {listed(others)}" if others else ""
    raise FormatError(f"{folder} holds neither {SINGLE} nor {INDEX}{has}")


def _same(a: tuple[SafetensorsFile, str], b: tuple[SafetensorsFile, str]) -> bool:
    """Whether two tensors have one type, shape and content, read a piece at a time."""
    one, other = a[0].tensors[a[1]], b[0].tensors[b[1]]
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    size = one.stop - one.start
    for at in range(0, size, _COMPARED_BYTES):
        length = min(_COMPARED_BYTES, size - at)
        left = a[0].mapping.array(np.uint8, (length,), one.start + at)
        right = b[0].mapping.array(np.uint8, (length,), other.start + at)
        if not np.array_equal(left, right):
            return False
    a[0].release()
    b[0].release()
    return True


def _as_before(name: str, renamed: Mapping[str, str]) -> str:
    """The name of a tensor of a layer that a family has another name for."""
    layer, part = re.fullmatch(r"((?:model\.)?layers\.\d+\.)?(.*)", name).groups("")  # type: ignore[union-attr]
    return layer + renamed.get(part, part)


def _usual(name: str, prefix: str) -> str:
    """Strip what vision-language checkpoints put around their decoder's names."""
    if not prefix:
        return name
    # written before Transformers 4.52: language_model.model.X; since then model.language_model.X
    if name.startswith("model." + prefix):
        return "model." + name.removeprefix("model." + prefix)
    return name.removeprefix(prefix)
