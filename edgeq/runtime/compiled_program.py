"""The program of a decoder: the records that `edgeq.runtime.kernels.program` runs.

`CompiledProgram` has `edgeq.runtime.step_fusion` turn the recorded decoder into steps, allocates
every buffer, and describes weights, layers and steps in records. `edgeq.runtime.kernels.abi.Step`
says what each kind of step computes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.formats.packing import TILE
from edgeq.formats.schemes import K_BLOCK
from edgeq.formats.tensor import FloatTensor, QuantTensor, Tensor
from edgeq.model import recording
from edgeq.model.block import RopeSpec
from edgeq.model.formulas import rope_tables
from edgeq.model.memory_layout import Buffers, attention_work, buffers, cache_length, query_block
from edgeq.model.model import Model
from edgeq.runtime.engine_memory import EngineMemory
from edgeq.runtime.kernels import abi
from edgeq.runtime.kernels.abi import Step
from edgeq.runtime.kernels.jit import kernel_address
from edgeq.runtime.kernels.vector_ops import FLOAT_KINDS
from edgeq.runtime.packed_cache import PackedCache
from edgeq.runtime.step_fusion import ProgramStep, fuse
from edgeq.runtime.step_times import StepLabel
from edgeq.runtime.weights import WeightArena

_ROWS = {
    "x": True, "normed": True, "branch": False, "q": False, "k": False, "v": False, "att": True,
    "gate": False, "up": False, "acts": True,
}  # fmt: skip
"""Buffers of rows in the order of the program's records, and whether each thread has a row of its
own while one token is decoded. q, k, v and gate, up follow each other: a step names the first."""
_ROW_NUMBERS = {name: number for number, name in enumerate(_ROWS)}


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
        labels: layer and label of each step, for its time.
        caches: the KV cache of each layer.
        logits: float32 [1, V rounded up to whole tiles].

    Raises:
        UnsupportedError: the decoder needs an operation for which there is no step.
    """

    def __init__(
        self,
        model: Model,
        context: int,
        threads: int,
        kv_bits: int,
        arena: WeightArena | None,
        memory: EngineMemory,
    ) -> None:
        self._model, self._arena, self._memory = model, arena, memory
        c = model.config
        steps = fuse(recording.record(c))
        self.labels: tuple[StepLabel, ...] = tuple((step.layer, step.label) for step in steps)
        linears = self._linear_records([name for step in steps for name in step.linears])
        self.caches = [
            PackedCache(c, cache_length(block, context), kv_bits, memory.zeros)
            for block in c.blocks
        ]
        sizes = buffers(c, context, threads)
        attentions = self._attention_records(steps, context)
        scratch = {name: memory.scratch(shape) for name, shape in sizes.arrays.items()}
        self.logits = scratch["logits"]
        rows = memory.zeros(len(_ROWS), abi.ROWS)
        for row, (name, private) in zip(rows, _ROWS.items(), strict=True):
            row["address"], row["stride"] = scratch[name].ctypes.data, scratch[name].strides[0]
            row["private"] = private
        self.record = memory.zeros(1, abi.PROGRAM)
        program = self.record[0]
        program["eps"], program["embed_scale"] = c.norm_eps, c.embed_scale
        for name, table in {
            "step": self._step_records(steps, sizes), "linear": linears, "row": rows,
        }.items():  # fmt: skip
            program[f"{name}s"], program[f"{name}_count"] = memory.address(table), len(table)
        caches = np.array([cache.record for cache in self.caches])
        program["attentions"], program["caches"] = (
            memory.address(attentions),
            memory.address(caches),
        )
        program["layer_count"] = c.layers
        program["sync"] = scratch["sync"].ctypes.data
        program["parts"], program["part_stride"] = scratch["part"].ctypes.data, sizes.part
        program["chunks"] = sizes.chunks
        program["work"], program["work_stride"] = scratch["work"].ctypes.data, sizes.work
        for name, (offset, _) in attention_work(c).items():
            program[f"work_{name}"] = offset
        ones = memory.zeros(TILE, np.float16)
        ones[:] = 1
        program["ones"] = ones.ctypes.data

    def _linear_records(self, names: list[str]) -> NDArray[Any]:
        """Records of matrices by their tensors' names."""
        table = self._memory.zeros(len(names), abi.LINEAR)
        for record, name in zip(table, names, strict=True):
            self._describe_linear(record, name)
        return table

    def _describe_linear(self, record: Any, name: str) -> None:
        tensor: Tensor = self._model.tensors[name]
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
                tensor = FloatTensor("float32", tensor.numpy())
            record["kind"] = FLOAT_KINDS[tensor.dtype]
            record["codes"] = address(tensor.data, tensor.data.itemsize)
        bias = self._model.tensors.get(name.removesuffix("weight") + "bias")
        if bias is not None:
            record["bias"] = address(bias.numpy(), 4)

    def _attention_records(self, steps: list[ProgramStep], context: int) -> NDArray[Any]:
        """One record of each layer."""
        c, memory = self._model.config, self._memory
        tables: dict[RopeSpec, tuple[int, int]] = {}
        scale = memory.zeros(1, np.float32)
        scale[0] = c.attn_scale
        table = memory.zeros(c.layers, abi.ATTENTION)
        for step in steps:
            if step.kind != Step.ATTENTION:
                continue
            assert step.layer is not None
            record = table[step.layer]
            record["heads"], record["kv_heads"], record["dim"] = c.heads, c.kv_heads, c.head_dim
            record["query_block"] = query_block(c)
            record["window"] = c.blocks[step.layer].window or 0
            record["scale"] = scale.ctypes.data
            if step.rope is not None:
                if step.rope not in tables:
                    cos, sin = rope_tables(step.rope, context)
                    memory.scratch_bytes += cos.nbytes + sin.nbytes
                    tables[step.rope] = (memory.address(cos, 4), memory.address(sin, 4))
                record["cos"], record["sin"] = tables[step.rope]
                record["rope_half"] = step.rope.dim // 2
            record["norm_spans_heads"] = step.norm_spans_heads
            record["norm_q"], record["norm_k"] = self._norm(step.q_norm), self._norm(step.k_norm)
        return table

    def _norm(self, name: str) -> int:
        """Address of a norm's weight with the family's offset added; 0 for no norm."""
        if not name:
            return 0
        weight = self._model.tensors[name].numpy() + np.float32(self._model.config.norm_offset)
        self._memory.scratch_bytes += weight.nbytes
        return self._memory.address(weight, 4)

    def _step_records(self, steps: list[ProgramStep], sizes: Buffers) -> NDArray[Any]:
        """The steps as records: buffers and weights by their numbers and addresses."""
        config = self._model.config
        widths = {"x": sizes.hidden, "att": sizes.q, "gate": sizes.ffn}
        table = self._memory.zeros(len(steps), abi.STEP)
        linear = 0
        for record, step in zip(table, steps, strict=True):
            record["kind"], record["layer"] = step.kind, step.layer or 0
            record["x"], record["out"] = _ROW_NUMBERS[step.x or "x"], _ROW_NUMBERS[step.out or "x"]
            record["acts"] = _ROW_NUMBERS["acts"]
            record["branch"] = _ROW_NUMBERS[step.branch] if step.branch else -1
            record["norm"], record["post_norm"] = self._norm(step.norm), self._norm(step.post_norm)
            record["width"] = config.hidden
            record["blocks"] = widths.get(step.x, 0) // K_BLOCK
            record["linear"], record["linears"] = linear, len(step.linears)
            linear += len(step.linears)
            record["activation"] = abi.ACTIVATIONS.index(config.activation)
        return table
