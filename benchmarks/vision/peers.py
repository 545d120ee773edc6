"""What edgeq is compared with: onnxruntime.quantization and ai-edge-quantizer, each at its best.

Each is given every way it has that keeps to the same bits, on the same float file and the same
samples, and the one with the best figure on the test data counts. `run.WAYS` does so for edgeq.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from subjects import even

from edgeq.graph.ir import Graph
from edgeq.graph.onnx.save import write_onnx

AEQ = Path.home() / ".cache" / "edgeq-vision" / "ai-edge-quantizer"
"""A Python of its own: its pins conflict with others'."""
Arrays = Mapping[str, NDArray[Any]]

ORT_STATIC = ("MinMax", "Entropy", "Percentile")
"""Its ways to find ranges."""
HISTOGRAM_BYTES = 1 << 30
"""Values it may keep: for a histogram it holds those of all samples at once."""
AEQ_RECIPES = {
    8: ("static_wi8_ai8", "dynamic_wi8_afp32", "weight_only_wi8_afp32"),
    4: ("dynamic_wi4_afp32", "dynamic_wi4b32_afp32", "dynamic_wi4c_hr_afp32",
        "weight_only_wi4_afp32"),
}  # fmt: skip
"""Bits of the weights -> its recipes."""


def ort_files(graph: Graph, folder: Path, calibration: Arrays) -> Iterator[tuple[str, Path]]:
    """What onnxruntime.quantization makes: static, weights by channel; and dynamic."""
    from onnxruntime import quantization as q
    from onnxruntime.quantization.shape_inference import quant_pre_process

    logging.getLogger().setLevel(logging.ERROR)
    source, ready = folder / "peer.onnx", folder / "peer-ready.onnx"
    write_onnx(graph, source)
    quant_pre_process(str(source), str(ready), skip_symbolic_shape=True)
    few = max(1, HISTOGRAM_BYTES // _value_bytes(graph))
    some = {name: even(array, few) for name, array in calibration.items()}
    for method in ORT_STATIC:
        rows = calibration if method == "MinMax" else some
        for unsigned in (True, False):
            out = folder / f"ort-{method}-{unsigned}.onnx"
            kinds = {"activation_type": q.QuantType.QUInt8 if unsigned else q.QuantType.QInt8,
                     "weight_type": q.QuantType.QInt8}  # fmt: skip
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                q.quantize_static(
                    str(ready), str(out), _Rows(rows), per_channel=True,
                    calibrate_method=getattr(q.CalibrationMethod, method), **kinds,
                )  # fmt: skip
            yield f"static {method}, {'uint8' if unsigned else 'int8'}", out
    if any(node.op == "LayerNormalization" for node in graph.nodes):
        # whole encoders collapse: the masks' -10000 takes the scores' whole range
        out = folder / "ort-products.onnx"
        q.quantize_static(
            str(ready), str(out), _Rows(calibration), per_channel=True,
            op_types_to_quantize=["MatMul", "Gemm", "Gather"],
            activation_type=q.QuantType.QUInt8, weight_type=q.QuantType.QInt8,
        )  # fmt: skip
        yield "static MinMax of products alone, uint8", out
    out = folder / "ort-dynamic.onnx"
    q.quantize_dynamic(str(ready), str(out), per_channel=True, weight_type=q.QuantType.QInt8)
    yield "dynamic", out


def _value_bytes(graph: Graph) -> int:
    return sum(info.nbytes for info in graph.values.values())


class _Rows:
    """Samples as onnxruntime.quantization reads them."""

    def __init__(self, arrays: Arrays) -> None:
        self._arrays, self._n = arrays, len(next(iter(arrays.values())))
        self.rewind()

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        """The next sample; None behind the last."""
        i = next(self._left, None)
        return None if i is None else {k: a[i : i + 1] for k, a in self._arrays.items()}

    def rewind(self) -> None:
        """Begin again."""
        self._left = iter(range(self._n))

    def set_range(self, start_index: int, end_index: int) -> None:
        """Some of them."""
        self._left = iter(range(start_index, min(end_index, self._n)))

    def __len__(self) -> int:
        return self._n


def aeq_python() -> Path:
    """Its Python, made if it is not there."""
    python = AEQ / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(AEQ)], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "ai-edge-quantizer"], check=True)
    return python


def aeq_files(
    source: Path, folder: Path, calibration: Arrays, bits: int
) -> Iterator[tuple[str, Path]]:
    """What ai-edge-quantizer makes of a float .tflite file; recipes it fails with are left out."""
    data = folder / "aeq-calibration.npz"
    np.savez(data, **_turned(source, calibration))
    for recipe in AEQ_RECIPES[bits]:
        out = folder / f"aeq-{recipe}.tflite"
        command = [aeq_python(), Path(__file__).with_name("aeq_worker.py"), source, out, recipe]
        done = subprocess.run(
            [*map(str, command), str(data)], capture_output=True, text=True, check=False,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"},
        )  # fmt: skip
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            print(f"ai-edge-quantizer {recipe}: {last}", file=sys.stderr, flush=True)
            continue
        yield recipe, out


def _turned(source: Path, arrays: Arrays) -> dict[str, NDArray[Any]]:
    runner = PeerTflite(source, None)
    return {name: runner.turned(name, array) for name, array in arrays.items()}


class PeerTflite:
    """Any .tflite file with the names of a graph of ours, rounded inputs and outputs or not.

    Args:
        path: the file.
        graph: whose shapes outputs are brought back to; None if it is not run.
        threads: LiteRT's.
    """

    def __init__(self, path: Path, graph: Graph | None, threads: int = 1) -> None:
        from ai_edge_litert.interpreter import Interpreter

        self._interpreter = Interpreter(str(path), num_threads=threads)
        self._run = self._interpreter.get_signature_runner()
        self._inputs = self._run.get_input_details()
        self._outputs = self._run.get_output_details()
        self._graph = graph

    def turned(self, name: str, array: NDArray[Any]) -> NDArray[Any]:
        """An array in the file's order of axes and type of numbers; the first axis is left."""
        entry = self._inputs[name]
        if tuple(array.shape[1:]) != tuple(entry["shape"][1:]):
            array = array.transpose(0, 2, 3, 1)
        dtype = np.dtype(entry["dtype"])
        scale, zero = entry["quantization"]
        if scale:
            limits = np.iinfo(dtype)
            array = np.clip(np.rint(array / scale) + zero, limits.min, limits.max)
        return np.ascontiguousarray(array.astype(dtype))

    def __call__(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        """Outputs of inputs."""
        assert self._graph is not None
        found = self._run(**{name: self.turned(name, array) for name, array in feeds.items()})
        made = {}
        for name in self._graph.outputs:
            array, (scale, zero) = found[name], self._outputs[name]["quantization"]
            made[name] = (array.astype(np.float32) - zero) * scale if scale else array
        return made
