"""Graphs of operators: reading ONNX and LiteRT files, the canonical form, writing ONNX."""
