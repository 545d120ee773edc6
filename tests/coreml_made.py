"""Core ML packages made with coremltools, for the tests of edgeq's executor."""

from __future__ import annotations

import gc
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeq.converters.coreml.package import VERSIONS, write_package

ct = pytest.importorskip("coremltools")
torch = pytest.importorskip("torch")

from coremltools.converters.mil.mil import (  # noqa: E402
    Builder as mb,  # noqa: N813
)
from coremltools.converters.mil.mil import Function, Program, types  # noqa: E402

F = torch.nn.functional
Array = NDArray[Any]
TARGETS = {"ios16": ct.target.iOS16, "ios17": ct.target.iOS17, "ios18": ct.target.iOS18}
_BUILTIN = {"float32": types.fp32, "float16": types.fp16, "int32": types.int32, "bool": types.bool}


def rand(*shape: int, seed: int = 0, low: float | None = None) -> Array:
    rng = np.random.default_rng(seed + sum(shape))
    if low is not None:
        return (low + rng.random(shape)).astype(np.float32)
    return rng.standard_normal(shape).astype(np.float32)


def ints(*values: int) -> Array:
    return np.array(values, np.int32)


def package(
    folder: Path,
    build: Callable[..., Any],
    inputs: dict[str, Any],
    states: dict[str, Any] | None = None,
    target: str = "ios18",
) -> Path:
    """A package of one function, made by coremltools' builder and our writer."""
    specs = {name: mb.TensorSpec(np.shape(v), _BUILTIN[np.asarray(v).dtype.name])
             for name, v in inputs.items()}  # fmt: skip
    for name, shape in (states or {}).items():
        specs[name] = mb.StateTensorSpec(shape, types.fp16)
    with Function(specs, opset_version=TARGETS[target]) as function:
        found = build(**function.inputs)
        outputs = list(found) if isinstance(found, (tuple, list)) else [found]
        function.set_outputs([mb.identity(x=v, name=f"out{i}") for i, v in enumerate(outputs)])
    program = Program()
    program.add_function("main", function)
    out = folder / "op.mlpackage"
    shutil.rmtree(out, ignore_errors=True)
    write_package(out, program, VERSIONS[target], {}, {}, "", None)
    return out


def T(x: Array) -> Any:  # noqa: N802
    return torch.from_numpy(np.ascontiguousarray(x))


def quietly(call: Callable[[], Any]) -> Any:
    """coremltools leaves temporary folders to the garbage collector, which warns of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = call()
        gc.collect()
    return found


def reordered(weights: Any, order: Sequence[int]) -> Array:
    parts = np.split(weights.detach().numpy(), len(order))
    return np.concatenate([parts[i] for i in order])


def depth_to_space(x: Array, b: int) -> Array:
    n, c, h, w = x.shape
    out = np.zeros((n, c // (b * b), h * b, w * b), x.dtype)
    for i in range(b):
        for j in range(b):
            at = (i * b + j) * (c // (b * b))
            out[:, :, i::b, j::b] = x[:, at : at + c // (b * b)]
    return out
