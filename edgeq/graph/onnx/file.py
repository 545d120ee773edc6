"""Read an ONNX file as a raw `Graph`: checked, tensors in memory, operators unchanged.

External data is read only from the model's own folder. Float16, bfloat16 and float64 models are
taken as float32 ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import (
    EdgeqError,
    FormatError,
    MissingDependencyError,
    UnsupportedError,
    UsageError,
)
from edgeq.graph.ir import Graph, Info, Node, Shape
from edgeq.graph.onnx.check import DOMAINS, check, check_node, node_text
from edgeq.graph.operators import OPERATORS

OPSET = 21
"""What the operators of a `Graph` mean."""
NEWEST = 28
"""The newest opset whose changes to the known operators were looked at: types only, since 21."""
_WIDENED = ("float16", "float64", "bfloat16")


@dataclass(frozen=True)
class Raw:
    """A model as it was read, before any rewriting.

    Args:
        graph: nodes and constants as in the file; values are the inputs only.
        opset: what its operators mean.
        notes: what was decided in reading, to be kept in the graph's meta.
    """

    graph: Graph
    opset: int
    notes: Mapping[str, str]


def require() -> ModuleType:
    """Import onnx.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import onnx
        import onnx.external_data_helper
        import onnx.inliner
    except ImportError as err:
        raise MissingDependencyError("onnx", "ort", "to read or write ONNX files") from err
    return onnx


def read_raw(path: Path, shapes: Mapping[str, Shape], batch: int | None) -> Raw:
    """Read and check a file.

    Args:
        path: .onnx, its external data beside it.
        shapes: input -> shape, for inputs with unknown axes.
        batch: what an unknown first axis becomes; 1 if None.

    Raises:
        FormatError: damaged, or external data is missing or outside of the folder.
        UnsupportedError: an opset, type or operator that is not known.
        UsageError: an unknown axis that is not given, or a shape that contradicts the model.
    """
    onnx = require()
    model = _parsed(onnx, path)
    try:
        return _read(onnx, model, path, shapes, batch)
    except UnicodeDecodeError as err:  # a name that is no text, found when it is looked at
        raise FormatError(f"{path} is damaged: {err}") from err


def _read(
    onnx: ModuleType, model: Any, path: Path, shapes: Mapping[str, Shape], batch: int | None
) -> Raw:
    tensors = {t.name: _array(onnx, t, path) for t in model.graph.initializer}
    if model.graph.sparse_initializer:
        raise UnsupportedError(
            f"{path} has sparse tensors, which edgeq does not read; export it with dense tensors"
        )
    opset = _opset(model, path)
    _strip(onnx, model, tensors)
    check(onnx, model, path)
    if len(model.functions):
        model = onnx.inliner.inline_local_functions(model)
    for node in model.graph.node:
        check_node(onnx, node, opset, path)
    return _raw(onnx, model, tensors, opset, path, shapes, batch)


def _parsed(onnx: ModuleType, path: Path) -> Any:
    from google.protobuf.message import DecodeError

    try:
        content = path.read_bytes()
    except OSError as err:
        raise EdgeqError(f"{path} cannot be read: {err.strerror or err}") from err
    model = onnx.ModelProto()
    try:
        model.ParseFromString(content)
    except (DecodeError, RuntimeError) as err:
        raise FormatError(f"{path} is not an ONNX file, or is damaged: {err}") from err
    if not model.graph.node and not model.graph.output:
        raise FormatError(f"{path} is not an ONNX file, or is empty: it contains no graph")
    return model


def _opset(model: Any, path: Path) -> int:
    versions = [o.version for o in model.opset_import if o.domain in DOMAINS]
    opset = int(versions[0]) if versions else 1  # files before opsets existed say nothing
    if opset > NEWEST:
        raise UnsupportedError(
            f"{path} has opset {opset}; edgeq reads opsets up to {NEWEST}: export it with one of "
            f"those, preferably {OPSET}"
        )
    return opset


