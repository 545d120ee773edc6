"""Graphs from and to ONNX files."""
