"""onnxruntime's MatMulNBits, and NumPy's float32 matmul, as what single matmuls are compared with.

A run is ``copies`` matmuls with weights of their own in one graph, so that what a call costs is
shared by them and the weights come from as far away as they would in a model.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from protocol import repeat, serve

BLOCK = 32

_runs: dict[str, Any] = {}


def info() -> dict[str, Any]:
    """Versions."""
    return {"onnxruntime": onnxruntime.__version__, "numpy of the peers": np.__version__}


def _graph(n: int, k: int, m: int, copies: int, weights: list[tuple[Any, Any]]) -> bytes:
    nodes = [
        helper.make_node(
            "MatMulNBits", ["a", f"b{i}", f"s{i}"], [f"y{i}"], domain="com.microsoft",
            K=k, N=n, bits=4, block_size=BLOCK, accuracy_level=4,
        )
        for i in range(copies)
    ]  # fmt: skip
    initializers = [
        numpy_helper.from_array(array, f"{name}{i}")
        for i, parts in enumerate(weights)
        for name, array in zip("bs", parts, strict=True)
    ]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("a", TensorProto.FLOAT, [m, k])],
        [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, [m, n]) for i in range(copies)],
        initializers,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return bytes(model.SerializeToString())


class OrtRun:
    """MatMulNBits with accuracy_level 4: activations in INT8, as edgeq has them."""

    def __init__(self, n: int, k: int, m: int, copies: int, threads: int) -> None:
        rng = np.random.default_rng(0)
        self._copies = copies
        self.weights = [
            (
                rng.integers(0, 256, (n, k // BLOCK, BLOCK // 2), np.uint8),
                rng.uniform(0.01, 0.02, (n, k // BLOCK)).astype(np.float32),
            )
            for _ in range(copies)
        ]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        self._session = onnxruntime.InferenceSession(
            _graph(n, k, m, copies, self.weights), options, providers=["CPUExecutionProvider"]
        )
        self.x = rng.standard_normal((m, k), np.float32)
        self._binding = self._session.io_binding()
        self._binding.bind_cpu_input("a", self.x)
        self.outputs = [np.empty((m, n), np.float32) for _ in range(copies)]
        for i, out in enumerate(self.outputs):
            self._binding.bind_output(f"y{i}", "cpu", 0, np.float32, out.shape, out.ctypes.data)

    def once(self) -> None:
        """Run the graph."""
        self._session.run_with_iobinding(self._binding)

    def error(self) -> float:
        """Relative error (2-norm) of the last product against float64."""
        packed, scales = self.weights[-1]
        codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)
        wide = (codes.astype(np.float64) - 8) * np.repeat(scales, BLOCK, axis=1)
        want = self.x @ wide.T
        return float(np.linalg.norm(self.outputs[-1] - want) / np.linalg.norm(want))


class NumpyRun:
    """The same product in float32 by NumPy's BLAS: what not quantizing costs."""

    def __init__(self, n: int, k: int, m: int, copies: int, threads: int) -> None:
        rng = np.random.default_rng(0)
        self.weights = [rng.standard_normal((n, k), np.float32) for _ in range(copies)]
        self.x = rng.standard_normal((m, k), np.float32)
        self.outputs = [np.empty((m, n), np.float32) for _ in range(copies)]

    def once(self) -> None:
        """Run all products."""
        for w, out in zip(self.weights, self.outputs, strict=True):
            np.matmul(self.x, w.T, out=out)

    def error(self) -> float:
        """Relative error (2-norm) of the last product against float64."""
        want = self.x.astype(np.float64) @ self.weights[-1].T.astype(np.float64)
        return float(np.linalg.norm(self.outputs[-1] - want) / np.linalg.norm(want))


def open_matmul(session: str, kind: str, n: int, k: int, m: int, copies: int, threads: int) -> None:
    """Make ready a run of ``copies`` matmuls of m rows."""
    _runs[session] = {"onnxruntime": OrtRun, "numpy": NumpyRun}[kind](n, k, m, copies, threads)


def matmul(session: str, budget: float) -> list[float]:
    """Seconds per matmul of runs of all copies, for ``budget`` seconds."""
    run = _runs[session]

    def once() -> float:
        start = time.perf_counter()
        run.once()
        return time.perf_counter() - start

    return [seconds / len(run.outputs) for seconds in repeat(once, budget)]


def check_matmul(session: str) -> float:
    """The relative error of the last product against float64."""
    return float(_runs[session].error())


def close_matmul(session: str) -> None:
    """Free a run."""
    del _runs[session]


if __name__ == "__main__":
    serve({f.__name__: f for f in (info, open_matmul, matmul, check_matmul, close_matmul)})