def _array(onnx: ModuleType, tensor: Any, path: Path) -> NDArray[Any]:
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return _external(onnx, tensor, path)
    if tensor.data_type == onnx.TensorProto.STRING:
        raise UnsupportedError(
            f"{path} has the string tensor {tensor.name!r}; edgeq does not read strings"
        )
    try:
        array: NDArray[Any] = onnx.numpy_helper.to_array(tensor)
    except (ValueError, TypeError, KeyError, RuntimeError) as err:
        raise FormatError(f"the tensor {tensor.name!r} of {path} is damaged: {err}") from err
    return array


def _external(onnx: ModuleType, tensor: Any, path: Path) -> NDArray[Any]:
    """Read a tensor of an external data file, which must be in the model's folder."""
    entries = {e.key: e.value for e in tensor.external_data}
    where, named = entries.get("location", ""), f"the tensor {tensor.name!r} of {path}"
    folder = path.parent.resolve()
    file = (folder / where).resolve()
    if not where or folder not in file.parents:
        raise FormatError(
            f"{named} is stored in {where!r}, outside the folder of the model; only data in that "
            "folder is read"
        )
    if not file.is_file():
        raise FormatError(
            f"{named} is stored in {where!r}, which is missing from {path.parent}; put it there"
        )
    try:
        start = int(entries.get("offset", 0))
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
        shape = tuple(tensor.dims)
        count = int(np.prod(shape, dtype=np.int64))
        elements = -(-count // 2) if dtype.name in ("int4", "uint4") else count
        length = int(entries.get("length", elements * dtype.itemsize))
        if start < 0 or min(shape, default=0) < 0 or length != elements * dtype.itemsize:
            raise FormatError(f"{named} has {length} bytes from {start}; its shape is {shape}")
        available = file.stat().st_size
        if start + length > available:
            raise FormatError(
                f"{named} ends at byte {start + length} of {where!r}, which has {available} bytes"
            )
        with file.open("rb") as data:
            data.seek(start)
            raw = data.read(length)
        whole = onnx.TensorProto(data_type=tensor.data_type, dims=shape, raw_data=raw)
        array: NDArray[Any] = onnx.numpy_helper.to_array(whole)
    except (ValueError, TypeError, KeyError, OverflowError, OSError) as err:
        raise FormatError(f"{named} cannot be read from {where!r}: {err}") from err
    return array


def _strip(onnx: ModuleType, model: Any, tensors: Mapping[str, NDArray[Any]]) -> None:
    """Turn initializers into inputs, so that the rest is small whatever the size of the weights."""
    known = {i.name for i in model.graph.input}
    for tensor in model.graph.initializer:
        if tensor.name not in known:
            shape = tensors[tensor.name].shape
            given = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, shape)
            model.graph.input.append(given)
    del model.graph.initializer[:]


def _raw(
    onnx: ModuleType,
    model: Any,
    tensors: dict[str, NDArray[Any]],
    opset: int,
    path: Path,
    shapes: Mapping[str, Shape],
    batch: int | None,
) -> Raw:
    for proto in model.graph.node:
        _texts(path, proto.name, proto.op_type, *proto.input, *proto.output)
    _texts(path, model.graph.name, *tensors, *(p.value for p in model.metadata_props))
    _own_names(model, tensors, path)
    widened: set[str] = set()
    constants = {name: _widened(a, widened) for name, a in tensors.items()}
    given = [i for i in model.graph.input if i.name not in tensors]
    infos, notes = _inputs(onnx, given, path, shapes, batch, widened)
    taken: set[str] = set()
    nodes = []
    for proto in model.graph.node:
        if proto.op_type == "Constant":
            constants[proto.output[0]] = _widened(_constant(onnx, proto, path), widened)
            continue
        name = _fresh(proto.name or next((o for o in proto.output if o), proto.op_type), taken)
        written = [*_left_out(onnx, proto, opset), *proto.attribute]
        attrs = {a.name: _attribute(onnx, a, path) for a in written}
        if proto.op_type == "Cast":
            attrs["to"] = _cast_to(onnx, attrs["to"])
        nodes.append(Node(proto.op_type, name, tuple(proto.input), tuple(proto.output), attrs))
    if widened:
        notes["edgeq.widened"] = ", ".join(sorted(widened))
    graph = Graph(
        name=model.graph.name or path.stem,
        inputs=tuple(infos),
        outputs=tuple(o.name for o in model.graph.output),
        nodes=tuple(nodes),
        constants=constants,
        values=infos,
        meta={p.key: p.value for p in model.metadata_props},
    )
    return Raw(graph, opset, notes)


