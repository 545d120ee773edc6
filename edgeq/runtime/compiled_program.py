"""The program of a decoder: the records that `edgeq.runtime.kernels.program` runs.

`CompiledProgram` has `edgeq.runtime.step_fusion` turn the recorded decoder into steps, allocates
every buffer, and describes weights, layers and steps in records. `edgeq.runtime.kernels.abi.Step`
says what each kind of step computes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.formats.packing import TILE, round_up
from edgeq.formats.schemes import K_BLOCK
from edgeq.formats.tensor import FloatTensor, QuantTensor
from edgeq.model import recording
from edgeq.model.block import (
    A_LOG,
    CHOICE_BIAS,
    DELTA_CONV,
    DELTA_NORM,
    DT_BIAS,
    SINKS,
    tensor_name,
)
from edgeq.model.memory_layout import (
    ACT_BLOCK,
    KEPT_STATES,
    WIDTH,
    Buffers,
    attention_work,
    buffers,
    input_width,
    query_block,
)
from edgeq.model.model import Model
from edgeq.model.rope_spec import RopeSpec
from edgeq.model.rotary import rope_tables
from edgeq.runtime.engine_memory import EngineMemory
from edgeq.runtime.kernels import abi
from edgeq.runtime.kernels.abi import Step
from edgeq.runtime.kernels.jit import float_kernel_address, kernel_address
from edgeq.runtime.layer_cache import InputCache, layer_caches
from edgeq.runtime.step_fusion import ProgramStep, fuse
from edgeq.runtime.step_times import StepLabel

_ROWS = {
    "x": True, "normed": True, "branch": False, "q": False, "k": False, "v": False, "g": False,
    "att": True, "mixed": False, "gate": False, "up": False, "acts": True, "router": False,
    "expert_x": False, "expert_acts": False, "expert_gate": False, "expert_up": False,
    "expert_between": False, "expert_out": False, "inputs": False, "own": True,
}  # fmt: skip
"""Buffers of rows in the order of the program's records, and whether each thread has a row of its
own while one token is decoded. q, k, v, g and gate, up follow each other, and so do the rows of
experts: a step names the first. A program without gates and gated delta nets has no g and mixed,
and one without inputs of layers no inputs and own."""
_ROW_NUMBERS = {name: number for number, name in enumerate(_ROWS)}


class CompiledProgram:
    """A model as records for compiled code.

    Args:
        model: validated, every matrix quantized or rows of floats (`edgeq.runtime.weights`).
        context: positions the cache holds.
        threads: how many run side by side.
        kv_bits: 4, 8 or 16.
        sequences: how many are decoded together, each with its own cache.
        memory: keeps all that the records point to.

    Attributes:
        record: the `abi.PROGRAM`, an array of one.
        labels: layer and label of each step, for its time.
        caches: the cache of each layer, for each sequence.
        states: for each sequence, the final norms of its last positions; empty where no
            multi-token-prediction head reads them.
        tables: address of the records of each sequence's caches.
        logits: float32 [sequences, V rounded up to whole tiles].
        normed: float32 [rows, hidden rounded up]: after a pass, the final norm of its tokens.

    Raises:
        UnsupportedError: the decoder needs an operation for which there is no step.
    """

    def __init__(
        self,
        model: Model,
        context: int,
        threads: int,
        kv_bits: int,
        memory: EngineMemory,
        sequences: int = 1,
    ) -> None:
        self._model, self._memory = model, memory
        c = model.config
        steps = fuse(recording.record(c))
        self.labels: tuple[StepLabel, ...] = tuple((step.layer, step.label) for step in steps)
        linears = self._linear_records([name for step in steps for name in step.linears])
        self.caches = [layer_caches(c, context, kv_bits, memory.zeros) for _ in range(sequences)]
        self.states = [
            InputCache(c.hidden, KEPT_STATES, memory.zeros) for _ in self.caches if c.mtp
        ]
        self.tables = [
            memory.address(
                np.array([cache.record for cache in (*caches, *self.states[number : number + 1])])
            )
            for number, caches in enumerate(self.caches)
        ]
        sizes = buffers(c, context, threads, sequences)
        attentions = self._attention_records(steps, context)
        scratch = {name: memory.scratch(shape) for name, shape in sizes.arrays.items()}
        self.logits, self.normed = scratch["logits"], scratch["normed"]
        self._plan = scratch["plan"]
        rows = memory.zeros(len(_ROWS), abi.ROWS)
        for row, (name, private) in zip(rows, _ROWS.items(), strict=True):
            if name in scratch:
                row["address"], row["stride"] = scratch[name].ctypes.data, scratch[name].strides[0]
            row["private"] = private
        self.record = memory.zeros(1, abi.PROGRAM)
        program = self.record[0]
        program["eps"], program["embed_scale"] = c.norm_eps, c.embed_scale
        for name, table in {
            "step": self._step_records(steps, sizes, linears), "linear": linears, "row": rows,
        }.items():  # fmt: skip
            program[f"{name}s"], program[f"{name}_count"] = memory.address(table), len(table)
        program["attentions"] = memory.address(attentions)
        program["layer_count"] = c.layers
        program["sync"] = scratch["sync"].ctypes.data
        program["parts"], program["part_stride"] = scratch["part"].ctypes.data, sizes.part
        program["chunks"] = sizes.chunks
        program["work"], program["work_stride"] = scratch["work"].ctypes.data, sizes.work
        for name, (offset, _) in attention_work(c).items():
            program[f"work_{name}"] = offset
        program["keeps_states"], program["hidden"] = bool(self.states), c.hidden
        program["normed"] = _ROW_NUMBERS["normed"]
        ones = memory.zeros(TILE, np.float16)
        ones[:] = 1
        program["ones"] = ones.ctypes.data

    def _linear_records(self, names: list[str]) -> NDArray[Any]:
        """Records of matrices by their tensors' names."""
        return self._table(abi.LINEAR, [self._linear(name) for name in names])

    def _linear(self, name: str) -> dict[str, int]:
        tensor = self._model.tensors[name]
        address = self._memory.address
        n, k = tensor.shape
        record = {"n": n, "k": k, "tiles": -(-n // TILE)}
        if isinstance(tensor, QuantTensor):
            scheme = tensor.scheme
            record |= {
                "kind": abi.quant_kind(scheme),
                "kernel": kernel_address(scheme),
                "blocks": tensor.packed.shape[1],
                "shift": abi.group_shift(scheme),
                "codes": address(tensor.packed),
                "code_step": tensor.packed.strides[0],
                "scales": address(tensor.scales, 32),
                "scale_step": tensor.scales.strides[0],
            }
            if tensor.palette is not None:  # one table for all tiles
                palette = self._memory.zeros(TILE, np.int8)
                palette[: tensor.palette.size] = tensor.palette
                record["zeros"] = palette.ctypes.data
            if tensor.zero_points is not None:
                record["zeros"] = address(tensor.zero_points, 16)
                record["zero_step"] = tensor.zero_points.strides[0]
            if tensor.minimums is not None:
                record["zeros"] = address(tensor.minimums, 32)
                record["zero_step"] = tensor.minimums.strides[0]
        else:
            assert isinstance(tensor, FloatTensor)
            record["kind"] = abi.FLOAT_KINDS[tensor.dtype]
            record["kernel"] = float_kernel_address(tensor.dtype)
            record["codes"] = address(tensor.data, tensor.data.itemsize)
            record["code_step"] = k * tensor.data.itemsize
        bias = self._model.tensors.get(name.removesuffix("weight") + "bias")
        if bias is not None:
            values = bias.numpy()
            record["bias"] = address(values, 4)
            if ".mlp." in name:  # those of attention are optional, and no plan counts them
                self._memory.scratch_bytes += values.nbytes
        return record

    def _attention_records(self, steps: list[ProgramStep], context: int) -> NDArray[Any]:
        """A record for each layer; that of a layer without attention is empty."""
        c, memory = self._model.config, self._memory
        tables: dict[RopeSpec | None, tuple[int, int]] = {None: (0, 0)}
        scale = self._numbers(c.attn_scale)
        softcap = 0
        if c.attn_softcap is not None:
            softcap = self._numbers(c.attn_scale / c.attn_softcap, c.attn_softcap, 1.0)
        records: list[dict[str, int]] = [{} for _ in c.blocks]
        for step in steps:
            if step.kind != Step.ATTENTION or step.layer is None:
                continue
            rope = step.rope
            keys = rope and rope.for_keys
            for one in (rope, keys):
                if one is not None and one not in tables:
                    cos, sin = rope_tables(one, context)
                    memory.scratch_bytes += cos.nbytes + sin.nbytes
                    tables[one] = (memory.address(cos, 4), memory.address(sin, 4))
            records[step.layer] = {
                "heads": c.heads,
                "kv_heads": c.kv_heads,
                "dim": c.head_dim_of(step.layer),
                "query_block": query_block(c),
                "window": c.blocks[step.layer].window or 0,
                "both_ways": not c.blocks[step.layer].causal,
                "norm_last": step.norm_last,
                "norm_values": step.norm_values,
                "borrowed": step.borrowed,
                "scale": scale,
                "softcap": softcap,
                "cos_q": tables[rope][0],
                "sin_q": tables[rope][1],
                "cos_k": tables[keys][0],
                "sin_k": tables[keys][1],
                "rope_half": rope.dim // 2 if rope else 0,
                "norm_q": self._norm(step.q_norm),
                "norm_k": self._norm(step.k_norm),
                "norm_spans_heads": step.norm_spans_heads,
                "sinks": self._sinks(step.layer),
            }
        return self._table(abi.ATTENTION, records)

    def _sinks(self, layer: int) -> int:
        """Address of the sinks of a layer's attention; 0 for none."""
        if not self._model.config.blocks[layer].sinks:
            return 0
        sinks = self._model.tensors[tensor_name(layer, SINKS)].numpy()
        self._memory.scratch_bytes += sinks.nbytes
        return self._memory.address(sinks, 4)

    def _numbers(self, *values: float) -> int:
        """Address of float32 values."""
        array = self._memory.zeros(len(values), np.float32)
        array[:] = values
        return array.ctypes.data

    def _norm(self, name: str) -> int:
        """Address of a norm's weight with the family's offset added; 0 for no norm."""
        if not name:
            return 0
        weight = self._model.tensors[name].numpy() + np.float32(self._model.config.norm_offset)
        self._memory.scratch_bytes += weight.nbytes
        return self._memory.address(weight, 4)

    def _taps(self, name: str) -> tuple[int, int]:
        """Address and number of the taps of a short convolution, each a row over the channels."""
        if not name:
            return 0, 0
        rows = np.ascontiguousarray(self._model.tensors[name].numpy()[:, 0].T)
        self._memory.scratch_bytes += rows.nbytes
        return self._memory.address(rows, 4), len(rows)

    def _delta(self, step: ProgramStep) -> int:
        """Address of the record of a gated delta net; 0 for other steps."""
        if step.kind != Step.DELTA_NET or step.layer is None:
            return 0
        config, memory, tensors = self._model.config, self._memory, self._model.tensors
        delta = config.blocks[step.layer].delta
        assert delta is not None
        taps, tap_count = self._taps(tensor_name(step.layer, DELTA_CONV))
        heads = delta.value_heads
        vectors = memory.zeros(2 * (heads + TILE) + delta.value_dim, np.float32)
        rate, dt_bias = vectors[:heads], vectors[heads + TILE :][:heads]
        norm = vectors[2 * (heads + TILE) :]
        rate[:] = -np.exp(tensors[tensor_name(step.layer, A_LOG)].numpy().astype(np.float64))
        dt_bias[:] = tensors[tensor_name(step.layer, DT_BIAS)].numpy()
        norm[:] = tensors[tensor_name(step.layer, DELTA_NORM)].numpy()
        memory.scratch_bytes += 4 * (2 * heads + delta.value_dim)
        record = {
            "key_heads": delta.key_heads,
            "value_heads": heads,
            "key_dim": delta.key_dim,
            "value_dim": delta.value_dim,
            "channels": delta.channels,
            "width": input_width(config, step.layer),
            "taps": taps,
            "tap_count": tap_count,
            "rate": rate.ctypes.data,
            "dt_bias": dt_bias.ctypes.data,
            "norm": norm.ctypes.data,
            "tiled_out": delta.tiled_out,
        }
        return memory.address(self._table(abi.DELTA, [record]))

    def _experts(self, step: ProgramStep, matrices: NDArray[Any], sizes: Buffers) -> int:
        """Address of the record of a step's experts; 0 for another step.

        Args:
            step: the step.
            matrices: its records of gate, up and down of each expert.
            sizes: of the buffers.
        """
        if step.kind != Step.EXPERTS or step.layer is None:
            return 0
        experts = self._model.config.blocks[step.layer].experts
        assert experts is not None  # by which there is such a step
        bias = 0
        if experts.choice_bias:
            added = self._model.tensors[f"model.layers.{step.layer}.{CHOICE_BIAS}"].numpy()
            self._memory.scratch_bytes += added.nbytes
            bias = self._memory.address(added, 4)
        quantized = matrices["kind"].reshape(-1, 3) >= abi.FIRST_QUANT
        record: dict[str, float] = {
            "count": experts.count,
            "chosen": experts.chosen,
            "sigmoid": experts.score == "sigmoid",
            "normalize": experts.normalize,
            "bias": bias,
            "rows": _ROW_NUMBERS["router"],
            "plan": self._plan.ctypes.data,
            "room": sizes.arrays["expert_x"][0],
            "width": sizes.hidden,
            "words": sizes.hidden // K_BLOCK * ACT_BLOCK // 8,
            "floats": not quantized[:, :2].all(),
            "quantized": bool(quantized[:, :2].any()),
            "blocks": sizes.expert_ffn // K_BLOCK if quantized[:, 2].any() else 0,
            "scale": experts.scale,
        }
        return self._table(abi.EXPERTS, [record]).ctypes.data

    def _step_records(
        self, steps: list[ProgramStep], sizes: Buffers, matrices: NDArray[Any]
    ) -> NDArray[Any]:
        """The steps as records: buffers and weights by their numbers and addresses."""
        config = self._model.config
        records, linear = [], 0
        # values of a step's rows that quantized matrices after it read; 0 where there are none
        read: list[int] = []
        wanted, end = 0, len(matrices)
        for step in reversed(steps):
            read.insert(0, wanted)
            if step.kind in (Step.NORM, Step.QUANTIZE, Step.OWN_INPUT):
                wanted = 0
            elif step.kind not in (Step.EMBED, Step.LAYER_INPUTS) and step.linears:
                first = matrices[end - len(step.linears) : end]
                if (first["kind"] >= abi.FIRST_QUANT).any():
                    wanted = int(first["k"][0])
            end -= len(step.linears)
        for step, values in zip(steps, read, strict=True):
            quantizes = step.kind in (Step.NORM, Step.QUANTIZE, Step.OWN_INPUT)
            taps, tap_count = self._taps(step.taps)
            records.append(
                {
                    "kind": step.kind,
                    "layer": step.layer or 0,
                    "x": _ROW_NUMBERS[step.x or "x"],
                    "out": _ROW_NUMBERS[step.out or "x"],
                    "acts": _ROW_NUMBERS["acts"],
                    "branch": _ROW_NUMBERS[step.branch] if step.branch else -1,
                    "norm": self._norm(step.norm),
                    "post_norm": self._norm(step.post_norm),
                    "width": values if step.kind == Step.QUANTIZE else self._width(step),
                    "blocks": round_up(values, WIDTH) // K_BLOCK if quantizes else 0,
                    "linear": linear,
                    "linears": len(step.linears),
                    "activation": abi.ACTIVATIONS.index(config.activation),
                    "stream_scale": self._number(step.stream_scale),
                    "factors": self._input_factors(step),
                    "softcap": self._numbers(step.scale / step.cap, step.cap) if step.cap else 0,
                    "scale": step.scale,
                    "taps": taps,
                    "tap_count": tap_count,
                    "delta": self._delta(step),
                    "experts": self._experts(
                        step, matrices[linear : linear + len(step.linears)], sizes
                    ),
                }
            )
            linear += len(step.linears)
        return self._table(abi.STEP, records)

    def _width(self, step: ProgramStep) -> int:
        """How many values of a row a step is about."""
        config = self._model.config
        if step.kind in (Step.LAYER_INPUTS, Step.OWN_INPUT):
            return config.layer_input
        if step.kind == Step.OUTPUT_GATE and step.layer is not None:
            return round_up(config.heads * config.head_dim_of(step.layer), TILE)
        return config.hidden

    def _number(self, name: str) -> int:
        """Address of a tensor of one number; 0 for no name."""
        if not name:
            return 0
        self._memory.scratch_bytes += 4
        return self._numbers(float(self._model.tensors[name].numpy()[0]))

    def _input_factors(self, step: ProgramStep) -> int:
        """Address of the factors of LAYER_INPUTS; 0 for other steps."""
        if step.kind != Step.LAYER_INPUTS:
            return 0
        projected, summed = step.factors
        return self._numbers(projected, self._model.config.layer_input**0.5, summed)

    def _table(self, kind: np.dtype[Any], records: Sequence[Mapping[str, float]]) -> NDArray[Any]:
        """Records of a kind; fields that are not given are 0."""
        assert kind.names is not None
        assert all(record.keys() <= set(kind.names) for record in records)
        table = self._memory.zeros(len(records), kind)
        table[:] = [tuple(record.get(name, 0) for name in kind.names) for record in records]
        return table
