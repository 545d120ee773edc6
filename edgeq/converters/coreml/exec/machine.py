"""Runs the functions of an ML Program in NumPy, operator by operator.

Floats are computed in float32. What the program declares as fp16 is held either as float32 too
(``arithmetic="float32"``: is the program right?) or rounded to float16 after every operator
("float16": what does its precision cost?). It is the meaning of the program that is executed:
Apple's compiler may fuse operators and its processors round otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.coreml.exec import (
    ops_image,
    ops_math,
    ops_nn,
    ops_recurrent,
    ops_shape,
    weights,
)
from edgeq.converters.coreml.exec.load import Function, MilBlock, MilTensor, Op, Type
from edgeq.converters.coreml.exec.weights import Packed
from edgeq.core.errors import EdgeqError, UnsupportedError, UsageError
from edgeq.core.memory import sparse_zeros

Arithmetic = Literal["float32", "float16"]
State = MutableMapping[str, NDArray[Any]]
"""What is kept between calls, by the name of the state."""

_DTYPES: dict[str, Any] = {
    "bool": np.bool_, "fp32": np.float32, "float64": np.float64, "int8": np.int8,
    "int16": np.int16, "int32": np.int32, "int64": np.int64, "uint8": np.uint8,
    "uint16": np.uint16, "uint32": np.uint32, "uint64": np.uint64, "int4": np.int8,
    "uint1": np.uint8, "uint2": np.uint8, "uint3": np.uint8, "uint4": np.uint8, "uint6": np.uint8,
}  # fmt: skip
_FLOAT = {**ops_math.OPS, **ops_nn.OPS, **ops_image.OPS, **ops_recurrent.OPS}
_LISTED = {"concat": ("values",), "stack": ("values",), "einsum": ("values",),
           "reshape_like": ("ref_tensors",), "make_list": ("elem_shape",)}  # fmt: skip
"""Parameters that are a tuple even of one."""
_STATE_INPUTS = {"write_state": ("input", "data"), "coreml_update_state": ("state", "value")}
"""Operators that change a state: the parameters of the state and of its new value."""
_LAZY = {"linear": "weight", "gather": "x"}
"""Parameters that may stay packed."""
_SMALL = 1 << 14
"""Numbers of a constant that is turned into the arithmetic's type once and kept."""


def _list_write(ls: list[Any], index: Any, value: Any) -> list[Any]:
    at = int(index)
    grown = ls + [None] * (at + 1 - len(ls))
    grown[at] = value
    return grown


def _list_scatter(ls: list[Any], indices: Any, value: Any) -> list[Any]:
    for i, entry in zip(ops_shape.ints(indices), value, strict=True):
        ls = _list_write(ls, i, entry)
    return ls


def _classify(probabilities: Any, classes: Any) -> tuple[Any, dict[Any, float]]:
    values = np.asarray(probabilities).reshape(-1)
    names = [c.item() if isinstance(c, np.generic) else c for c in classes]
    probability_of = {name: float(v) for name, v in zip(names, values, strict=True)}
    return names[int(values.argmax())], probability_of


_OTHER: dict[str, Callable[..., Any]] = {
    **ops_shape.OPS,
    "classify": _classify,
    "list_gather": lambda ls, indices: np.stack([ls[i] for i in ops_shape.ints(indices)]),
    "list_length": lambda ls: np.int32(len(ls)),
    "list_read": lambda ls, index: ls[int(index)],
    "list_scatter": _list_scatter,
    "list_write": _list_write,
    "make_list": lambda init_length=0, **_: [None] * int(init_length),
}
_BUILT_IN = frozenset(
    {"const", "read_state", "write_state", "coreml_update_state", "cond", "while_loop"}
)
SUPPORTED = frozenset(_FLOAT) | frozenset(_OTHER) | _BUILT_IN | weights.KNOWN
"""Every operator that can be executed."""


