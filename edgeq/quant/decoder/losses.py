"""Measure the loss of each matrix in each candidate scheme, with one replay of a text.

`edgeq.quant.decoder.sensitivity` defines the losses. In modes other than "kl" errors are estimated
on a sample of a matrix's rows, and embedding and head are read and rounded in chunks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgeq.core.progress import Progress
from edgeq.evaluation.text import BLOCK_ELEMENTS, kl_divergence, log_softmax
from edgeq.formats.mapped_file import release
from edgeq.formats.packing import TILE
from edgeq.formats.schemes import MOST_PALETTE_BITS, FloatScheme, QuantScheme, Scheme
from edgeq.formats.spill import Spill
from edgeq.formats.tensor import FloatTensor, Tensor, row_blocks
from edgeq.model.formulas import Array
from edgeq.model.model import Model
from edgeq.quant.decoder.calibrate import CalibrationText
from edgeq.quant.decoder.calibrated import REPLAY_OPTIONS, is_weighted
from edgeq.quant.decoder.data_free import round_matrix
from edgeq.quant.decoder.replay import Replay, ReplayStep
from edgeq.quant.rounders.hessian import Factor, Hessian, damped, weighted_error
from edgeq.quant.rounders.rounding import (
    FALLBACK,
    METHOD_INPUTS,
    data_free_method,
    quantize_tensor,
)

Mode = Literal["kl", "scaled", "output"]
EMBEDDING = "model.embed_tokens.weight"
GROUPED_BITS = (2, 3, 4, 5, 6)
BANDS = 3
"""Number of parts of the depth; "scaled" measures each kind of matrix in each part."""
EVERY = 4
"""In mode "scaled" the divergence is computed at every `EVERY`-th position."""
SAMPLED_ROWS = 64
"""In modes other than "kl" errors are estimated on this many rows of a matrix, or on one row in
`SAMPLED_SHARE` if that is more. Rows are similar, and each is rounded by itself."""
SAMPLED_SHARE = 32
DAMPING = 0.01
"""Damping for the estimate of GPTQ's error, as a fraction of the mean of H's diagonal."""


def candidates(base: QuantScheme, k: int) -> tuple[Scheme, ...]:
    """The candidate schemes of a matrix: 2 to 6, 8 and 16 bits, with groups of several sizes.

    If the base scheme is a palette, palettes of at most `MOST_PALETTE_BITS` bits are candidates
    too.

    Args:
        base: the scheme that determines whether there are palettes or zero points, and the
            shortest group.
        k: columns of the matrix; no group is longer than a row.

    Returns:
        schemes by rising bits; those of equal bits by rising group size.
    """
    shortest = base.group_size or 32
    longest = max(k, 32)
    groups = [g for g in (16, 32, 64, 128) if shortest <= g <= longest] or [32]
    schemes: list[Scheme] = [
        QuantScheme(bits, base.symmetric, "group", g, codebook)
        for bits in GROUPED_BITS
        for codebook in dict.fromkeys((None, base.codebook if bits <= MOST_PALETTE_BITS else None))
        for g in groups
    ]
    return (
        *schemes,
        QuantScheme(8, granularity="channel", group_size=None),
        FloatScheme("float16"),
    )


class Trials:
    """Rounds one tensor at a time, or all tensors of a kind together, and measures the loss."""

    def __init__(
        self,
        model: Model,
        calibration: CalibrationText,
        base: QuantScheme,
        method: str,
        options: Mapping[str, Any],
        mode: Mode,
        spill: Spill,
    ) -> None:
        self._model, self._base, self._mode = model, base, mode
        self._method = method
        self._options = {
            name: value for name, value in options.items() if name not in REPLAY_OPTIONS
        }
        self._windows = calibration.windows
        self._spill = spill
        self._every = EVERY if mode == "scaled" else 1
        self._float: Replay | None = None
        if mode != "output":
            self._float = Replay(model, self._windows).run()
            self._float.keep_logits(self._every)

    def run(self, wanted: set[str], progress: Progress) -> dict[str, dict[str, float]]:
        """The losses of each of the matrices by scheme, in the order of the replay."""
        config = self._model.config
        replay = Replay(self._model, self._windows)
        start = None
        losses: dict[str, dict[str, float]] = {}
        kinds: dict[tuple[str, int], _Kind] = {}
        scaled = self._mode == "scaled"
        steps = len(wanted)
        if scaled:
            steps += len({_kind(name, config.layers) for name in wanted if _in_layer(name)})
        for step in replay:
            if step.group.kind == "attn_in":
                start = replay.state()
            names = [name for name in step.group.linears if name in wanted]
            if not names:
                continue
            inputs = self._inputs(step)
            for name in names:
                if step.group.kind == "head":
                    # a tied head is also the embedding, so the whole model is replayed
                    start = None if config.tied else replay.state()
                progress(f"rounding {name} at every precision", len(losses), steps)
                w = step.weights[name] if _in_layer(name) else None
                losses[name] = self._losses(name, w, inputs, start)
                if scaled and w is not None:
                    kind = kinds.setdefault(_kind(name, config.layers), _Kind(start))
                    self._disturb(kind, name, w, inputs)
        if not config.tied and EMBEDDING in wanted:
            progress(f"rounding {EMBEDDING} at every precision", len(losses), steps)
            losses[EMBEDDING] = self._losses(EMBEDDING, None, None, None)
        for done, ((part, _), kind) in enumerate(kinds.items(), len(losses)):
            of = f"{len(kind.tensors)} {part} matrices from layer {kind.start.layer} on"
            progress(f"measuring the KL of {of}", done, steps)
            factor = 0.0
            if kind.error > 0:
                factor = self._divergence(kind.tensors, kind.start) / kind.error
            for name in kind.tensors:
                losses[name] = {text: factor * error for text, error in losses[name].items()}
        progress("sensitivities", steps, steps)
        return losses

    def _disturb(self, kind: _Kind, name: str, w: Array, inputs: _Inputs) -> None:
        """Round a matrix to the bits of the base, and add it to those measured together."""
        scheme = replace(self._base, bits=min(self._base.bits, 4), codebook=None)
        fits = candidates(scheme, w.shape[1])
        if scheme not in fits:  # its groups are longer than the row
            scheme = next(s for s in fits if isinstance(s, QuantScheme) and s.bits == scheme.bits)
        plain = _Inputs(FALLBACK).rounded(w, scheme, name, {})
        some, rounded = _sampled(FloatTensor("float32", w)), _sampled(plain)
        signal = weighted_error(some, np.zeros_like(some), inputs.moments)
        if signal > 0:
            kind.error += weighted_error(some, rounded, inputs.moments) / signal
        kind.tensors[name] = self._spill.put(plain)

    def _inputs(self, step: ReplayStep) -> _Inputs:
        moments: Hessian | None = None
        for x in step.inputs():
            moments = moments or Hessian(x.shape[1])
            moments.add(x)
        assert moments is not None  # a replay has windows
        method = self._method
        is_head = step.group.kind == "head"
        if is_head:
            method = "imatrix" if method in METHOD_INPUTS else data_free_method(method)
        if method != "gptq":
            return _Inputs(method, moments, is_head=is_head)
        pivots = Factor.of(damped(moments.matrix, DAMPING)).pivots
        return _Inputs(method, moments, float(pivots.mean()))

    def _losses(
        self, name: str, w: Array | None, inputs: _Inputs | None, start: Any
    ) -> dict[str, float]:
        """Losses of a matrix by scheme; w is None for embedding and head, read in chunks."""
        inputs = inputs or _Inputs(data_free_method(self._method))
        matrix = self._model.tensors[name]
        relative = self._mode == "output" or (self._mode == "scaled" and _in_layer(name))
        losses: dict[str, float] = {}
        if self._mode == "kl":
            some = matrix.numpy() if w is None else w
        else:
            some = _sampled(matrix) if w is None else _sampled(FloatTensor("float32", w))
        signal = weighted_error(some, np.zeros_like(some), inputs.moments)
        measured: dict[Any, tuple[float, float]] = {}
        errors: dict[Scheme, float] = {}
        for scheme in candidates(self._base, some.shape[1]):
            error = errors[scheme] = self._error(some, scheme, name, inputs, errors)
            if relative:
                losses[str(scheme)] = error / signal if signal > 0 else 0.0
                continue
            kind = self._like(scheme)
            if kind not in measured:
                if w is None and isinstance(scheme, QuantScheme):
                    importance = inputs.importance(scheme)
                    tensor: Tensor = round_matrix(matrix, scheme, inputs.method, name, importance)
                else:
                    whole = some if self._mode == "kl" else matrix.numpy()
                    tensor = inputs.rounded(whole, scheme, name, self._options)
                measured[kind] = self._divergence({name: tensor}, start), error
            loss, at = measured[kind]
            losses[str(scheme)] = loss * error / at if at > 0 else loss
        return losses

    def _error(
        self, w: Array, scheme: Scheme, name: str, inputs: _Inputs, known: Mapping[Scheme, float]
    ) -> float:
        """Squared error of the outputs. Except in mode "kl" it is estimated for palettes.

        Finding a palette is slow. Longer groups increase its error by about the same factor as
        that of evenly spaced codes.
        """
        if self._mode != "kl" and isinstance(scheme, QuantScheme) and scheme.codebook:
            plain = replace(scheme, codebook=None)
            for other, error in known.items():
                if isinstance(other, QuantScheme) and other.codebook and other.bits == scheme.bits:
                    shortest = known[replace(other, codebook=None)]
                    return error * known[plain] / shortest if shortest > 0 else error
        return inputs.error(w, scheme, name)

    def _like(self, scheme: Scheme) -> Any:
        """The kind of a scheme. The loss of a kind is measured once and scaled by the errors."""
        bits = scheme.bits if isinstance(scheme, QuantScheme) else 16
        if self._mode == "scaled":
            return min(bits, 8)
        return bits, scheme.codebook if isinstance(scheme, QuantScheme) else None

    def _divergence(self, tensors: Mapping[str, Tensor], start: Any) -> float:
        """Mean KL divergence from the float model with these tensors, in nats per token."""
        assert self._float is not None
        replay = Replay(self._model, self._windows, replaced=tensors, state=start)
        return mean_divergence(self._float, replay.run(), self._every)


@dataclass
class _Kind:
    """Matrices of one kind in one part of the depth, which are rounded together.

    Args:
        start: state of the replay at the first of their layers.
        tensors: the rounded matrices.
        error: sum of the relative squared errors of their outputs.
    """

    start: Any
    tensors: dict[str, Tensor] = field(default_factory=dict)
    error: float = 0.0


def _sampled(matrix: Tensor) -> Array:
    """A sample of rows: evenly spaced runs of one tile of rows."""
    n = matrix.shape[0]
    wanted = max(SAMPLED_ROWS, n // SAMPLED_SHARE)
    every = max(n // wanted, 1) * TILE
    runs = [matrix.rows(start, min(start + TILE, n)) for start in range(0, n, every)]
    release(matrix)
    return np.concatenate(runs)


def _in_layer(name: str) -> bool:
    return name.startswith("model.layers.")


def _kind(name: str, layers: int) -> tuple[str, int]:
    """The kind of a matrix, and the number of the part of the depth that its layer is in."""
    _, _, layer, _, matrix, _ = name.split(".")
    return matrix, int(layer) * BANDS // layers


@dataclass(frozen=True)
class _Inputs:
    """Statistics of a group's inputs, and how its matrices are rounded with them.

    Args:
        method: a name of `edgeq.quant.METHODS`.
        moments: second moments of the inputs; None for an embedding.
        pivot: mean pivot of the Cholesky factor, for the method "gptq".
        is_head: whether the inputs are those of the head, see `edgeq.quant.decoder.calibrated`.
    """

    method: str
    moments: Hessian | None = None
    pivot: float | None = None
    is_head: bool = False

    def rounded(self, w: Array, scheme: Scheme, name: str, options: Mapping[str, Any]) -> Tensor:
        """Round a matrix as the recipe does."""
        if isinstance(scheme, FloatScheme):
            return FloatTensor("float16", w.astype(np.float16))
        method = self.method
        if self.is_head and self.importance(scheme) is None:
            method = data_free_method(method)
        importance = None if self.moments is None else self.moments.diagonal
        return quantize_tensor(
            w, scheme, method, name=name,
            importance=importance, hessian=self.moments, **options,
        )  # fmt: skip

    def importance(self, scheme: Scheme) -> NDArray[np.float32] | None:
        """The weights of a head's errors, float32 [K]; None if all count the same."""
        if not self.is_head or self.method != "imatrix" or not is_weighted(scheme):
            return None
        assert self.moments is not None  # a head has inputs
        return self.moments.diagonal

    def error(self, w: Array, scheme: Scheme, name: str) -> float:
        """Squared error of the outputs: measured, or estimated if the method is GPTQ."""
        if self.pivot is None:
            return weighted_error(w, self.rounded(w, scheme, name, {}).numpy(), self.moments)
        plain = _Inputs(FALLBACK).rounded(w, scheme, name, {})
        return self.pivot * weighted_error(w, plain.numpy(), None)


def mean_divergence(base: Replay, other: Replay, every: int = 1) -> float:
    """Mean KL divergence between two finished replays of the same windows, in nats per token.

    Args:
        base: replay of the float model.
        other: replay of the rounded model.
        every: the divergence is computed at every ``every``-th position.
    """
    total = n = 0.0
    for p, q in zip(base.logits(every), other.logits(every), strict=True):
        for part in row_blocks(p.shape, BLOCK_ELEMENTS):
            divergences = kl_divergence(log_softmax(p[part]), log_softmax(q[part]))
            total += float(divergences.sum())
            n += divergences.size
    return total / n
