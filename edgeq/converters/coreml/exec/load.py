"""A Core ML file as plain objects: what a function takes, gives, and does.

Reads ``.mlpackage`` folders and ``.mlmodel`` files. The protobuf classes are coremltools'; nothing
else of it is used, so what is executed is what lies in the file.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.coreml.exec.blob import KINDS, Blob, Reader, unpack_bits
from edgeq.core.errors import FormatError, MissingDependencyError, UnsupportedError

SUFFIXES = (".mlpackage", ".mlmodel")
_WEIGHTS = "@model_path/"


@dataclass(frozen=True)
class Type:
    """Type of a value.

    Args:
        kind: MIL's name: "fp16", "int32", "string" ..., or "list", "dict", "tuple".
        shape: of a tensor, None for a dimension that is not fixed; None if it is no tensor.
        state: whether it is a state of that type.
    """

    kind: str
    shape: tuple[int | None, ...] | None
    state: bool = False

    def __str__(self) -> str:
        size = "" if self.shape is None else str([d if d else "?" for d in self.shape])
        return f"{'state of ' if self.state else ''}{self.kind}{size.replace(chr(39), '')}"


@dataclass(frozen=True)
class MilTensor:
    """A constant, in weight.bin or in the program itself.

    Args:
        type: its kind and shape.
        blob: the numbers in weight.bin, or None.
        value: the numbers as an array, or any other constant; None if there is a blob.
    """

    type: Type
    blob: Blob | None = None
    value: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape."""
        return tuple(d or 0 for d in self.type.shape or ())

    def rows(self, start: int, stop: int) -> NDArray[Any]:
        """Entries ``start:stop`` along the first axis."""
        if self.blob is None:
            part: NDArray[Any] = self.value[start:stop]
            return part
        size = math.prod(self.shape[1:])
        return self.blob.read(start * size, stop * size).reshape(-1, *self.shape[1:])

    def get(self) -> Any:
        """The whole value."""
        return self.value if self.blob is None else self.blob.read().reshape(self.shape)


@dataclass(frozen=True, eq=False)
class Op:
    """An operator of a program.

    Args:
        type: "linear", "const" ...
        name: its name, or that of its first result.
        inputs: by parameter, names of values or constants; a list where MIL says a tuple.
        outputs: names and types of its results.
        blocks: of "cond" and "while_loop".
        key: equal for equal constants, across functions too; of constants alone.
    """

    type: str
    name: str
    inputs: Mapping[str, list[str | MilTensor]]
    outputs: tuple[tuple[str, Type], ...]
    blocks: tuple[MilBlock, ...] = ()
    key: bytes = b""


@dataclass(frozen=True, eq=False)
class MilBlock:
    """Operators in order.

    Args:
        inputs: names given from outside, of nested blocks.
        outputs: names of what it gives.
        ops: the operators.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    ops: tuple[Op, ...]

    def walk(self) -> Iterator[Op]:
        """Every operator, including nested ones."""
        for op in self.ops:
            yield op
            for block in op.blocks:
                yield from block.walk()


@dataclass(frozen=True)
class Function:
    """One function of a program.

    Args:
        name: its name.
        inputs: names and types, states included.
        block: what it does.
    """

    name: str
    inputs: Mapping[str, Type]
    block: MilBlock


@dataclass
class File:
    """An opened Core ML file.

    Args:
        path: the package or file.
        spec: coremltools' protobuf message.
        folder: where weights lie, or None.
    """

    path: Path
    spec: Any
    folder: Path | None = None
    _readers: dict[str, Reader] = field(default_factory=dict)

    @property
    def metadata(self) -> Mapping[str, str]:
        """User-defined entries of the model's description."""
        entries: Mapping[str, str] = self.spec.description.metadata.userDefined
        return entries

    def reader(self, name: str) -> Reader:
        """The weight file a program names."""
        if name not in self._readers:
            relative = name.removeprefix(_WEIGHTS)
            inside = not Path(relative).is_absolute() and ".." not in Path(relative).parts
            if self.folder is None or not inside:
                raise FormatError(f"{self.path} refers to {name}, which is not in it")
            self._readers[name] = Reader(self.folder / relative)
        return self._readers[name]


