"""Matmul kernels of float weights: rows of F32, F16 or BF16, used as they lie in their file.

Every result is summed in one order, whatever the instruction set, the rows, tokens or threads. The
columns that fill whole steps of 16 are cut into blocks of equal length, at most `BLOCK` steps, and

    lanes[i] = fma(w[16 j + i], x[16 j + i], lanes[i])    for the steps j of a block, ascending
    y = y + tree(lanes)                                   for the blocks, ascending
    y = fma(w[c], x[c], y)                                for the columns c that are left, ascending

where the tree adds lanes i and i + 8, then i and i + 4, and so on. Weights are widened to float32
in registers, which is exact.

Few tokens are bound by memory: rows go through the registers straight from the file, several at
once, each from another part of the range, so that the processor sees a few long streams and
fetches them ahead. Many tokens are bound by arithmetic: a panel of `Isa.float_panel` rows of a
block is widened once, and a tile of `GROUP` rows times `Isa.float_tokens` tokens has its sums in
registers, as in Goto & van de Geijn 2008, "Anatomy of high-performance matrix multiplication". As
the 16 lanes are independent of each other, a tile is done in passes over as many lanes as fill a
register, which leaves room for more rows and tokens.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import NamedTuple

from llvmlite import ir

from edgeq.compiler.llvm_ir import (
    F16,
    F32,
    I16,
    I32,
    I64,
    V16F32,
    VOID,
    add,
    const,
    declare,
    fma,
    largest,
    least,
    load,
    local,
    loop,
    prefetch,
    splat,
    store,
    take,
)
from edgeq.formats.packing import TILE
from edgeq.formats.schemes import FLOAT_TAGS, FloatType
from edgeq.runtime.kernels.abi import FLOAT_ARGS
from edgeq.runtime.kernels.microkernel import Isa

LANES = 16
"""Partial sums of a result, and columns of a step."""
BLOCK = 64
"""Most steps of a block: a group's part of the panel stays in a first-level cache."""
GROUP = 4
"""Rows that are multiplied together."""
FEW = 3
"""Fewer tokens than this are multiplied straight from the file."""
_AHEAD = 1024
"""How many bytes ahead of a row to prefetch, on machines where prefetching helps at all."""
_BYTES: dict[FloatType, int] = {"float32": 4, "float16": 2, "bfloat16": 2}
_F32, _LINE = 4, 64  # bytes
_V4F32 = ir.VectorType(F32, GROUP)
_NO_SUMS = ir.Constant(_V4F32, [0.0] * GROUP)


def kernel_symbol(kind: FloatType) -> str:
    """The name of the kernel for a float type."""
    return f"edgeq_{FLOAT_TAGS[kind]}"


def module(kind: FloatType, isa: Isa) -> ir.Module:
    """The LLVM module of the kernel for a float type; it takes the integers of `abi.FLOAT_ARGS`."""
    return _Kernel(kind, isa).emit()


class _Call(NamedTuple):
    """The arguments of a kernel, and what follows from them."""

    weights: ir.Value
    stride: ir.Value
    n: ir.Value
    k: ir.Value
    x: ir.Value
    x_stride: ir.Value
    tokens: ir.Value
    out: ir.Value
    out_stride: ir.Value
    start: ir.Value
    """The first row of the range."""
    stop: ir.Value
    steps: ir.Value
    """Whole steps of a row."""
    length: ir.Value
    """Steps of a block."""

    def row(self, b: ir.IRBuilder, number: ir.Value) -> ir.Value:
        """The address of a row of weights."""
        return b.add(self.weights, b.mul(number, self.stride))

    def inputs(self, b: ir.IRBuilder, token: ir.Value) -> ir.Value:
        """The address of a token's activations."""
        return b.add(self.x, b.mul(token, self.x_stride))

    def results(self, b: ir.IRBuilder, token: ir.Value) -> ir.Value:
        """The address of a token's results."""
        return b.add(self.out, b.mul(token, self.out_stride))


