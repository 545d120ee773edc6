"""The decoder in MIL, Core ML's operators, written with coremltools' own builder.

Products are in ``narrow`` (float16 unless told otherwise), all between them in ``wide``: the
residual stream, norms, rotations, the gate. In "mixed" precision wide is float32, as the residual
stream of large models leaves float16's range; "float16" suits the Neural Engine, which has nothing
wider, and norms are then computed on x / max|x| so that squares stay in range.

Every operator that ends a step of `decoder` is named after it, with underscores for dots.

    iOS 18   a function for each number of tokens, "decode" and "prefill_64" ..., or one of
             enumerated shapes; keys and values are states [L, Hkv, S, D], read once, then each
             layer writes its slice and goes on with what the write gives
    iOS 16   one function "main" of enumerated shapes; keys and values of the past come in as
             [L, Hkv, S, D] and those of the new tokens go out as [L, Hkv, T, D]; whoever calls
             puts them at ``position``

    in    tokens int32 [1, T] · position int32 [1], of the first · last int32 [1], the row whose
          logits are wanted, unless T is 1
    out   logits float32 [1, V]

A prompt shorter than T is padded at its end: what the padding puts into the cache is seen by no
earlier position and overwritten by the tokens that follow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeq.converters.coreml.weights import Matrix, identifier, narrowed
from edgeq.converters.mixers import AttentionOnly
from edgeq.model.decoder import decoder
from edgeq.model.model import Model
from edgeq.model.rope_spec import RopeSpec
from edgeq.model.rotary import rope_tables

MASKED = -30000.0
"""Added to scores that may not be seen; in float16's range whatever the score."""

Var = Any
"""coremltools' value in a graph."""


@dataclass(frozen=True)
class CoreMLSettings:
    """Settings of a program.

    Args:
        target: "ios18" or "ios16".
        narrow: of products: "fp16" or "fp32".
        wide: of all between them: "fp16" or "fp32".
        context: positions of the cache.
        lengths: numbers of tokens a call may have, 1 first.
        enumerated: one function of enumerated shapes rather than one a length.
    """

    target: str
    narrow: str
    wide: str
    context: int
    lengths: tuple[int, ...]
    enumerated: bool

    @property
    def functions(self) -> dict[str, int | None]:
        """Name -> its number of tokens, None if that is enumerated."""
        if self.enumerated:  # Core ML wants at least two shapes to call them so
            return {"main": None if len(self.lengths) > 1 else self.lengths[0]}
        return {function_name(t): t for t in self.lengths}


def function_name(tokens: int) -> str:
    """The function that takes so many tokens at once."""
    return "decode" if tokens == 1 else f"prefill_{tokens}"


def program(model: Model, settings: CoreMLSettings, matrices: Mapping[str, Matrix]) -> Any:
    """The whole program over stand-ins for the weights: coremltools' ``Program``."""
    from coremltools.converters.mil.mil import Builder, Program

    result = Program()
    # operators without a name are counted: from 0, that the same model make the same file
    Builder.name_count.clear()
    for name, tokens in settings.functions.items():
        result.add_function(name, _function(model, settings, matrices, tokens))
    result.default_function_name = next(iter(settings.functions))
    result.export_as_multifunction = not settings.enumerated
    return result


def _function(
    model: Model, s: CoreMLSettings, matrices: Mapping[str, Matrix], tokens: int | None
) -> Any:
    import coremltools as ct
    from coremltools.converters.mil.mil import Builder, Function, get_new_symbol, types

    c = model.config
    cache = (c.layers, c.kv_heads, s.context, c.head_dim)
    inputs = {
        "tokens": Builder.TensorSpec((1, tokens or get_new_symbol()), types.int32),
        "position": Builder.TensorSpec((1,), types.int32),
    }
    if tokens != 1:
        inputs["last"] = Builder.TensorSpec((1,), types.int32)
    kind = Builder.StateTensorSpec if s.target == "ios18" else Builder.TensorSpec
    for name in ("key_cache", "value_cache"):
        inputs[name] = kind(cache, types.fp16)
    opset = ct.target.iOS18 if s.target == "ios18" else ct.target.iOS16
    with Function(inputs, opset_version=opset) as function:
        graph = MilGraph(model, s, matrices, tokens, function.inputs)
        outputs = [decoder(graph, c)]
        if s.target == "ios16":
            outputs += graph.new_cache()
        function.set_outputs(outputs)
    if tokens is None:
        shapes = ct.EnumeratedShapes([(1, t) for t in s.lengths], default=(1, s.lengths[0]))
        function.set_input_types((ct.TensorType("tokens", shapes, np.int32),))
    return function


