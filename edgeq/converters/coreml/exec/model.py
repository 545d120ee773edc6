"""A Core ML file, described and run.

ML Programs run in `edgeq.converters.coreml.exec.machine`; models of the older format, which edgeq
never writes, in `edgeq.converters.coreml.exec.neural_network`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.coreml.exec.load import File, Function, functions, open_file
from edgeq.converters.coreml.exec.machine import (
    SUPPORTED,
    Arithmetic,
    Machine,
    State,
    refuse_unknown,
)
from edgeq.core.errors import FormatError, UsageError, unknown


@dataclass(frozen=True)
class FunctionDescription:
    """Inputs, outputs, states and operators of a function.

    Args:
        inputs, outputs, states: name -> type, in words.
        ops: operator or layer type -> how many there are.
    """

    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    states: Mapping[str, str]
    ops: Mapping[str, int]


@dataclass(frozen=True)
class Description:
    """Kind, version and functions of a file.

    Args:
        kind: "mlProgram", "neuralNetworkClassifier", "pipeline" ...
        specification: Core ML's specification version.
        functions: name -> what it takes and gives; one called "main" if there are no functions.
        unsupported: types of operators, layers or models that cannot be executed here.
    """

    kind: str
    specification: int
    functions: Mapping[str, FunctionDescription]
    unsupported: tuple[str, ...]


@dataclass
class CoreMLModel:
    """An opened file.

    Args:
        file: it.
        arithmetic: what an ML Program's fp16 is held as.
    """

    file: File
    arithmetic: Arithmetic = "float32"
    programs: Mapping[str, Function] = field(init=False)

    def __post_init__(self) -> None:
        self.machine = Machine(self.arithmetic)
        self.kind = str(self.file.spec.WhichOneof("Type"))
        self.programs = functions(self.file) if self.kind == "mlProgram" else {}

    @property
    def default_function(self) -> str | None:
        """The function that runs if none is named; None if the file is not an ML Program."""
        if not self.programs:
            return None
        name = self.file.spec.description.defaultFunctionName or "main"
        return name if name in self.programs else next(iter(self.programs))

    def describe(self) -> Description:
        """Its kind, version and functions."""
        spec = self.file.spec
        described_functions: dict[str, FunctionDescription] = {}
        missing: set[str] = set()
        for name, function in self.programs.items():
            described = self._features(name)
            counts = Counter(op.type for op in function.block.walk())
            missing |= set(counts) - SUPPORTED
            states = {n: str(t) for n, t in function.inputs.items() if t.state}
            described_functions[name] = FunctionDescription(
                _words(described.input), _words(described.output), states, counts
            )
        if not self.programs:
            from edgeq.converters.coreml.exec.neural_network import parts

            counts, absent = parts(spec)
            missing |= absent
            described_functions["main"] = FunctionDescription(
                _words(spec.description.input), _words(spec.description.output), {}, counts
            )
        return Description(
            self.kind, spec.specificationVersion, described_functions, tuple(sorted(missing))
        )

    def new_state(self, function: str | None = None) -> State:
        """States of zeros, for `predict`."""
        return self.machine.new_state(self._function(function))

    def predict(
        self,
        inputs: Mapping[str, Any],
        function: str | None = None,
        state: State | None = None,
        watch: Collection[str] = (),
    ) -> dict[str, Any]:
        """Run it once.

        Args:
            inputs: by name; arrays, or for images [H, W] or [H, W, C] of 0 to 255 or what NumPy
                makes so, numbers, text, or dictionaries, as the model's description says.
            function: which; its default if None.
            state: what it keeps from call to call, changed in place; zeros each time if None.
            watch: names of values inside an ML Program to give too.

        Returns:
            outputs by name: arrays, and of a classifier its label and a dictionary.

        Raises:
            UnsupportedError: an operator, layer or model that cannot be executed; names it.
            UsageError: an input is missing, unknown, or of another shape.
        """
        if not self.programs:
            from edgeq.converters.coreml.exec.neural_network import run_spec

            checked = _checked(self.file.spec.description.input, inputs)
            return run_spec(self.file.spec, checked)
        chosen = self._function(function)
        refuse_unknown(chosen)
        described = self._features(chosen.name)
        checked = _checked(described.input, inputs)
        for item in described.input:  # an image is a batch of one
            if item.type.WhichOneof("Type") == "imageType":
                checked[item.name] = np.asarray(checked[item.name])[None]
        return self.machine.run(chosen, checked, state, watch)

    def sample(self, function: str | None = None, seed: int = 0) -> dict[str, Any]:
        """Random inputs of the right types and shapes, to try a model with."""
        rng = np.random.default_rng(seed)
        words: list[Any] = []
        if self.programs:
            items = self._features(self._function(function).name).input
        else:
            from edgeq.converters.coreml.exec.neural_network import vocabulary

            items = self.file.spec.description.input
            words = vocabulary(self.file.spec)
        return {item.name: _random(item.type, rng, words) for item in items}

    def _function(self, name: str | None) -> Function:
        if not self.programs:
            raise UsageError(f"a model of kind {self.kind} has no functions or states")
        name = name or str(self.default_function)
        if name not in self.programs:
            raise UsageError(unknown("function", name, tuple(self.programs)))
        return self.programs[name]

    def _features(self, name: str) -> Any:
        described = {f.name: f for f in self.file.spec.description.functions}
        return described.get(name, self.file.spec.description)


def open_model(path: str | Path, arithmetic: Arithmetic = "float32") -> CoreMLModel:
    """Open a .mlpackage or .mlmodel.

    Raises:
        FormatError: it is damaged or no Core ML file.
        MissingDependencyError: coremltools is not installed.
    """
    return CoreMLModel(open_file(path), arithmetic)


# --- inputs -----------------------------------------------------------------------------------


def _words(items: Any) -> dict[str, str]:
    return {item.name: _type_words(item.type) for item in items}


def _type_words(kind: Any) -> str:
    which = str(kind.WhichOneof("Type"))
    if which == "multiArrayType":
        array = kind.multiArrayType
        name = array.ArrayDataType.Name(array.dataType).lower()
        sizes = [list(s.shape) for s in array.enumeratedShapes.shapes]
        return f"{name} {sizes or list(array.shape)}"
    if which == "imageType":
        image = kind.imageType
        return f"image {image.ColorSpace.Name(image.colorSpace)} {image.height} x {image.width}"
    return which.removesuffix("Type")


def _checked(items: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    names = [item.name for item in items]
    for name in inputs:
        if name not in names:
            raise UsageError(unknown("input", name, names))
    checked = {}
    for item in items:
        if item.name not in inputs:
            if item.type.isOptional:
                continue
            raise UsageError(
                f"the input {item.name!r} is missing: {_type_words(item.type)}; "
                f"the model takes {', '.join(names)}"
            )
        checked[item.name] = _fit(item, inputs[item.name])
    return checked


def _fit(item: Any, value: Any) -> Any:
    which = item.type.WhichOneof("Type")
    if which == "imageType":
        return _image(item, value)
    if which == "dictionaryType" and not isinstance(value, Mapping):
        raise UsageError(f"the input {item.name!r} is a dictionary, got {type(value).__name__}")
    if which != "multiArrayType":
        return value
    array = np.asarray(value)
    if not any(_shape_allowed(shape, array.shape) for shape in _shapes(item.type.multiArrayType)):
        raise UsageError(
            f"the input {item.name!r} has shape {list(array.shape)}; "
            f"the model takes {_type_words(item.type)}"
        )
    return array


def _shapes(array: Any) -> Iterator[list[tuple[int, int | None]]]:
    """Allowed shapes: for each dimension the least and the most, None for no limit."""
    if len(array.shape) or not array.WhichOneof("ShapeFlexibility"):
        yield [(d, d) for d in array.shape]
    for shape in array.enumeratedShapes.shapes:
        yield [(d, d) for d in shape.shape]
    ranges = array.shapeRange.sizeRanges
    if len(ranges):
        yield [(r.lowerBound, r.upperBound if r.upperBound >= 0 else None) for r in ranges]


def _shape_allowed(allowed: list[tuple[int, int | None]], shape: tuple[int, ...]) -> bool:
    if not allowed:
        return True
    return len(allowed) == len(shape) and all(
        low <= n and (high is None or n <= high)
        for n, (low, high) in zip(shape, allowed, strict=True)
    )


def _image(item: Any, value: Any) -> NDArray[np.float32]:
    """An image as [C, H, W], in the order of channels that the model says."""
    kind = item.type.imageType
    gray = "GRAY" in kind.ColorSpace.Name(kind.colorSpace)
    array = np.asarray(value, np.float32)
    if array.ndim == 2:
        array = array[None]
    elif array.ndim == 3 and array.shape[-1] in (1, 3) and array.shape[0] not in (1, 3):
        array = np.moveaxis(array, -1, 0)
    if array.ndim != 3 or array.shape[0] != (1 if gray else 3):
        raise UsageError(
            f"the input {item.name!r} is an {_type_words(item.type)}; "
            f"got an array {list(np.shape(value))}"
        )
    flexible = kind.WhichOneof("SizeFlexibility") is not None
    if not flexible and array.shape[1:] != (kind.height, kind.width):
        raise UsageError(
            f"the input {item.name!r} is an {_type_words(item.type)}, "
            f"got {array.shape[1]} x {array.shape[2]}; resize it first"
        )
    bgr = kind.ColorSpace.Name(kind.colorSpace) == "BGR"
    return array[::-1] if bgr else array


def _random(kind: Any, rng: np.random.Generator, words: list[Any]) -> Any:
    which = kind.WhichOneof("Type")
    if which == "imageType":
        image = kind.imageType
        gray = "GRAY" in image.ColorSpace.Name(image.colorSpace)
        size = (image.height, image.width, *(() if gray else (3,)))
        return rng.integers(0, 256, size).astype(np.uint8)
    if which == "multiArrayType":
        array = kind.multiArrayType
        shape = [max(1, low) for low, _ in next(_shapes(array))]
        if array.ArrayDataType.Name(array.dataType).startswith("INT"):
            return np.zeros(shape, np.int32)
        return rng.standard_normal(shape).astype(np.float32)
    if which == "dictionaryType":
        return dict.fromkeys(words[:: max(1, len(words) // 5)], 1.0)
    if which == "stringType":
        return str(words[0]) if words else ""
    if which in ("int64Type", "doubleType"):
        return int(rng.integers(0, 3)) if which == "int64Type" else float(rng.standard_normal())
    raise FormatError(f"an input of type {which} cannot be made up")