class _Kernel:
    """Emits the functions of one module."""

    def __init__(self, kind: FloatType, isa: Isa) -> None:
        self.mod = ir.Module(kernel_symbol(kind))
        self.kind, self.isa, self.size = kind, isa, _BYTES[kind]
        self.lanes, self.passes = isa.float_lanes, LANES // isa.float_lanes
        self.vector = ir.VectorType(F32, self.lanes)

    def emit(self) -> ir.Module:
        """The kernel and what it calls."""
        args = ir.FunctionType(VOID, [I64] * len(FLOAT_ARGS))
        fn = ir.Function(self.mod, args, self.mod.name)
        b = ir.IRBuilder(fn.append_basic_block())
        weights, stride, n, k, x, x_stride, tokens, out, out_stride, first, last = fn.args
        steps = b.lshr(k, const(LANES.bit_length() - 1))
        blocks = largest(b, _quotient(b, steps, const(BLOCK)), const(1))
        call = _Call(
            weights, stride, n, k, x, x_stride, tokens, out, out_stride,
            start=b.mul(first, const(TILE)),
            stop=least(b, b.mul(last, const(TILE)), n),
            steps=steps,
            length=_quotient(b, steps, blocks),
        )  # fmt: skip
        with b.if_else(b.icmp_signed("<", tokens, const(FEW))) as (few, many):
            with few:
                self._few(b, call)
            with many:
                self._many(b, call)
        with b.if_then(b.icmp_signed("!=", b.and_(k, const(LANES - 1)), const(0)), likely=False):
            self._rest(b, call)
        b.ret_void()
        return self.mod

    # --- few tokens ------------------------------------------------------------------------------

    def _few(self, b: ir.IRBuilder, call: _Call) -> None:
        """`GROUP` rows at once that lie as far apart as the range allows, from the file."""
        product = self._product()
        apart = _quotient(b, b.sub(call.stop, call.start), const(GROUP))
        last = b.sub(call.stop, const(1))
        with loop(b, call.start, b.add(call.start, apart), 1) as first:
            # where the range does not divide, the last row is done more than once
            numbers = [least(b, b.add(first, b.mul(apart, const(j))), last) for j in range(GROUP)]
            rows = [call.row(b, number) for number in numbers]
            with loop(b, const(0), call.tokens, 1) as token:
                arguments = [*rows, call.steps, call.length, call.inputs(b, token)]
                sums, to = b.call(product, arguments), call.results(b, token)
                for j, number in enumerate(numbers):
                    one = b.extract_element(sums, const(j, I32))
                    store(b, one, b.add(to, b.mul(number, const(_F32))), 4)

    def _product(self) -> ir.Function:
        """`GROUP` rows of weights times one of activations."""
        fn, b = self._define("product", GROUP + 3, _V4F32)
        *rows, steps, length, x = fn.args
        totals = local(b, _NO_SUMS)
        with _blocks(b, steps, length) as block:
            lanes = [local(b, ir.Constant(V16F32, [0.0] * LANES)) for _ in range(GROUP)]
            with loop(b, block, least(b, b.add(block, length), steps), 1) as step:
                values = load(b, b.add(x, b.mul(step, const(LANES * _F32))), V16F32, 4)
                shift = b.mul(step, const(LANES * self.size))
                for row, slot in zip(rows, lanes, strict=True):
                    at = b.add(row, shift)
                    if self.isa.prefetch:
                        prefetch(b, add(b, at, _AHEAD))
                    b.store(fma(b, self._widened(b, at, LANES), values, b.load(slot)), slot)
            sums = _tree(b, [[b.load(slot)] for slot in lanes])
            first = b.icmp_signed("==", block, const(0))
            b.store(b.select(first, sums, b.fadd(b.load(totals), sums)), totals)
        b.ret(b.load(totals))
        return fn

    # --- many tokens -----------------------------------------------------------------------------

    def _many(self, b: ir.IRBuilder, call: _Call) -> None:
        """Panel after panel of a block, each times all tokens."""
        with b.goto_entry_block():
            room = b.alloca(V16F32, self.isa.float_panel * BLOCK)
            room.align = _LINE
        panel = b.ptrtoint(room, I64)

        def part(first: ir.Value, row: ir.Value) -> ir.Value:
            """The place in the panel of the group of rows from ``row`` on."""
            return b.add(panel, b.mul(b.udiv(b.sub(row, first), const(GROUP)), group_bytes))

        widen = self._widen()
        tiles = {tokens: self._tile(tokens) for tokens in self.isa.float_tokens}
        with _blocks(b, call.steps, call.length) as block:
            count = b.sub(least(b, b.add(block, call.length), call.steps), block)
            shift = b.mul(block, const(LANES * self.size))
            group_bytes = b.mul(count, const(GROUP * LANES * _F32))
            row_bytes = b.mul(count, const(LANES * self.size))
            with loop(b, call.start, call.stop, self.isa.float_panel) as first:
                end = least(b, add(b, first, self.isa.float_panel), call.stop)
                with loop(b, first, end, GROUP) as row:
                    source = b.add(call.row(b, row), shift)
                    b.call(
                        widen, [source, call.stride, b.sub(call.n, row), count, part(first, row)]
                    )
                after = b.add(call.row(b, add(b, first, self.isa.float_panel)), shift)
                done: ir.Value = const(0)
                for tokens, tile in sorted(tiles.items(), reverse=True):
                    whole = b.sdiv(b.sub(call.tokens, done), const(tokens))
                    stop = b.add(done, b.mul(whole, const(tokens)))
                    with loop(b, done, stop, tokens) as token:
                        if self.isa.prefetch:
                            line = b.mul(b.udiv(token, const(tokens)), const(_LINE))
                            with b.if_then(b.icmp_signed("<", line, row_bytes)):
                                self._prefetch(b, b.add(after, line), call.stride)
                        x = b.add(call.inputs(b, token), b.mul(block, const(LANES * _F32)))
                        with loop(b, first, end, GROUP) as row:
                            to = b.add(call.results(b, token), b.mul(row, const(_F32)))
                            b.call(tile, [part(first, row), x, call.x_stride, count, block, to,
                                          call.out_stride, b.sub(call.n, row)])  # fmt: skip
                    done = stop

    def _prefetch(self, b: ir.IRBuilder, at: ir.Value, stride: ir.Value) -> None:
        """Ask for one cache line of each row of a panel; it may lie past the last row."""
        for _ in range(self.isa.float_panel):
            prefetch(b, at)
            at = b.add(at, stride)

    def _widen(self) -> ir.Function:
        """`GROUP` rows of a block as float32 [passes, steps, rows, lanes]."""
        fn, b = self._define("widen", 5)
        weights, stride, left, steps, to = fn.args
        last = b.sub(left, const(1))
        rows = [b.add(weights, b.mul(stride, least(b, const(r), last))) for r in range(GROUP)]
        step_bytes = GROUP * self.lanes * _F32
        pass_bytes = b.mul(steps, const(step_bytes))
        with loop(b, const(0), steps, 1) as step:
            target = b.add(to, b.mul(step, const(step_bytes)))
            for r, row in enumerate(rows):
                source = b.add(row, b.mul(step, const(LANES * self.size)))
                place = add(b, target, r * self.lanes * _F32)
                for _ in range(self.passes):
                    store(b, self._widened(b, source, self.lanes), place, self.lanes * _F32)
                    source = add(b, source, self.lanes * self.size)
                    place = b.add(place, pass_bytes)
        b.ret_void()
        return fn

    def _tile(self, tokens: int) -> ir.Function:
        """`GROUP` rows of a panel times some tokens, added to the results of the blocks before."""
        fn, b = self._define(f"tile{tokens}", 8)
        panel, x, x_stride, steps, block, out, out_stride, left = fn.args
        inputs = [b.add(x, b.mul(x_stride, const(t))) for t in range(tokens)]
        step_bytes = GROUP * self.lanes * _F32
        at: ir.Value = panel
        sums: list[list[list[ir.Value]]] = [[[] for _ in range(GROUP)] for _ in range(tokens)]
        for number in range(self.passes):
            zero = ir.Constant(self.vector, [0.0] * self.lanes)
            slots = [[local(b, zero) for _ in range(GROUP)] for _ in range(tokens)]
            with loop(b, const(0), steps, 1) as step:
                shift = add(b, b.mul(step, const(LANES * _F32)), number * self.lanes * _F32)
                values = [load(b, b.add(place, shift), self.vector, 4) for place in inputs]
                # one row of weights at a time, as the sums leave a single register for it
                for r in range(GROUP):
                    place = add(b, b.add(at, b.mul(step, const(step_bytes))), r * self.lanes * _F32)
                    w = load(b, place, self.vector, self.lanes * _F32)
                    for t in range(tokens):
                        b.store(fma(b, w, values[t], b.load(slots[t][r])), slots[t][r])
            at = b.add(at, b.mul(steps, const(step_bytes)))
            for t in range(tokens):
                for r in range(GROUP):
                    sums[t][r].append(b.load(slots[t][r]))
        numbers = ir.Constant(ir.VectorType(I64, GROUP), list(range(GROUP)))
        there = b.icmp_signed("<", numbers, splat(b, left, numbers.type))
        first = b.icmp_signed("==", block, const(0))
        for t in range(tokens):
            place = b.add(out, b.mul(out_stride, const(t)))
            part = b.select(there, _tree(b, sums[t]), _NO_SUMS)
            more = b.fadd(load(b, place, _V4F32, 4), part)
            store(b, b.select(first, part, more), place, 4)
        b.ret_void()
        return fn

    # --- both ------------------------------------------------------------------------------------

    def _rest(self, b: ir.IRBuilder, call: _Call) -> None:
        """The columns past the last whole step, one by one."""
        fused = declare(b, "llvm.fma.f32", F32, [F32] * 3)
        with (
            loop(b, const(0), call.tokens, 1) as token,
            loop(b, call.start, call.stop, 1) as number,
        ):
            place = b.add(call.results(b, token), b.mul(number, const(_F32)))
            with loop(b, b.and_(call.k, const(-LANES)), call.k, 1) as column:
                at = b.add(call.row(b, number), b.mul(column, const(self.size)))
                value = b.add(call.inputs(b, token), b.mul(column, const(_F32)))
                factors = [self._widened(b, at, 1), load(b, value, F32, 4)]
                store(b, b.call(fused, [*factors, load(b, place, F32, 4)]), place, 4)

    def _widened(self, b: ir.IRBuilder, address: ir.Value, n: int) -> ir.Value:
        """``n`` weights as float32 (a scalar for n = 1)."""

        def ty(element: ir.Type) -> ir.Type:
            return element if n == 1 else ir.VectorType(element, n)

        if self.kind == "float32":
            return load(b, address, ty(F32), 4)
        if self.kind == "float16":
            return b.fpext(load(b, address, ty(F16), 2), ty(F32))
        wide = b.zext(load(b, address, ty(I16), 2), ty(I32))
        return b.bitcast(b.shl(wide, const(16, ty(I32))), ty(F32))

    def _define(
        self, name: str, count: int, result: ir.Type = VOID
    ) -> tuple[ir.Function, ir.IRBuilder]:
        """A function of the module of ``count`` integers."""
        ty = ir.FunctionType(result, [I64] * count)
        fn = ir.Function(self.mod, ty, f"{self.mod.name}_{name}")
        fn.linkage = "internal"
        fn.attributes.add("noinline")
        fn.attributes.add("optsize")  # unrolled loops take more registers than there are
        return fn, ir.IRBuilder(fn.append_basic_block())