_PROTO = "_edgeq_coremltools_proto"


def protobuf(purpose: str = "to read Core ML files") -> Any:
    """coremltools' protobuf classes.

    They are loaded without the rest of coremltools, which imports PyTorch and scikit-learn where
    these are installed: some 280 MB that nothing here needs. The classes are the same ones.

    Raises:
        MissingDependencyError: it is not installed.
    """
    if "coremltools" not in sys.modules:
        if _PROTO in sys.modules:
            return sys.modules[_PROTO]
        spec = importlib.util.find_spec("coremltools")
        for place in (spec and spec.submodule_search_locations) or ():
            if (Path(place) / "proto" / "__init__.py").exists():
                return _package(_PROTO, Path(place) / "proto")
    return library(purpose).proto


def library(purpose: str = "to write Core ML packages") -> Any:
    """The coremltools package, imported without its warnings.

    Raises:
        MissingDependencyError: it is not installed.
    """
    # it warns of parts that are absent outside macOS, and of torch, neither of which is used
    logger = logging.getLogger("coremltools")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        import coremltools
    except ImportError as err:
        raise MissingDependencyError("coremltools", "coreml", purpose) from err
    finally:
        logger.setLevel(level)
    return coremltools


def _package(name: str, folder: Path) -> ModuleType:
    """The package in a folder under another name, imported without its parent."""
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def versions() -> dict[str, str]:
    """Versions of the libraries that write, read and execute packages.

    Raises:
        MissingDependencyError: coremltools is not installed.
    """
    protobuf("to write and read Core ML packages")
    version = importlib.metadata.version("coremltools")
    return {"coremltools": version, "numpy": np.__version__}


def open_file(path: str | Path) -> File:
    """Open a package or model file.

    Raises:
        FormatError: it is damaged or no Core ML file.
        MissingDependencyError: coremltools is not installed.
    """
    path = Path(path)
    model, folder = path, None
    if path.is_dir():
        model = _model_of(path)
        folder = model.parent
    try:
        raw = model.read_bytes()
    except OSError as err:
        raise FormatError(f"{path} cannot be read: {err.strerror or err}") from err
    proto = protobuf()
    from google.protobuf.message import DecodeError

    spec = proto.Model_pb2.Model()
    try:
        spec.ParseFromString(raw)
    except DecodeError as err:
        raise FormatError(f"{model} is not a Core ML model: {err}") from err
    if spec.WhichOneof("Type") is None:
        raise FormatError(f"{model} is not a Core ML model: it has no model type")
    return File(path, spec, folder)


def _model_of(package: Path) -> Path:
    try:
        manifest = json.loads((package / "Manifest.json").read_bytes())
        item = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
        parts = Path(str(item)).parts
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise FormatError(
            f"{package} is not a Core ML package: its Manifest.json names no model ({err})"
        ) from err
    if ".." in parts or Path(str(item)).is_absolute():
        raise FormatError(f"{package}: Manifest.json names a model outside the package")
    return package / "Data" / str(item)


def functions(file: File) -> dict[str, Function]:
    """The functions of an ML Program by name.

    Raises:
        FormatError: constants are missing or do not fit their types.
        UnsupportedError: it has a type of value that is not known.
    """
    by_name = {}
    for name, function in file.spec.mlProgram.functions.items():
        inputs = {item.name: _type(item.type) for item in function.inputs}
        by_name[name] = Function(
            name, inputs, _block(file, function.block_specializations[function.opset], {})
        )
    return by_name


def _block(file: File, block: Any, outer: Mapping[str, bytes]) -> MilBlock:
    keys = dict(outer)
    ops = []
    for raw in block.operations:
        op = _op(file, raw, keys)
        ops.append(op)
        if op.key:
            keys.update((name, op.key) for name, _ in op.outputs)
    return MilBlock(tuple(item.name for item in block.inputs), tuple(block.outputs), tuple(ops))


