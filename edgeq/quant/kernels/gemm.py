"""Matrix products as LLVM code: ``C = A B^T`` in one order for every element.

The products of an element are added by fused multiply-additions in ascending k, in blocks of
`shapes.K_BLOCK`; the sums of the blocks are then added one after the other. The order depends on
nothing else: not on the size of the matrices, the tiles, the threads or the width of registers.

Tiles follow Goto & van de Geijn 2008, "Anatomy of high-performance matrix multiplication": a block
of B is packed for the second-level cache, a panel of A for the first, and a tile of C stays in
registers.
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from edgeq.compiler.llvm_ir import I64, VOID, add, const, declare, load, local, loop, splat, store
from edgeq.quant.kernels.shapes import GEMM, GEMMS, K_BLOCK, LANES, N_BLOCK, Tile

_TYPES: dict[str, ir.Type] = {"float32": ir.FloatType(), "float64": ir.DoubleType()}
_SIZES = {"float32": 4, "float64": 8}
_Read = Callable[[ir.IRBuilder, ir.Value, ir.Type], ir.Value]


def define(mod: ir.Module, dtype: str, tile: Tile) -> None:
    """Add ``edgeq_gemm_float32`` or ``edgeq_gemm_float64`` to a module."""
    emitter = _Gemm(mod, dtype, tile)
    emitter.emit()


def define_stack(mod: ir.Module) -> None:
    """Add ``edgeq_gemms_float32``: one product after the other, of matrices at equal distances."""
    fn = ir.Function(mod, ir.FunctionType(VOID, [I64] * len(GEMMS)), "edgeq_gemms_float32")
    b = ir.IRBuilder(fn.append_basic_block())
    at = dict(zip(GEMMS, fn.args, strict=True))
    with loop(b, const(0), at["count"], 1) as i:
        moved = {name: b.add(at[name], b.mul(i, at[f"{name}_step"])) for name in ("a", "b", "c")}
        b.call(mod.get_global("edgeq_gemm_float32"), [moved.get(n, at[n]) for n in GEMM])
    b.ret_void()


class _Gemm:
    def __init__(self, mod: ir.Module, dtype: str, tile: Tile) -> None:
        self.element, self.size, self.lanes = _TYPES[dtype], _SIZES[dtype], LANES[dtype]
        self.vector = ir.VectorType(self.element, self.lanes)
        self.tile, self.width = tile, tile.vectors * self.lanes
        name = f"edgeq_gemm_{dtype}"
        self.fn = ir.Function(mod, ir.FunctionType(VOID, [I64] * len(GEMM)), name)
        self.mod, self.dtype = mod, dtype

    def emit(self) -> None:
        b = ir.IRBuilder(self.fn.append_basic_block())
        at = dict(zip(GEMM, self.fn.args, strict=True))
        packed_b = at["scratch"]
        panels_bytes = K_BLOCK * (N_BLOCK + self.width) * self.size
        packed_a = add(b, packed_b, panels_bytes)
        spare = add(b, packed_a, K_BLOCK * self.tile.rows * self.size)
        b_element = self._loader(None)
        a_element = self._loader(at["negate"])
        tile_function = self._tile_function()
        with loop(b, const(0), at["k"], K_BLOCK) as k0:
            kc = _least(b, b.sub(at["k"], k0), const(K_BLOCK))
            first = b.and_(
                b.icmp_signed("==", k0, const(0)), b.icmp_signed("==", at["accumulate"], const(0))
            )
            fresh = b.zext(first, I64)
            with loop(b, const(0), at["n"], N_BLOCK) as n0:
                nc = _least(b, b.sub(at["n"], n0), const(N_BLOCK))
                with loop(b, const(0), nc, self.width) as j:
                    self._pack(
                        b, b.add(n0, j), at["n"], self.width, kc, b_element,
                        b.add(at["b"], b.mul(k0, at["b_column"])), at["b_row"], at["b_column"],
                        b.add(packed_b, b.mul(j, const(K_BLOCK * self.size))),
                    )  # fmt: skip
                with loop(b, const(0), at["m"], self.tile.rows) as i:
                    self._pack(
                        b, i, at["m"], self.tile.rows, kc, a_element,
                        b.add(at["a"], b.mul(k0, at["a_column"])), at["a_row"], at["a_column"],
                        packed_a,
                    )  # fmt: skip
                    rows = b.sub(at["m"], i)
                    with loop(b, const(0), nc, self.width) as j:
                        column = b.add(n0, j)
                        to = b.add(
                            b.add(at["c"], b.mul(i, at["c_row"])), b.mul(column, const(self.size))
                        )
                        source = b.add(packed_b, b.mul(j, const(K_BLOCK * self.size)))
                        columns = b.sub(at["n"], column)
                        b.call(
                            tile_function,
                            [packed_a, source, kc, to, at["c_row"], rows, columns, fresh, spare],
                        )
        b.ret_void()

    def _loader(self, negate: ir.Value | None) -> _Read:
        def read(b: ir.IRBuilder, address: ir.Value, ty: ir.Type) -> ir.Value:
            value = load(b, address, ty, self.size)
            if negate is None:
                return value
            return b.select(b.icmp_signed("!=", negate, const(0)), b.fneg(value), value)

        return read

    def _pack(
        self,
        b: ir.IRBuilder,
        first: ir.Value,
        count: ir.Value,
        width: int,
        kc: ir.Value,
        read: _Read,
        base: ir.Value,
        row: ir.Value,
        column: ir.Value,
        to: ir.Value,
    ) -> None:
        """``width`` rows from ``first`` on, side by side for each k; past the last, the last."""
        last = b.sub(count, const(1))
        lanes = self.lanes if width % self.lanes == 0 else 1
        whole = b.icmp_signed("<=", b.add(first, const(width)), count)
        together = b.and_(whole, b.icmp_signed("==", row, const(self.size)))
        if lanes == 1:
            together = ir.Constant(ir.IntType(1), 0)
        with b.if_else(together) as (then, otherwise):
            with then:
                start = b.add(base, b.mul(first, row))
                with loop(b, const(0), kc, 1) as k:
                    source = b.add(start, b.mul(k, column))
                    target = b.add(to, b.mul(k, const(width * self.size)))
                    for i in range(0, width, lanes) if lanes > 1 else ():
                        value = read(b, add(b, source, self.size * i), self.vector)
                        store(b, value, add(b, target, self.size * i), self.size)
            with otherwise:
                rows = [
                    b.add(base, b.mul(_least(b, b.add(first, const(i)), last), row))
                    for i in range(width)
                ]
                with loop(b, const(0), kc, 1) as k:
                    shift = b.mul(k, column)
                    target = b.add(to, b.mul(k, const(width * self.size)))
                    for i, address in enumerate(rows):
                        value = read(b, b.add(address, shift), self.element)
                        store(b, value, add(b, target, self.size * i), self.size)

    def _tile_function(self) -> ir.Function:
        """A tile of C: ``c (+)= sum over kc``, of which ``rows`` x ``columns`` are there."""
        fn = ir.Function(self.mod, ir.FunctionType(VOID, [I64] * 9), f"edgeq_tile_{self.dtype}")
        fn.linkage = "internal"
        fn.attributes.add("noinline")
        a, source, kc, c, c_row, rows, columns, fresh, spare = fn.args
        b = ir.IRBuilder(fn.append_basic_block())
        zero = ir.Constant(self.vector, [0.0] * self.lanes)
        height, vectors = self.tile.rows, self.tile.vectors
        sums = [[local(b, zero) for _ in range(vectors)] for _ in range(height)]
        step = self.lanes * self.size
        with loop(b, const(0), kc, 1) as k:
            at_b = b.add(source, b.mul(k, const(self.width * self.size)))
            at_a = b.add(a, b.mul(k, const(height * self.size)))
            right = [load(b, add(b, at_b, step * v), self.vector, step) for v in range(vectors)]
            for i in range(height):
                one = load(b, add(b, at_a, self.size * i), self.element, self.size)
                left = splat(b, one, self.vector)
                for v in range(vectors):
                    b.store(self._fma(b, left, right[v], b.load(sums[i][v])), sums[i][v])
        whole = b.and_(
            b.icmp_signed(">=", rows, const(height)),
            b.icmp_signed(">=", columns, const(self.width)),
        )
        is_fresh = b.icmp_signed("!=", fresh, const(0))
        with b.if_else(whole) as (then, otherwise):
            with then, b.if_else(is_fresh) as (new, more):
                with new:
                    self._write(b, sums, c, c_row, add_to=False)
                with more:
                    self._write(b, sums, c, c_row, add_to=True)
            with otherwise:
                self._write(b, sums, spare, const(self.width * self.size), add_to=False)
                height_here = _least(b, rows, const(height))
                width_here = _least(b, columns, const(self.width))
                with (
                    loop(b, const(0), height_here, 1) as i,
                    loop(b, const(0), width_here, 1) as j,
                ):
                    shift = b.mul(j, const(self.size))
                    read = b.add(b.add(spare, b.mul(i, const(self.width * self.size))), shift)
                    to = b.add(b.add(c, b.mul(i, c_row)), shift)
                    value = load(b, read, self.element, self.size)
                    before = load(b, to, self.element, self.size)
                    value = b.select(is_fresh, value, b.fadd(before, value))
                    store(b, value, to, self.size)
        b.ret_void()
        return fn

    def _write(
        self,
        b: ir.IRBuilder,
        sums: list[list[ir.Value]],
        c: ir.Value,
        c_row: ir.Value,
        add_to: bool,
    ) -> None:
        step = self.lanes * self.size
        for i, row in enumerate(sums):
            at = b.add(c, b.mul(const(i), c_row))
            for v, slot in enumerate(row):
                value, to = b.load(slot), add(b, at, step * v)
                if add_to:
                    value = b.fadd(load(b, to, self.vector, self.size), value)
                store(b, value, to, self.size)

    def _fma(self, b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
        bits = 8 * self.size
        fn = declare(b, f"llvm.fma.v{self.lanes}f{bits}", self.vector, [self.vector] * 3)
        return b.call(fn, [x, y, z])


def _least(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    return b.select(b.icmp_signed("<", x, y), x, y)
