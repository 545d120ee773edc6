"""ONNX Runtime models and onnxruntime-genai folders."""
