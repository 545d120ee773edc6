"""Reading and writing graphs as ONNX files."""
