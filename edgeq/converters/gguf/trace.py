"""llama.cpp's intermediate results, by the names of `edgeq.model.decoder`.

llama.cpp calls back with every tensor of its graph. Steps are known by the weights they use, not
by the names llama.cpp gives results: the product with ``blk.0.attn_q.weight`` is ``layers.0.q``,
whatever the architecture, and what goes into ``blk.0.ffn_down.weight`` is ``layers.0.act``.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.gguf.names import ModelShape
from edgeq.importers.gguf.value_heads import by_heads
from edgeq.importers.lazy import half_split_order
from edgeq.model.block import (
    DELTA_OUT,
    G_PROJ,
    GATE_PROJ,
    IN_A,
    IN_B,
    IN_QKV,
    IN_Z,
    Q_PROJ,
    UP_PROJ,
    QKNorm,
    tensor_name,
)

Array = NDArray[np.float32]


class _Tensor(ctypes.Structure):
    """The head of ``struct ggml_tensor`` (ggml.h)."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    ]


@dataclass(frozen=True)
class GgmlNode:
    """One computed tensor.

    Args:
        op: ggml's name of the operator.
        sources: addresses of what it was made from.
        offset: of a view, bytes into what it views.
        value: float32, outermost dimension first; None if it is of another type.
    """

    op: str
    sources: tuple[int, ...]
    offset: int
    value: Array | None


class TensorRecorder:
    """The callback: keeps every tensor of the last pass.

    Args:
        library: the loaded shared library, which exports ``ggml_op_name``.
    """

    def __init__(self, library: Any) -> None:
        self._op_name = library.ggml_op_name
        self._op_name.restype, self._op_name.argtypes = ctypes.c_char_p, [ctypes.c_int]
        self.nodes: dict[int, GgmlNode] = {}
        self.weights: dict[int, str] = {}

    def clear(self) -> None:
        """Delete the recorded results."""
        self.nodes.clear()
        self.weights.clear()

    def __call__(self, address: int, ask: bool, _: Any) -> bool:
        """The callback of llama.cpp: it asks whether a tensor is wanted, and reports it."""
        if ask:
            return True
        tensor = _Tensor.from_address(address)
        sources = tuple(src for src in tensor.src if src)
        for source in sources:
            if source not in self.nodes:
                self.weights[source] = _Tensor.from_address(source).name.decode(errors="replace")
        op = self._op_name(tensor.op).decode()
        self.nodes[address] = GgmlNode(op, sources, tensor.view_offs, _copied(tensor))
        return True


def _copied(tensor: _Tensor) -> Array | None:
    if tensor.type != 0 or not tensor.data:  # F32
        return None
    shape, strides = tuple(tensor.ne)[::-1], tuple(tensor.nb)[::-1]
    span = sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) + 4
    buffer = (ctypes.c_char * span).from_address(tensor.data)
    return np.ndarray(shape, np.float32, buffer, 0, strides).copy()


_DELTA_PARTS = {
    "qkv": (IN_QKV, "attn_qkv"), "z": (IN_Z, "attn_gate"), "beta": (IN_B, "ssm_beta"),
    "decay": (IN_A, "ssm_alpha"),
}  # fmt: skip
"""Results of a gated delta net's products -> edgeq's and the file's names of their matrices."""