def _op(file: File, raw: Any, keys: Mapping[str, bytes]) -> Op:
    inputs: dict[str, list[str | MilTensor]] = {}
    constant = raw.type == "const" or raw.type.startswith("constexpr_")
    key = [raw.type.encode()] if constant else []
    for name in sorted(raw.inputs):
        inputs[name] = []
        for binding in raw.inputs[name].arguments:
            if binding.WhichOneof("binding") == "name":
                inputs[name].append(binding.name)
                key.append(keys.get(binding.name, binding.name.encode()))
            else:
                inputs[name].append(_value(file, binding.value))
                key.append(name.encode() + binding.value.SerializeToString(deterministic=True))
    label = ""
    for name in sorted(raw.attributes):
        value = raw.attributes[name]
        if name == "name":
            label = value.immediateValue.tensor.strings.values[0]
            continue
        inputs[name] = [_value(file, value)]
        key.append(name.encode() + value.SerializeToString(deterministic=True))
    outputs = tuple((item.name, _type(item.type)) for item in raw.outputs)
    label = label or (outputs[0][0] if outputs else raw.type)
    blocks = tuple(_block(file, block, keys) for block in raw.blocks)
    return Op(raw.type, label, inputs, outputs, blocks, b"\0".join(key) if constant else b"")


def _type(raw: Any) -> Type:
    which = raw.WhichOneof("type")
    if which == "tensorType":
        tensor = raw.tensorType
        shape = tuple(
            d.constant.size if d.WhichOneof("dimension") == "constant" else None
            for d in tensor.dimensions
        )
        return Type(_kind(tensor.dataType), shape)
    if which == "stateType":
        inner = _type(raw.stateType.wrappedType)
        return Type(inner.kind, inner.shape, state=True)
    return Type(str(which).removesuffix("Type"), None)


def _kind(number: int) -> str:
    proto = protobuf()
    name: str = proto.MIL_pb2.DataType.Name(number)
    return name.lower().replace("float16", "fp16").replace("float32", "fp32")


def _value(file: File, raw: Any) -> MilTensor:
    kind = _type(raw.type)
    if raw.WhichOneof("value") == "blobFileValue":
        place = raw.blobFileValue
        if kind.kind not in KINDS or kind.shape is None or None in kind.shape:
            raise UnsupportedError(f"{file.path}: constants of type {kind} cannot be executed")
        count = math.prod(d or 0 for d in kind.shape)
        return MilTensor(kind, file.reader(place.fileName).blob(place.offset, kind.kind, count))
    immediate = raw.immediateValue
    which = immediate.WhichOneof("value")
    if which == "list":
        return MilTensor(kind, value=[_value(file, item).value for item in immediate.list.values])
    if which != "tensor":
        raise UnsupportedError(f"{file.path}: constants of type {which} cannot be executed")
    return MilTensor(kind, value=_immediate(file, kind, immediate.tensor))


def _immediate(file: File, kind: Type, tensor: Any) -> Any:
    """A constant written in the program: an array, or text."""
    shape = tuple(d or 0 for d in kind.shape or ())
    which = tensor.WhichOneof("value")
    if which == "strings":
        texts = [str(text) for text in tensor.strings.values]
        return texts[0] if not shape else texts
    count = math.prod(shape)
    if which == "bytes" or which is None:
        if kind.kind not in KINDS:
            raise UnsupportedError(f"{file.path}: constants of type {kind} cannot be executed")
        entry = KINDS[kind.kind]
        raw = np.frombuffer(tensor.bytes.values, np.uint8)
        if raw.size != -(-count * entry.bits // 8):
            raise FormatError(f"{file.path}: {raw.size} bytes for a constant of type {kind}")
        if entry.bits >= 8:
            return raw.view(entry.dtype).reshape(shape)
        return unpack_bits(raw, entry.bits, count, entry.dtype is np.int8).reshape(shape)
    values = getattr(tensor, which).values
    dtype: Any = {"bools": np.bool_, "floats": np.float32, "doubles": np.float64}.get(which)
    if dtype is None:
        dtype = np.dtype(kind.kind if kind.kind in ("int64", "uint64") else "int64")
        if kind.kind in KINDS:
            dtype = KINDS[kind.kind].dtype
    array = np.array(values, dtype=dtype)
    if array.size != count:
        raise FormatError(f"{file.path}: {array.size} numbers for a constant of type {kind}")
    return array.reshape(shape)
