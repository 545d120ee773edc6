"""Executes Core ML files in NumPy, on any machine.

    describe("model.mlpackage")            functions, inputs, outputs, operators
    execute("model.mlpackage", inputs)     outputs by name
    open_model("model.mlpackage")          to run it more than once, with states

    load, blob, weights    a file as plain objects: functions, operators, (compressed) constants
    machine                runs an ML Program operator by operator
    ops_*                  the operators
    model                  a file of any kind, described and run
    neural_network/        kinds of models that edgeq never writes

ML Programs (.mlpackage, .mlmodel) are read from their protobuf and weight.bin as they are on disk.
What cannot be executed is refused by name.

It is the meaning of the file that is executed. Apple's compiler, which fuses operators and chooses
a processor, is not involved, nor the Neural Engine: results on a device differ by its rounding,
and a program that this executes may still be one that a device refuses.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeq.converters.coreml.exec.machine import Arithmetic
from edgeq.converters.coreml.exec.model import (
    CoreMLModel,
    Description,
    FunctionDescription,
    open_model,
)

__all__ = [
    "Arithmetic",
    "CoreMLModel",
    "Description",
    "FunctionDescription",
    "describe",
    "execute",
    "open_model",
]


def describe(path: str | Path) -> Description:
    """Describe a Core ML file: its functions, inputs, outputs and operators.

    Raises:
        FormatError: it is damaged or no Core ML file.
        MissingDependencyError: coremltools is not installed.
    """
    return open_model(path).describe()


def execute(
    path: str | Path,
    inputs: Mapping[str, Any],
    *,
    function: str | None = None,
    arithmetic: Arithmetic = "float32",
) -> dict[str, Any]:
    """Run a Core ML file once.

    Args:
        path: a .mlpackage or .mlmodel.
        inputs: by name: arrays, images [H, W] or [H, W, C], numbers, text or dictionaries.
        function: of an ML Program that has several; its default if None.
        arithmetic: "float32", or "float16" to round what the program declares so.

    Returns:
        outputs by name: arrays, and of a classifier its label and a dictionary of labels.

    Raises:
        FormatError: the file is damaged.
        UnsupportedError: an operator, layer or model that cannot be executed; names it.
        UsageError: an input is missing, unknown, or of another shape.
    """
    return open_model(path, arithmetic).predict(inputs, function)
