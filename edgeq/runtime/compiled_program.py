"""The program of a decoder: the records that `edgeq.runtime.kernels.program` runs.

`CompiledProgram` allocates every buffer, describes weights and layers in records, and lists the
steps in order. What a step kind does is said at `edgeq.runtime.kernels.abi.Step`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import UnsupportedError
from edgeq.formats.packing import TILE
from edgeq.formats.schemes import K_BLOCK
from edgeq.formats.tensor import FloatTensor, QuantTensor, Tensor
from edgeq.model.formulas import rope_tables
from edgeq.model.memory_layout import attention_work, buffers, cache_length, query_block
from edgeq.model.model import Model
from edgeq.runtime.engine_memory import EngineMemory
from edgeq.runtime.kernels import abi
from edgeq.runtime.kernels.abi import Step
from edgeq.runtime.kernels.jit import kernel_address
from edgeq.runtime.kernels.vector_ops import FLOAT_KINDS
from edgeq.runtime.packed_cache import PackedCache
from edgeq.runtime.step_times import slot
from edgeq.runtime.weights import Arena

LAYER_LINEARS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
"""A layer's linears in the order of the program's records."""
_ROWS = {
    "x": True, "normed": True, "branch": False, "q": False, "k": False, "v": False, "att": True,
    "gate": False, "up": False, "acts": True,
}  # fmt: skip
"""Buffers of rows in the order of the program's records, and whether each thread has a row of its
own while one token is decoded. q, k, v and gate, up follow each other: a step names the first."""


class CompiledProgram:
    """A model as records for compiled code.

    Args:
        model: validated.
        context: positions the cache holds.
        threads: how many run side by side.
        kv_bits: 8 or 16.
        arena: where weights are copied to; None uses them where they are.
        memory: keeps all that the records point to.

    Attributes:
        record: the `abi.PROGRAM`, an array of one.
        caches: the KV cache of each layer.
        logits: float32 [1, V rounded up to whole tiles].
    """

    def __init__(
        self,
        model: Model,
        context: int,
        threads: int,
        kv_bits: int,
        arena: Arena | None,
        memory: EngineMemory,
    ) -> None:
        self._model, self._arena, self._memory = model, arena, memory
        c = model.config
        linears = self._linear_records()
        self.caches = [
            PackedCache(c, cache_length(block, context), kv_bits, memory.zeros)
            for block in c.blocks
        ]
        sizes = buffers(c, context, threads)
        self.record = memory.zeros(1, abi.PROGRAM)
        program = self.record[0]
        program["eps"], program["embed_scale"] = c.norm_eps, c.embed_scale
        attentions = self._attention_records(context)
        scratch = {name: memory.scratch(shape) for name, shape in sizes.arrays.items()}
        self.logits = scratch["logits"]
        rows = memory.zeros(len(_ROWS), abi.ROWS)
        for row, (name, private) in zip(rows, _ROWS.items(), strict=True):
            array = scratch[name]
            row["address"], row["stride"], row["private"] = (
                array.ctypes.data, array.strides[0], private,
            )  # fmt: skip
        steps = self._step_records(sizes.hidden, sizes.q, sizes.ffn)
        for name, table in {
            "step": steps, "linear": linears, "row": rows, "layer": attentions,
        }.items():  # fmt: skip
            program["attentions" if name == "layer" else f"{name}s"] = memory.address(table)
            program[f"{name}_count"] = len(table)
        program["caches"] = memory.address(np.array([cache.record for cache in self.caches]))
        program["sync"] = scratch["sync"].ctypes.data
        program["argmax_slot"] = slot(c.layers, "argmax")
        program["parts"], program["part_stride"] = scratch["part"].ctypes.data, sizes.part
        program["chunks"] = sizes.chunks
        program["work"], program["work_stride"] = scratch["work"].ctypes.data, sizes.work
        for name, (offset, _) in attention_work(c).items():
            program[f"work_{name}"] = offset
        ones = memory.zeros(TILE, np.float16)
        ones[:] = 1
        program["ones"] = ones.ctypes.data

    def _linear_records(self) -> NDArray[Any]:
        """Of all layers' linears, then embedding and head."""
        c = self._model.config
        names = [f"model.layers.{i}.{part}" for i in range(c.layers) for part in LAYER_LINEARS]
        names += ["model.embed_tokens", c.head_name.removesuffix(".weight")]
        table = self._memory.zeros(len(names), abi.LINEAR)
        for record, name in zip(table, names, strict=True):
            self._describe_linear(record, name)
        return table

    def _describe_linear(self, record: Any, name: str) -> None:
        tensor: Tensor = self._model.tensors[f"{name}.weight"]
        tensor = self._arena.copied(tensor) if self._arena else tensor
        address = self._memory.address
        record["n"], record["k"] = tensor.shape
        record["tiles"] = -(-tensor.shape[0] // TILE)
        if isinstance(tensor, QuantTensor):
            scheme = tensor.scheme
            record["kind"] = abi.quant_kind(scheme)
            record["kernel"] = kernel_address(scheme)
            record["blocks"] = tensor.packed.shape[1]
            record["shift"] = abi.group_shift(scheme)
            record["codes"] = address(tensor.packed)
            record["code_step"] = tensor.packed.strides[0]
            record["scales"] = address(tensor.scales, 32)
            record["scale_step"] = tensor.scales.strides[0]
            if tensor.palette is not None:  # one table for all tiles
                palette = self._memory.zeros(TILE, np.int8)
                palette[: tensor.palette.size] = tensor.palette
                record["zeros"] = palette.ctypes.data
            if tensor.zero_points is not None:
                record["zeros"] = address(tensor.zero_points, 16)
                record["zero_step"] = tensor.zero_points.strides[0]
        else:
            if not isinstance(tensor, FloatTensor):  # a lazily decoded tensor has no bytes to use
                tensor = FloatTensor("F32", tensor.numpy())
            record["kind"] = FLOAT_KINDS[tensor.dtype]
            record["codes"] = address(tensor.data, tensor.data.itemsize)
        bias = self._model.tensors.get(f"{name}.bias")
        if bias is not None:
            record["bias"] = address(bias.numpy(), 4)

    def _attention_records(self, context: int) -> NDArray[Any]:
        c, memory = self._model.config, self._memory
        tables = {}
        for rope in c.ropes:
            cos, sin = rope_tables(rope, context)
            memory.scratch_bytes += cos.nbytes + sin.nbytes
            tables[rope] = (memory.address(cos, 4), memory.address(sin, 4))
        scale = memory.zeros(1, np.float32)
        scale[0] = c.attn_scale
        table = memory.zeros(c.layers, abi.ATTENTION)
        for i, (record, block) in enumerate(zip(table, c.blocks, strict=True)):
            if block.rope is None or not block.norm_before or block.qk_norm == "all":
                raise UnsupportedError(
                    f"layer {i} has no rotary positions, no norm before it, or a norm over all "
                    "heads of q and k; the compiled engine does not support that"
                )
            record["heads"], record["kv_heads"], record["dim"] = c.heads, c.kv_heads, c.head_dim
            record["rope_half"], record["query_block"] = block.rope.dim // 2, query_block(c)
            record["cos"], record["sin"] = tables[block.rope]
            record["window"] = block.window or 0
            record["scale"] = scale.ctypes.data
            if block.qk_norm:
                record["norm_q"] = self._norm(f"model.layers.{i}.self_attn.q_norm")
                record["norm_k"] = self._norm(f"model.layers.{i}.self_attn.k_norm")
        return table

    def _norm(self, name: str) -> int:
        """Address of a norm's weight with the family's offset added."""
        config = self._model.config
        weight = self._model.tensors[f"{name}.weight"].numpy() + np.float32(config.norm_offset)
        self._memory.scratch_bytes += weight.nbytes
        return self._memory.address(weight, 4)

    def _step_records(self, hidden: int, q: int, ffn: int) -> NDArray[Any]:
        """The steps of the decoder in order; widths are floats of the padded rows."""
        c = self._model.config
        row = {name: number for number, name in enumerate(_ROWS)}
        steps: list[dict[str, int]] = []

        def add(kind: Step, time: str, layer: int = -1, **fields: int | str) -> None:
            places = {key: row[v] if isinstance(v, str) else v for key, v in fields.items()}
            record = {"kind": kind, "slot": slot(c.layers, time, layer), "acts": row["acts"]}
            steps.append({**record, "layer": max(layer, 0), **places})

        def norm(time: str, layer: int, branch: int, norm: str, post_norm: str = "") -> None:
            add(
                Step.NORM, time, layer, x="x", out="normed", branch=branch, norm=self._norm(norm),
                post_norm=self._norm(post_norm) if post_norm else 0, width=c.hidden,
                blocks=hidden // K_BLOCK,
            )  # fmt: skip

        embedding = c.layers * len(LAYER_LINEARS)
        add(Step.EMBED, "embed", out="x", linear=embedding)
        branch, post_norm = -1, ""
        for i in range(c.layers):
            layer, linear = f"model.layers.{i}.", i * len(LAYER_LINEARS)
            norm("norm_in", i, branch, f"{layer}input_layernorm", post_norm)
            add(Step.LINEARS, "qkv", i, x="normed", out="q", linear=linear, linears=3)
            add(Step.ATTENTION, "attention", i, x="q", out="att")
            add(Step.QUANTIZE, "o_proj", i, x="att", blocks=q // K_BLOCK)
            add(Step.LINEARS, "o_proj", i, x="att", out="branch", linear=linear + 3, linears=1)
            branch, after_attention = row["branch"], f"{layer}post_attention_layernorm"
            if c.blocks[i].norm_after:
                norm("norm_ffn", i, branch, f"{layer}pre_feedforward_layernorm", after_attention)
            else:
                norm("norm_ffn", i, branch, after_attention)
            add(
                Step.GATED, "gate_up", i, x="normed", out="gate", linear=linear + 4, linears=2,
                activation=abi.ACTIVATIONS.index(c.activation),
            )  # fmt: skip
            add(Step.QUANTIZE, "down_proj", i, x="gate", blocks=ffn // K_BLOCK)
            add(Step.LINEARS, "down_proj", i, x="gate", out="branch", linear=linear + 6, linears=1)
            post_norm = f"{layer}post_feedforward_layernorm" if c.blocks[i].norm_after else ""
        norm("final_norm", -1, branch, "model.norm", post_norm)
        add(Step.HEAD, "head", x="normed", linear=embedding + 1)
        table = self._memory.zeros(len(steps), abi.STEP)
        for record, values in zip(table, steps, strict=True):
            for field, value in values.items():
                record[field] = value
        return table