def results(recorder: TensorRecorder, shape: ModelShape) -> dict[str, Array]:
    """The last pass's results by their names in `decoder`."""
    graph = _Graph(recorder)
    last_norm = shape.arch.tensor_name("model.norm.weight")
    values: dict[str, Array | None] = {"embed": _stream(graph, "blk.0.attn_norm", "blk.0.attn_q")}
    for i in range(shape.layers):
        at, p = f"layers.{i}.", f"blk.{i}."
        values[at + "attn_norm"] = graph.normed(p + "attn_norm.weight")
        if i in shape.convolutions:
            inputs, output = graph.product(p + "shortconv.in_proj.weight"), "shortconv.out_proj"
            if inputs is not None:
                for letter, part in zip("bcx", np.split(inputs, 3, axis=1), strict=True):
                    values[at + letter] = part
        elif i in shape.deltas:
            for step, (ours, matrix) in _DELTA_PARTS.items():
                values[at + step] = value = graph.product(f"{p}{matrix}.weight")
                order = shape.value_rows(tensor_name(i, ours))
                if value is not None and order is not None:
                    values[at + step] = value[:, order]
            output = "ssm_out"
        else:
            _attention(graph, shape, i, values)
            output = "attn_output"
        gated = output == "attn_output" and shape.arch.output_gate
        mix = graph.into(f"{p}{output}.weight")
        values[at + ("gated_mix" if gated else "mix")] = moved_back(shape, i, mix)
        values[at + "o"] = graph.product(f"{p}{output}.weight")
        before = "ffn_norm"
        if shape.arch.norm_after:
            values[at + "attn_post_norm"] = graph.normed(p + "post_attention_norm.weight")
        elif shape.arch.norm_before:
            norm = tensor_name(i, "post_attention_layernorm")
            before = shape.arch.tensor_name(norm).removeprefix(p).removesuffix(".weight")
        values[at + "attn_out"] = _stream(graph, p + before, p + "ffn_up")
        values[at + "mlp_norm"] = graph.normed(f"{p}{before}.weight")
        values[at + "router"] = graph.product(p + "ffn_gate_inp.weight")
        up = graph.product(p + "ffn_up.weight")
        gate = graph.product(p + "ffn_gate.weight")
        if shape.is_fused(GATE_PROJ, UP_PROJ) and up is not None:
            gate, up = up[:, : shape.padded], up[:, shape.padded :]
        for name, value in (("gate", gate), ("up", up)):
            values[at + name] = None if value is None else value[:, : shape.ffn]
        act = graph.into(p + "ffn_down.weight")
        values[at + "act"] = None if act is None else act[:, : shape.ffn]
        values[at + "down"] = graph.product(p + "ffn_down.weight")
        values[at + "mlp_post_norm"] = graph.normed(p + "post_ffw_norm.weight")
        after = f"blk.{i + 1}."
        if i + 1 == shape.layers:
            values[at + "out"] = graph.before(last_norm)
        else:
            values[at + "out"] = _stream(graph, after + "attn_norm", after + "attn_q")
    values["final_norm"] = graph.normed(last_norm)
    values["logits"] = graph.finished("token_embd.weight" if shape.tied else "output.weight")
    return {name: value for name, value in values.items() if value is not None}


def moved_back(shape: ModelShape, layer: int, mix: Array | None) -> Array | None:
    """What a mixer gives, its value heads in the source's order."""
    places = shape.moved(tensor_name(layer, DELTA_OUT)) if layer in shape.deltas else None
    if mix is None or places is None or shape.delta is None:
        return mix
    return cast(Array, by_heads(mix, shape.delta, places))


def _stream(graph: _Graph, norm: str, linear: str) -> Array | None:
    """The residual stream that a layer norms, or gives to a matrix where it has no such norm."""
    normed = graph.before(norm + ".weight")
    return graph.into(linear + ".weight") if normed is None else normed


def _attention(graph: _Graph, shape: ModelShape, i: int, values: dict[str, Array | None]) -> None:
    at, p = f"layers.{i}.", f"blk.{i}."
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    fused = graph.product(p + "attn_qkv.weight")
    for letter, start, rows in (("q", 0, q), ("k", q, kv), ("v", q + kv, kv)):
        if fused is not None:
            value: Array | None = fused[:, start : start + rows]
        else:
            value = graph.product(f"{p}attn_{letter}.weight")
        if letter == "q" and value is not None and shape.arch.output_gate:
            both = value
            for name, part in (("q", Q_PROJ), ("g", G_PROJ)):
                values[at + name] = value = both[:, shape.by_head(tensor_name(i, part))]
            value = values[at + "q"]
        heads = {"q": shape.heads, "k": shape.kv_heads}.get(letter, 0)
        neighbors = bool(heads) and shape.arch.interleaved
        if value is not None and neighbors:
            value = _half_split(value, heads, shape.rotated)
        values[at + letter] = value
        if letter == "v":
            continue
        normed = graph.normed(f"{p}attn_{letter}_norm.weight", shape.arch.qk_norm)
        factor = np.float32(shape.query_scale if letter == "q" else 1.0)
        values[f"{at}{letter}_norm"] = None if normed is None else normed / factor
        rotated = graph.rotated(
            f"{p}attn_{'qkv' if fused is not None else letter}.weight",
            4 * start if fused is not None else 0,
        )
        if rotated is not None:
            rotated = (
                _half_split(rotated, heads, shape.rotated) if neighbors else rotated
            ) / factor
        values[f"{at}{letter}_rope"] = rotated