def refuse_unknown(function: Function) -> None:
    """Raise for the first operator that cannot be executed.

    Raises:
        UnsupportedError: names it, and all other kinds there are.
    """
    unknown = [op for op in function.block.walk() if op.type not in SUPPORTED]
    if unknown:
        kinds = sorted({op.type for op in unknown})
        raise UnsupportedError(
            f"the operator {unknown[0].type} ({unknown[0].name!r} in function {function.name!r}) "
            f"cannot be executed; not supported here: {', '.join(kinds)}"
        )


@dataclass(frozen=True)
class _Plan:
    """A block made ready to run.

    Args:
        constants: its operators that give constants.
        ops: the others, in order.
        frees: for each of them, the values that nothing after it needs.
    """

    constants: tuple[Op, ...]
    ops: tuple[Op, ...]
    frees: tuple[tuple[str, ...], ...]


class Machine:
    """Runs the functions of one program, which share their constants.

    Args:
        arithmetic: what fp16 is held as.
        keep_bytes: how much of large weights may be kept decompressed from call to call; the rest
            is decompressed again each time, a block of rows after another.
        overwrite: write slices of a state into its own array where nothing else in the call reads
            it. Arrays that a caller kept of a state change too.
    """

    def __init__(
        self,
        arithmetic: Arithmetic = "float32",
        keep_bytes: int = 1 << 30,
        *,
        overwrite: bool = False,
    ) -> None:
        if arithmetic not in ("float32", "float16"):
            raise UsageError(f"arithmetic is {arithmetic!r}; use 'float32' or 'float16'")
        self._half: Any = np.float16 if arithmetic == "float16" else np.float32
        self._left = keep_bytes
        self.overwrite = overwrite
        self._constants: dict[bytes, Sequence[Any]] = {}
        self._decompressed: dict[int, tuple[Packed, NDArray[Any]]] = {}
        self._plans: dict[MilBlock, _Plan] = {}

    def dtype(self, kind: str) -> Any:
        """NumPy's type for a type of MIL."""
        return self._half if kind == "fp16" else _DTYPES.get(kind, object)

    def new_state(self, function: Function) -> State:
        """Zeros for every state of a function."""
        return {
            name: sparse_zeros([d or 0 for d in kind.shape or ()], self.dtype(kind.kind))
            for name, kind in function.inputs.items()
            if kind.state
        }

    def run(
        self,
        function: Function,
        inputs: Mapping[str, Any],
        state: State | None = None,
        watch: Collection[str] = (),
    ) -> dict[str, Any]:
        """Run a function.

        Args:
            function: it.
            inputs: by name, in the types the function says.
            state: kept from call to call, changed in place; new zeros if None.
            watch: names of values to give beside the outputs.

        Returns:
            outputs and watched values by name.
        """
        state = self.new_state(function) if state is None else state
        env: dict[str, Any] = {}
        for name, kind in function.inputs.items():
            env[name] = name if kind.state else np.asarray(inputs[name], self.dtype(kind.kind))
        run = _Run(self, env, state, frozenset(watch), {})
        with np.errstate(all="ignore"):  # infinities and NaN are results, as on a device
            run.block(function.block)
        for name in function.block.outputs:
            run.results[name] = self.array(env[name])
        if self.overwrite:  # a later call must not change what this one gave
            for name, value in run.results.items():
                if isinstance(value, np.ndarray) and any(
                    np.may_share_memory(value, buffer) for buffer in state.values()
                ):
                    run.results[name] = value.copy()
        return run.results

    # --- what is made once --------------------------------------------------------------------

    def plan(self, block: MilBlock) -> _Plan:
        """A block made ready to run."""
        if block not in self._plans:
            constants = tuple(op for op in block.ops if op.key)
            ops = tuple(op for op in block.ops if not op.key)
            self._plans[block] = _Plan(constants, ops, _frees(block, ops))
        return self._plans[block]

    def constant(self, op: Op, env: Mapping[str, Any]) -> Sequence[Any]:
        """Results of an operator without variable inputs: arrays, or `Packed` if large."""
        if op.key not in self._constants:
            if op.type == "const":
                values: Sequence[Any] = [self._constant(op.inputs["val"][0])]
            else:
                inputs = {
                    name: env[refs[0]] if isinstance(refs[0], str) else refs[0]
                    for name, refs in op.inputs.items()
                }
                value = weights.decompress(op.type, inputs, self.dtype(op.outputs[0][1].kind))
                values = value if isinstance(value, tuple) else [value]
            self._constants[op.key] = values
        return self._constants[op.key]

    def _constant(self, value: Any) -> Any:
        if isinstance(value, MilTensor) and value.blob and value.blob.count > _SMALL:
            return Packed(value.shape, self.dtype(value.type.kind), value.rows)
        return self.array(value)

    def array(self, value: Any) -> Any:
        """A value as the machine holds it: constants read, fp16 in the arithmetic's type."""
        if isinstance(value, MilTensor):
            return self.typed(value.get(), value.type)
        if isinstance(value, Packed):
            cached = self.kept(value)
            return cached.array() if isinstance(cached, Packed) else cached
        return value

    def kept(self, value: Packed) -> Any:
        """A packed constant, decompressed if there is room to keep it."""
        cached = self._decompressed.get(id(value))
        if cached is None:
            if value.nbytes > self._left:
                return value
            self._left -= value.nbytes
            cached = self._decompressed[id(value)] = (value, value.array())
        return cached[1]

    def typed(self, value: Any, kind: Type) -> Any:
        """A result in the type that the program declares."""
        if kind.shape is None or isinstance(value, (str, dict, list)):
            return value
        wanted = self.dtype(kind.kind)
        return value if wanted is object else np.asarray(value).astype(wanted, copy=False)


