"""Compiling with LLVM: shared by the kernels of `edgeq.runtime` and of `edgeq.quant`.

llvm_ir      emitting vector code
vector_math  exponential function and reductions, the same bits on every processor
object_code  machine code for this processor, cached on disk
"""