def _blocks(b: ir.IRBuilder, steps: ir.Value, length: ir.Value) -> AbstractContextManager[ir.Value]:
    """A loop over the first steps of the blocks; one block without steps where K is below 16."""
    return loop(b, const(0), largest(b, steps, const(1)), largest(b, length, const(1)))


def _quotient(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """x / y rounded up."""
    return b.udiv(b.add(x, b.sub(y, const(1))), y)


def _tree(b: ir.IRBuilder, rows: list[list[ir.Value]]) -> ir.Value:
    """The sums of 16 lanes of each of four rows, whose lanes are given in parts of equal length."""
    parts = []
    for row in rows:
        first, second, third, fourth = (
            take(b, part, list(range(i, i + 4))) if part.type.count > 4 else part
            for part in row
            for i in range(0, part.type.count, 4)
        )
        parts.append(b.fadd(b.fadd(first, third), b.fadd(second, fourth)))

    def pick(x: ir.Value, y: ir.Value, lanes: list[int]) -> ir.Value:
        return b.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, 4), lanes))

    # lanes i and i + 2 of two rows side by side, then the two that are left of each of four
    x, y = (
        b.fadd(pick(p, q, [0, 1, 4, 5]), pick(p, q, [2, 3, 6, 7]))
        for p, q in (parts[:2], parts[2:])
    )
    return b.fadd(pick(x, y, [0, 2, 4, 6]), pick(x, y, [1, 3, 5, 7]))
