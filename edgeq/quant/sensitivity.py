"""How much each tensor minds being held in fewer bits.

Two ways to say it, for every tensor and every scheme it might get:

    kl       nats a token: the divergence of the whole model from the float one when this tensor
             alone is rounded. Measured once for each number of bits, by walking on from the
             tensor's layer; other group sizes of as many bits are scaled by their output errors,
             since the divergence of a small disturbance grows with its square.
    output   the relative squared error of what the matrix puts out, tr(E H E') / tr(W H W'),
             with H the second moments of its inputs: one walk for all, a proxy.

Divergences of several tensors add up, nearly: that is what `edgeq.quant.allocate` counts on.

Source: sensitivity by the divergence of the output, Cai et al. 2020, "ZeroQ" (arXiv:2001.00281),
section 3.2; its sum over layers as the objective, equation 6.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from edgeq.errors import FormatError, UsageError, unknown
from edgeq.evaluate import kl_divergence, log_softmax
from edgeq.model import Model
from edgeq.quant.calibrate import Calibration, model_sha256
from edgeq.quant.gptq import Hessian, weighted_error
from edgeq.quant.rounding import quantize_tensor
from edgeq.quant.walk import Stage, Walk
from edgeq.reference import Array
from edgeq.schemes import FloatScheme, QuantScheme, Scheme
from edgeq.tensor import FloatTensor, QuantTensor, Tensor

Progress = Callable[[str, int, int], None]
Mode = Literal["kl", "output"]
MODES = ("kl", "output")
METHOD = "mse"
"""How tensors are rounded here: without data, so that only the bits differ."""
FORMAT_VERSION = 1
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Sensitivity:
    """Losses of each tensor in each scheme.

    Args:
        mode: "kl" in nats a token, or "output" as a ratio of squares.
        n_tokens: of the calibration text that were walked.
        text_sha256: of the text.
        model_sha256: of the float model.
        losses: tensor -> scheme's text form -> loss.
    """

    mode: Mode
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
                    f"{path} is not of version {FORMAT_VERSION} of edgeq-sensitivity; "
                    "make it anew with 'edgeq sensitivity'"
                )
            losses = {
                name: {text: float(loss) for text, loss in found.items()}
                for name, found in data["losses"].items()
            }
            mode: Any = data["mode"]
            return cls(
                mode, int(data["n_tokens"]), data["text_sha256"], data["model_sha256"], losses
            )
        except OSError as err:
            raise FormatError(f"{path} cannot be read: {err.strerror or err}") from err
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


def candidates(base: QuantScheme, k: int) -> tuple[Scheme, ...]:
    """Schemes a matrix may get: 2, 3, 4, 8 and 16 bits, those below 8 in groups of several sizes.

    Args:
        base: says whether there are zero points, and the shortest group.
        k: columns; no group is longer than a row.

    Returns:
        Rising bits; of equal bits the base's group first.
    """
    shortest = base.group_size or 32
    longest = max(k, 32)
    groups = [g for g in (16, 32, 64, 128) if shortest <= g <= longest] or [32]
    found: list[Scheme] = [
        QuantScheme(bits, base.symmetric, "group", g) for bits in (2, 3, 4) for g in groups
    ]
    return (*found, QuantScheme(8, granularity="channel", group_size=None), FloatScheme("f16"))


def measure_sensitivity(
    model: Model,
    calibration: Calibration,
    base: QuantScheme,
    *,
    mode: Mode = "kl",
    names: Iterable[str] | None = None,
    progress: Progress | None = None,
) -> Sensitivity:
    """Try every matrix of a float model in every scheme it might get.

    Memory is that of two walks (`edgeq.quant.walk`) and the second moments of one site's inputs.

    Args:
        model: float.
        calibration: windows of text. A few thousand tokens are enough: what is compared is the
            same text with and without one tensor rounded.
        base: of the recipe's default; see `candidates`.
        mode: "kl" or "output".
        names: only these matrices; all if None.
        progress: called with a tensor's name, tensors done, and of how many.

    Raises:
        UsageError: an unknown mode, or a model that is quantized already.
    """
    if mode not in MODES:
        raise UsageError(unknown("mode", mode, MODES))
    shapes = dict(model.config.linears())
    wanted = set(shapes if names is None else names)
    for name in shapes:
        if isinstance(model.tensors[name], QuantTensor):
            raise UsageError(
                f"{name} is quantized already ({model.tensors[name].scheme}); "  # type: ignore[attr-defined]
                "measure the checkpoint it was made from"
            )
    trials = _Trials(model, calibration, base, mode)
    losses: dict[str, dict[str, float]] = {}
    for name, found in trials.run(wanted):
        losses[name] = found
        if progress:
            progress(name, len(losses), len(wanted))
    ordered = {name: losses[name] for name in shapes if name in losses}
    return Sensitivity(
        mode,
        calibration.n_tokens,
        calibration.text_sha256,
        model_sha256(model),
        ordered,
    )


class _Trials:
    """One tensor after the other, rounded alone."""

    def __init__(
        self, model: Model, calibration: Calibration, base: QuantScheme, mode: Mode
    ) -> None:
        self._model, self._base, self._mode = model, base, mode
        self._windows = calibration.windows
        self._float: Walk | None = None
        if mode == "kl":
            self._float = Walk(model, self._windows)
            for _ in self._float:
                pass

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
            moments = _moments(stage)
            for name in names:
                if stage.site.kind == "head":
                    # a tied head is the embedding too, which only a whole walk sees
                    start = None if config.tied else walk.state()
                yield name, self._losses(name, stage.weights[name], moments, start)
        if not config.tied and EMBEDDING in wanted:
            table = self._model.tensors[EMBEDDING].numpy()
            yield EMBEDDING, self._losses(EMBEDDING, table, None, None)

    def _losses(self, name: str, w: Array, moments: Hessian | None, start: Any) -> dict[str, float]:
        found: dict[str, float] = {}
        measured: dict[int, tuple[float, float]] = {}
        for scheme in candidates(self._base, w.shape[1]):
            tensor = _rounded(w, scheme, name)
            error = weighted_error(w, tensor.numpy(), moments)
            bits = scheme.bits if isinstance(scheme, QuantScheme) else 16
            if self._mode == "output":
                signal = weighted_error(w, np.zeros_like(w), moments)
                found[str(scheme)] = error / signal if signal > 0 else 0.0
                continue
            if bits not in measured:
                measured[bits] = self._divergence(name, tensor, start), error
            loss, at = measured[bits]
            found[str(scheme)] = loss * error / at if at > 0 else loss
        return found

    def _divergence(self, name: str, tensor: Tensor, start: Any) -> float:
        """Mean KL in nats of the float model to the one with this tensor."""
        assert self._float is not None
        walk = Walk(self._model, self._windows, replaced={name: tensor}, state=start)
        for _ in walk:
            pass
        total = n = 0.0
        for p, q in zip(self._float.logits(), walk.logits(), strict=True):
            divergences = kl_divergence(log_softmax(p), log_softmax(q))
            total += float(divergences.sum())
            n += divergences.size
        return total / n


def _moments(stage: Stage) -> Hessian:
    moments: Hessian | None = None
    for x in stage.inputs():
        moments = moments or Hessian(x.shape[1])
        moments.add(x)
    assert moments is not None  # a walk has windows
    return moments


def _rounded(w: Array, scheme: Scheme, name: str) -> Tensor:
    if isinstance(scheme, QuantScheme):
        return quantize_tensor(w, scheme, METHOD, name=name)
    return FloatTensor("F16", w.astype(np.float16))