def _own_names(model: Any, tensors: Mapping[str, NDArray[Any]], path: Path) -> None:
    """Refuse an output that is an input itself, which runtimes cannot name."""
    given = {i.name for i in model.graph.input if i.name not in tensors}
    for out in model.graph.output:
        if out.name in given:
            raise UnsupportedError(
                f"the output {out.name!r} of {path} is an input of the graph itself; leave it out "
                "of the outputs, or export it behind an Identity"
            )


def _left_out(onnx: ModuleType, proto: Any, opset: int) -> Iterator[Any]:
    """Defaults of a function without an operator here; ONNX's inference (1.23) forgets them."""
    schema = onnx.defs.get_schema(proto.op_type, min(opset, onnx.defs.onnx_opset_version()))
    if proto.op_type in OPERATORS or not schema.has_function:
        return
    defaults = (attribute.default_value for attribute in schema.attributes.values())
    yield from (value for value in defaults if value.type != onnx.AttributeProto.UNDEFINED)


def _texts(path: Path, *names: Any) -> None:
    """Refuse names that are not valid text; protobuf returns them as bytes."""
    for name in names:
        if not isinstance(name, str):
            raise FormatError(f"{path} is damaged: the name {name!r} is not valid text")


def _fresh(name: str, taken: set[str]) -> str:
    tried, count = name, 1
    while tried in taken:
        count += 1
        tried = f"{name}.{count}"
    taken.add(tried)
    return tried


def _widened(array: NDArray[Any], widened: set[str]) -> NDArray[Any]:
    """Convert float64 and bfloat16 to float32; float16 is kept, and computed in float32."""
    if array.dtype.name in ("float64", "bfloat16"):
        widened.add(array.dtype.name)
        return array.astype(np.float32)
    return array


def _inputs(
    onnx: ModuleType,
    given: list[Any],
    path: Path,
    shapes: Mapping[str, Shape],
    batch: int | None,
    widened: set[str],
) -> tuple[dict[str, Info], dict[str, str]]:
    """Fix every open axis of the inputs; returns notes on how."""
    names = [i.name for i in given]
    if unknown := [name for name in shapes if name not in names]:
        raise UsageError(f"{path} has no input {unknown[0]!r}; its inputs: {', '.join(names)}")
    if batch is not None and batch < 1:
        raise UsageError(f"the batch is {batch}; it must be 1 or more")
    axes: dict[str, list[int | str]] = {}
    for value in given:
        kind = value.type.WhichOneof("value")
        if kind != "tensor_type" or not value.type.tensor_type.HasField("shape"):
            if kind == "tensor_type" and value.name in shapes:
                axes[value.name] = ["?"] * len(shapes[value.name])
                continue
            raise UsageError(
                f"the input {value.name!r} of {path} has no shape"
                + (
                    f"; give one, as --shape {value.name}=1,3,224,224"
                    if kind == "tensor_type"
                    else f": it is {kind or 'of no type'}, and edgeq takes tensors"
                )
            )
        dims = value.type.tensor_type.shape.dim
        axes[value.name] = [d.dim_value if d.dim_value > 0 else d.dim_param or "?" for d in dims]
    bound = _bound(axes, shapes, path)
    notes: dict[str, str] = {}
    infos: dict[str, Info] = {}
    for value in given:
        shape = []
        for place, axis in enumerate(axes[value.name]):
            if isinstance(axis, int):
                if place == 0 and batch not in (None, axis) and value.name not in shapes:
                    raise UsageError(
                        f"the input {value.name!r} of {path} has the fixed batch {axis}, "
                        f"not {batch}"
                    )
                shape.append(axis)
            elif value.name in shapes:
                shape.append(shapes[value.name][place])
            elif axis in bound:
                shape.append(bound[axis])
            elif place == 0:
                shape.append(batch or 1)
                notes["edgeq.batch"] = f"{batch or 1}, unknown in the model ({axis})"
            else:
                shown = ", ".join(str(a) for a in axes[value.name])
                raise UsageError(
                    f"axis {place} ({axis}) of the input {value.name!r} [{shown}] of {path} is "
                    f"dynamic; give the whole shape, as --shape {value.name}="
                    + ",".join(str(a) if isinstance(a, int) else "N" for a in axes[value.name])
                    + " with a number for each N"
                )
        dtype = np.dtype(_dtype(onnx, value.type.tensor_type.elem_type)).name
        dtype = "text" if dtype == "object" else dtype
        if dtype in _WIDENED:
            widened.add(dtype)
            dtype = "float32"
        if dtype not in ("float32", "int64", "int32", "bool", "int8", "uint8"):
            raise UnsupportedError(
                f"the input {value.name!r} of {path} is {dtype}; edgeq reads float32, int64, "
                "int32, int8, uint8 and bool"
            )
        infos[value.name] = Info(tuple(shape), dtype)
    return infos, notes


