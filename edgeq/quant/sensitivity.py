"""How much each tensor minds being held in fewer bits.

Three ways to say it, for every tensor and every scheme it might get:

    kl       nats a token: the divergence of the whole model from the float one when this tensor
             alone is rounded, by the method that the recipe rounds with. Measured once for each
             number of bits, and for palettes apart, by walking on from the tensor's layer; other
             group sizes are scaled by their output errors, since the divergence of a small
             disturbance grows with its square.
    scaled   nats per token again, estimated: the relative squared error of each matrix's output
             times the divergence that a unit of it causes. That factor is measured for each kind of
             matrix (q_proj, down_proj, ...) in each third of the layers, by rounding all matrices
             of the kind there together and walking on. Embedding and head, which are few and
             large, are measured as under "kl", a tied matrix at both its uses.
    output   the relative squared error of what the matrix puts out, tr(E H E') / tr(W H W'),
             with H the second moments of its inputs: one walk for all. These errors do not add up
             over kinds of matrices, so bits cannot be chosen by them.

GPTQ, which takes long, is not carried out for output errors. With H = M D M' (`edgeq.quant.gptq`)
what it leaves is the sum over columns of D_k (error of rounding there)^2, and how far numbers lie
from the nearest level has little to do with the column: mean(D) |W - W'|^2 with W' rounded by
itself foretells it.

Divergences of several tensors add up, nearly: that is what `edgeq.quant.allocate` counts on.

Source: sensitivity by the divergence of the output, Cai et al. 2020, "ZeroQ" (arXiv:2001.00281),
section 3.2; its sum over layers as the objective, equation 6; GPTQ's error by D, Chee et al.
2023, "QuIP" (arXiv:2307.13304), theorem 1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from edgeq.errors import FormatError, UsageError, unknown
from edgeq.evaluate import BLOCK_ELEMENTS, kl_divergence, log_softmax
from edgeq.model import Model
from edgeq.quant.calibrate import Calibration, model_sha256
from edgeq.quant.hessian import Factor, Hessian, damped, weighted_error
from edgeq.quant.rounding import FALLBACK, NEEDS, alone, check_method, quantize_tensor
from edgeq.quant.spill import Spill
from edgeq.quant.walk import Stage, Walk
from edgeq.reference import Array
from edgeq.schemes import FloatScheme, QuantScheme, Scheme
from edgeq.tensor import FloatTensor, Tensor

Progress = Callable[[str, int, int], None]
Mode = Literal["kl", "scaled", "output"]
MODES = ("kl", "scaled", "output")
BANDS = 3
"""Parts of the depth in which "scaled" measures each kind of matrix by itself."""
EVERY = 4
"""For "scaled", the divergence is taken at one position in so many."""
SAMPLED_ROWS = 64
"""Rows of a matrix, or one in `SAMPLED_SHARE` if that is more, that errors are estimated on beyond
what "kl" measures: rows are many, alike, and rounded each by itself."""
SAMPLED_SHARE = 32
EXACT_WORK = 10**13
"""Multiplications up to which "kl" is the mode that is chosen where none is asked for: minutes."""
DAMPING = 0.01
"""What GPTQ's error is foretold with, in parts of the mean of H's diagonal."""
FORMAT_VERSION = 2
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Sensitivity:
    """Losses of each tensor in each scheme.

    Args:
        mode: "kl" or "scaled" in nats per token, or "output" as a ratio of squares.
        method: how tensors were rounded.
        n_tokens: of the calibration text that were walked.
        text_sha256: of the text.
        model_sha256: of the float model.
        losses: tensor -> scheme's text form -> loss.
    """

    mode: Mode
    method: str
    n_tokens: int
    text_sha256: str
    model_sha256: str
    losses: Mapping[str, Mapping[str, float]]

    def to_json(self) -> str:
        """The text of a file for later runs."""
        return json.dumps(
            {
                "format": "edgeq-sensitivity",
                "format_version": FORMAT_VERSION,
                "mode": self.mode,
                "method": self.method,
                "n_tokens": self.n_tokens,
                "text_sha256": self.text_sha256,
                "model_sha256": self.model_sha256,
                "losses": {name: dict(found) for name, found in self.losses.items()},
            },
            indent=1,
        )

    @classmethod
    def load(cls, path: str | Path) -> Sensitivity:
        """Read what `to_json` gave.

        Raises:
            FormatError: the file cannot be read, or holds something else.
        """
        try:
            data = json.loads(Path(path).read_text("utf-8"))
            if data["format"] != "edgeq-sensitivity" or data["format_version"] != FORMAT_VERSION:
                raise FormatError(
                    f"{path} is not of version {FORMAT_VERSION} of edgeq-sensitivity, which says "
                    "how tensors were rounded; make it anew with 'edgeq sensitivity'"
                )
            losses = {
                name: {text: float(loss) for text, loss in found.items()}
                for name, found in data["losses"].items()
            }
            mode: Any = data["mode"]
            if mode not in MODES:
                raise FormatError(f"{path}: {unknown('mode', str(mode), MODES)}")
            if not all(math.isfinite(loss) for found in losses.values() for loss in found.values()):
                raise FormatError(f"{path} holds losses that are not finite numbers")
            return cls(
                mode, str(data["method"]), int(data["n_tokens"]),
                data["text_sha256"], data["model_sha256"], losses,
            )  # fmt: skip
        except OSError as err:
            raise FormatError(f"{path} cannot be read: {err.strerror or err}") from err
        except UnicodeDecodeError as err:  # whose repr would hold the whole file
            raise FormatError(f"{path} holds no sensitivities: it is not text ({err})") from err
        except (KeyError, TypeError, ValueError, AttributeError) as err:
            raise FormatError(f"{path} holds no sensitivities: {err!r}") from err

    def check_model(self, model: Model) -> None:
        """Refuse sensitivities of another model.

        Raises:
            UsageError: they are not this model's.
        """
        if self.model_sha256 != model_sha256(model):
            raise UsageError(
                "the sensitivities are of another model (its sha256 differs); "
                "measure this one with 'edgeq sensitivity'"
            )

    def suited(self, base: QuantScheme) -> Sensitivity:
        """Only what a recipe may hold: palettes where its default is one.

        Raises:
            UsageError: there are no palettes, and the recipe wants them; or the losses are not
                in nats, so that they cannot be added up.
        """
        if self.mode == "output":
            raise UsageError(
                "the sensitivities are relative output errors, which cannot be added up over "
                "matrices of different kinds, so bits cannot be chosen by them; measure them in "
                "nats with edgeq sensitivity --mode scaled (or kl)"
            )
        if base.codebook:
            if not any("palette" in text for found in self.losses.values() for text in found):
                raise UsageError(
                    "the sensitivities are without palettes, and the recipe's default is "
                    f"{base}; measure them too: edgeq sensitivity --palette"
                )
            return self
        losses = {
            name: {text: loss for text, loss in found.items() if "palette" not in text}
            for name, found in self.losses.items()
        }
        return replace(self, losses=losses)


def candidates(base: QuantScheme, k: int) -> tuple[Scheme, ...]:
    """Schemes a matrix may get: 2, 3, 4, 8 and 16 bits, those below 8 in groups of several sizes.

    Palettes are among them where the base is one, beside evenly spaced codes.

    Args:
        base: says whether there are palettes or zero points, and the shortest group.
        k: columns; no group is longer than a row.

    Returns:
        Rising bits; of equal bits the shortest group first.
    """
    shortest = base.group_size or 32
    longest = max(k, 32)
    groups = [g for g in (16, 32, 64, 128) if shortest <= g <= longest] or [32]
    found: list[Scheme] = [
        QuantScheme(bits, base.symmetric, "group", g, codebook)
        for bits in (2, 3, 4)
        for codebook in dict.fromkeys((None, base.codebook))
        for g in groups
    ]
    return (*found, QuantScheme(8, granularity="channel", group_size=None), FloatScheme("f16"))


def mode_for(model: Model, n_tokens: int) -> Mode:
    """The mode for a model where none is asked for: "kl" if that takes minutes, else "scaled".

    Args:
        model: of any size.
        n_tokens: of the text.
    """
    shapes = list(model.config.linears())
    # each matrix at some four numbers of bits takes the model from its layer on
    weights = sum(n * k for _, (n, k) in shapes)
    return "kl" if 2 * len(shapes) * n_tokens * weights <= EXACT_WORK else "scaled"


def measure_sensitivity(
    model: Model,
    calibration: Calibration,
    base: QuantScheme,
    *,
    method: str = "mse",
    options: Mapping[str, Any] | None = None,
    mode: Mode | None = "kl",
    names: Iterable[str] | None = None,
    scratch: Path | None = None,
    progress: Progress | None = None,
) -> Sensitivity:
    """Try every matrix of a float model in every scheme it might get.

    Memory is that of two walks (`edgeq.quant.walk`) and the second moments of one site's inputs.
    "kl" rounds each matrix by the method and walks on with it five times, eight with palettes;
    "scaled" and "output" only round it without data, once for every scheme, and factor each site's
    moments; "scaled" then walks on once for each kind of matrix in each third of the layers, and
    four times for embedding and head.

    Args:
        model: float; of a quantized one, its weights as they are rounded count as exact.
        calibration: windows of text. A few thousand tokens are enough: what is compared is the
            same text with and without one tensor rounded.
        base: of the recipe's default; see `candidates`.
        method: the recipe's; embedding and head are rounded without data, as in an artifact.
        options: of the method, the recipe's; "crossed" has nothing to make up for here.
        mode: of `MODES`; `mode_for` the model if None.
        names: only these matrices; all if None.
        scratch: a folder for a temporary file of rounded matrices ("scaled"); the system's if None.
        progress: called with what is measured, steps done, and of how many.

    Raises:
        UsageError: an unknown mode or method.
    """
    mode = mode or mode_for(model, calibration.n_tokens)
    if mode not in MODES:
        raise UsageError(unknown("mode", mode, MODES))
    check_method(method, NEEDS.values())
    shapes = dict(model.config.linears())
    wanted = set(shapes if names is None else names)
    with Spill(scratch) as spill:
        trials = _Trials(model, calibration, base, method, options or {}, mode, spill)
        losses = trials.run(wanted, progress or (lambda label, done, total: None))
    ordered = {name: losses[name] for name in shapes if name in losses}
    return Sensitivity(
        mode,
        method,
        calibration.n_tokens,
        calibration.text_sha256,
        model_sha256(model),
        ordered,
    )


class _Trials:
    """One tensor after the other, rounded alone; or all of a kind together."""

    def __init__(
        self,
        model: Model,
        calibration: Calibration,
        base: QuantScheme,
        method: str,
        options: Mapping[str, Any],
        mode: Mode,
        spill: Spill,
    ) -> None:
        self._model, self._base, self._mode = model, base, mode
        self._method = method
        self._options = {name: value for name, value in options.items() if name != "crossed"}
        self._windows = calibration.windows
        self._spill = spill
        self._every = EVERY if mode == "scaled" else 1
        self._float: Walk | None = None
        if mode != "output":
            self._float = walked(Walk(model, self._windows))

    def run(self, wanted: set[str], progress: Progress) -> dict[str, dict[str, float]]:
        """Losses by scheme of each wanted matrix, in the order of the walk."""
        config = self._model.config
        walk = Walk(self._model, self._windows)
        start = None
        losses: dict[str, dict[str, float]] = {}
        kinds: dict[tuple[str, int], _Kind] = {}
        scaled = self._mode == "scaled"
        steps = len(wanted)
        if scaled:
            steps += len({_kind(name, config.layers) for name in wanted if _in_layer(name)})
        for stage in walk:
            if stage.site.kind == "attn_in":
                start = walk.state()
            names = [name for name in stage.site.linears if name in wanted]
            if not names:
                continue
            inputs = self._inputs(stage)
            for name in names:
                if stage.site.kind == "head":
                    # a tied head is the embedding too, which only a whole walk sees
                    start = None if config.tied else walk.state()
                progress(f"rounding {name} at every precision", len(losses), steps)
                losses[name] = self._losses(name, stage.weights[name], inputs, start)
                if scaled and _in_layer(name):
                    kind = kinds.setdefault(_kind(name, config.layers), _Kind(start))
                    self._disturb(kind, name, stage.weights[name], inputs)
        if not config.tied and EMBEDDING in wanted:
            progress(f"rounding {EMBEDDING} at every precision", len(losses), steps)
            table = self._model.tensors[EMBEDDING].numpy()
            losses[EMBEDDING] = self._losses(EMBEDDING, table, None, None)
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
        """Add a matrix, rounded plainly to the base's bits, to those that are tried together."""
        scheme = replace(self._base, bits=min(self._base.bits, 4), codebook=None)
        fits = candidates(scheme, w.shape[1])
        if scheme not in fits:  # its groups are longer than the row
            scheme = next(s for s in fits if isinstance(s, QuantScheme) and s.bits == scheme.bits)
        plain = _Inputs(FALLBACK).rounded(w, scheme, name, {})
        some, rounded = _sampled(w), _sampled(plain.numpy())
        signal = weighted_error(some, np.zeros_like(some), inputs.moments)
        if signal > 0:
            kind.error += weighted_error(some, rounded, inputs.moments) / signal
        kind.tensors[name] = self._spill.put(plain)

    def _inputs(self, stage: Stage) -> _Inputs:
        moments: Hessian | None = None
        for x in stage.inputs():
            moments = moments or Hessian(x.shape[1])
            moments.add(x)
        assert moments is not None  # a walk has windows
        method = alone(self._method) if stage.site.kind == "head" else self._method
        if method != "gptq":
            return _Inputs(method, moments)
        pivots = Factor.of(damped(moments.matrix, DAMPING)).pivots
        return _Inputs(method, moments, float(pivots.mean()))

    def _losses(self, name: str, w: Array, inputs: _Inputs | None, start: Any) -> dict[str, float]:
        inputs = inputs or _Inputs(alone(self._method))
        relative = self._mode == "output" or (self._mode == "scaled" and _in_layer(name))
        found: dict[str, float] = {}
        some = w if self._mode == "kl" else _sampled(w)
        signal = weighted_error(some, np.zeros_like(some), inputs.moments)
        measured: dict[Any, tuple[float, float]] = {}
        errors: dict[Scheme, float] = {}
        for scheme in candidates(self._base, w.shape[1]):
            error = errors[scheme] = self._error(some, scheme, name, inputs, errors)
            if relative:
                found[str(scheme)] = error / signal if signal > 0 else 0.0
                continue
            kind = self._like(scheme)
            if kind not in measured:
                tensor = inputs.rounded(w, scheme, name, self._options)
                measured[kind] = self._divergence({name: tensor}, start), error
            loss, at = measured[kind]
            found[str(scheme)] = loss * error / at if at > 0 else loss
        return found

    def _error(
        self, w: Array, scheme: Scheme, name: str, inputs: _Inputs, known: Mapping[Scheme, float]
    ) -> float:
        """Squared error of the outputs; beyond "kl", of palettes in longer groups foretold.

        Finding a palette takes long, and longer groups add to its error in the proportion in which
        they add to that of evenly spaced codes.
        """
        if self._mode != "kl" and isinstance(scheme, QuantScheme) and scheme.codebook:
            plain = replace(scheme, codebook=None)
            for other, error in known.items():
                if isinstance(other, QuantScheme) and other.codebook and other.bits == scheme.bits:
                    shortest = known[replace(other, codebook=None)]
                    return error * known[plain] / shortest if shortest > 0 else error
        return inputs.error(w, scheme, name)

    def _like(self, scheme: Scheme) -> Any:
        """Schemes of one kind are measured once, and told apart by their errors."""
        bits = scheme.bits if isinstance(scheme, QuantScheme) else 16
        if self._mode == "scaled":
            return min(bits, 8)
        return bits, scheme.codebook if isinstance(scheme, QuantScheme) else None

    def _divergence(self, tensors: Mapping[str, Tensor], start: Any) -> float:
        """Mean KL in nats per token of the float model to the one with these tensors."""
        assert self._float is not None
        walk = Walk(self._model, self._windows, replaced=tensors, state=start)
        return mean_divergence(self._float, walked(walk), self._every)