def _frees(block: MilBlock, ops: Sequence[Op]) -> tuple[tuple[str, ...], ...]:
    """For each operator, the values computed in the block whose last use it is."""
    computed = {name for op in ops for name, _ in op.outputs}
    last: dict[str, int] = {}
    for at, op in enumerate(ops):
        for one in (op, *(inner for b in op.blocks for inner in b.walk())):
            for refs in one.inputs.values():
                last.update((r, at) for r in refs if isinstance(r, str) and r in computed)
        for nested in op.blocks:
            last.update((name, at) for name in nested.outputs if name in computed)
    for name in block.outputs:
        last.pop(name, None)
    frees: list[list[str]] = [[] for _ in ops]
    for name, at in last.items():
        frees[at].append(name)
    return tuple(map(tuple, frees))


@dataclass
class _Run:
    """A call of a function.

    Args:
        machine: what runs it.
        env: values by name.
        state: kept from call to call.
        watch: names whose values are asked for.
        results: those found so far.
    """

    machine: Machine
    env: dict[str, Any]
    state: State
    watch: frozenset[str]
    results: dict[str, Any]

    def block(self, block: MilBlock) -> None:
        """Run all operators of a block."""
        plan, env = self.machine.plan(block), self.env
        for op in plan.constants:
            for (name, _), value in zip(op.outputs, self.machine.constant(op, env), strict=True):
                env[name] = value
        for at, (op, frees) in enumerate(zip(plan.ops, plan.frees, strict=True)):
            results = (
                self._written(op)
                if op.type == "slice_update"
                and self._may_write(op, frees, plan.ops[at + 1 : at + 2])
                else self._op(op)
            )
            for (name, kind), value in zip(op.outputs, results, strict=True):
                env[name] = self.machine.typed(value, kind)
                if name in self.watch:
                    self.results[name] = env[name]
            for name in frees:
                del env[name]

    def _may_write(self, op: Op, frees: Sequence[str], following: Sequence[Op]) -> bool:
        """Whether a slice may be replaced in the array itself, as nothing else will read it.

        A cache of a whole context would otherwise be copied for the keys and values of each layer.
        """
        ref = op.inputs["x"][0]
        if not self.machine.overwrite or not isinstance(ref, str) or ref not in frees:
            return False
        x = self.env[ref]
        if not isinstance(x, np.ndarray) or not x.flags.writeable:
            return False
        holders = [n for n, buffer in self.state.items() if np.may_share_memory(buffer, x)]
        if holders:
            # what a state holds may change only if the result becomes that state at once
            update = following[0] if following else None
            which, what = _STATE_INPUTS.get(update.type if update else "", ("", ""))
            if (
                update is None
                or not which
                or len(holders) > 1
                or self.env.get(str(update.inputs[which][0])) != holders[0]
                or update.inputs[what][0] != op.outputs[0][0]
            ):
                return False
        others = [*((n, v) for n, v in self.env.items() if n != ref), *self.results.items()]
        return not any(isinstance(v, np.ndarray) and np.may_share_memory(v, x) for _, v in others)

    def _written(self, op: Op) -> Sequence[Any]:
        """`slice_update` without a copy."""
        inputs = {name: self._get(refs[0]) for name, refs in op.inputs.items()}
        return [ops_shape.slice_update(**inputs, in_place=True)]

    def _op(self, op: Op) -> Sequence[Any]:
        if op.type == "read_state":
            return [self.state[self.env[str(op.inputs["input"][0])]]]
        if op.type in ("write_state", "coreml_update_state"):
            which, what = _STATE_INPUTS[op.type]
            name = self.env[str(op.inputs[which][0])]
            new = np.asarray(self._get(op.inputs[what][0]), self.state[name].dtype)
            self.state[name] = new
            return [new] * len(op.outputs)
        if op.type in ("cond", "while_loop"):
            return self._control(op)
        inputs: dict[str, Any] = {}
        for name, refs in op.inputs.items():
            if _LAZY.get(op.type) == name:
                inputs[name] = self._get(refs[0], lazy=True)
            elif name in _LISTED.get(op.type, ()):
                inputs[name] = [self._get(ref) for ref in refs]
            else:
                inputs[name] = self._get(refs[0])
        if op.type in _FLOAT:
            inputs = {name: _widened(value) for name, value in inputs.items()}
            call = _FLOAT[op.type]
        elif op.type in _OTHER:
            call = _OTHER[op.type]
        else:
            raise UnsupportedError(f"the operator {op.type} ({op.name!r}) cannot be executed")
        try:
            result = call(**inputs)
        except EdgeqError:
            raise
        except (ValueError, IndexError, TypeError, KeyError, ZeroDivisionError) as err:
            sizes = {k: list(np.shape(v)) for k, v in inputs.items() if not isinstance(v, list)}
            raise UnsupportedError(
                f"the operator {op.type} ({op.name!r}) failed on {sizes}: {err}"
            ) from err
        return result if isinstance(result, tuple) else [result]

    def _control(self, op: Op) -> list[Any]:
        def call(block: MilBlock, values: Sequence[Any]) -> list[Any]:
            self.env.update(zip(block.inputs, values, strict=True))
            self.block(block)
            return [self.machine.array(self.env[name]) for name in block.outputs]

        if op.type == "cond":
            yes = bool(np.asarray(self._get(op.inputs["pred"][0])).reshape(()))
            return call(op.blocks[0 if yes else 1], ())
        values = [self._get(ref) for ref in op.inputs["loop_vars"]]
        test, body = op.blocks
        while bool(np.asarray(call(test, values)[0]).reshape(())):
            values = call(body, values)
        return values

    def _get(self, ref: str | MilTensor, lazy: bool = False) -> Any:
        value = self.env[ref] if isinstance(ref, str) else ref
        if isinstance(value, Packed) and lazy:
            return self.machine.kept(value)
        return self.machine.array(value) if isinstance(value, MilTensor | Packed) else value


def _widened(value: Any) -> Any:
    """float16 as float32, exactly."""
    if isinstance(value, list):
        return [_widened(v) for v in value]
    if isinstance(value, np.ndarray) and value.dtype == np.float16:
        return value.astype(np.float32)
    return value
