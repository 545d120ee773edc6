"""Round the tensors of a model by a recipe, without training.

    embedding, head and floats    without data                          `data_free`
    matrices of the layers        without data too, or, if the method needs their inputs, group by
                                  group in a replay of the text         `calibrated`

The embedding, the head and the floats are rounded first, and the replay computes with them.
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
from edgeq.quant.decoder.finished_layers import FinishedLayers
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
    finished: FinishedLayers | None = None,
    progress: Progress | None = None,
) -> Ratios:
    """Round every tensor of a model.

    Args:
        model: the float model.
        recipe: the recipe; its training is ignored.
        schemes: name of each tensor that is stored -> its scheme.
        text: the text on which inputs are measured; None rounds all tensors without data.
        data_free: rounds and writes tensors by a method that needs no inputs, or by "imatrix" those
            whose importance is given, and returns their SQNR.
        write: writes a rounded matrix.
        written: returns a tensor that was written.
        finished: layers that an interrupted run has rounded, and where those of this run are kept.
        progress: called with a matrix, weights done, and number of weights.

    Returns:
        name of each quantized tensor -> SQNR in dB; None without an error.
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
            options=recipe.options, finished=finished, progress=progress,
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
    """The model with the tensors that an artifact would have, for measuring before writing.

    Args:
        model, recipe, schemes, text, progress: as for `round_model`.
        spill: temporary storage of the rounded tensors.
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
