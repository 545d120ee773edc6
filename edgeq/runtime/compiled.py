"""The compiled backend: lays out buffers, fills the kernels' tables, runs the team of threads."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.footprint import BATCH, Buffers, buffers, cache_length
from edgeq.model import Model
from edgeq.packing import TILE, round_up
from edgeq.reference import rope_tables
from edgeq.runtime.kernels import decoder
from edgeq.runtime.kernels import plan as st
from edgeq.runtime.kernels.native import kernel_address
from edgeq.runtime.kernels.routines import FLOAT_KINDS
from edgeq.runtime.pace import Pace
from edgeq.runtime.packed_cache import PackedCache
from edgeq.runtime.state import Parts
from edgeq.runtime.step_times import StepTimes
from edgeq.runtime.threads import Team
from edgeq.runtime.weights import Arena, advise, worth_copying
from edgeq.tensor import FloatTensor, QuantTensor, Tensor

SMALL = 4
"""Tokens up to which a pass takes as many threads as decoding has found worth it."""
_LAYER_LINEARS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
_NORMS = {
    st.Y_NORM_IN: "input_layernorm",
    st.Y_NORM_POST_ATT: "post_attention_layernorm",
    st.Y_NORM_PRE_FFN: "pre_feedforward_layernorm",
    st.Y_NORM_POST_FFN: "post_feedforward_layernorm",
    st.Y_NORM_Q: "self_attn.q_norm",
    st.Y_NORM_K: "self_attn.k_norm",
}
_BUFFERS = {
    st.P_X: "x", st.P_X_OWN: "x_own", st.P_NORMED: "normed", st.P_BRANCH: "branch",
    st.P_Q: "q", st.P_K: "k", st.P_V: "v", st.P_ATT: "att", st.P_GATE: "gate", st.P_UP: "up",
    st.P_ACTS: "acts", st.P_PART: "part", st.P_SCRATCH: "work", st.P_SYNC: "sync",
}  # fmt: skip
"""Field of the plan -> the buffer of `edgeq.footprint` whose address it holds."""


class CompiledBackend:
    """See `edgeq.runtime.engine.Backend`.

    Args:
        model: validated.
        context: positions the cache holds.
        threads: how many run side by side.
        kv_bits: 8 or 16.
        mmap: use weights where the file is mapped (True), copy them to memory of huge pages
            (False), or whichever is better here (None).
    """

    def __init__(
        self, model: Model, context: int, threads: int, kv_bits: int, mmap: bool | None = None
    ) -> None:
        self._model = model
        self._kept: list[NDArray[Any]] = []
        self.scratch_bytes = 0
        c = model.config
        self._batch = min(BATCH, context)
        self._threads = threads
        mmap = not worth_copying(model) if mmap is None else mmap
        self._arena = None if mmap else Arena(model)
        if mmap:
            advise(model)
        self._linears = self._linear_table()
        self._rings = [
            PackedCache(c, cache_length(c, windowed, context), kv_bits, self._buffer)
            for windowed in c.window_layers
        ]
        self.kv_bytes = sum(ring.nbytes for ring in self._rings)
        self._caches = np.stack([ring.record for ring in self._rings])
        self._starts, self._written = [0] * c.layers, 0
        self._layers = self._layer_table(context)
        self._floats = np.array([c.norm_eps, c.attn_scale, c.embed_scale], np.float32)
        sizes = buffers(c, context, threads)
        self._plan = self._plan_vector(sizes)
        self._logits = self._scratch_array(sizes.arrays["logits"], np.float32)
        self._found = np.zeros(0, np.int64)
        self._team = Team(threads)
        self._pace = Pace(threads)

    def forward(
        self, tokens: NDArray[np.int64], position: int, outputs: int
    ) -> NDArray[np.float32]:
        """Run tokens in batches; logits [outputs, V] of the last ``outputs`` of them."""
        n = len(tokens)
        if n == 1:
            self._decode(int(tokens[0]), position, self._found)
            return self._logits[:, : self._model.config.vocab].copy()
        rows = (
            self._logits if outputs == 1 else np.empty((outputs, self._logits.shape[1]), np.float32)
        )
        for start in range(0, n, self._batch):
            ids = tokens[start : start + self._batch]
            stop = start + len(ids)
            wanted = max(0, stop - max(start, n - outputs))
            into = rows[max(0, start - (n - outputs)) :] if wanted else rows
            # few tokens at once meet the same troubles as one
            threads = self._pace.current if n <= SMALL else self._threads
            self._call(ids, position + start, wanted, into, 0, self._found, threads)
        return rows[:outputs, : self._model.config.vocab].copy()

    def greedy(self, token: int, position: int, steps: int) -> list[int]:
        """``steps`` greedy tokens after ``token``, without Python in between."""
        found = np.zeros(steps, np.int64)
        done = 0
        while done < steps:
            first = found[done - 1] if done else token
            done += self._decode(int(first), position + done, found[done:])
        return [int(t) for t in found]

    def is_finite(self) -> bool:
        """Whether the last logits were numbers."""
        return bool(np.isfinite(self._logits[0, : self._model.config.vocab].max()))

    def _decode(self, token: int, position: int, found: NDArray[np.int64]) -> int:
        """One burst with as many threads as are worth it: greedy tokens into ``found`` (or, if
        that is empty, the logits after one token); returns how many."""
        threads, burst = self._pace.next(max(1, len(found)))
        steps = burst if len(found) else 0
        start = time.perf_counter()
        self._call(np.array([token], np.int64), position, 1, self._logits, steps, found, threads)
        self._pace.record(threads, burst, time.perf_counter() - start)
        return burst

    def _call(
        self,
        ids: NDArray[np.int64],
        position: int,
        outputs: int,
        logits: NDArray[np.float32],
        steps: int,
        found: NDArray[np.int64],
        threads: int,
    ) -> None:
        """Run the compiled decoder on some threads side by side."""
        self._written = max(self._written, position + max(len(ids), steps))
        tables = (self._plan, self._floats, self._linears, self._layers, self._caches)
        args = [
            *(table.ctypes.data for table in tables), threads, len(ids), position,
            ids.ctypes.data, outputs, logits.ctypes.data, logits.strides[0], steps,
            found.ctypes.data,
        ]  # fmt: skip
        self._team.call(decoder(), args, threads)

    def time_steps(self, times: StepTimes | None) -> None:
        """Add the time of every step to these sums, until it is called with None."""
        self._times = times  # keeps the memory that the plan points to
        self._plan[st.P_TIMES] = 0 if times is None else times.raw.ctypes.data

    def truncate(self, position: int) -> None:
        """What lies past the sequence is never read: only a whole reset is noted."""
        if position == 0:
            self._starts, self._written = [0] * len(self._starts), 0

    def first(self, layer: int) -> int:
        """The first position of the sequence whose key and value the layer still holds."""
        # a tile of 16 is lost with its first position, which is the center of all
        oldest = round_up(self._written - self._rings[layer].length, TILE)
        return max(self._starts[layer], oldest, 0)

    def read(self, layer: int, start: int, stop: int) -> Parts:
        """A layer's keys and values of positions ``start:stop``, start a multiple of 16."""
        return self._rings[layer].read(start, stop)

    def write(self, layer: int, start: int, parts: Parts) -> None:
        """Put a saved sequence's last positions, from ``start`` to its end, into a layer."""
        ring, stop = self._rings[layer], start + len(parts["keys"])
        self._written = max(self._written, stop)
        self._starts[layer] = start
        skip = self.first(layer) - start
        rows = {name: skip // TILE if name == "centers" else skip for name in parts}
        ring.write(start + skip, {name: part[rows[name] :] for name, part in parts.items()})

    def close(self) -> None:
        """End the threads."""
        self._team.close()

    # tables

    def _aligned(self, array: NDArray[Any], step: int = 64) -> int:
        """The address of a contiguous array aligned to ``step``; copied only if it is not."""
        if not array.flags.c_contiguous or array.ctypes.data % step:
            copy = self._buffer(array.nbytes, np.uint8).view(array.dtype).reshape(array.shape)
            copy[...] = array
            array = copy
        self._kept.append(array)
        return int(array.ctypes.data)

    def _buffer(self, count: int, dtype: Any) -> NDArray[Any]:
        """A zeroed, 64-byte aligned vector (untouched pages take no memory)."""
        nbytes = count * np.dtype(dtype).itemsize
        raw = np.zeros(nbytes + 64, np.uint8)
        start = -raw.ctypes.data % 64
        part: NDArray[Any] = raw[start : start + nbytes].view(dtype)
        self._kept.append(part)
        return part

    def _scratch_array(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        array = self._buffer(int(np.prod(shape)), dtype).reshape(shape)
        self.scratch_bytes += array.nbytes
        return array

    def _scratch(self, *shape: int) -> int:
        """The address of zeroed float32 scratch."""
        return int(self._scratch_array(shape, np.float32).ctypes.data)

    def _linear_table(self) -> NDArray[np.int64]:
        c = self._model.config
        names = [f"model.layers.{i}.{part}" for i in range(c.layers) for part in _LAYER_LINEARS]
        names += ["model.embed_tokens", c.head_name.removesuffix(".weight")]
        return np.stack([self._linear_record(name) for name in names])

    def _linear_record(self, name: str) -> NDArray[np.int64]:
        tensor: Tensor = self._model.tensors[f"{name}.weight"]
        tensor = self._arena.copied(tensor) if self._arena else tensor
        record = np.zeros(st.L_FIELDS, np.int64)
        n, k = tensor.shape
        record[st.L_N], record[st.L_K], record[st.L_TILES] = n, k, -(-n // TILE)
        if isinstance(tensor, QuantTensor):
            scheme = tensor.scheme
            record[st.L_KIND] = st.quant_kind(scheme)
            record[st.L_KERNEL] = kernel_address(scheme)
            record[st.L_BLOCKS] = tensor.packed.shape[1]
            record[st.L_SHIFT] = st.group_shift(scheme)
            record[st.L_CODES] = self._aligned(tensor.packed)
            record[st.L_CODE_STEP] = tensor.packed.strides[0]
            record[st.L_SCALES] = self._aligned(tensor.scales, 32)
            record[st.L_SCALE_STEP] = tensor.scales.strides[0]
            if tensor.palette is not None:  # one table for all tiles
                table = self._buffer(TILE, np.int8)
                table[: tensor.palette.size] = tensor.palette
                record[st.L_ZEROS] = table.ctypes.data
            if tensor.zero_points is not None:
                record[st.L_ZEROS] = self._aligned(tensor.zero_points, 16)
                record[st.L_ZERO_STEP] = tensor.zero_points.strides[0]
        else:
            if not isinstance(tensor, FloatTensor):  # a lazily decoded tensor has no bytes to use
                tensor = FloatTensor("F32", tensor.numpy())
            record[st.L_KIND] = FLOAT_KINDS[tensor.dtype]
            record[st.L_CODES] = self._aligned(tensor.data, tensor.data.itemsize)
        bias = self._model.tensors.get(f"{name}.bias")
        if bias is not None:
            record[st.L_BIAS] = self._aligned(bias.numpy(), 4)
        return record

    def _layer_table(self, context: int) -> NDArray[np.int64]:
        c = self._model.config
        kinds = set(c.window_layers) if c.rope_theta_local is not None else {False}
        tables = {}
        for local in kinds:
            cos, sin = rope_tables(c, local, context)
            self.scratch_bytes += cos.nbytes + sin.nbytes
            tables[local] = (self._aligned(cos, 4), self._aligned(sin, 4))
        table = np.zeros((c.layers, st.Y_FIELDS), np.int64)
        for i, (row, local) in enumerate(zip(table, c.window_layers, strict=True)):
            for field, name in _NORMS.items():
                row[field] = self._norm(f"model.layers.{i}.{name}.weight")
            row[st.Y_COS], row[st.Y_SIN] = tables[local if local in tables else False]
            row[st.Y_WINDOW] = c.window if local and c.window else 0
        return table

    def _norm(self, name: str) -> int:
        """Address of a norm's weight with the family's offset added; 0 if it has none."""
        tensor = self._model.tensors.get(name)
        if tensor is None:
            return 0
        weight = tensor.numpy() + np.float32(self._model.config.norm_offset)
        self.scratch_bytes += weight.nbytes
        return self._aligned(weight, 4)

    def _plan_vector(self, sizes: Buffers) -> NDArray[np.int64]:
        c = self._model.config
        plan = np.zeros(st.P_FIELDS, np.int64)
        ones = self._buffer(TILE, np.float16)
        ones[:] = 1
        values = {
            st.P_LAYERS: c.layers,
            st.P_HIDDEN: c.hidden,
            st.P_FFN: c.ffn,
            st.P_HEADS: c.heads,
            st.P_KV_HEADS: c.kv_heads,
            st.P_DIM: c.head_dim,
            st.P_ROPE_HALF: c.rope_dim // 2,
            st.P_ACT_KIND: ("silu", "gelu_tanh").index(c.activation),
            st.P_QK_NORM: int(c.qk_norm),
            st.P_POST_NORMS: int(c.post_norms),
            st.P_HIDDEN_STRIDE: sizes.hidden * 4,
            st.P_FFN_STRIDE: sizes.ffn * 4,
            st.P_Q_STRIDE: sizes.q * 4,
            st.P_KV_STRIDE: sizes.kv * 4,
            st.P_ACTS_STRIDE: sizes.acts,
            st.P_PART_STRIDE: sizes.part,
            st.P_MAX_CHUNKS: sizes.chunks,
            st.P_SCRATCH_STRIDE: sizes.work,
            st.P_ONES: ones.ctypes.data,
            st.P_FINAL_NORM: self._norm("model.norm.weight"),
            st.P_QUERY_BLOCK: sizes.query_block,
            st.P_ATTN_SCALE: self._floats.ctypes.data + 4 * st.F_ATTN_SCALE,
            **{field: self._scratch(*sizes.arrays[name]) for field, name in _BUFFERS.items()},
        }
        for field, value in values.items():
            plan[field] = value
        return plan
