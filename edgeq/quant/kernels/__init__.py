"""Compiled kernels of quantization: their results are the same bits on every processor.

shapes      what the compiled functions are called and take
gemm        matrix products; `rounding`: GPTQ's blocks; `vectors`: sums, softmax, factors
module      all of them as one LLVM module; `library`: compiled, cached on disk and loaded
parallel    threads
products    the functions for NumPy arrays
"""