class MilGraph(AttentionOnly):
    """Builds one function; each method adds the operators of one step of `decoder`.

    Args:
        model: the model.
        settings: what it is built for.
        matrices: how each matrix is held.
        tokens: how many the function takes, or None if that is enumerated.
        inputs: the function's inputs by name.
    """

    def __init__(
        self,
        model: Model,
        settings: CoreMLSettings,
        matrices: Mapping[str, Matrix],
        tokens: int | None,
        inputs: Mapping[str, Var],
    ) -> None:
        from coremltools.converters.mil.mil import Builder, types

        self.mb, self.types = Builder, types
        self.model, self.config, self.s = model, model.config, settings
        self.matrices, self.t = matrices, tokens
        self.inputs = inputs
        self._memo: dict[Any, Var] = {}
        self._new: dict[str, list[Var]] = {"key_cache": [], "value_cache": []}
        self._tokens = self.mb.reshape(x=inputs["tokens"], shape=[-1])
        self._positions = self._count()
        self._cache = dict(inputs)
        if settings.target == "ios18":
            for name in self._new:
                self._cache[name] = self.mb.read_state(input=inputs[name])

    # --- steps --------------------------------------------------------------------------------

    def embed(self, name: str) -> Var:
        """Rows of the embedding: [T, hidden], in the wide type."""
        matrix = self.matrices["model.embed_tokens.weight"]
        x = self.mb.gather(x=self._weight(matrix), indices=self._tokens, axis=0)
        if matrix.padded != matrix.shape[1]:
            x = self._slice(x, 1, 0, matrix.shape[1])
        x = self._wide(x)
        if matrix.row_scale is not None:
            scales = self.mb.gather(x=self._row_scales(matrix), indices=self._tokens, axis=0)
            x = self.mb.mul(x=x, y=self.mb.expand_dims(x=scales, axes=[1]))
        if self.config.embed_scale != 1:
            x = self.mb.mul(x=x, y=self._number(self.config.embed_scale))
        return _named(x, name)

    def norm(self, name: str, x: Var, weight: str) -> Var:
        """RMS norm along the last axis, in the wide type."""
        x, eps = self._wide(x), self.config.norm_eps
        over = {"axes": [-1], "keep_dims": True}
        if self.s.wide == "fp16":
            # squares of x / max|x| are at most 1; eps is divided by max|x|**2 twice, in steps
            top = self.mb.reduce_max(x=self.mb.abs(x=x), **over)
            top = self.mb.maximum(x=top, y=self._number(2.0**-10))
            x = self.mb.real_div(x=x, y=top)
            root = self.mb.real_div(x=self._number(math.sqrt(eps)), y=top)
            small = self.mb.mul(x=root, y=root)
            mean = self.mb.add(x=self.mb.reduce_mean(x=self.mb.mul(x=x, y=x), **over), y=small)
            scale = self.mb.rsqrt(x=mean)
        else:
            mean = self.mb.reduce_mean(x=self.mb.mul(x=x, y=x), **over)
            scale = self.mb.rsqrt(x=mean, epsilon=self._number(eps))
        x = self.mb.mul(x=x, y=scale)
        return self.mb.mul(x=x, y=self._vector(weight, self.config.norm_offset), name=name)

    def linear(self, name: str, x: Var, weight: str) -> Var:
        """x [T, K] times the matrix, plus its bias: [T, N], in the wide type."""
        y = self._product(x, weight)
        bias = weight.removesuffix("weight") + "bias"
        if bias in self.model.tensors:
            y = self.mb.add(x=y, y=self._vector(bias))
        return _named(y, name)

    def heads(self, name: str, x: Var, n: int) -> Var:
        """[T, n*D] as [T, n, D]."""
        return self.mb.reshape(x=x, shape=[self.t or -1, n, self.config.head_dim])

    def rope(self, name: str, x: Var, rope: RopeSpec) -> Var:
        """x [T, n, D] rotated, in half-split order; dimensions past rope.dim pass."""
        cos, sin = self._rotation(rope)
        half = rope.dim // 2
        rest = self.config.head_dim - 2 * half
        sizes = [half, half, rest] if rest else [half, half]
        first, second, *tail = self.mb.split(x=x, split_sizes=sizes, axis=-1)
        mul = self.mb.mul
        a = self.mb.sub(x=mul(x=first, y=cos), y=mul(x=second, y=sin))
        b = self.mb.add(x=mul(x=second, y=cos), y=mul(x=first, y=sin))
        return self.mb.concat(values=[a, b, *tail], axis=-1, name=name)

    def attend(self, name: str, layer: int, q: Var, k: Var, v: Var) -> Var:
        """Keys and values into the cache, and attention over it: [T, H*D], narrow.

        The query heads that share a key are rows of one product: [1, Hkv, group*T, D].
        """
        c, t = self.config, self.t or -1
        cap = c.attn_softcap
        fused = self.s.target == "ios18" and cap is None
        scale = c.attn_scale * (math.sqrt(c.head_dim) if fused else 1.0)
        if cap is not None:
            scale /= (
                cap  # here in the wide type: as float16, 1 / cap is off by up to 5e-4 of itself
            )
        if not math.isclose(scale, 1):
            q = self.mb.mul(x=q, y=self._number(scale))
        q = self.mb.reshape(x=self._narrow(q), shape=[t, c.kv_heads, c.group, c.head_dim])
        q = self.mb.transpose(x=q, perm=[1, 2, 0, 3])
        rows = c.group * self.t if self.t else -1
        q = self.mb.reshape(x=q, shape=[1, c.kv_heads, rows, c.head_dim])
        keys = self._extend("key_cache", layer, k)
        values = self._extend("value_cache", layer, v)
        mask = self._mask(c.blocks[layer].window)
        if fused:
            out = self.mb.scaled_dot_product_attention(
                query=q, key=keys, value=values, attn_mask=mask
            )
        else:
            scores = self.mb.matmul(x=q, y=keys, transpose_y=True)
            if cap is not None:
                scores = self._times_tanh(scores, cap)
            scores = self.mb.add(x=scores, y=mask)
            out = self.mb.matmul(x=self.mb.softmax(x=scores, axis=-1), y=values)
        out = self.mb.reshape(x=out, shape=[c.kv_heads, c.group, t, c.head_dim])
        out = self.mb.transpose(x=out, perm=[2, 0, 1, 3])
        return self.mb.reshape(x=out, shape=[t, c.heads * c.head_dim], name=name)

    def gated(self, name: str, gate: Var, up: Var) -> Var:
        """activation(gate) * up, in the wide type."""
        if self.config.activation == "silu":
            gate = self.mb.silu(x=gate)
        else:
            gate = self.mb.gelu(x=gate, mode="TANH_APPROXIMATION")
        return self.mb.mul(x=gate, y=up, name=name)

    def add(self, name: str, a: Var, b: Var) -> Var:
        """a + b, in the wide type."""
        return self.mb.add(x=a, y=b, name=name)

    def scaled(self, name: str, x: Var, factor: float) -> Var:
        """x times a number, in its own type."""
        return self.mb.mul(x=x, y=self._number_like(x, factor), name=name)

    def capped(self, name: str, x: Var, cap: float) -> Var:
        """cap * tanh(x / cap), in its own type."""
        part = self.mb.mul(x=x, y=self._number_like(x, 1 / cap))
        return _named(self._times_tanh(part, cap), name)

    def _times_tanh(self, x: Var, cap: float) -> Var:
        return self.mb.mul(x=self.mb.tanh(x=x), y=self._number_like(x, cap))

    def logits(self, name: str, x: Var, weight: str) -> Var:
        """The logits of the row that is asked for: float32 [1, V]."""
        if self.t != 1:
            x = self.mb.gather(x=x, indices=self.inputs["last"], axis=0)
        return _named(self._cast(self._product(x, weight), "fp32"), name)

    def new_cache(self) -> list[Var]:
        """Keys and values of the new tokens, [L, Hkv, T, D] each, for iOS 16."""
        return [
            self.mb.concat(values=self._new[cache], axis=0, name=name)
            for cache, name in (("key_cache", "new_keys"), ("value_cache", "new_values"))
        ]

    # --- weights ------------------------------------------------------------------------------

    def _product(self, x: Var, weight: str) -> Var:
        matrix = self.matrices[weight]
        x = self._narrow(x)
        extra = matrix.padded - matrix.shape[1]
        if extra:
            x = self._once(("pad", x.name, extra), lambda: self.mb.pad(x=x, pad=[0, 0, 0, extra]))
        y = self._wide(self.mb.linear(x=x, weight=self._weight(matrix)))
        if matrix.row_scale is not None:
            y = self.mb.mul(x=y, y=self._row_scales(matrix))
        return y

    def _weight(self, matrix: Matrix) -> Var:
        return self._once(matrix.op, lambda: self._decompressed(matrix))

    def _decompressed(self, m: Matrix) -> Var:
        mb = self.mb
        parts = {c.name: mb.const(val=c.stand_in(self.types), name=c.name) for c in m.constants}
        data = parts[m.data.name]
        scale = parts[m.scale.name] if m.scale else None
        offset = {"offset": parts[m.offset.name]} if m.offset else {}
        if self.s.target == "ios16":
            if m.lut is not None:
                shape = np.array(m.shape, np.uint32)
                return mb.constexpr_lut_to_dense(indices=data, lut=m.lut, shape=shape, name=m.op)
            if scale is None:
                return data
            zero = offset.get("offset", np.int8(0))
            return mb.constexpr_affine_dequantize(
                quantized_data=data, zero_point=zero, scale=scale, axis=0, name=m.op
            )
        if m.lut is not None:
            data = mb.constexpr_lut_to_dense(
                indices=data, lut=m.lut.reshape(1, 1, -1, 1), name=m.op + "_levels"
            )
        if scale is None:
            return data
        return mb.constexpr_blockwise_shift_scale(data=data, scale=scale, name=m.op, **offset)

    def _row_scales(self, matrix: Matrix) -> Var:
        """A scale for each row: [N], in the wide type."""
        assert matrix.row_scale is not None
        values = matrix.row_scale.reshape(-1).astype(self._np(self.s.wide))
        name = f"{matrix.op}_scale"
        return self._once(name, lambda: self.mb.const(val=values, name=name))

    def _vector(self, name: str, plus: float = 0.0) -> Var:
        values = self.model.tensors[name].numpy() + np.float32(plus)
        values = narrowed(name, values, self.s.wide)
        label = identifier(name)
        return self._once(label, lambda: self.mb.const(val=values, name=label))

    # --- positions, masks and the cache -------------------------------------------------------

    def _count(self) -> Var:
        """Positions of the tokens: int32 [T]."""
        first = self.inputs["position"]
        if self.t == 1:
            return first
        if self.t:
            return self.mb.add(x=np.arange(self.t, dtype=np.int32), y=first)
        size = self.mb.squeeze(x=self._length(), axes=[0])
        steps = self.mb.range_1d(start=np.int32(0), end=size, step=np.int32(1))
        return self.mb.add(x=steps, y=first)

    def _rotation(self, rope: RopeSpec) -> tuple[Var, Var]:
        """Cosines and sines of the tokens: [T, 1, rope.dim / 2] each."""
        tables = rope_tables(rope, self.s.context)
        kind = self.config.rope_names[rope]

        def rows(name: str, table: Any) -> Var:
            const = self.mb.const(val=table.astype(self._np(self.s.wide)), name=name)
            taken = self.mb.gather(x=const, indices=self._positions, axis=0)
            return self.mb.expand_dims(x=taken, axes=[1])

        cos, sin = (
            self._once(name, lambda name=name, table=table: rows(name, table))
            for name, table in zip((f"cos_{kind}", f"sin_{kind}"), tables, strict=True)
        )
        return cos, sin

    def _mask(self, window: int | None) -> Var:
        """0 where a query row may see a key, `MASKED` elsewhere: [1, 1, group*T, S]."""
        return self._once(("mask", window), lambda: self._new_mask(window))

    def _new_mask(self, window: int | None) -> Var:
        mb = self.mb
        rows = mb.expand_dims(x=self._positions, axes=[1])
        keys = np.arange(self.s.context, dtype=np.int32)[None]
        if self.s.target == "ios16":
            # what the cache holds at and past ``position`` is old; the new tokens come after it
            position = mb.expand_dims(x=self.inputs["position"], axes=[1])
            never = np.full_like(keys, np.iinfo(np.int32).max)
            past = mb.select(cond=mb.less(x=keys, y=position), a=keys, b=never)
            keys = mb.concat(values=[past, mb.expand_dims(x=self._positions, axes=[0])], axis=1)
        seen = mb.less_equal(x=keys, y=rows)
        if window is not None:
            start = mb.sub(x=rows, y=np.int32(window))
            seen = mb.logical_and(x=seen, y=mb.greater(x=keys, y=start))
        free = self._as(seen, self.s.narrow)
        one, depth = self._np(self.s.narrow)(1), self._np(self.s.narrow)(-MASKED)
        mask = mb.mul(x=mb.sub(x=free, y=one), y=depth)
        mask = mb.expand_dims(x=mask, axes=[0, 1])
        if self.config.group > 1:
            mask = mb.tile(x=mask, reps=[1, 1, self.config.group, 1])
        return mask

    def _extend(self, name: str, layer: int, new: Var) -> Var:
        """Put new keys or values [T, Hkv, D] in the cache; all of the layer's, narrow.

        Returns:
            [1, Hkv, S, D], or for iOS 16 [1, Hkv, S + T, D].
        """
        mb, c = self.mb, self.config
        new = mb.transpose(x=self._cast(new, "fp16"), perm=[1, 0, 2])
        new = mb.expand_dims(x=new, axes=[0])
        if self.s.target == "ios18":
            begin, end = self._place(layer)
            changed = mb.slice_update(x=self._cache[name], update=new, begin=begin, end=end)
            self._cache[name] = mb.coreml_update_state(state=self.inputs[name], value=changed)
        current = mb.slice_by_index(
            x=self._cache[name],
            begin=[layer, 0, 0, 0],
            end=[layer + 1, c.kv_heads, self.s.context, c.head_dim],
        )
        if self.s.target == "ios16":
            self._new[name].append(new)
            current = mb.concat(values=[current, new], axis=2)
        return self._narrow(current)

    def _place(self, layer: int) -> tuple[Var, Var]:
        """Begin and end of the layer's new positions in the cache."""

        def make() -> tuple[Var, Var]:
            c, first = self.config, self.inputs["position"]
            stop = self._once("stop", lambda: self.mb.add(x=first, y=self._length()))
            begin = self.mb.concat(
                values=[np.array([layer, 0], np.int32), first, np.array([0], np.int32)], axis=0
            )
            end = self.mb.concat(
                values=[
                    np.array([layer + 1, c.kv_heads], np.int32),
                    stop,
                    np.array([c.head_dim], np.int32),
                ],
                axis=0,
            )
            return begin, end

        places: tuple[Var, Var] = self._once(("place", layer), make)
        return places

    def _length(self) -> Any:
        """How many tokens: int32 [1]."""
        return np.array([self.t], np.int32) if self.t else self.mb.shape(x=self._tokens)

    # --- types --------------------------------------------------------------------------------

    def _wide(self, x: Var) -> Var:
        return self._cast(x, self.s.wide)

    def _narrow(self, x: Var) -> Var:
        return self._cast(x, self.s.narrow)

    def _cast(self, x: Var, kind: str) -> Var:
        """x as a float type; each cast is added to the program once."""
        if x.dtype == getattr(self.types, kind):
            return x
        return self._once(("cast", x.name, kind), lambda: self._as(x, kind))

    def _as(self, x: Var, kind: str) -> Var:
        return self.mb.cast(x=x, dtype=kind)

    def _number(self, value: float) -> Any:
        return self._np(self.s.wide)(value)

    def _number_like(self, x: Var, value: float) -> Any:
        """A number of the type of x."""
        return self._np("fp16" if x.dtype == self.types.fp16 else "fp32")(value)

    def _np(self, kind: str) -> Any:
        return np.float16 if kind == "fp16" else np.float32

    def _slice(self, x: Var, axis: int, begin: int, end: int) -> Var:
        mask = [i != axis for i in range(x.rank)]
        at = [begin if i == axis else 0 for i in range(x.rank)]
        to = [end if i == axis else 0 for i in range(x.rank)]
        return self.mb.slice_by_index(x=x, begin=at, end=to, begin_mask=mask, end_mask=mask)

    def _once(self, key: Any, make: Any) -> Any:
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]


def _named(x: Var, name: str) -> Var:
    """Name the operator that computes x, and its result."""
    x.op.name = name
    x.set_name(name)
    return x