@dataclass
class _Kind:
    """Matrices of one kind in one part of the depth, rounded together.

    Args:
        start: of the walk, at the first of their layers.
        tensors: the rounded ones.
        error: sum of the relative squared errors of their outputs.
    """

    start: Any
    tensors: dict[str, Tensor] = field(default_factory=dict)
    error: float = 0.0


def _sampled(w: Array) -> Array:
    """Some rows, evenly spread."""
    wanted = max(SAMPLED_ROWS, len(w) // SAMPLED_SHARE)
    return w[:: max(len(w) // wanted, 1)]


def _in_layer(name: str) -> bool:
    return name.startswith("model.layers.")


def _kind(name: str, layers: int) -> tuple[str, int]:
    """What kind of matrix it is, and in which part of the depth."""
    _, _, layer, _, matrix, _ = name.split(".")
    return matrix, int(layer) * BANDS // layers


@dataclass(frozen=True)
class _Inputs:
    """What is known of a site's inputs, and how its matrices are rounded by it.

    Args:
        method: of `edgeq.quant.METHODS`.
        moments: second moments; None for a table that is only looked up in.
        pivot: mean of the factor's, where the method is "gptq".
    """

    method: str
    moments: Hessian | None = None
    pivot: float | None = None

    def rounded(self, w: Array, scheme: Scheme, name: str, options: Mapping[str, Any]) -> Tensor:
        """A matrix as the recipe will have it."""
        if isinstance(scheme, FloatScheme):
            return FloatTensor("F16", w.astype(np.float16))
        importance = None if self.moments is None else self.moments.diagonal
        return quantize_tensor(
            w, scheme, self.method, name=name,
            importance=importance, hessian=self.moments, **options,
        )  # fmt: skip

    def error(self, w: Array, scheme: Scheme, name: str) -> float:
        """Squared error of the outputs: measured, or foretold where that would take GPTQ."""
        if self.pivot is None:
            return weighted_error(w, self.rounded(w, scheme, name, {}).numpy(), self.moments)
        plain = _Inputs(FALLBACK).rounded(w, scheme, name, {})
        return self.pivot * weighted_error(w, plain.numpy(), None)


def walked(walk: Walk) -> Walk:
    """A walk gone to its end, where it knows its logits."""
    for _ in walk:
        pass
    return walk


def mean_divergence(base: Walk, other: Walk, every: int = 1) -> float:
    """Mean KL in nats per token between two walks over the same windows, gone to their ends.

    Args:
        base: of the float model.
        other: of the rounded one.
        every: taken at one position in so many.
    """
    total = n = 0.0
    for p, q in zip(base.logits(every), other.logits(every), strict=True):
        step = max(1, BLOCK_ELEMENTS // p.shape[1])
        for start in range(0, len(p), step):
            part = slice(start, start + step)
            divergences = kl_divergence(log_softmax(p[part]), log_softmax(q[part]))
            total += float(divergences.sum())
            n += divergences.size
    return total / n
