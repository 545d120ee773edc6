"""Models of one operator each, over the whole space of its attributes, and what becomes of them.

`cases` makes the models: each attribute at each of its documented values, opsets on both sides of
a change of meaning, axes of one element, odd sizes, negative and empty axes, inputs left out,
outputs that nobody takes, and every type that both ONNX Runtime and edgeq know. `outcomes` runs a
case through every path: the canonical graph, the file that is written, and each target's runtime,
compared with what ONNX Runtime computes from the original model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from edgeq.core.errors import EdgeqError

Array = NDArray[Any]
STAGES = ("read", "record", "ort", "tflite", "coreml")
"""The canonical graph; the file edgeq writes; and each target's file in its own runtime."""


@dataclass(frozen=True)
class Case:
    """One model.

    Args:
        name: unique, says what is special.
        opset: of the model.
        op: the operator under test.
        feeds: input -> what the model is run with.
        inputs: names of the operator's inputs, "" for one that is left out.
        constants: initializers.
        attrs: of the operator.
        outputs: how many outputs the node lists.
        used: which of them the model gives; the others are named but nobody takes them.
        behind: the operator stands behind a convolution, so that images lie channels last.
    """

    name: str
    opset: int
    op: str
    feeds: Mapping[str, Array]
    inputs: tuple[str, ...]
    constants: Mapping[str, Array] = field(default_factory=dict)
    attrs: Mapping[str, Any] = field(default_factory=dict)
    outputs: int = 1
    used: tuple[int, ...] = (0,)
    behind: bool = False

    def model(self) -> onnx.ModelProto:
        """The model."""
        nodes, constants = [], dict(self.constants)
        inputs = list(self.inputs)
        if self.behind:
            channels = self.feeds["x"].shape[1]
            constants["eye"] = np.eye(channels, dtype=np.float32)[:, :, None, None]
            nodes.append(helper.make_node("Conv", ["x", "eye"], ["image"], name="before"))
            inputs = ["image" if name == "x" else name for name in inputs]
        made = [f"y{i}" for i in range(self.outputs)]
        nodes.append(helper.make_node(self.op, inputs, made, name="tested", **dict(self.attrs)))
        tensors = [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()]
        given = [
            helper.make_tensor_value_info(
                name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape
            )
            for name, array in self.feeds.items()
        ]
        outputs = [helper.make_empty_tensor_value_info(f"y{i}") for i in self.used]
        graph = helper.make_graph(nodes, "matrix", given, outputs, tensors)
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8
        )
        for out, array in zip(model.graph.output, self.expected(model), strict=True):
            kind = helper.np_dtype_to_tensor_dtype(np.asarray(array).dtype)
            out.CopyFrom(helper.make_tensor_value_info(out.name, kind, np.asarray(array).shape))
        return model

    def expected(self, model: onnx.ModelProto) -> list[Array]:
        """What ONNX Runtime computes, each operator as it stands; else ONNX's own evaluator.

        Raises:
            Exception: neither runs the model.
        """
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        typed = onnx.ModelProto()
        typed.CopyFrom(model)
        try:
            session = onnxruntime.InferenceSession(
                typed.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            return list(session.run(None, dict(self.feeds)))
        except Exception:  # noqa: BLE001 - its errors share no base
            return list(ReferenceEvaluator(model).run(None, dict(self.feeds)))


def outcomes(case: Case, stages: tuple[str, ...] = STAGES) -> dict[str, str]:
    """What becomes of a case: stage -> "right", "refused: ...", "wrong: ..." or "internal: ...".

    A refusal must be an `EdgeqError` that names the operator or the node; where the graph itself
    is refused, the stages after it are not in the result.

    Args:
        case: the model.
        stages: of `STAGES`; "read" is always one.
    """
    from edgeq.graph.onnx.read import read_onnx

    model = case.model()
    want = {f"y{i}": a for i, a in zip(case.used, case.expected(model), strict=True)}
    found: dict[str, str] = {}
    far = ("tflite", "coreml")
    loose = case.op == "TopK" and case.attrs.get("sorted") == 0  # in any order

    def ordered(made: Mapping[str, Array]) -> Mapping[str, Array]:
        axis = case.attrs.get("axis", -1)
        return {k: np.sort(v, axis) for k, v in made.items()} if loose else made

    right = ordered(want)
    with tempfile.TemporaryDirectory() as folder:
        room = Path(folder)
        onnx.save(model, room / "model.onnx")

        def stage(name: str, run: Callable[[], Mapping[str, Array]]) -> None:
            try:
                fault = _fault(ordered(run()), right, 2e-4 if name in far else 2e-5)
                found[name] = f"wrong: {fault}" if fault else "right"
            except EdgeqError as err:
                found[name] = f"{'refused' if _named(case, str(err)) else 'wrong'}: {err}"
            except Exception as err:  # noqa: BLE001 - what it is is the outcome
                found[name] = f"internal: {type(err).__name__}: {err}"

        graphs = []

        def read() -> Mapping[str, Array]:
            graphs.append(read_onnx(room / "model.onnx"))
            return _session(graphs[0], case)

        stage("read", read)
        if not graphs or found["read"] != "right":
            return found
        graph = graphs[0]
        if "record" in stages:
            stage("record", lambda: _recorded(graph, room, case))
        for target, suffix in (("ort", ".onnx"), ("tflite", ".tflite"), ("coreml", ".mlpackage")):
            if target in stages:
                path = room / f"{target}{suffix}"
                stage(target, lambda t=target, p=path: _converted(graph, t, p, case))
    return found


def _named(case: Case, message: str) -> bool:
    """Whether a refusal says what it is about.

    LiteRT itself finds a place that is negative while it runs, and says so, where ONNX counts it
    from the end; all else it must have been spared.
    """
    if "gather index out of bounds" in message or "index is out of bounds" in message:
        return "negative" in case.name
    if message.startswith("LiteRT cannot"):
        return False
    return any(word in message for word in (case.op, "tested", "input 'x"))


def _session(graph: Any, case: Case) -> Mapping[str, Array]:
    from edgeq.graph.execute import Session

    return Session(graph, optimize=False)(case.feeds)


def _recorded(graph: Any, room: Path, case: Case) -> Mapping[str, Array]:
    """The written file in ONNX Runtime as it is, and read back."""
    from edgeq.graph.onnx.read import read_onnx
    from edgeq.graph.onnx.save import write_onnx

    write_onnx(graph, room / "record.onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        str(room / "record.onnx"), options, providers=["CPUExecutionProvider"]
    )
    names = [out.name for out in session.get_outputs()]
    here = dict(zip(names, session.run(names, dict(case.feeds)), strict=True))
    again = _session(read_onnx(room / "record.onnx"), case)
    if fault := _fault(again, here, 2e-5):
        raise AssertionError(f"read back: {fault}")
    return here


def _converted(graph: Any, target: str, path: Path, case: Case) -> Mapping[str, Array]:
    from edgeq.converters import graph_target

    converter = graph_target(target)
    options = {"precision": "float32"} if target == "coreml" else {}
    converter.check(graph, options)
    converter.write(graph, path, options)
    runner = converter.open_runner(path)
    try:
        made: Mapping[str, Array] = runner(case.feeds)
    finally:
        runner.close()
    return made


def _fault(got: Mapping[str, Array], want: Mapping[str, Array], near: float) -> str:
    """How outputs differ from what is right; empty if they do not."""
    if got.keys() != want.keys():
        return f"gives {sorted(got)}, not {sorted(want)}"
    for name, right in want.items():
        made = np.asarray(got[name])
        if right.dtype == np.float16:  # graphs hold it as float32
            right, near = right.astype(np.float32), 1e-3
        if made.shape != np.shape(right) or made.dtype != right.dtype:
            return f"{name} is {made.dtype}{made.shape}, not {right.dtype}{np.shape(right)}"
        if right.dtype.kind != "f":
            if not np.array_equal(made, right):
                return f"{name} differs in {np.mean(made != right):.0%} of its elements"
        elif not np.allclose(made, right, rtol=near, atol=near, equal_nan=True):
            with np.errstate(invalid="ignore"):
                return f"{name} differs by {np.nanmax(np.abs(made - right)):.3g}"
    return ""