def _bound(
    axes: Mapping[str, list[int | str]], shapes: Mapping[str, Shape], path: Path
) -> dict[str, int]:
    """Match named axes with the shapes given by the user."""
    bound: dict[str, int] = {}
    for name, shape in shapes.items():
        own = axes[name]
        shown = ", ".join(str(a) for a in own)
        if len(shape) != len(own) or any(n < 1 for n in shape):
            raise UsageError(
                f"the shape {list(shape)} does not fit the input {name!r} [{shown}] of {path}"
            )
        for axis, length in zip(own, shape, strict=True):
            if axis != "?" and length != (
                axis if isinstance(axis, int) else bound.get(axis, length)
            ):
                raise UsageError(
                    f"the shape {list(shape)} of the input {name!r} contradicts the model's "
                    f"[{shown}] in {path}"
                )
            if isinstance(axis, str) and axis != "?":
                bound[axis] = length
    return bound


def _dtype(onnx: ModuleType, elem_type: int) -> np.dtype[Any]:
    try:
        dtype: np.dtype[Any] = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(elem_type))
    except KeyError as err:
        raise FormatError(f"ONNX has no tensor type {elem_type}") from err
    return dtype


def _cast_to(onnx: ModuleType, to: int | str) -> int:
    """The type that a Cast makes: float32 for any float. Before opset 6 it was a string."""
    try:
        number = int(onnx.TensorProto.DataType.Value(to) if isinstance(to, str) else to)
    except ValueError as err:
        raise FormatError(f"ONNX has no tensor type {to!r}") from err
    return int(onnx.TensorProto.FLOAT) if _dtype(onnx, number).name in _WIDENED else number


def _constant(onnx: ModuleType, node: Any, path: Path) -> NDArray[Any]:
    """Return the value of a Constant node in any of its forms."""
    if len(node.attribute) != 1:
        raise FormatError(f"the Constant {node_text(node)} of {path} must have one value attribute")
    value = _attribute(onnx, node.attribute[0], path)
    if node.attribute[0].name not in ("value", "value_float", "value_floats", "value_int",
                                      "value_ints"):  # fmt: skip
        raise UnsupportedError(
            f"the Constant {node_text(node)} of {path} is a {node.attribute[0].name}; edgeq reads "
            "dense numbers"
        )
    if isinstance(value, np.ndarray):
        return value
    numbers = np.asarray(value)
    return numbers.astype(np.float32 if "float" in node.attribute[0].name else np.int64)


def _attribute(onnx: ModuleType, attribute: Any, path: Path) -> Any:
    """Convert an attribute to a number, a string, a tuple of them, or an array."""
    if attribute.type == onnx.AttributeProto.TENSOR:
        array = _array(onnx, attribute.t, path)
        return array.astype(np.float32) if array.dtype.name in _WIDENED else array
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if not isinstance(value, int | float | str):
        return tuple(v.decode("utf-8", "replace") if isinstance(v, bytes) else v for v in value)
    return value
