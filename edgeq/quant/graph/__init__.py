"""Graphs of operators to integers: recipes, calibration data, and the pipeline of passes."""

from __future__ import annotations
