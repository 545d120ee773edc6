"""Rounded layers that are kept until the artifact is whole, so that an interrupted run continues.

Beside the output NAME lies a folder while a calibrated recipe rounds:

    .NAME.unfinished/
        lock                    held while a process works; the system releases it with the process
        layer-000007            safetensors: the packed arrays of the matrices of one layer
        .NAME.PID-RANDOM.tmp    the artifact, see `edgeq.model.artifact`

Each layer's file has a key in its metadata: the SHA-256 of all that decides the integers. A run
with another key removes it. The same source, recipe and version give the same integers on every
machine, so that the artifact of a run that was interrupted and continued has the bytes of one that
was not. A run that ends without an error removes the folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import EdgeqError, FormatError, SchemeError
from edgeq.formats.safetensors_file import SafetensorsFile, open_safetensors, write_arrays
from edgeq.formats.schemes import QuantScheme
from edgeq.formats.tensor import QuantTensor, part_shapes

if sys.platform != "win32":
    import fcntl

LOCK = "lock"
Wanted = Mapping[str, tuple[QuantScheme, tuple[int, int]]]
"""Name of a matrix -> its scheme and shape."""


def unfinished_folder(out: Path) -> Path:
    """Where the finished layers of an output are kept until it is whole.

    Args:
        out: the file that the artifact is written to.
    """
    return out.absolute().with_name(f".{out.name}.unfinished")


def run_key(facts: Mapping[str, Any], windows: Sequence[NDArray[np.int64]]) -> str:
    """The SHA-256 of what decides the integers of a run.

    Args:
        facts: ready for JSON: the source's SHA-256, the version and the recipe.
        windows: the calibration text.
    """
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for window in windows:
        digest.update(window.size.to_bytes(8, "little"))
        digest.update(window.astype("<i8").tobytes())
    return digest.hexdigest()


class FinishedLayers:
    """The layers of an output that are rounded already, for the time of a ``with`` block.

    Nothing is kept where the folder cannot be made, or another process works in it: a run that
    cannot be continued is better than none.

    Args:
        out: the file that the artifact is written to.
        key: of the run, see `run_key`; None keeps nothing, and removes what an earlier run left.

    Attributes:
        folder: the folder, while this process has its lock; else None.
        taken: number of layers that were taken over from an interrupted run.
    """

    def __init__(self, out: Path, key: str | None) -> None:
        self.folder: Path | None = None
        self.taken = 0
        self._place, self._key = unfinished_folder(out), key
        self._lock: IO[bytes] | None = None

    def __enter__(self) -> FinishedLayers:
        if self._key is None and not self._place.exists():
            return self
        self._lock = _locked(self._place)
        if self._lock is not None:
            self.folder = self._place
            for path in self.folder.iterdir():
                if path.name != LOCK and not self._is_own(path):
                    path.unlink()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.folder is not None and (kind is None or not any(self.folder.glob("layer-*"))):
            shutil.rmtree(self.folder, ignore_errors=True)
        self._release()

    def tensors(self, layer: int, wanted: Wanted) -> dict[str, QuantTensor]:
        """The matrices of a layer, if an interrupted run has rounded it; else nothing.

        Args:
            layer: number of the layer.
            wanted: the matrices of the layer.
        """
        if self.folder is None or not (path := self._path(layer)).exists():
            return {}
        try:
            file = open_safetensors(path)
            tensors = {name: _tensor(file, name, *wanted[name]) for name in wanted}
            whole = file.metadata.get("sha256") == _digest(tensors)
        except (FormatError, SchemeError):  # damaged: the layer is rounded again
            return {}
        if not whole:
            return {}
        self.taken += 1
        return tensors

    def keep(self, layer: int, tensors: Mapping[str, QuantTensor]) -> None:
        """Keep the matrices of a layer. If there is no room for them, no more layers are kept.

        Args:
            layer: number of the layer.
            tensors: all its rounded matrices.
        """
        if self.folder is None or self._key is None:
            return
        facts = {"key": self._key, "sha256": _digest(tensors)}
        arrays = {
            f"{name}.{part}": array
            for name, tensor in tensors.items()
            for part, array in _parts(tensor).items()
        }
        try:
            write_arrays(self._path(layer), facts, arrays, "the finished layer")
        except EdgeqError:
            self._key = None
        if self._key is None:
            for path in self.folder.glob("layer-*"):
                path.unlink()

    def _path(self, layer: int) -> Path:
        return self._place / f"layer-{layer:06}"

    def _is_own(self, path: Path) -> bool:
        """Whether a file is a layer of the same run."""
        if self._key is None or not path.name.startswith("layer-"):
            return False
        try:
            return open_safetensors(path).metadata.get("key") == self._key
        except FormatError:
            return False

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _locked(folder: Path) -> IO[bytes] | None:
    """The folder's lock; None if another process has it, or the folder cannot have one."""
    if sys.platform == "win32":
        return None
    while True:
        try:
            folder.mkdir(exist_ok=True)
            file = (folder / LOCK).open("wb")
        except FileNotFoundError:  # another process has just removed the folder
            if not folder.parent.is_dir():
                return None
            continue
        except OSError:
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            return None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), (folder / LOCK).stat()):
                return file
        file.close()  # the lock of a folder that was removed meanwhile


def _parts(tensor: QuantTensor) -> dict[str, NDArray[Any]]:
    return {part: getattr(tensor, part) for part in part_shapes(tensor.scheme, tensor.shape)}


def _digest(tensors: Mapping[str, QuantTensor]) -> str:
    """The SHA-256 of the arrays of matrices."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        for array in _parts(tensors[name]).values():
            digest.update(array.tobytes())
    return digest.hexdigest()


def _tensor(
    file: SafetensorsFile, name: str, scheme: QuantScheme, shape: tuple[int, int]
) -> QuantTensor:
    """A matrix of a layer's file, in memory."""
    parts = {part: np.array(file.array(f"{name}.{part}")) for part in part_shapes(scheme, shape)}
    return QuantTensor(scheme, shape, **parts)
