"""Files that cannot be taken, and the words in which that is said."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeq.core.errors import (
    EdgeqError,
    FormatError,
    MissingDependencyError,
    UnsupportedError,
    UsageError,
)
from edgeq.graph.execute import Session
from edgeq.graph.files import read
from edgeq.graph.onnx.file import NEWEST
from edgeq.graph.onnx.read import read_onnx
from edgeq.graph.onnx.save import write_onnx
from edgeq.graph.qdq import FORMAT
from tests.graph_zoo import Exporter, canonical, rounded, save


def model(
    nodes: list[onnx.NodeProto],
    shape: list[Any] | None = None,
    opset: int = 17,
    held: dict[str, Any] | None = None,
    kind: int = TensorProto.FLOAT,
    domains: tuple[str, ...] = (),
) -> onnx.ModelProto:
    """A model from x to y."""
    x = helper.make_tensor_value_info("x", kind, [1, 4] if shape is None else shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    tensors = [numpy_helper.from_array(np.asarray(a), n) for n, a in (held or {}).items()]
    ids = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    graph = helper.make_graph(nodes, "m", [x], [y], tensors)
    return helper.make_model(graph, opset_imports=ids, ir_version=8)


def refused(made: onnx.ModelProto, folder: Path, kind: type[EdgeqError], words: str) -> None:
    onnx.save(made, folder / "m.onnx")
    with pytest.raises(kind, match=words):
        read_onnx(folder / "m.onnx")


RELU = helper.make_node("Relu", ["x"], ["y"], name="act")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "contains no graph"),
        (b"not a model at all", "not an ONNX file, or is damaged"),
        (b"\x08\x08", "contains no graph"),
        (np.random.default_rng(0).bytes(4000), "not an ONNX file, or"),
    ],
)
def test_no_onnx_at_all(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(FormatError, match=words):
        read_onnx(tmp_path / "m.onnx")


def test_absent_and_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(EdgeqError, match=r"none\.onnx cannot be read: No such file"):
        read_onnx(tmp_path / "none.onnx")
    with pytest.raises(
        UsageError,
        match=r"m\.pt is not a graph; give an ONNX \(\.onnx\) or LiteRT \(\.tflite\) file",
    ):
        read(tmp_path / "m.pt")


def test_damaged_files_never_end_in_a_traceback(tmp_path: Path) -> None:
    chance = random.Random(0)
    sources = [save(n, tmp_path).read_bytes() for n in ("keyword_spotter", "gemms", "resizes")]
    write_onnx(rounded(canonical("keyword_spotter", tmp_path), 4), tmp_path / "q.onnx")
    sources.append((tmp_path / "q.onnx").read_bytes())
    path, refusals = tmp_path / "damaged.onnx", []
    for _ in range(120):
        content = bytearray(chance.choice(sources))
        if chance.random() < 0.3:
            content = content[: chance.randrange(len(content))]
        else:
            for _ in range(chance.choice((1, 3, 10))):
                content[chance.randrange(len(content))] = chance.randrange(256)
        path.write_bytes(content)
        try:
            read_onnx(path)
        except EdgeqError as err:
            refusals.append(str(err))
    assert len(refusals) > 30
    assert all(refusals)


def test_opsets_past_the_known(tmp_path: Path) -> None:
    refused(
        model([RELU], opset=NEWEST + 1), tmp_path, UnsupportedError,
        rf"has opset {NEWEST + 1}; edgeq reads opsets up to {NEWEST}: export it with",
    )  # fmt: skip


def test_old_forms_that_are_not_known(tmp_path: Path) -> None:
    node = helper.make_node("Upsample", ["x"], ["y"], name="u", width_scale=2.0, height_scale=2.0)
    made = model([node], [1, 1, 2, 2], opset=1)
    refused(
        made,
        tmp_path,
        UnsupportedError,
        r"Upsample 'u' has opset 1, whose version of it edgeq does not read",
    )
    held = {n: np.ones(4, np.float32) for n in ("scale", "bias", "mean", "var")}
    norm = helper.make_node(
        "BatchNormalization", ["x", *held], ["y"], name="norm", spatial=0
    )  # fmt: skip
    refused(model([norm], opset=7, held=held), tmp_path, UnsupportedError, r"'norm'.*spatial=0")


@pytest.mark.parametrize(
    ("node", "held", "words"),
    [
        (("LSTM", ["x3", "w", "r"]), {}, r"LSTM 'odd': no such operator is known"),
        (("Det", ["x2"]), {}, r"Det 'odd': no such operator is known"),
        (("Hardmax", ["x"]), {}, r"'odd': no such operator is known\n"),
        (("MeanVarianceNormalization", ["x4"]), {}, r"'odd': no such operator is known\n"),
        (("Conv", ["x4", "x4"]), {}, r"Conv 'odd': its weight input is computed; it must"),
        (
            ("Resize", ["x4", "", "", "sizes"], {"mode": "linear", "antialias": 1}),
            {"sizes": np.array([1, 1, 4, 4])},
            r"Resize 'odd': its antialias is 1; it must be 0",
        ),
        (
            ("MaxPool", ["x4"], {"kernel_shape": [2, 2], "two": True}),
            {},
            r"MaxPool 'odd': its output number 2 is used; it may have 1",
        ),
        (
            ("ArgMax", ["x"], {"select_last_index": 1}),
            {},
            r"ArgMax 'odd': its select_last_index is 1; it must be 0",
        ),
    ],
)  # fmt: skip
def test_operators_outside_of_the_set(
    node: tuple[Any, ...], held: dict[str, Any], words: str, tmp_path: Path
) -> None:
    e = Exporter(18)
    shapes = {"x2": [1, 3, 3], "x3": [3, 1, 3], "x4": [1, 1, 3, 3]}
    for name, array in held.items():
        e.initializers.append(numpy_helper.from_array(array, name))
    for name, shape in (("w", (1, 8, 3)), ("r", (1, 8, 2))):
        e.initializers.append(numpy_helper.from_array(np.ones(shape, np.float32), name))
    for name, shape in shapes.items():
        e.nodes.append(helper.make_node("Reshape", ["x", e.i(*shape)], [name], name=f"to_{name}"))
    op, inputs, attrs = (*node, {})[:3]
    attrs = dict(attrs)
    outputs = ["y", "second"] if attrs.pop("two", False) else ["y"]
    attrs.update({"hidden_size": 2} if op == "LSTM" else {})
    e.nodes.append(helper.make_node(op, inputs, outputs, name="odd", **attrs))
    made = e.model({"x": (1, 9)}, {"out": "y", **({"out2": "second"} if outputs[1:] else {})})
    refused(made, tmp_path, UnsupportedError, words)


def test_every_offender_is_listed_with_what_is_known(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Hardmax", ["x"], ["a"], name="first"),
        helper.make_node("Asin", ["a"], ["y"], name="second"),
    ]
    refused(
        model(nodes), tmp_path, UnsupportedError,
        r"(?s)has 2 operators that edgeq does not support:.*Hardmax 'first'.*Asin "
        "'second'.*operators: Abs, Add",
    )  # fmt: skip


def test_operators_that_are_not_of_onnx(tmp_path: Path) -> None:
    node = helper.make_node("FusedConv", ["x"], ["y"], name="f", domain="com.microsoft")
    refused(
        model([node], domains=("com.microsoft",)), tmp_path, UnsupportedError,
        r"outside ONNX's default domain: com\.microsoft\.FusedConv 'f'",
    )  # fmt: skip
    node = helper.make_node("Invented", ["x"], ["y"], name="i")
    refused(
        model([node]), tmp_path, UnsupportedError, r"operator Invented 'i', which ONNX does not"
    )


def test_control_flow(tmp_path: Path) -> None:
    y = helper.make_tensor_value_info("b", TensorProto.FLOAT, None)
    branch = helper.make_graph([helper.make_node("Relu", ["x"], ["b"])], "branch", [], [y])
    nodes = [
        helper.make_node("If", ["c"], ["y"], name="if", then_branch=branch, else_branch=branch)
    ]
    made = model(nodes, held={"c": np.array(True)})
    refused(made, tmp_path, UnsupportedError, r"operator If 'if', which contains a subgraph")


def test_outputs_that_are_inputs(tmp_path: Path) -> None:
    made = model([helper.make_node("Relu", ["x"], ["y"])])
    made.graph.output.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4]))
    refused(made, tmp_path, UnsupportedError, r"the output 'x' .* is an input of the graph itself")


def test_values_out_of_nowhere_and_circles(tmp_path: Path) -> None:
    made = model([helper.make_node("Add", ["x", "ghost"], ["y"], name="sum")])
    refused(made, tmp_path, FormatError, "ghost")
    circle = [
        helper.make_node("Add", ["x", "b"], ["a"], name="one"),
        helper.make_node("Relu", ["a"], ["b"], name="two"),
        helper.make_node("Relu", ["b"], ["y"], name="three"),
    ]
    refused(model(circle), tmp_path, FormatError, "not output of any previous")


def test_shapes_that_do_not_fit(tmp_path: Path) -> None:
    held = {"w": np.ones((5, 3), np.float32)}
    made = model([helper.make_node("MatMul", ["x", "w"], ["y"])], held=held)
    refused(made, tmp_path, FormatError, "shapes of the graph m do not fit: .*MatMul")
    held = {"w": np.array([2, 3])}
    made = model([helper.make_node("Reshape", ["x", "w"], ["y"], name="r")], held=held)
    refused(made, tmp_path, FormatError, r"Reshape 'r' makes \[2, 3\] of \[1, 4\]")


def test_shapes_that_depend_on_what_is_in_the_input(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("NonZero", ["x"], ["where"], name="find"),
        helper.make_node("Cast", ["where"], ["y"], to=TensorProto.FLOAT),
    ]
    refused(
        model(nodes),
        tmp_path,
        UnsupportedError,
        r"the output shape of NonZero 'find' is unknown: it depends",
    )


def test_open_axes(tmp_path: Path) -> None:
    onnx.save(model([RELU], ["N", 3, "H", 8]), tmp_path / "m.onnx")
    path = tmp_path / "m.onnx"
    with pytest.raises(
        UsageError, match=r"axis 2 \(H\) of the input 'x' \[N, 3, H, 8\].*--shape x="
    ):
        read_onnx(path)
    with pytest.raises(UsageError, match=r"\[1, 3, 8\] does not fit the input 'x' \[N, 3, H, 8\]"):
        read_onnx(path, shapes={"x": (1, 3, 8)})
    with pytest.raises(UsageError, match=r"\[1, 4, 8, 8\].*contradicts the model's \[N, 3, H, 8\]"):
        read_onnx(path, shapes={"x": (1, 4, 8, 8)})
    with pytest.raises(UsageError, match=r"does not fit"):
        read_onnx(path, shapes={"x": (1, 3, 0, 8)})
    with pytest.raises(UsageError, match=r"no input 'image'; its inputs: x"):
        read_onnx(path, shapes={"image": (1, 3, 8, 8)})
    with pytest.raises(UsageError, match="the batch is 0"):
        read_onnx(path, batch=0)
    assert read_onnx(path, shapes={"x": (2, 3, 5, 8)}).values["y"].shape == (2, 3, 5, 8)
    onnx.save(model([RELU], [2, 3]), path)
    with pytest.raises(UsageError, match="fixed batch 2, not 4"):
        read_onnx(path, batch=4)


def test_inputs_of_other_types(tmp_path: Path) -> None:
    nodes = [helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT)]
    made = model(nodes, kind=TensorProto.COMPLEX64)
    refused(made, tmp_path, EdgeqError, "complex64|COMPLEX|complex")
    made = model(nodes, kind=TensorProto.UINT16)
    refused(
        made, tmp_path, UnsupportedError, "input 'x' of .* is uint16; edgeq reads float32, int64"
    )


def external(folder: Path, **changed: str) -> Path:
    """A model whose weight lies in a file, with some of what it says about that changed."""
    held = {"w": np.ones((4, 4), np.float32)}
    made = model([helper.make_node("MatMul", ["x", "w"], ["y"])], held=held)
    path = folder / "m.onnx"
    (folder / "data.bin").unlink(missing_ok=True)  # onnx would write behind what is there
    onnx.save(made, path, save_as_external_data=True, location="data.bin", size_threshold=0)
    bare = onnx.load(path, load_external_data=False)
    for entry in bare.graph.initializer[0].external_data:
        entry.value = changed.pop(entry.key, entry.value)
    for key, value in changed.items():
        bare.graph.initializer[0].external_data.add(key=key, value=value)
    path.write_bytes(bare.SerializeToString())
    return path


def test_external_data(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(bytes(64))
    (folder / "link").symlink_to(tmp_path / "secret")
    read_onnx(external(folder))
    for where in ("../secret", str(tmp_path / "secret"), "link", "..", ""):
        with pytest.raises(FormatError, match="outside the folder of the model"):
            read_onnx(external(folder, location=where))
    with pytest.raises(
        FormatError, match=r"is stored in 'gone.bin', which is missing from .*; put it there"
    ):
        read_onnx(external(folder, location="gone.bin"))
    with pytest.raises(FormatError, match=r"ends at byte 164 of 'data.bin', which has 64"):
        read_onnx(external(folder, offset="100"))
    with pytest.raises(FormatError, match="has 60 bytes from 0"):
        read_onnx(external(folder, length="60"))
    with pytest.raises(FormatError, match=r"cannot be read from 'data.bin'"):
        read_onnx(external(folder, offset="many"))


def test_what_other_tools_quantized(tmp_path: Path) -> None:
    held = {"s": np.float32(0.1), "z": np.int8(0)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="quant"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], name="dequant"),
    ]
    refused(
        model(nodes, held=held), tmp_path, UnsupportedError,
        r"already quantized by another tool \(2 such operators: QuantizeLinear 'quant'",
    )  # fmt: skip
    held["w"] = np.ones((4, 4), np.int8)
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "qs", "qz"], name="dyn"),
        helper.make_node("DequantizeLinear", ["q", "qs", "qz"], ["y"], name="undo"),
    ]
    refused(model(nodes, held=held), tmp_path, UnsupportedError, "DynamicQuantizeLinear 'dyn'")


def test_a_record_of_ours_that_was_changed(tmp_path: Path) -> None:
    write_onnx(rounded(canonical("keyword_spotter", tmp_path)), tmp_path / "q.onnx")
    whole = onnx.load(tmp_path / "q.onnx")

    def changed(what: Any) -> onnx.ModelProto:
        made = onnx.ModelProto()
        made.CopyFrom(whole)
        what(made)
        return made

    def later(made: onnx.ModelProto) -> None:
        next(p for p in made.metadata_props if p.key == FORMAT).value = "99"

    refused(
        changed(later),
        tmp_path,
        FormatError,
        "has version 99 of edgeq's metadata; this edgeq reads version 1",
    )

    def scale(made: onnx.ModelProto) -> None:
        node = next(n for n in made.graph.node if n.op_type == "QuantizeLinear")
        tensor = next(t for t in made.graph.initializer if t.name == node.input[1])
        tensor.CopyFrom(numpy_helper.from_array(np.float32(-1), tensor.name))

    refused(changed(scale), tmp_path, FormatError, "damaged: the scale is -1.0")

    def other_grid(made: onnx.ModelProto) -> None:
        node = next(n for n in made.graph.node if n.op_type == "QuantizeLinear")
        other = next(t for t in made.graph.initializer if t.name.endswith(".scale") and
                     not t.dims and t.name != node.input[1])  # fmt: skip
        node.input[1] = other.name

    refused(
        changed(other_grid),
        tmp_path,
        FormatError,
        "has another scale or zero point than its QuantizeLinear",
    )

    def level(made: onnx.ModelProto) -> None:
        tensor = next(t for t in made.graph.initializer if t.data_type == TensorProto.INT8 and
                      len(t.dims) == 4)  # fmt: skip
        held = numpy_helper.to_array(tensor).copy()
        held.flat[0] = -128
        tensor.CopyFrom(numpy_helper.from_array(held, tensor.name))

    refused(changed(level), tmp_path, FormatError, r"levels of 8 bits must lie in -127 \.\. 127")


def test_constants_that_cannot_be_computed(tmp_path: Path) -> None:
    held = {"table": np.ones(3, np.float32), "far": np.array([7])}
    nodes = [
        helper.make_node("Gather", ["table", "far"], ["t"], name="g"),
        helper.make_node("Add", ["x", "t"], ["y"]),
    ]
    refused(model(nodes, held=held), tmp_path, FormatError, r"onnxruntime fails to run.*'g'")


def test_texts(tmp_path: Path) -> None:
    tensor = helper.make_tensor("w", TensorProto.STRING, [1], [b"a"])
    made = model([RELU])
    made.graph.initializer.append(tensor)
    refused(made, tmp_path, UnsupportedError, "string tensor 'w'")


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_without_the_packages(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save("resnet", tmp_path)
    graph = canonical("resnet", tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'edgeq\[ort\]'"):
        Session(graph) if package == "onnxruntime" else read_onnx(path)
