"""Small float .tflite files written by hand, operator by operator, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_TYPES = {"float32": "FLOAT32", "float16": "FLOAT16", "int32": "INT32", "int8": "INT8"}


class Net:
    """A file in the making; shapes of what operators give are asked of LiteRT."""

    def __init__(self, seed: int = 0) -> None:
        from ai_edge_litert import schema_py_generated as schema

        self.s = schema
        self.rng = np.random.default_rng(seed)
        self.model = schema.ModelT()
        self.model.version, self.model.description = 3, "test"
        self.model.buffers = [schema.BufferT()]
        self.model.operatorCodes = []
        self.graph = schema.SubGraphT()
        self.graph.tensors, self.graph.operators = [], []
        self.graph.inputs, self.graph.outputs = [], []
        self.model.subgraphs = [self.graph]

    def tensor(self, name: str, shape: tuple[int, ...], dtype: str = "float32") -> int:
        """A value."""
        tensor = self.s.TensorT()
        tensor.name, tensor.shape = name, np.array(shape, np.int32)
        tensor.type, tensor.buffer = getattr(self.s.TensorType, _TYPES[dtype]), 0
        self.graph.tensors.append(tensor)
        return len(self.graph.tensors) - 1

    def input(self, *shape: int, dtype: str = "float32") -> int:
        """A value that is given."""
        index = self.tensor(f"x{len(self.graph.inputs)}", shape, dtype)
        self.graph.inputs.append(index)
        return index

    def const(self, data: Any, scale: float | None = None) -> int:
        """A constant; int64 becomes int32 and float64 float32, as the format has them."""
        array = np.asarray(data)
        narrow = {"int64": "int32", "float64": "float32"}
        array = array.astype(narrow.get(str(array.dtype), array.dtype))
        index = self.tensor(f"c{len(self.graph.tensors)}", array.shape, str(array.dtype))
        buffer = self.s.BufferT()
        buffer.data = np.frombuffer(array.tobytes(), np.uint8)
        self.graph.tensors[index].buffer = len(self.model.buffers)
        self.model.buffers.append(buffer)
        if scale is not None:
            held = self.s.QuantizationParametersT()
            held.scale, held.zeroPoint = np.array([scale], np.float32), np.zeros(1, np.int64)
            self.graph.tensors[index].quantization = held
        return index

    def random(self, *shape: int) -> int:
        """A constant of random numbers."""
        return self.const(self.rng.standard_normal(shape))

    def op(
        self, name: str, inputs: list[int], options: str = "", outs: int = 1,
        dtype: str = "float32", shape: tuple[int, ...] = (1,), **settings: Any,
    ) -> Any:  # fmt: skip
        """An operator; gives its output, or a list of several.

        ``shape`` is the output's, which few operators need to be told.
        """
        code, operator = self.s.OperatorCodeT(), self.s.OperatorT()
        code.builtinCode, code.version = getattr(self.s.BuiltinOperator, name), 1
        code.deprecatedBuiltinCode = min(code.builtinCode, 127)
        operator.opcodeIndex = len(self.model.operatorCodes)
        self.model.operatorCodes.append(code)
        made = [self.tensor(f"{name.lower()}_{len(self.graph.tensors)}", shape, dtype)
                for _ in range(outs)]  # fmt: skip
        operator.inputs, operator.outputs = list(inputs), list(made)
        if options:
            operator.builtinOptionsType = getattr(self.s.BuiltinOptions, options)
            operator.builtinOptions = getattr(self.s, options + "T")()
            for key, value in settings.items():
                assert hasattr(operator.builtinOptions, key), key
                setattr(operator.builtinOptions, key, value)
        self.graph.operators.append(operator)
        return made if outs > 1 else made[0]

    def conv(
        self, x: int, channels: tuple[int, int], kernel: int = 3, stride: int = 1,
        same: bool = True, act: int = 0, dilation: int = 1,
    ) -> int:  # fmt: skip
        """A convolution with a bias."""
        i, o = channels
        weights, bias = self.random(o, kernel, kernel, i), self.random(o)
        found: int = self.op(
            "CONV_2D", [x, weights, bias], "Conv2DOptions", padding=0 if same else 1,
            strideH=stride, strideW=stride, fusedActivationFunction=act,
            dilationHFactor=dilation, dilationWFactor=dilation,
        )  # fmt: skip
        return found

    def dense(self, x: int, k: int, n: int, act: int = 0) -> int:
        """A fully connected layer with a bias."""
        inputs = [x, self.random(n, k), self.random(n)]
        found: int = self.op(
            "FULLY_CONNECTED", inputs, "FullyConnectedOptions", fusedActivationFunction=act
        )
        return found

    def save(self, path: Path, *outputs: int) -> Path:
        """Write the file, with the shapes that LiteRT finds."""
        self.graph.outputs = list(outputs)
        runner = _interpreter(model_content=self._packed())
        for detail in runner.get_tensor_details():
            if detail["index"] < len(self.graph.tensors):
                self.graph.tensors[detail["index"]].shape = np.array(detail["shape"], np.int32)
        path.write_bytes(self._packed())
        return path

    def _packed(self) -> bytes:
        import flatbuffers

        builder = flatbuffers.Builder(1 << 12)
        builder.Finish(self.model.Pack(builder), b"TFL3")
        return bytes(builder.Output())


def run_litert(path: Path, feeds: list[NDArray[Any]]) -> list[NDArray[Any]]:
    """What LiteRT's own kernels, without delegates, make of inputs in the file's order."""
    runner = _interpreter(model_path=str(path))
    for detail, array in zip(runner.get_input_details(), feeds, strict=True):
        runner.set_tensor(detail["index"], array)
    runner.invoke()
    return [runner.get_tensor(detail["index"]) for detail in runner.get_output_details()]


def _interpreter(**model: Any) -> Any:
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    kernels = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    runner = Interpreter(experimental_op_resolver_type=kernels, **model)
    runner.allocate_tensors()
    return runner
