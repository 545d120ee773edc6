"""The tensors of a model rounded by a recipe: what an artifact holds of them, but for training.

    embedding, head and floats    without data                        `data_free`
    matrices of the layers        without data too, or, where the method needs their inputs, group
                                  by group in a replay of the text    `calibrated`

The tensors rounded first are those that the replay then computes with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from edgeq.core.progress import Progress
from edgeq.formats.mapped_file import release
from edgeq.formats.schemes import FloatScheme, QuantScheme, Scheme
from edgeq.formats.spill import Spill
from edgeq.formats.tensor import Tensor
from edgeq.model.model import Model
from edgeq.quant.decoder.calibrate import CalibrationText
from edgeq.quant.decoder.calibrated import (
    Ratios,
    Write,
    head_by_gptq,
    head_importance,
    layer_matrices,
    round_calibrated,
    round_head,
)
from edgeq.quant.decoder.data_free import Importance, cast_float, round_matrix
from edgeq.quant.recipe import Recipe
from edgeq.quant.rounders.rounding import METHOD_INPUTS, data_free_method


def round_model(
    model: Model,
    recipe: Recipe,
    schemes: Mapping[str, Scheme],
    text: CalibrationText | None,
    *,
    data_free: Callable[[Mapping[str, Tensor], str, Importance], Ratios],
    write: Write,
    written: Callable[[str], Tensor],
    progress: Progress | None = None,
) -> Ratios:
    """Round every tensor of a model.

    Args:
        model: float.
        recipe: says how its weights are rounded; what it trains is left out.
        schemes: of each tensor that is stored.
        text: what inputs are measured on; None to round all tensors without data.
        data_free: rounds and stores tensors by a method that needs no inputs, or "imatrix" those
            whose inputs' mean squares are given, and returns their SQNR.
        write: stores a rounded matrix.
        written: a tensor that was stored.
        progress: called with a matrix, weights rounded, and of how many.

    Returns:
        The SQNR in dB of each quantized tensor; None where nothing was lost.
    """
    matrices: dict[str, QuantScheme] = {}
    method = recipe.method
    importance: Importance = {}
    head = None
    if text is not None and method in METHOD_INPUTS:
        matrices = layer_matrices(schemes)
        head = head_by_gptq(model, schemes, recipe)
        importance = {} if head else head_importance(model, schemes, method, text)
        method = "imatrix" if importance else data_free_method(method)
    others = {name: model.tensors[name] for name in schemes if name not in (*matrices, head)}
    ratios = dict(data_free(others, method, importance))
    if head:
        assert text is not None
        scheme = schemes[head]
        assert isinstance(scheme, QuantScheme)
        ratios[head] = round_head(
            model, head, scheme, text, write, options=recipe.options, progress=progress
        )
    if matrices:
        assert text is not None
        rest = {name: written(name) for name in schemes if name not in matrices}
        ratios |= round_calibrated(
            model, matrices, recipe.method, text, write, rest,
            options=recipe.options, progress=progress,
        )  # fmt: skip
    return ratios


def rounded_model(
    model: Model,
    recipe: Recipe,
    schemes: Mapping[str, Scheme],
    text: CalibrationText,
    spill: Spill,
    progress: Progress | None = None,
) -> Model:
    """The model as an artifact would hold it, to be measured before anything is written.

    Args:
        model, recipe, schemes, text, progress: as for `round_model`.
        spill: where the rounded tensors are kept.
    """
    tensors: dict[str, Tensor] = {}

    def write(name: str, tensor: Tensor) -> None:
        tensors[name] = spill.put(tensor)

    def data_free(others: Mapping[str, Tensor], method: str, importance: Importance) -> Ratios:
        for name, tensor in others.items():
            if progress and len(others) == len(schemes):
                progress(name, len(tensors), len(schemes))
            scheme = schemes[name]
            write(
                name,
                cast_float(tensor.numpy(), scheme, name)
                if isinstance(scheme, FloatScheme)
                else round_matrix(tensor, scheme, method, name, importance.get(name)),
            )
            release(tensor)
        return {}

    round_model(
        model, recipe, schemes, text,
        data_free=data_free, write=write, written=tensors.__getitem__, progress=progress,
    )  # fmt: skip
    return replace(model, tensors={name: tensors[name] for name in schemes})
