"""Quantization of graphs: recipes, calibration data, and the passes of the pipeline."""

from __future__ import annotations
