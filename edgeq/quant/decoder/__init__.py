"""Quantization of decoders: calibration, layer replay, bit allocation and reports."""
