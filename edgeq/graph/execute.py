"""Run a `Graph` in onnxruntime: all of it, with intermediate values, or a few of its nodes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgeq.core.cpu import this_cpu
from edgeq.core.errors import FormatError, MissingDependencyError, UsageError
from edgeq.graph.ir import Graph, Info, Node
from edgeq.graph.onnx.write import Integers, to_bytes, to_model
from edgeq.graph.rewrite import prune


def sums_saturate() -> bool:
    """Whether onnxruntime's sums of unsigned and signed 8-bit products saturate at 16 bits here.

    They do on x86 processors without VNNI. Products of two unsigned factors are summed exactly
    everywhere. A graph that was measured or corrected with saturating sums would fit such
    processors alone.

    Source: onnxruntime's docs/performance/quantization.md, "When and why do I need to try U8U8?".
    """
    cpu = this_cpu()
    return cpu.arch == "x86_64" and not cpu.features & {"avx512vnni", "avxvnni"}


def require() -> Any:
    """Import onnxruntime.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as err:
        raise MissingDependencyError("onnxruntime", "ort", "to run graphs") from err
    return onnxruntime


class Session:
    """A graph in onnxruntime's CPU provider, with the quantization that it holds.

    Args:
        graph: canonical.
        watch: values that are returned beside the outputs, rounded if they have `QuantParams`.
        threads: onnxruntime's.
        optimize: let onnxruntime fuse operators, quantized ones into integer ones; without it
            each is computed as it stands, the quantized ones in float on rounded values.
        activations: "int8" or "uint8", see `edgeq.graph.onnx.save.write_onnx`. Where signed weights
            would make sums saturate, all integers are unsigned; the values are the same.

    Raises:
        UsageError: ``watch`` names an unknown value.
        FormatError: onnxruntime refuses the graph.
        UnsupportedError: it has more than 2 GB of constants.
        MissingDependencyError: onnx or onnxruntime is not installed.
    """

    precision: Literal["float32"] = "float32"

    def __init__(
        self,
        graph: Graph,
        watch: Iterable[str] = (),
        threads: int = 1,
        *,
        optimize: bool = True,
        activations: Integers = "int8",
    ) -> None:
        self.graph = graph
        watched = [w for w in dict.fromkeys(watch) if w not in graph.outputs]
        self._fed = [w for w in watched if w in graph.inputs]
        computed = tuple(w for w in watched if w not in graph.inputs)
        weights: Integers = "int8"
        if sums_saturate():
            activations = weights = "uint8"
        content = to_bytes(graph, activations=activations, weights=weights, watch=computed)
        self._names = (*graph.outputs, *computed)
        self._session = _opened(graph, content, threads, optimize)
        self.runtime = f"onnxruntime {require().__version__}"
        self.metadata: Mapping[str, str] = graph.meta
        self.inputs: Mapping[str, Info] = {name: graph.info(name) for name in graph.inputs}
        self.outputs: Mapping[str, Info] = {name: graph.info(name) for name in graph.outputs}

    def close(self) -> None:
        """Release the session."""
        self._session = None

    def __call__(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run one sample; returns outputs and watched values by name.

        Args:
            feeds: every input of the graph, of its shape and type.

        Raises:
            UsageError: an input is missing, unknown, or of another shape or type.
            FormatError: onnxruntime fails.
        """
        check_feeds(self.graph, feeds)
        given = {name: np.asarray(array, order="C") for name, array in feeds.items()}
        results = _run(self._session, self._names, given, self.graph.name)
        for name in self._fed:
            quant = self.graph.quants.get(name)
            results[name] = quant.dequantize(quant.quantize(given[name])) if quant else given[name]
        return results


def check_feeds(graph: Graph, feeds: Mapping[str, NDArray[Any]]) -> None:
    """Check that a sample has the graph's inputs, in their shapes and types.

    Raises:
        UsageError: an input is missing, unknown, or of another shape or type.
    """
    if feeds.keys() != set(graph.inputs):
        raise UsageError(
            f"the graph {graph.name} takes {', '.join(graph.inputs)}; given: "
            f"{', '.join(feeds) or 'nothing'}"
        )
    for name, array in feeds.items():
        info = graph.values[name]
        if array.shape != info.shape or array.dtype != info.dtype:
            raise UsageError(
                f"the input {name!r} is {info.dtype} {list(info.shape)}; given: {array.dtype} "
                f"{list(array.shape)}"
            )


def compute(graph: Graph, names: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    """Compute values that depend on constants only.

    Args:
        graph: nothing needs to be known of its values.
        names: of the values.

    Raises:
        FormatError: onnxruntime refuses one of the nodes, or fails to compute it.
    """
    part = prune(replace(graph, outputs=names, inputs=(), quants={}, meta={}))
    content = to_model(part).SerializeToString()
    session = _opened(part, content, 1, False)
    return _run(session, names, {}, graph.name)


def check_opens(graph: Graph, content: bytes) -> None:
    """Check that onnxruntime loads a file.

    Args:
        graph: what the file was made of.
        content: the file.

    Raises:
        FormatError: names the operator that onnxruntime refuses.
        MissingDependencyError: onnxruntime is not installed.
    """
    _opened(graph, content, 1, True)


def _opened(graph: Graph, content: bytes, threads: int, optimize: bool) -> Any:
    """Open a session; if onnxruntime refuses the file, the error names the operator."""
    runtime = require()
    try:
        return _session(runtime, content, threads, optimize)
    except Exception as err:  # onnxruntime's errors share no base of their own
        node, reason = _refused(runtime, graph, optimize) or (None, err)
        what = f"{node} of the graph {graph.name}" if node else f"the graph {graph.name}"
        raise FormatError(f"onnxruntime refuses {what}: {_short(reason)}") from err


def _refused(runtime: Any, graph: Graph, optimize: bool) -> tuple[Node, Exception] | None:
    """Find the first node that onnxruntime does not load by itself, and the reason."""
    for node in graph.nodes:
        outputs = tuple(out for out in node.outputs if out)
        given = tuple(dict.fromkeys(i for i in node.inputs if i in graph.values))
        part = replace(graph, nodes=(node,), inputs=given, outputs=outputs, quants={}, meta={})
        try:
            _session(runtime, to_model(prune(part)).SerializeToString(), 1, optimize)
        except Exception as err:  # noqa: BLE001 - as in `_opened`
            return node, err
    return None


def _short(err: BaseException) -> str:
    """Shorten a message of onnxruntime to one line without source locations."""
    words = " ".join(str(err).split())
    return re.sub(r"/onnxruntime_src/\S+ |\[ONNXRuntimeError\] : \d+ : ", "", words)[:400]


def _session(runtime: Any, content: bytes, threads: int, optimize: bool) -> Any:
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # threads that spin while they wait take the machine from whoever else works on it
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # by default values that meet 4-bit weights are rounded to 8 bits, which is not recorded
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    if not optimize:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def _run(
    session: Any, names: tuple[str, ...], feeds: Mapping[str, NDArray[Any]], name: str
) -> dict[str, NDArray[Any]]:
    try:
        values = session.run(list(names), feeds)
    except Exception as err:  # onnxruntime's errors share no base of their own
        raise FormatError(f"onnxruntime fails to run the graph {name}: {err}") from err
    return dict(zip(names, values, strict=True))
