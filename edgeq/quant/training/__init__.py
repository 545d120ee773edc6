"""Training-time quantization in torch, on the CPU: the ``train`` extra.

    distill    the whole model toward a float teacher's distribution at every position
    qat        the whole model on the text's own next tokens
    adaround   layer by layer: which way to round each weight, so that the layer's output stays

The first two train weights, scales, zero points, palettes and norms through the rounding; all
begin at codes and scales of a post-training method. What comes out is what training saw, to the
bit: integer codes, and scales exact in float16 and bfloat16.

Memory: some 20 bytes a weight, 4 for the teacher's, and the activations of a batch.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from edgeq.core.errors import MissingDependencyError, SchemeError, UsageError
from edgeq.core.progress import Progress
from edgeq.formats.schemes import QuantScheme, Scheme
from edgeq.formats.tensor import QuantTensor, Tensor
from edgeq.model.config import ModelConfig
from edgeq.model.model import Model
from edgeq.quant.decoder.calibrate import CalibrationText
from edgeq.quant.rounders.rounding import quantize_tensor
from edgeq.quant.training.adaround import reconstruct
from edgeq.quant.training.decoder import TorchDecoder
from edgeq.quant.training.loop import Teacher, fit
from edgeq.quant.training.settings import TRAINING_METHODS, TrainingSettings
from edgeq.quant.training.student import Student, float_weights

__all__ = ["TRAINING_METHODS", "TrainingSettings", "train"]


def train(
    model: Model,
    schemes: Mapping[str, Scheme],
    calibration: CalibrationText,
    *,
    method: str = "distill",
    steps: int = 500,
    batch: int = 8,
    learning_rate: float = 0.01,
    hidden: float = 0.0,
    seed: int = 0,
    init: Mapping[str, QuantTensor] | None = None,
    teacher: Model | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Train a model's quantized weights.

    Args:
        model: the float model.
        schemes: of every tensor of it, as `Recipe.assign` gives them. Quantized matrices are
            trained, and vectors (norms, biases) of scheme f32 too, except by "adaround"; all else
            is held fixed in its float type.
        calibration: windows of text to train on.
        method: "distill", "qat" or "adaround".
        steps: times the weights are changed; for "adaround", in each layer.
        batch: windows a step.
        learning_rate: of the weights, in steps between levels; the others follow from it.
        hidden: for "distill": weight of the hidden states' squared error after each layer,
            relative to the teacher's mean square.
        seed: of the order of the windows. Results repeat on one machine with as many threads.
        init: quantized matrices to begin with, of the same schemes; for those it lacks, those of
            least squared error.
        teacher: what is learned from, of the same vocabulary (and, with ``hidden`` or "adaround",
            of the same layers and width); the float model itself if None.
        threads: of torch; as many as it is set to if None.
        progress: called with ("training" or "rounding", steps done, of all).

    Returns:
        The trained tensors by name: quantized matrices, and float32 vectors.

    Raises:
        MissingDependencyError: torch is not installed.
        UsageError: an argument is out of range, or training diverged.
        SchemeError: ``schemes`` or ``init`` does not suit the model.
        FormatError: a weight is NaN or infinite.
    """
    if importlib.util.find_spec("torch") is None:
        raise MissingDependencyError("torch", "train", "to train quantized weights")
    settings = TrainingSettings(method, steps, batch, learning_rate, hidden, seed)
    windows = [window for window in calibration.windows if window.size > 1]
    if not windows:
        raise UsageError("there is no text to train on; give one of at least two tokens")
    if teacher is not None:
        alike = bool(hidden) or method == "adaround"
        _check_teacher(model.config, teacher.config, states=alike)
    start = _start(model, schemes, init or {})
    longest = max(window.size for window in windows)
    decoder = TorchDecoder(model.config, longest)
    with _torch_threads(threads):
        student = Student(model, schemes, start)
        wise = teacher or model
        knowing = Teacher(TorchDecoder(wise.config, longest), float_weights(wise))
        if method == "adaround":
            reconstruct(student, decoder, windows, knowing, settings, progress)
        else:
            learned = knowing if method == "distill" else None
            fit(student, decoder, windows, learned, settings, progress)
        return student.tensors()


def _start(
    model: Model, schemes: Mapping[str, Scheme], init: Mapping[str, QuantTensor]
) -> dict[str, QuantTensor]:
    """The quantized matrices to begin with."""
    start: dict[str, QuantTensor] = {}
    for name, tensor in model.tensors.items():
        scheme = schemes.get(name)
        if scheme is None:
            raise SchemeError(f"no scheme for tensor {name}; give one for every tensor")
        if isinstance(tensor, QuantTensor):
            raise UsageError(
                f"the model is already quantized ({name} is {tensor.scheme}); "
                "train from the checkpoint it was made from"
            )
        if not isinstance(scheme, QuantScheme):
            continue
        begun = init.get(name)
        if begun is None:
            begun = quantize_tensor(tensor.numpy(), scheme, "mse", name=name)
        if begun.scheme != scheme or begun.shape != tuple(tensor.shape):
            raise SchemeError(
                f"training of {name} begins with {begun.scheme} {list(begun.shape)}, and "
                f"{scheme} {list(tensor.shape)} is wanted; round it with the same recipe"
            )
        start[name] = begun
    if not start:
        raise SchemeError("no tensor is to be quantized, so there is nothing to train")
    return start


def _check_teacher(student: ModelConfig, teacher: ModelConfig, *, states: bool) -> None:
    if teacher.vocab != student.vocab:
        raise UsageError(
            f"the teacher has {teacher.vocab} tokens in its vocabulary and the model "
            f"{student.vocab}; they must have the same vocabulary"
        )
    ours, theirs = (student.layers, student.hidden), (teacher.layers, teacher.hidden)
    if states and ours != theirs:
        raise UsageError(
            f"the teacher has {theirs[0]} layers of width {theirs[1]} and the model {ours[0]} of "
            f"{ours[1]}; hidden states of another shape cannot be learned: use the method "
            "distill without hidden"
        )


@contextmanager
def _torch_threads(threads: int | None) -> Iterator[None]:
    """So many threads for torch, for a while."""
    import torch

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads or before)
        yield
    finally:
        torch.set_num_threads(before)
