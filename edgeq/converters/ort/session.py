"""Sessions of onnxruntime, in which sums of 8-bit products are exact on every processor."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import FormatError, MissingDependencyError
from edgeq.graph.execute import sums_saturate

TYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype("float32"), "tensor(float16)": np.dtype("float16"),
    "tensor(double)": np.dtype("float64"), "tensor(int8)": np.dtype("int8"),
    "tensor(uint8)": np.dtype("uint8"), "tensor(int16)": np.dtype("int16"),
    "tensor(uint16)": np.dtype("uint16"), "tensor(int32)": np.dtype("int32"),
    "tensor(uint32)": np.dtype("uint32"), "tensor(int64)": np.dtype("int64"),
    "tensor(uint64)": np.dtype("uint64"), "tensor(bool)": np.dtype("bool"),
}  # fmt: skip
"""NumPy's type for each type of tensor that onnxruntime names."""
_SUMMED = {
    "QLinearConv": (3, 5), "QLinearMatMul": (3, 5), "QGemm": (3, 5), "ConvInteger": (1, 3),
    "MatMulInteger": (1, 3), "MatMulIntegerToFloat": (1, 5), "DynamicQuantizeMatMul": (1, 3),
}  # fmt: skip
"""Operator that sums 8-bit products -> the positions of its weights and of their zero point."""


def require() -> tuple[ModuleType, ModuleType]:
    """onnx and onnxruntime.

    Raises:
        MissingDependencyError: one is not installed.
    """
    try:
        import onnx
        import onnxruntime
    except ImportError as err:
        package = (err.name or "onnxruntime").split(".")[0]
        purpose = "to make or run ONNX files"
        raise MissingDependencyError(package, "ort", purpose) from err
    return onnx, onnxruntime


def open_session(
    path: Path,
    *,
    threads: int | None = None,
    graph: bytes | None = None,
    profile: Path | None = None,
) -> Any:
    """A session of onnxruntime's CPU provider that adds products of 8 bits exactly.

    On x86 processors without VNNI onnxruntime does so by making signed weights unsigned. It cannot
    do that in an .ort file, which is therefore run as its `exact_form`, nor where operators share
    weights: those are computed in float.

    Args:
        path: .onnx or .ort file.
        threads: onnxruntime's; all cores if None.
        graph: the model's bytes, to be run in place of the file, with the data of its folder.
        profile: prefix of the file that onnxruntime's profiler writes; None does not profile.

    Raises:
        FormatError: onnxruntime refuses it.
        MissingDependencyError: onnxruntime is not installed.
    """
    _, onnxruntime = require()
    if graph is None and path.suffix.lower() == ".ort" and sums_saturate():
        graph = exact_form(path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if threads:
        options.intra_op_num_threads = threads
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    if graph is not None:
        key = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(key, str(path.parent))
    if sums_saturate():  # elsewhere the setting is not needed, and some graphs fail to load with it
        options.add_session_config_entry("session.x64quantprecision", "1")
    content = str(path) if graph is None else graph
    providers = ["CPUExecutionProvider"]
    try:
        try:
            return onnxruntime.InferenceSession(content, options, providers=providers)
        except Exception:
            if not sums_saturate():
                raise
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            return onnxruntime.InferenceSession(content, options, providers=providers)
    # onnxruntime's own exceptions share no base but this
    except Exception as err:
        raise FormatError(f"onnxruntime cannot load {path}: {first_line(err)}") from err


def exact_form(path: Path) -> bytes | None:
    """The graph of an .ort file as ONNX, with unsigned weights of the same values.

    Products of two unsigned factors are summed exactly on every processor.

    Args:
        path: .ort file.

    Returns:
        the ONNX model, or None if no operator of the file sums 8-bit products (decoders do not), or
        if it cannot be opened; opening the file itself then says why.
    """
    onnx, onnxruntime = require()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    with tempfile.TemporaryDirectory(prefix="edgeq-") as folder:
        onnx_file = Path(folder) / "model.onnx"
        options.optimized_model_filepath = str(onnx_file)
        try:
            if not any(operator in _SUMMED for operator in _operators(path)):
                return None
            onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception:  # noqa: BLE001  (opening the file itself tells why)
            return None
        model = onnx.load(onnx_file)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        at, zero = _SUMMED.get(node.op_type, (0, 0))
        weights = tensors.get(node.input[at]) if zero else None
        if weights is None or weights.data_type != onnx.TensorProto.INT8:
            continue
        node.input.extend([""] * (zero + 1 - len(node.input)))
        zeros = tensors.get(node.input[zero])
        zero_points = np.zeros((), np.int8) if zeros is None else onnx.numpy_helper.to_array(zeros)
        for place, signed in ((at, onnx.numpy_helper.to_array(weights)), (zero, zero_points)):
            name = node.input[place] = f"{node.input[place]} unsigned"
            if name not in tensors:
                unsigned = np.ascontiguousarray(signed).view(np.uint8) ^ np.uint8(128)
                tensors[name] = onnx.numpy_helper.from_array(unsigned.reshape(signed.shape), name)
                model.graph.initializer.append(tensors[name])
    return bytes(model.SerializeToString())


def ort_tensors(path: Path) -> dict[str, NDArray[Any]]:
    """Constants of an .ort file, by the reader that onnxruntime's package includes."""
    onnx, _ = require()
    graph = _ort_graph(path)
    tensors = {}
    for i in range(graph.InitializersLength()):
        tensor = graph.Initializers(i)
        # numbers of types are those of ONNX
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.DataType()))
        if dtype in TYPES.values():
            raw = np.asarray(tensor.RawDataAsNumpy(), np.uint8)
            shape = [tensor.Dims(k) for k in range(tensor.DimsLength())]
            tensors[tensor.Name().decode()] = raw.view(dtype).reshape(shape)
    return tensors


def _operators(path: Path) -> set[str]:
    """The operators of an .ort file."""
    graph = _ort_graph(path)
    return {graph.Nodes(i).OpType().decode() for i in range(graph.NodesLength())}


def _ort_graph(path: Path) -> Any:
    require()
    from onnxruntime.tools.ort_format_model.ort_flatbuffers_py.fbs.InferenceSession import (
        InferenceSession,
    )

    content: Any = np.memmap(path, np.uint8, "r")
    return InferenceSession.GetRootAs(memoryview(content), 0).Model().Graph()


def first_line(err: BaseException) -> str:
    """The first line of an error's text; its class if it has none."""
    return (str(err).strip() or type(err).__name__).splitlines()[0]
