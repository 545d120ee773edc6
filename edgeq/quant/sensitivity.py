"""How much each tensor minds being held in fewer bits.

Two ways to say it, for every tensor and every scheme it might get:

    kl       nats a token: the divergence of the whole model from the float one when this tensor
             alone is rounded, by the method that the recipe rounds with. Measured once for each
             number of bits, and for palettes apart, by walking on from the tensor's layer; other
             group sizes are scaled by their output errors, since the divergence of a small
             disturbance grows with its square.
    output   the relative squared error of what the matrix puts out, tr(E H E') / tr(W H W'),
             with H the second moments of its inputs: one walk for all, a proxy.

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
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from edgeq.errors import FormatError, UsageError, unknown
from edgeq.evaluate import kl_divergence, log_softmax
from edgeq.model import Model
from edgeq.quant.calibrate import Calibration, model_sha256
from edgeq.quant.hessian import Factor, Hessian, damped, weighted_error
from edgeq.quant.rounding import FALLBACK, NEEDS, alone, check_method, quantize_tensor
from edgeq.quant.walk import Stage, Walk
from edgeq.reference import Array
from edgeq.schemes import FloatScheme, QuantScheme, Scheme
from edgeq.tensor import FloatTensor, QuantTensor, Tensor

Progress = Callable[[str, int, int], None]
Mode = Literal["kl", "output"]
MODES = ("kl", "output")
DAMPING = 0.01
"""What GPTQ's error is foretold with, in parts of the mean of H's diagonal."""
FORMAT_VERSION = 2
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Sensitivity:
    """Losses of each tensor in each scheme.

    Args:
        mode: "kl" in nats a token, or "output" as a ratio of squares.
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
                    f"{path} does not have version {FORMAT_VERSION} of the format, which records "
                    "how tensors were rounded; make it again with 'edgeq sensitivity'"
                )
            losses = {
                name: {text: float(loss) for text, loss in found.items()}
                for name, found in data["losses"].items()
            }
            mode: Any = data["mode"]
            return cls(
                mode, str(data["method"]), int(data["n_tokens"]),
                data["text_sha256"], data["model_sha256"], losses,
            )  # fmt: skip
        except OSError as err:
            raise FormatError(f"{path} cannot be read: {err.strerror or err}") from err
        except UnicodeDecodeError as err:  # whose repr would hold the whole file
            raise FormatError(f"{path} is not a sensitivity file: it is not text ({err})") from err
        except (KeyError, TypeError, ValueError, AttributeError) as err:
            raise FormatError(f"{path} is not a sensitivity file: {err!r}") from err

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
            UsageError: there are no palettes, and the recipe wants them.
        """
        if base.codebook:
            if not any("palette" in text for found in self.losses.values() for text in found):
                raise UsageError(
                    "the sensitivity file has no palettes, but the default of the recipe is "
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


def measure_sensitivity(
    model: Model,
    calibration: Calibration,
    base: QuantScheme,
    *,
    method: str = "mse",
    options: Mapping[str, Any] | None = None,
    mode: Mode = "kl",
    names: Iterable[str] | None = None,
    progress: Progress | None = None,
) -> Sensitivity:
    """Try every matrix of a float model in every scheme it might get.

    Memory is that of two walks (`edgeq.quant.walk`) and the second moments of one site's inputs.
    "kl" rounds each matrix by the method and walks on with it five times, eight with palettes;
    "output" only rounds it without data, once for every scheme, and factors each site's moments.

    Args:
        model: float.
        calibration: windows of text. A few thousand tokens are enough: what is compared is the
            same text with and without one tensor rounded.
        base: of the recipe's default; see `candidates`.
        method: the recipe's; embedding and head are rounded without data, as in an artifact.
        options: of the method, the recipe's; "crossed" has nothing to make up for here.
        mode: "kl" or "output".
        names: only these matrices; all if None.
        progress: called with a tensor's name, tensors done, and of how many.

    Raises:
        UsageError: an unknown mode, or a model that is quantized already.
    """
    if mode not in MODES:
        raise UsageError(unknown("mode", mode, MODES))
    check_method(method, NEEDS.values())
    shapes = dict(model.config.linears())
    wanted = set(shapes if names is None else names)
    for name in shapes:
        if isinstance(model.tensors[name], QuantTensor):
            raise UsageError(
                f"{name} is quantized already ({model.tensors[name].scheme}); "  # type: ignore[attr-defined]
                "measure the checkpoint it was made from"
            )
    trials = _Trials(model, calibration, base, method, options or {}, mode)
    losses: dict[str, dict[str, float]] = {}
    for name, found in trials.run(wanted):
        losses[name] = found
        if progress:
            progress(name, len(losses), len(wanted))
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
    """One tensor after the other, rounded alone."""

    def __init__(
        self,
        model: Model,
        calibration: Calibration,
        base: QuantScheme,
        method: str,
        options: Mapping[str, Any],
        mode: Mode,
    ) -> None:
        self._model, self._base, self._mode = model, base, mode
        self._method = method
        self._options = {name: value for name, value in options.items() if name != "crossed"}
        self._windows = calibration.windows
        self._float: Walk | None = None
        if mode == "kl":
            self._float = walked(Walk(model, self._windows))

    def run(self, wanted: set[str]) -> Iterator[tuple[str, dict[str, float]]]:
        """Losses by scheme of each wanted matrix, in the order of the walk."""
        config = self._model.config
        walk = Walk(self._model, self._windows)
        start = None
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
                yield name, self._losses(name, stage.weights[name], inputs, start)
        if not config.tied and EMBEDDING in wanted:
            table = self._model.tensors[EMBEDDING].numpy()
            yield EMBEDDING, self._losses(EMBEDDING, table, None, None)

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
        found: dict[str, float] = {}
        signal = weighted_error(w, np.zeros_like(w), inputs.moments)
        measured: dict[tuple[int, str | None], tuple[float, float]] = {}
        for scheme in candidates(self._base, w.shape[1]):
            error = inputs.error(w, scheme, name)
            if self._mode == "output":
                found[str(scheme)] = error / signal if signal > 0 else 0.0
                continue
            kind = (scheme.bits, scheme.codebook) if isinstance(scheme, QuantScheme) else (16, None)
            if kind not in measured:
                tensor = inputs.rounded(w, scheme, name, self._options)
                measured[kind] = self._divergence(name, tensor, start), error
            loss, at = measured[kind]
            found[str(scheme)] = loss * error / at if at > 0 else loss
        return found

    def _divergence(self, name: str, tensor: Tensor, start: Any) -> float:
        """Mean KL in nats of the float model to the one with this tensor."""
        assert self._float is not None
        walk = Walk(self._model, self._windows, replaced={name: tensor}, state=start)
        return mean_divergence(self._float, walked(walk))


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


def mean_divergence(base: Walk, other: Walk) -> float:
    """Mean KL in nats a token between two walks over the same windows, gone to their ends."""
    total = n = 0.0
    for p, q in zip(base.logits(), other.logits(), strict=True):
        divergences = kl_divergence(log_softmax(p), log_softmax(q))
        total += float(divergences.sum())
        n += divergences.size
    return total / n