def _half_split(value: Array, heads: int, rotated: int) -> Array:
    """Neighbors (2j, 2j+1) of each head to j and j + rotated/2: [T, H*D] or [T, H, D]."""
    order = half_split_order(value[0].size, heads, rotated)
    return value.reshape(len(value), -1)[:, order].reshape(value.shape)


class _Graph:
    """Steps by the weights they use."""

    def __init__(self, recorder: TensorRecorder) -> None:
        self._nodes, self._weights = recorder.nodes, recorder.weights
        self._users: dict[tuple[str, str], int] = {}
        for address, node in recorder.nodes.items():
            for source in node.sources:
                if source in recorder.weights:
                    self._users[node.op, recorder.weights[source]] = address

    def product(self, weight: str) -> Array | None:
        """The product with a matrix, its bias added: [T, N]."""
        address = self._users.get(("MUL_MAT", weight))
        biased = self._users.get(("ADD", weight.removesuffix("weight") + "bias"))
        return self._rows(biased or address)

    def finished(self, weight: str) -> Array | None:
        """The product with a matrix, after the factors and the cap that follow it: [T, N]."""
        address = self._users.get(("MUL_MAT", weight))
        for after, node in self._nodes.items():  # in the order in which they were computed
            if node.op in ("SCALE", "TANH", "UNARY") and node.sources[:1] == (address,):
                address = after
        return self._rows(address)

    def into(self, weight: str) -> Array | None:
        """The inputs of a matrix product: [T, K]."""
        address = self._users.get(("MUL_MAT", weight))
        return None if address is None else self._rows(self._nodes[address].sources[1])

    def normed(self, weight: str, qk_norm: QKNorm | None = None) -> Array | None:
        """A norm's result: [T, n], or [T, H, D] of a norm of each head."""
        return self._rows(self._users.get(("MUL", weight)), dims=3 if qk_norm == "head" else 2)

    def before(self, weight: str) -> Array | None:
        """The input of a norm: [T, n]."""
        address = self._users.get(("MUL", weight))
        if address is None:
            return None
        return self._rows(self._nodes[self._nodes[address].sources[0]].sources[0])

    def rotated(self, weight: str, offset: int) -> Array | None:
        """The rotary step below a product, times a temperature if it has one: [T, H, D].

        Args:
            weight: of the product.
            offset: bytes into the product's row where its part begins.
        """
        product = self._users.get(("MUL_MAT", weight))
        for address, node in self._nodes.items():
            if node.op != "ROPE":
                continue
            at, begins = node.sources[0], 0
            while at in self._nodes and at != product:
                if self._nodes[at].op == "VIEW":
                    begins = self._nodes[at].offset
                at = self._nodes[at].sources[0]
            if at == product and begins == offset:
                return self._rows(self._scaled(address), dims=3)
        return None

    def _scaled(self, address: int) -> int:
        """What multiplies a step by a tensor; the step itself if nothing does."""
        for user, node in self._nodes.items():
            if node.op == "MUL" and node.sources[:1] == (address,):
                return user
        return address

    def _rows(self, address: int | None, dims: int = 2) -> Array | None:
        """A tensor without ggml's outer dimensions of one."""
        node = self._nodes.get(address or 0)
        if node is None or node.value is None:
            return None
        return node.value.reshape(node.value.shape[4 - dims :])
