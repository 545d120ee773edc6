"""LiteRT (TensorFlow Lite) files and LiteRT-LM bundles."""
