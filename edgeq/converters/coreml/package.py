"""A Core ML package on disk: the program serialized by coremltools, the weights streamed by us.

    NAME.mlpackage/
      Manifest.json                             the items of the package and which is the model
      Data/com.apple.CoreML/model.mlmodel       protobuf: description and program
      Data/com.apple.CoreML/weights/weight.bin  the constants, see `coreml_exec.blob`

coremltools' exporter would hold every constant in memory, four-bit numbers as bytes. Here it is
given stand-ins, and asked for a constant's place in weight.bin it has the numbers written there
and then. No graph pass is run: the default ones drop writes to a state that is read again, and
the program has nothing that they could simplify.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgeq.converters.coreml.exec.blob import Writer
from edgeq.converters.coreml.weights import BlobConstant
from edgeq.core.errors import EdgeqError
from edgeq.core.files import no_room
from edgeq.core.progress import Progress

_FOLDER = "com.apple.CoreML"
_AUTHOR = "com.apple.CoreML"
_SHORT = 64
"""Floats that are written in the program itself; coremltools does so with 9 numbers."""
VERSIONS = {"ios16": 7, "ios17": 8, "ios18": 9}
"""System -> version of Core ML's specification."""


def write_package(
    out: Path,
    program: Any,
    version: int,
    constants: Mapping[str, BlobConstant],
    metadata: Mapping[str, str],
    description: str,
    progress: Progress | None,
) -> None:
    """Write a package.

    Args:
        out: the folder to make; removed again if anything fails.
        program: coremltools' program, over stand-ins.
        version: of Core ML's specification, see `VERSIONS`.
        constants: by their name in the program; any other is taken from the program itself.
        metadata: user-defined entries of the model's description.
        description: one line for a reader.
        progress: called with each constant's name, how many are done, and of how many.

    Raises:
        EdgeqError: it cannot be written.
    """
    data = out / "Data" / _FOLDER
    try:
        (data / "weights").mkdir(parents=True)
        writer = Writer(data / "weights" / "weight.bin")
        try:
            spec = _export(program, version, _BlobOffsets(writer, constants, progress))
            writer.close()
        except BaseException:
            writer.abandon()
            raise
        spec.description.metadata.shortDescription = description
        spec.description.metadata.userDefined.update(metadata)
        raw = spec.SerializeToString(deterministic=True)
        _write(data / "model.mlmodel", raw)
        _write(out / "Manifest.json", _manifest(raw))
    except OSError as err:
        shutil.rmtree(out, ignore_errors=True)
        if full := no_room(out.name, err):
            raise full from err
        raise EdgeqError(f"{out} cannot be written: {err.strerror or err}") from err
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise


class _BlobOffsets:
    """Offsets of constants in weight.bin; each is written when its offset is first requested."""

    def __init__(
        self,
        writer: Writer,
        constants: Mapping[str, BlobConstant],
        progress: Progress | None,
    ) -> None:
        self._writer, self._constants, self._progress = writer, constants, progress
        self._places: dict[Any, int] = {}
        self._done = 0

    def holds(self, name: str) -> bool:
        """Whether a constant's numbers are given apart, and the program has a stand-in."""
        return name in self._constants

    def place(self, name: str, kind: str, value: Any) -> int:
        """The offset of a constant, which is written unless an equal one was written before."""
        constant = self._constants.get(name)
        key: Any = name
        if constant is None:
            value = np.ascontiguousarray(value)
            key = (kind, value.size, hashlib.sha256(value.data).digest())
        if key in self._places:
            return self._places[key]
        at = self._places[key] = self._writer.begin(
            kind, value.size if constant is None else int(np.prod(constant.shape))
        )
        if constant is None:
            self._writer.write(value)
            return at
        for piece in constant.pieces():
            self._writer.write(piece)
        self._done += 1
        if self._progress:
            self._progress(name, self._done, len(self._constants))
        return at


def _is_short(value: Any) -> bool:
    """Whether floats take less room in the program: weight.bin has 64 bytes before them."""
    floats = isinstance(value, np.ndarray) and value.dtype in (np.float16, np.float32)
    return floats and value.size <= _SHORT


def _export(program: Any, version: int, weights: _BlobOffsets) -> Any:
    """The model's protobuf, by coremltools' own exporter."""
    from coremltools.converters.mil.backend.mil.helper import (
        create_file_value_tensor,
        create_immediate_value,
    )
    from coremltools.converters.mil.backend.mil.load import CoreMLProtoExporter, MILProtoExporter
    from coremltools.converters.mil.mil import types
    from coremltools.converters.mil.mil.passes.defs.preprocess import NameSanitizer

    # names in MIL are identifiers; coremltools' own pass skips a program without a "main"
    for function in program.functions.values():
        NameSanitizer.sanitize_block(function, NameSanitizer("var_"), NameSanitizer("op_"))

    class Exporter(MILProtoExporter):  # type: ignore[misc]  # coremltools has no types
        def get_milproto_value(self, var: Any) -> Any:
            if weights.holds(var.op.name) or not _is_short(var.val):
                return super().get_milproto_value(var)
            return create_immediate_value(var)

        def create_file_value(self, var: Any) -> Any:
            kind = types.builtin_to_string(var.sym_type.get_primitive())
            return create_file_value_tensor(
                file_name="@model_path/weights/weight.bin",
                offset=weights.place(var.op.name, kind, var.val),
                dim=var.val.shape,
                data_type=types.BUILTIN_TO_PROTO_TYPES[var.sym_type.get_primitive()],
            )

    mil = Exporter(program, "", version).export()
    return CoreMLProtoExporter(
        program, mil, None, None, None, "mlprogram", "milinternal", version
    ).export(version)


def _manifest(model: bytes) -> bytes:
    """Items named by what the model holds, so that the same model makes the same package."""
    ids = {
        item: str(uuid.uuid5(uuid.NAMESPACE_OID, hashlib.sha256(model).hexdigest() + item)).upper()
        for item in ("model.mlmodel", "weights")
    }
    entries = {
        ids[item]: {
            "author": _AUTHOR,
            "description": f"CoreML Model {what}",
            "name": item,
            "path": f"{_FOLDER}/{item}",
        }
        for item, what in (("model.mlmodel", "Specification"), ("weights", "Weights"))
    }
    manifest = {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": entries,
        "rootModelIdentifier": ids["model.mlmodel"],
    }
    return json.dumps(manifest, separators=(",", ":")).encode()


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
