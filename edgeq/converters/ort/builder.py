"""The decoder as an ONNX graph of onnxruntime's own operators.

    matrices            MatMulNBits, of 2, 4 or 8 bits; FusedMatMul where they are floating point
    embedding           GatherBlockQuantized, on the head's bytes if tied; Gather
    RMS norm            SimplifiedLayerNormalization
    rotary positions    RotaryEmbedding, on tables of our own for global and for local layers
    attention, cache    GroupQueryAttention; heads are padded with zeros to a multiple of 8
    short convolutions  Conv by channels, on the columns that are kept of the positions before and
                        those of the pass

Scales lie in the file as they are, in float16 and only once for a row that shares one: a Cast and
an Expand, which onnxruntime folds while it loads, make of them the float32 scale of each block
that the operators want.

Source: onnxruntime's docs/ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from edgeq._version import __version__
from edgeq.converters.encoding import spread
from edgeq.converters.mixers import AttentionOnly
from edgeq.converters.ort.file import (
    OnnxGraphWriter,
    OrtSettings,
    encodings,
    pack_rows,
    packed_codes,
    steps,
)
from edgeq.core.progress import Progress
from edgeq.formats.mapped_file import release
from edgeq.formats.packing import round_up
from edgeq.formats.tensor import FloatTensor, QuantTensor
from edgeq.model.model import Model
from edgeq.model.rope_spec import RopeSpec
from edgeq.model.rotary import rope_tables

OPSET, IR_VERSION = 21, 10
MICROSOFT = "com.microsoft"
PAST_CONV, PRESENT_CONV = "past_conv.", "present_conv."
"""Before the number of a layer: what is kept of a short convolution, before a pass and after."""
HEAD_STEP = 8
"""GroupQueryAttention wants heads of a multiple of this many dimensions."""


class OrtBuilder(AttentionOnly):
    """Builds the decoder's graph; a value is the name of an ONNX value [1, T, width].

    The inputs are input_ids and attention_mask, both int64 and of one sequence, and for each
    layer past_key_values.{i}.key and .value [1, Hkv, past, D]; the outputs are logits and
    present.{i}.key and .value. These are the names onnxruntime-genai expects. The mask's length
    alone is used: it says how many positions there are with the new ones. A short convolution has
    past_conv.{i} and present_conv.{i} [1, hidden, taps - 1] instead, zeros before the first
    position.

    Args:
        graph: what is built.
        model: its weights.
        settings: how.
        progress: called with ("tensors", done, total).
    """

    def __init__(
        self,
        graph: OnnxGraphWriter,
        model: Model,
        settings: OrtSettings,
        progress: Progress | None = None,
    ) -> None:
        from onnx import TensorProto

        self._graph, self._model, self._config = graph, model, model.config
        self._settings, self._progress = settings, progress
        self._encodings = encodings(model)
        self._types = TensorProto
        self._made: dict[str, dict[str, str]] = {}
        self._tables: set[str] = set()
        self._total = len(list(self._config.linears()))
        self._prologue()

    # --- the steps of `decoder` ----------------------------------------------------------------

    def embed(self, name: str) -> str:
        """Rows of the embedding, times embed_scale."""
        g, c = self._graph, self._config
        weight = "model.embed_tokens.weight"
        tensor = self._model.tensors[weight]
        scaled, k = c.embed_scale != 1.0, c.hidden
        raw = f"{name}.rows" if scaled else name
        if isinstance(tensor, QuantTensor):
            parts, encoding = self._matrix(weight), self._encodings[weight]
            padded = round_up(k, encoding.group_size or k)
            table = f"{weight}.table"
            g.alias(table, parts["codes"], (c.vocab, padded * encoding.bits // 8))
            inputs = [table, "input_ids", parts["scales"]]
            if "zero_points" in parts:
                blocks = padded // (encoding.group_size or k)
                shape = (c.vocab, -(-blocks * encoding.bits // 8))
                inputs.append(g.alias(f"{weight}.table_zeros", parts["zero_points"], shape))
            g.node(
                "GatherBlockQuantized",
                inputs,
                raw if padded == k else f"{name}.padded",
                domain=MICROSOFT,
                bits=encoding.bits,
                block_size=encoding.group_size,
                gather_axis=0,
                quantize_axis=1,
            )
            if padded != k:
                self._slice(f"{name}.padded", raw, 0, k)
        else:
            parts = self._matrix(weight)
            narrow = cast(FloatTensor, tensor).dtype != "float32"
            rows = g.node("Gather", [parts["stored"], "input_ids"], f"{name}.n" if narrow else raw)
            if narrow:
                g.node("Cast", [rows], raw, to=self._types.FLOAT)
        if scaled:
            factor = g.constant("embed_scale", np.array(c.embed_scale, np.float32))
            g.node("Mul", [raw, factor], name)
        return name

    def norm(self, name: str, x: str, weight: str) -> str:
        """RMS norm; of each head where the weight has the size of one."""
        g, c = self._graph, self._config
        values = self._model.tensors[weight].numpy() + np.float32(c.norm_offset)
        scale = g.weight(weight, self._types.FLOAT, values.shape, [values])
        attributes: dict[str, Any] = {"axis": -1, "epsilon": c.norm_eps, "stash_type": 1}
        of_heads = weight.endswith(("q_norm.weight", "k_norm.weight"))
        if not of_heads or values.size != c.head_dim:
            return g.node("SimplifiedLayerNormalization", [x, scale], name, **attributes)
        heads = self._reshape(x, f"{name}.heads", (0, 0, -1, c.head_dim))
        normed = g.node(
            "SimplifiedLayerNormalization", [heads, scale], f"{name}.normed", **attributes
        )
        return self._reshape(normed, name, (0, 0, -1))

    def linear(self, name: str, x: str, weight: str) -> str:
        """x times the matrix, plus its bias."""
        g = self._graph
        n, k = self._model.tensors[weight].shape
        bias_name = weight.removesuffix("weight") + "bias"
        bias = ""
        if bias_name in self._model.tensors:
            values = self._model.tensors[bias_name].numpy()
            bias = g.weight(bias_name, self._types.FLOAT, values.shape, [values])
        parts = self._matrix(weight)
        if "stored" in parts:
            product = g.node(
                "FusedMatMul",
                [x, parts["float32"]],
                f"{name}.product" if bias else name,
                domain=MICROSOFT,
                transB=1,
            )
            return g.node("Add", [product, bias], name) if bias else product
        inputs = [x, parts["codes"], parts["scales"], parts.get("zero_points", ""), "", bias]
        while not inputs[-1]:
            inputs.pop()
        encoding = self._encodings[weight]
        return g.node(
            "MatMulNBits",
            inputs,
            name,
            domain=MICROSOFT,
            bits=encoding.bits,
            block_size=encoding.group_size,
            K=k,
            N=n,
            accuracy_level=4 if self._settings.compute == "int8" else 0,
        )

    def heads(self, name: str, x: str, n: int) -> str:
        """The operators that need heads know how many there are."""
        return x

    def rope(self, name: str, x: str, rope: RopeSpec) -> str:
        """x rotated by its positions."""
        g, c = self._graph, self._config
        kind = c.rope_names[rope]
        if kind not in self._tables:
            self._tables.add(kind)
            cos, sin = rope_tables(rope, self._settings.context)
            g.weight(f"cos.{kind}", self._types.FLOAT, cos.shape, [cos])
            g.weight(f"sin.{kind}", self._types.FLOAT, sin.shape, [sin])
        heads = c.heads if name.endswith("q_rope") else c.kv_heads
        partial = {"rotary_embedding_dim": rope.dim} if rope.dim != c.head_dim else {}
        return g.node(
            "RotaryEmbedding",
            [x, "past_length", f"cos.{kind}", f"sin.{kind}"],
            name,
            domain=MICROSOFT,
            interleaved=0,
            num_heads=heads,
            **partial,
        )

    def attend(self, name: str, layer: int, q: str, k: str, v: str) -> str:
        """Grouped-query attention, which extends the cache."""
        g, c = self._graph, self._config
        padded = round_up(c.head_dim, HEAD_STEP)
        inputs = []
        for part, x in (("q", q), ("k", k), ("v", v)):
            if padded != c.head_dim:
                x = self._pad_heads(x, f"{name}.{part}", padded - c.head_dim)
            if self._settings.kv == "float16":
                x = g.node("Cast", [x], f"{name}.{part}.half", to=self._types.FLOAT16)
            inputs.append(x)
        past = [f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"]
        present = [f"present.{layer}.key", f"present.{layer}.value"]
        plain = padded == c.head_dim and self._settings.kv != "float16"
        out = g.node(
            "GroupQueryAttention",
            [*inputs, *past, "seqlens_k", "total_sequence_length"],
            [name if plain else f"{name}.attention", *present],
            domain=MICROSOFT,
            num_heads=c.heads,
            kv_num_heads=c.kv_heads,
            scale=float(c.attn_scale),
            do_rotary=0,
            local_window_size=c.blocks[layer].window or -1,
            **({} if c.attn_softcap is None else {"softcap": float(c.attn_softcap)}),
        )
        if self._settings.kv == "float16":
            whole = name if padded == c.head_dim else f"{name}.wide"
            out = g.node("Cast", [out], whole, to=self._types.FLOAT)
        if padded != c.head_dim:
            apart = self._reshape(out, f"{name}.apart", (0, 0, -1, padded))
            cut = self._slice(apart, f"{name}.cut", 0, c.head_dim)
            out = self._reshape(cut, name, (0, 0, -1))
        return out

    def short_conv(self, name: str, layer: int, b: str, c: str, x: str, weight: str) -> str:
        """c times the causal convolution of b * x, of which the last columns are kept."""
        g, values = self._graph, self._model.tensors[weight].numpy()
        taps = values.shape[2]
        product = g.node("Mul", [b, x], f"{name}.product")
        columns = g.node("Transpose", [product], f"{name}.columns", perm=[0, 2, 1])
        whole = columns
        if taps > 1:
            past = f"{PAST_CONV}{layer}"
            whole = g.node("Concat", [past, columns], f"{name}.whole", axis=2)
            self._slice(whole, f"{PRESENT_CONV}{layer}", 1 - taps, np.iinfo(np.int64).max, axis=2)
        kernel = g.weight(weight, self._types.FLOAT, values.shape, [values])
        mixed = g.node(
            "Conv", [whole, kernel], f"{name}.mixed", group=len(values), kernel_shape=[taps]
        )
        rows = g.node("Transpose", [mixed], f"{name}.rows", perm=[0, 2, 1])
        return g.node("Mul", [c, rows], name)

    def gated(self, name: str, gate: str, up: str) -> str:
        """activation(gate) * up."""
        g = self._graph
        if self._config.activation == "silu":
            sigmoid = g.node("Sigmoid", [gate], f"{name}.sigmoid")
            activated = g.node("Mul", [gate, sigmoid], f"{name}.silu")
        else:
            activated = g.node("Gelu", [gate], f"{name}.gelu", approximate="tanh")
        return g.node("Mul", [activated, up], name)

    def add(self, name: str, a: str, b: str) -> str:
        """The sum of two."""
        return self._graph.node("Add", [a, b], name)

    def scaled(self, name: str, x: str, factor: float) -> str:
        """x times a number."""
        number = self._graph.constant(f"number.{factor!r}", np.array(factor, np.float32))
        return self._graph.node("Mul", [x, number], name)

    def capped(self, name: str, x: str, cap: float) -> str:
        """cap * tanh(x / cap)."""
        number = self._graph.constant(f"number.{cap!r}", np.array(cap, np.float32))
        part = self._graph.node("Div", [x, number], f"{name}.part")
        return self._graph.node(
            "Mul", [self._graph.node("Tanh", [part], f"{name}.tanh"), number], name
        )

    def logits(self, name: str, x: str, weight: str) -> str:
        """The head, on all positions or the last."""
        if self._settings.last_only:
            x = self._slice(x, f"{name}.last", -1, np.iinfo(np.int64).max, axis=1)
        return self.linear(name, x, weight)

    # --- the parts of them ---------------------------------------------------------------------

    def proto(self, metadata: Mapping[str, str]) -> Any:
        """The finished model.

        Args:
            metadata: its metadata_props.
        """
        from onnx import helper

        c, t = self._config, self._types
        kv = t.FLOAT16 if self._settings.kv == "float16" else t.FLOAT
        head = round_up(c.head_dim, HEAD_STEP)
        value = helper.make_tensor_value_info
        inputs = [
            value("input_ids", t.INT64, [1, "sequence_length"]),
            value("attention_mask", t.INT64, [1, "total_sequence_length"]),
        ]
        positions = 1 if self._settings.last_only else "sequence_length"
        outputs = [value("logits", t.FLOAT, [1, positions, c.vocab])]
        for i, block in enumerate(c.blocks):
            if block.mixer == "short_conv":
                assert block.window is not None  # checked by the block
                kept: list[str | int | None] = [1, c.hidden, block.window - 1]
                if block.window > 1:
                    inputs.append(value(f"{PAST_CONV}{i}", t.FLOAT, kept))
                    outputs.append(value(f"{PRESENT_CONV}{i}", t.FLOAT, kept))
                continue
            for part in ("key", "value"):
                before: list[str | int | None] = [1, c.kv_heads, "past_sequence_length", head]
                inputs.append(value(f"past_key_values.{i}.{part}", kv, before))
                after: list[str | int | None] = [1, c.kv_heads, "total_sequence_length", head]
                outputs.append(value(f"present.{i}.{part}", kv, after))
        g = self._graph
        graph = helper.make_graph(g.nodes, "decoder", inputs, outputs, g.initializers)
        imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        model = helper.make_model(
            graph,
            opset_imports=imports,
            ir_version=IR_VERSION,
            producer_name="edgeq",
            producer_version=__version__,
        )
        helper.set_model_props(model, dict(metadata))
        return model

    def _prologue(self) -> None:
        """The number of positions, in the forms that the operators take."""
        g, t = self._graph, self._types
        total = g.node("Shape", ["attention_mask"], "total_length", start=1)
        new = g.node("Shape", ["input_ids"], "new_length", start=1)
        g.node("Sub", [total, new], "past_length")
        one = g.constant("one", np.array([1], np.int64))
        g.node("Cast", [total], "total_sequence_length", to=t.INT32)
        g.node("Cast", [g.node("Sub", [total, one], "last_position")], "seqlens_k", to=t.INT32)

    def _matrix(self, name: str) -> dict[str, str]:
        """Write a matrix once; gives the names of its parts."""
        if name in self._made:
            return self._made[name]
        tensor = self._model.tensors[name]
        add = self._quantized if isinstance(tensor, QuantTensor) else self._float
        self._made[name] = add(name, cast(Any, tensor))
        release(tensor)
        if self._progress:
            self._progress("tensors", len(self._made), self._total)
        return self._made[name]

    def _float(self, name: str, tensor: FloatTensor) -> dict[str, str]:
        t = self._types
        kind = {"float32": t.FLOAT, "float16": t.FLOAT16, "bfloat16": t.BFLOAT16}[tensor.dtype]
        pieces = (tensor.data[a:b] for a, b in steps(tensor.shape))
        stored = self._graph.weight(name, kind, tensor.shape, pieces)
        if tensor.dtype != "float32":
            self._graph.node("Cast", [stored], f"{name}.float32", to=t.FLOAT)
            return {"stored": stored, "float32": f"{name}.float32"}
        return {"stored": stored, "float32": stored}

    def _quantized(self, name: str, tensor: QuantTensor) -> dict[str, str]:
        g, t, encoding = self._graph, self._types, self._encodings[name]
        n, k = tensor.shape
        size = encoding.group_size or k
        blocks = -(-k // size)
        shape = (n, blocks, size * encoding.bits // 8)
        codes = (packed_codes(tensor, encoding, a, b) for a, b in steps(tensor.shape))
        parts = {"codes": g.weight(f"{name}.codes", t.UINT8, shape, codes)}
        have = tensor.scheme.group_size
        scales = spread(tensor.row_params()[0], k, have, have).astype(np.float16)
        stored = g.weight(f"{name}.scales", t.FLOAT16, scales.shape, [scales])
        parts["scales"] = g.node("Cast", [stored], f"{name}.scales.float32", to=t.FLOAT)
        if scales.shape[1] != blocks:
            whole = g.constant(f"shape.{n}.{blocks}", np.array([n, blocks], np.int64))
            parts["scales"] = g.node("Expand", [parts["scales"], whole], f"{name}.scales.blocks")
        if tensor.zero_points is not None:
            zeros = spread(tensor.row_params()[1], k, have, encoding.group_size)
            packed = pack_rows(cast("NDArray[np.uint8]", zeros), encoding.bits)
            parts["zero_points"] = g.weight(
                f"{name}.zero_points", t.UINT8, (packed.size,), [packed]
            )
        return parts

    def _reshape(self, x: str, name: str, shape: tuple[int, ...]) -> str:
        key = "shape." + ".".join(map(str, shape))
        to = self._graph.constant(key, np.array(shape, np.int64))
        return self._graph.node("Reshape", [x, to], name)

    def _slice(self, x: str, name: str, start: int, stop: int, axis: int = -1) -> str:
        ends = [
            self._graph.constant(f"index.{i}", np.array([i], np.int64)) for i in (start, stop, axis)
        ]
        return self._graph.node("Slice", [x, *ends], name)

    def _pad_heads(self, x: str, name: str, extra: int) -> str:
        """Zeros behind each head's dimensions, which change no score and no sum."""
        apart = self._reshape(x, f"{name}.apart", (0, 0, -1, self._config.head_dim))
        pads = self._graph.constant(f"pad.{extra}", np.array([0] * 7 + [extra], np.int64))
        padded = self._graph.node("Pad", [apart, pads], f"{name}.padded")
        return self._reshape(padded, f"{name}.wide", (0, 0, -1))
