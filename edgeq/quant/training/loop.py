"""Training from end to end: the text's own tokens, or a float teacher's opinion of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import UsageError
from edgeq.core.progress import Progress
from edgeq.quant.training.decoder import TorchDecoder, Weights
from edgeq.quant.training.settings import TrainingSettings
from edgeq.quant.training.student import Student

PAD = -1
"""Fills windows that are shorter than the longest of their batch."""
RATES = {"latents": 1.0, "growth": 0.1, "zeros": 1.0, "palette": 1.0, "vector": 0.5}
"""Learning rates over that of the latents, whose unit is a step between levels."""
WARM_UP = 0.05
"""Share of the steps in which the learning rate rises."""
BETAS = (0.9, 0.95)
CLIP_NORM = 1.0


def batches(
    windows: Sequence[NDArray[np.int64]], size: int, steps: int, seed: int
) -> Iterator[NDArray[np.int64]]:
    """Windows in an order drawn anew for each time through the text: int64 [B, T]."""
    rng = np.random.default_rng(seed)
    queue: list[int] = []
    for _ in range(steps):
        while len(queue) < size:
            queue += rng.permutation(len(windows)).tolist()
        chosen, queue = [windows[i] for i in queue[:size]], queue[size:]
        yield padded(chosen)


def padded(windows: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Windows side by side, int64 [B, T], the shorter ones filled with `PAD`."""
    batch = np.full((len(windows), max(w.size for w in windows)), PAD, np.int64)
    for row, window in zip(batch, windows, strict=True):
        row[: window.size] = window
    return batch


def rate_at(step: int, steps: int) -> float:
    """Share of the learning rate at a step: a short rise, then half a cosine down to zero."""
    rise = max(1.0, WARM_UP * steps)
    return min((step + 1) / rise, 0.5 + 0.5 * math.cos(math.pi * step / steps))


@dataclass(frozen=True)
class Teacher:
    """A float model to learn from.

    Args:
        decoder: its decoder.
        weights: its tensors.
    """

    decoder: TorchDecoder
    weights: Weights


def fit(
    student: Student,
    decoder: TorchDecoder,
    windows: Sequence[NDArray[np.int64]],
    teacher: Teacher | None,
    settings: TrainingSettings,
    progress: Progress | None,
) -> None:
    """Train the student in place, toward a teacher or on the text itself.

    Args:
        student: what is trained.
        decoder: of the model.
        windows: tokens int64 [T] each.
        teacher: whose distribution is learned at every position; None to learn the text's next
            tokens.
        settings: steps and rates.
        progress: called with ("training", done, steps).

    Raises:
        UsageError: the loss is no longer finite.
    """
    import torch

    groups: list[dict[str, Any]] = [
        {"params": parameters, "lr": settings.learning_rate * RATES[kind]}
        for kind, parameters in student.parameters().items()
        if parameters
    ]
    steps = settings.steps
    optimizer = torch.optim.Adam(groups, betas=BETAS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, steps))
    every = [p for group in groups for p in group["params"]]
    for done, tokens in enumerate(batches(windows, settings.batch, steps, settings.seed)):
        ids = torch.from_numpy(tokens)
        loss = loss_of(student.weights(), decoder, teacher, ids, settings.hidden)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(every, CLIP_NORM)
        if not torch.isfinite(norm):
            raise UsageError(
                f"training diverged at step {done} of {steps} (the loss is {loss.item():.3g}); "
                f"use a learning_rate below {settings.learning_rate:g}"
            )
        optimizer.step()
        schedule.step()
        if progress:
            progress("training", done + 1, steps)


def loss_of(
    weights: Weights, decoder: TorchDecoder, teacher: Teacher | None, ids: Any, hidden: float
) -> Any:
    """The mean loss of a batch, in nats a position.

    Args:
        weights: the student's.
        decoder: of the model.
        teacher: what is learned from; None for the text itself.
        ids: int64 [B, T], filled with `PAD`.
        hidden: weight of the hidden states' relative squared error.
    """
    import torch
    from torch.nn.functional import cross_entropy, log_softmax

    real = ids != PAD
    tokens = ids.clamp(min=0)
    logits, states = decoder(weights, tokens)
    if teacher is None:
        return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), ignore_index=PAD)
    with torch.no_grad():
        wanted, wanted_states = teacher.decoder(teacher.weights, tokens)
        p = log_softmax(wanted[real], dim=-1)
    q = log_softmax(logits[real], dim=-1)
    loss = (p.exp() * (p - q)).sum(dim=-1).mean()
    if hidden:
        for ours, theirs in zip(states, wanted_states, strict=True):
            square = theirs[real].square().mean()
            loss = loss + hidden * (ours[real] - theirs[real]).square().mean() / square
    return loss
