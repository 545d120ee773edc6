"""Shapes of a .tflite file with open axes, computed by LiteRT."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgeq.core.errors import UnsupportedError, UsageError
from edgeq.graph.ir import Shape


def set_shapes(
    path: Path, model: Any, raw: bytes, shapes: Mapping[str, Shape], batch: int | None
) -> None:
    """Set the shapes of all tensors that follow from those of the inputs.

    A file holds one shape for each tensor, and for those that may have others a signature with -1
    at each open axis, whose number in the shape is a placeholder. LiteRT resizes the inputs and
    runs once on zeros, which tells the shape of every tensor.

    Args:
        path: of the file, for messages.
        model: the schema's object; its tensors get the new shapes.
        raw: the file.
        shapes: input -> its whole shape, in the file's own axes.
        batch: what an open first axis becomes; as the file has it if None.

    Raises:
        UsageError: an open axis that is not given, or a shape that contradicts the file.
        UnsupportedError: LiteRT cannot run the model with these shapes.
    """
    graph = model.subgraphs[0]
    names = _names(model, graph)
    for name in shapes:
        if name not in names.values():
            raise UsageError(
                f"{path} has no input {name!r}; its inputs: {', '.join(names.values())}"
            )
    if batch is not None and batch < 1:
        raise UsageError(f"the batch is {batch}; it must be 1 or more")
    wanted = {
        i: _wanted(path, name, graph.tensors[i], shapes.get(name), batch)
        for i, name in names.items()
    }
    if all(list(shape) == _shape(graph.tensors[i]) for i, shape in wanted.items()):
        return
    for i, shape in enumerate(_resized(path, raw, wanted)):
        if i < len(graph.tensors):
            graph.tensors[i].shape = shape


def _names(model: Any, graph: Any) -> dict[int, str]:
    """Input -> its name: the signature's, if there is one."""
    given = model.signatureDefs[0].inputs if model.signatureDefs else ()
    named = {int(entry.tensorIndex): entry.name for entry in given or ()}
    names = {int(i): named.get(int(i), graph.tensors[int(i)].name) for i in graph.inputs}
    return {i: n.decode("utf-8", "replace") if isinstance(n, bytes) else n or ""
            for i, n in names.items()}  # fmt: skip


def _shape(tensor: Any) -> list[int]:
    return [] if tensor.shape is None else [int(n) for n in tensor.shape]


def _wanted(
    path: Path, name: str, tensor: Any, given: Shape | None, batch: int | None
) -> tuple[int, ...]:
    """The shape of an input, with nothing left open."""
    shape = _shape(tensor)
    signature = tensor.shapeSignature
    axes = shape if signature is None or len(signature) != len(shape) else list(map(int, signature))
    shown = ", ".join("?" if n < 0 else str(n) for n in axes)
    if given is not None:
        if len(given) != len(axes) or any(n < 1 for n in given):
            raise UsageError(
                f"the shape {list(given)} does not fit the input {name!r} [{shown}] of {path}"
            )
        if any(axis not in (-1, n) for axis, n in zip(axes, given, strict=True)):
            raise UsageError(
                f"the shape {list(given)} of the input {name!r} contradicts the model's [{shown}] "
                f"in {path}; only axes shown as ? can be given"
            )
        return tuple(given)
    # TensorFlow's converter writes 1 for what it does not know; another number is meant
    unknown = [i for i, n in enumerate(axes) if i and n < 0 and shape[i] == 1]
    if unknown:
        place = unknown[0]
        raise UsageError(
            f"axis {place} of the input {name!r} [{shown}] of {path} is unknown; give all of its "
            f"shape, as --shape {name}="
            + ",".join("N" if n < 0 else str(n) for n in axes)
            + " with a number for each N"
        )
    if batch is None or not axes or axes[0] == batch:
        return tuple(shape)
    if axes[0] >= 0:
        raise UsageError(f"the input {name!r} of {path} has the fixed batch {axes[0]}, not {batch}")
    return (batch, *shape[1:])


def _resized(path: Path, raw: bytes, wanted: Mapping[int, Shape]) -> list[Any]:
    """The shape of every tensor once the inputs have these."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    try:
        interpreter = Interpreter(
            model_content=raw,
            experimental_preserve_all_tensors=True,
            experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
        )
        for i, shape in wanted.items():
            interpreter.resize_tensor_input(i, list(shape))
        interpreter.allocate_tensors()
        for entry in interpreter.get_input_details():
            interpreter.set_tensor(entry["index"], np.zeros(entry["shape"], entry["dtype"]))
        interpreter.invoke()  # some shapes are known only then
        details = {entry["index"]: entry["shape"] for entry in interpreter.get_tensor_details()}
    except (ValueError, RuntimeError) as err:
        shown = ", ".join(str(list(shape)) for shape in wanted.values())
        raise UnsupportedError(
            f"LiteRT does not run {path} with inputs of the shape {shown}: {err}"
        ) from err
    return [np.asarray(details.get(i, ()), np.int32) for i in range(max(details, default=-1) + 1)]
