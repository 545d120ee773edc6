"""Converters: a quantized model to the formats of other runtimes, one module a target."""
