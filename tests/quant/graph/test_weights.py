"""Weights of graphs to integers: shapes and axes, im2col, GPTQ on convolutions, integer biases."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgeq.core.errors import FormatError, SchemeError, UsageError
from edgeq.formats.schemes import parse_scheme
from edgeq.graph.ir import LEVELS, Graph, Info, Node, QuantWeight
from edgeq.quant import quantize_tensor
from edgeq.quant.graph import hessians as hessians_module
from edgeq.quant.graph.hessians import hessians, patches, weight_name
from edgeq.quant.graph.options import GraphOptions
from edgeq.quant.graph.weights import (
    BIAS_LIMIT,
    ODD,
    int_bias,
    needs_hessian,
    odd_scales,
    round_weight,
    weight_nodes,
    with_room,
)
from edgeq.quant.recipe import Recipe
from edgeq.quant.rounders.hessian import Hessian
from edgeq.quant.rounders.qparams import snap_scales
from tests.graph_made import Made, cnn, encoder, samples, weight_scheme

Array = NDArray[np.float32]


def session(graph: Graph, watch: Any) -> Any:
    pytest.importorskip("onnxruntime")
    from edgeq.graph.execute import Session

    return Session(graph, watch)


def node(op: str, **attrs: Any) -> Node:
    inputs = ("w", "i") if op == "Gather" else ("x", "w")
    return Node(op, "n", inputs, ("y",), attrs)


def weights(*shape: int, seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    wide = rng.lognormal(0, 1, (shape[0], *[1] * (len(shape) - 1)))
    return (rng.standard_normal(shape) * 0.05 * wide).astype(np.float32)


SHAPES = {
    "Linear": (10, 70),
    "Gather": (30, 40),
    "Conv": (12, 4, 3, 3),
    "ConvTranspose": (12, 4, 2, 2),
}


@pytest.mark.parametrize("method", ["rtn", "mse", "palette"])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("op", SHAPES)
def test_every_weight_becomes_integers(op: str, bits: Any, granularity: Any, method: Any) -> None:
    if method == "palette" and bits == 8:
        with pytest.raises(SchemeError, match="palette"):
            weight_scheme(8, "channel", None, "palette")
        return
    w = weights(*SHAPES[op])
    scheme = weight_scheme(bits, granularity, 32 if granularity == "group" else None, method)
    made = round_weight(w, node(op), scheme)
    assert (made.shape, made.bits) == (w.shape, bits)
    if granularity == "tensor":
        assert (made.axis, made.block) == (None, None)
    elif granularity == "group" and op in ("Linear", "Gather"):
        assert (made.axis, made.block, made.scales.shape) == (1, 32, (len(w), -(-w.shape[1] // 32)))
    else:
        axis = 1 if op == "ConvTranspose" else 0
        assert (made.axis, made.block, made.scales.shape) == (axis, None, (w.shape[axis],))
    np.testing.assert_array_equal(
        made.scales, snap_scales(made.scales.reshape(-1)).reshape(made.scales.shape)
    )
    if method == "rtn":
        low, high = LEVELS[bits]
        inside = np.clip(w, (low - 0.5) * made.wide_scales(), (high + 0.5) * made.wide_scales())
        step = made.wide_scales()
        assert (np.abs(made.numpy() - inside) <= 0.5001 * step).all()
        assert np.abs(w - inside).max() <= 0.01 * np.abs(w).max()  # what snapping cut off
    if method == "palette":
        assert made.palette is not None
        assert np.isin(made.levels, made.palette).all()
        assert len(made.palette) == 16
    else:
        assert made.palette is None
    relative = np.square(made.numpy() - w).sum() / np.square(w).sum()
    assert relative < (0.12 if bits == 4 else 0.001)


@pytest.mark.parametrize("text", ["w4-g32", "w4-g16", "w8-channel", "w4-channel", "w4-tensor"])
@pytest.mark.parametrize("method", ["rtn", "mse", "gptq"])
def test_a_linear_is_rounded_as_a_matrix_of_a_language_model(text: str, method: Any) -> None:
    """172 columns: the last group is short, and padding adds a group that is left out."""
    w, moments = weights(9, 172), Hessian(172)
    moments.add(weights(300, 172, seed=1))
    scheme: Any = parse_scheme(text)
    want = quantize_tensor(w, scheme, method, hessian=moments).numpy()
    ours = weight_scheme(scheme.bits, scheme.granularity, scheme.group_size, method)
    given = moments.matrix if method == "gptq" else None
    np.testing.assert_array_equal(round_weight(w, node("Linear"), ours, given).numpy(), want)


def test_a_row_no_longer_than_a_group_gets_a_scale_a_channel() -> None:
    made = round_weight(weights(5, 32), node("Linear"), weight_scheme(4, "group", 32, "mse"))
    assert (made.axis, made.block, made.scales.shape) == (0, None, (5,))


def test_scales_of_transposed_convolutions() -> None:
    scheme = weight_scheme(8, "channel", None, "rtn")
    depthwise = round_weight(weights(6, 1, 2, 2), node("ConvTranspose", group=6), scheme)
    assert (depthwise.axis, depthwise.scales.shape) == (0, (6,))
    grouped = round_weight(weights(6, 5, 2, 2), node("ConvTranspose", group=2), scheme)
    assert (grouped.axis, grouped.scales.shape) == (1, (5,))
    bias = int_bias(np.ones(10), 0.5, grouped)
    np.testing.assert_array_equal(bias.scales, np.float32(0.5) * np.tile(grouped.scales, 2))


@settings(max_examples=40)
@given(
    n=st.integers(1, 40), k=st.integers(1, 80), bits=st.sampled_from([4, 8]),
    size=st.sampled_from([None, 16, 32]), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_matrix(n: int, k: int, bits: Any, size: int | None, seed: int) -> None:
    w = weights(n, k, seed=seed)
    scheme = weight_scheme(bits, "group" if size else "channel", size, "mse")
    plain = replace(scheme, method="rtn")
    error, worst = (
        np.square(round_weight(w, node("Linear"), s).numpy() - w).sum(dtype=np.float64)
        for s in (scheme, plain)
    )
    assert error <= worst * (1 + 1e-5)


def test_impossible_schemes_are_refused() -> None:
    for text, word in (
        ("w3-channel", "cannot have 3 bits; use 4 or 8"),
        ("w4-g32-asym", "symmetric"),
        ("w8-channel-imatrix", "unknown method 'imatrix'"),
        ("bf16", "use f32 or f16 for float constants"),
    ):
        with pytest.raises(SchemeError, match=word):
            Recipe((), parse_scheme(text, method=True), graph=GraphOptions())
    with pytest.raises(SchemeError, match="unknown method 'gtpq'; did you mean 'gptq'"):
        weight_scheme(4, "channel", None, "gtpq")
    with pytest.raises(SchemeError, match="group_size is 48"):
        weight_scheme(4, "group", 48)
    with pytest.raises(SchemeError, match="group_size is 32 with granularity 'channel'"):
        weight_scheme(4, "channel", 32)


def test_bad_weights_are_refused() -> None:
    w = weights(3, 4)
    with pytest.raises(UsageError, match="gptq needs the second moments of the inputs of Linear"):
        round_weight(w, node("Linear"), weight_scheme(4, method="gptq"))
    with pytest.raises(UsageError, match="5 wide"):
        round_weight(w, node("Linear"), weight_scheme(4, method="gptq"), np.eye(5, dtype="f4"))
    w[1, 2] = np.nan
    with pytest.raises(FormatError, match="tensor w holds nan"):
        round_weight(w, node("Linear"), weight_scheme())


def test_which_nodes_have_weights() -> None:
    assert [n.op for n in weight_nodes(cnn())] == ["Conv", "Conv", "Conv", "Linear"]
    found = weight_nodes(encoder())
    assert [n.op for n in found] == ["Gather", *["Linear"] * 6]
    graph = encoder()
    for change in ({"axis": 1}, {}):
        gather = replace(found[0], attrs=change)
        nodes = tuple(gather if n.op == "Gather" else n for n in graph.nodes)
        assert (gather in weight_nodes(replace(graph, nodes=nodes))) == (not change)
    name = weight_name(found[1])
    rounded = round_weight(graph.array(name), found[1], weight_scheme())
    graph = replace(graph, constants={**graph.constants, name: rounded})
    assert found[1] not in weight_nodes(graph)
    assert needs_hessian(found[1], weight_scheme(4, method="gptq"))
    assert not needs_hessian(found[0], weight_scheme(4, method="gptq"))  # a table


# --- what a convolution's rows are multiplied with ------------------------------------------------

CONVS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "plain": ((6, 9, 9), (8, 6, 3, 3), {"pads": [1, 1, 1, 1]}),
    "strided": ((6, 9, 8), (8, 6, 3, 3), {"pads": [0, 1, 1, 0], "strides": [2, 3]}),
    "dilated": ((4, 11, 9), (6, 4, 3, 2), {"pads": [2, 0, 1, 1], "dilations": [2, 3]}),
    "grouped": ((8, 7, 7), (12, 4, 3, 3), {"pads": [1, 1, 1, 1], "group": 2}),
    "depthwise": ((6, 9, 9), (12, 1, 3, 3), {"pads": [1, 1, 1, 1], "group": 6}),
    "pointwise": ((32, 8, 8), (10, 32, 1, 1), {}),
    "one dimension": ((5, 40), (7, 5, 5), {"pads": [2, 2], "strides": [2]}),
}


def conv_graph(kind: str) -> Graph:
    """A layer that makes correlated inputs, and the convolution."""
    (c, *size), shape, attrs = CONVS[kind]
    d = len(size)
    m = Made(3, x=Info((1, c, *size)))
    mix = {"pads": [1] * 2 * d, "strides": [1] * d, "dilations": [1] * d, "group": 1}
    x = m.node("Conv", ["x", m.weight(c, c, *[3] * d)], (1, c, *size), **mix)
    x = m.same("Relu", x)
    held = {"pads": [0] * 2 * d, "strides": [1] * d, "dilations": [1] * d, "group": 1, **attrs}
    pads, kernel = held["pads"], shape[2:]
    out = tuple(
        (size[i] + pads[i] + pads[i + d] - held["dilations"][i] * (kernel[i] - 1) - 1)
        // held["strides"][i] + 1
        for i in range(d)
    )  # fmt: skip
    w = m.constant(weights(*shape), "w")
    y = m.node("Conv", [x, w], (1, shape[0], *out), kernel_shape=list(kernel), **held)
    return m.graph(y)


@pytest.mark.parametrize("kind", CONVS)
def test_patches_times_rows_is_the_convolution(kind: str) -> None:
    graph = conv_graph(kind)
    conv = graph.nodes[-1]
    feeds = next(iter(samples(graph, 1)))
    values = session(graph, [conv.inputs[0]])(feeds)
    cut = patches(values[conv.inputs[0]], graph, conv)
    rows = graph.array("w").reshape(len(cut), -1, cut.shape[2])
    y = np.concatenate([part @ w.T for part, w in zip(cut, rows, strict=True)], axis=1)
    want = values[conv.output][0]
    np.testing.assert_allclose(y.T, want.reshape(len(want), -1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("kind", CONVS)
def test_gptq_lowers_the_error_of_what_a_convolution_puts_out(kind: str, granularity: Any) -> None:
    graph = conv_graph(kind)
    conv = graph.nodes[-1]
    seen = list(samples(graph, 24))
    found = hessians(graph, [conv], seen, session_of=session)[conv.name]
    groups = conv.attrs["group"]
    k = int(np.prod(graph.info("w").shape[1:]))
    assert found.shape == ((k, k) if groups == 1 else (groups, k, k))
    want = [session(graph, ())(feeds)[conv.output] for feeds in seen]

    def error(method: Any) -> float:
        scheme = weight_scheme(4, granularity, None, method)
        made = round_weight(graph.array("w"), conv, scheme, found)
        run = session(replace(graph, constants={**graph.constants, "w": made.numpy()}), ())
        pairs = zip(seen, want, strict=True)
        return sum(float(np.square(run(feeds)[conv.output] - y).sum()) for feeds, y in pairs)

    assert error("gptq") < 0.9 * error("rtn")
    assert error("gptq") < error("mse")
    assert error("palette") < error("rtn")


def test_moments_are_means_over_places_and_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = conv_graph("plain")
    conv = graph.nodes[-1]
    seen = list(samples(graph, 5))
    told: list[tuple[str, int, int]] = []
    found = hessians(graph, [conv], seen, session_of=session, progress=lambda *at: told.append(at))
    run = session(graph, [conv.inputs[0]])
    rows = np.concatenate([patches(run(f)[conv.inputs[0]], graph, conv)[0] for f in seen])
    wide = rows.astype(np.float64)
    np.testing.assert_allclose(found[conv.name], wide.T @ wide / len(wide), rtol=1e-3, atol=1e-4)
    assert told[-1] == ("hessians", 5, 5)
    monkeypatch.setattr(hessians_module, "PLACES", 10)
    few = patches(run(seen[0])[conv.inputs[0]], graph, conv, offset=3)
    assert few.shape == (1, 9, 54)
    np.testing.assert_array_equal(few[0], rows[3:81:9])


def test_projections_of_one_input_share_a_matrix() -> None:
    graph = encoder()
    nodes = [n for n in weight_nodes(graph) if n.op == "Linear"]
    found = hessians(graph, nodes, samples(graph, 4), session_of=session)
    q, k, v, out, *_ = (found[n.name] for n in nodes)
    assert q is k is v is not out
    with pytest.raises(UsageError, match="there are no calibration samples"):
        hessians(graph, nodes, [], session_of=session)
    with pytest.raises(UsageError, match="only Conv and Linear"):
        hessians(graph, weight_nodes(graph), samples(graph, 1), session_of=session)


# --- biases -----------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_a_bias_is_a_whole_number_of_products(granularity: Any) -> None:
    w = round_weight(weights(6, 20), node("Linear"), weight_scheme(8, granularity))
    b = weights(6, 1)[:, 0]
    made = int_bias(b, 0.037, w)
    assert (made.bits, made.axis) == (32, 0)
    np.testing.assert_array_equal(made.scales, np.broadcast_to(np.float32(0.037) * w.scales, 6))
    assert (np.abs(made.numpy() - b) <= 0.5001 * made.scales + 1e-7 * np.abs(b)).all()
    assert with_room(b, 0.037, w) is w


def test_groups_leave_no_room_for_an_integer_bias() -> None:
    w = round_weight(weights(4, 64), node("Linear"), weight_scheme(4, "group", 32))
    for make in (int_bias, lambda b, s, w: with_room(b, s, w)):
        with pytest.raises(SchemeError, match="groups of 32"):
            make(np.ones(4), 0.1, w)  # type: ignore[operator]


@pytest.mark.parametrize("method", ["rtn", "palette"])
def test_a_dead_channel_with_a_bias_gets_a_larger_scale(method: Any) -> None:
    rows = weights(3, 20)
    rows[1] = 1e-8
    w = round_weight(rows, node("Linear"), weight_scheme(4, "channel", None, method))
    b = np.array([0.1, 7.0, -0.2])
    with pytest.raises(SchemeError, match="in channel 1"):
        int_bias(b, 0.01, w)
    roomy = with_room(b, 0.01, w)
    made = int_bias(b, 0.01, roomy)
    assert np.abs(made.levels).max() <= BIAS_LIMIT
    assert (np.abs(made.numpy() - b) <= 0.5001 * made.scales + 1e-7 * np.abs(b)).all()
    np.testing.assert_array_equal(roomy.numpy()[[0, 2]], w.numpy()[[0, 2]])
    assert np.abs(roomy.numpy()[1]).max() < 1e-5
    assert isinstance(roomy, QuantWeight)


def test_a_tensor_makes_room_for_its_largest_bias() -> None:
    w = round_weight(weights(3, 20) * np.float32(1e-3), node("Linear"), weight_scheme(8, "tensor"))
    roomy = with_room(np.array([0.0, 70.0, 0.0]), 0.01, w)
    assert roomy.scales.shape == ()
    assert int_bias(np.array([0.0, 70.0, 0.0]), 0.01, roomy).levels[1] > 0


@given(st.lists(st.floats(2**-20, 2**4), min_size=1, max_size=8), st.floats(2**-12, 2**12))
def test_a_step_of_the_output_is_an_odd_number_of_steps_of_the_sum(
    given_scales: list[float], ratio: float
) -> None:
    scales = np.array(given_scales, np.float32)
    made = odd_scales(scales, ratio)
    before, after = ratio / scales.astype(np.float64), ratio / made.astype(np.float64)
    moved = (before >= ODD[0]) & (before <= ODD[1])
    np.testing.assert_array_equal(made[~moved], scales[~moved])
    assert (np.rint(after[moved]) % 2 == 1).all()
    assert (np.abs(after - np.rint(after))[moved] < 1e-3).all()
    assert (np.abs(after - before)[moved] <= 1 + 1e-3).all()


@pytest.mark.parametrize(("op", "attrs"), [("Linear", {}), ("Conv", {}), ("Conv", {"group": 3})])
@pytest.mark.parametrize("method", ["mse", "gptq"])
def test_weights_of_four_bits_are_rounded_again_to_odd_scales(
    op: str, attrs: dict[str, int], method: Any
) -> None:
    shape = (12, 70) if op == "Linear" else (12, 4, 3, 3)
    w, layer, scheme = weights(*shape), node(op, **attrs), weight_scheme(4, method=method)
    k, groups = w[0].size, attrs.get("group", 1)
    x = np.random.default_rng(1).standard_normal((groups, 200, k)).astype(np.float32)
    x[:, :, 1:] += x[:, :, :-1]
    moments = x.transpose(0, 2, 1) @ x / 200
    hessian = moments if groups > 1 else moments[0]
    free = round_weight(w, layer, scheme, hessian)
    ratio = 40 * float(free.scales.mean())
    made = round_weight(w, layer, scheme, hessian, ratio)
    among = np.stack([odd_scales(free.scales, ratio, more) for more in (-2, 0, 2)])
    assert (made.scales == among).any(axis=0).all()
    assert (made.scales != free.scales).any()
    assert made.levels.min() >= LEVELS[4][0]
    assert made.levels.max() <= LEVELS[4][1]

    def error(found: QuantWeight) -> float:
        rows = (found.numpy() - w).reshape(groups, -1, k)
        if method == "mse":
            return float(np.square(rows).sum())
        return float(np.einsum("gnk,gkl,gnl->", rows, moments, rows))

    assert error(made) < 1.3 * error(free)
    assert error(made) < 1.05 * error(replace(free, scales=made.scales))
    eight = weight_scheme(8, method=method)
    np.testing.assert_array_equal(
        round_weight(w, layer, eight, hessian, ratio).numpy(),
        round_weight(w, layer, eight, hessian).numpy(),
    )
