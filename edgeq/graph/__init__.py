"""Models that are graphs: read from ONNX and LiteRT, brought to one form, written as ONNX."""
