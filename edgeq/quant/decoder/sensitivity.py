"""Sensitivity: how much the model loses when a tensor is stored in fewer bits.

It is measured for every tensor and every scheme it might get, in one of three modes:

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
             with H the second moments of its inputs: one replay for all. These errors do not add up
             over kinds of matrices, so bits cannot be chosen by them.

GPTQ, which takes long, is not carried out for output errors. With H = M D M'
(`edgeq.quant.rounders.gptq`)
what it leaves is the sum over columns of D_k (error of rounding there)^2, and how far numbers lie
from the nearest level has little to do with the column: mean(D) |W - W'|^2 with W' rounded by
itself estimates it.

Divergences of several tensors add up, nearly: that is what `edgeq.quant.decoder.allocate` counts
on.

Source: sensitivity by the divergence of the output, Cai et al. 2020, "ZeroQ" (arXiv:2001.00281),
section 3.2; its sum over layers as the objective, equation 6; GPTQ's error by D, Chee et al.
2023, "QuIP" (arXiv:2307.13304), theorem 1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgeq.core.documents import read_document
from edgeq.core.errors import FormatError, UsageError, unknown
from edgeq.core.progress import Progress
from edgeq.formats.schemes import QuantScheme
from edgeq.formats.spill import Spill
from edgeq.model.model import Model
from edgeq.quant.decoder.calibrate import CalibrationText, model_sha256
from edgeq.quant.decoder.losses import Mode, Trials
from edgeq.quant.rounders.rounding import METHOD_INPUTS, check_method

MODES = ("kl", "scaled", "output")
EXACT_WORK = 10**13
"""Multiplications up to which "kl" is the mode that is chosen where none is asked for: minutes."""
FORMAT_VERSION = 2


@dataclass(frozen=True)
class Sensitivity:
    """Losses of each tensor in each scheme.

    Args:
        mode: "kl" or "scaled" in nats per token, or "output" as a ratio of squares.
        method: how tensors were rounded.
        n_tokens: of the calibration text that were replayed.
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
                "losses": {name: dict(nats) for name, nats in self.losses.items()},
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
            data = read_document(Path(path), "give what 'edgeq sensitivity' wrote")
            if data["format"] != "edgeq-sensitivity" or data["format_version"] != FORMAT_VERSION:
                raise FormatError(
                    f"{path} does not have version {FORMAT_VERSION} of the format, which records "
                    "how tensors were rounded; make it again with 'edgeq sensitivity'"
                )
            losses = {
                name: {text: float(loss) for text, loss in nats.items()}
                for name, nats in data["losses"].items()
            }
            mode: Any = data["mode"]
            if mode not in MODES:
                raise FormatError(f"{path}: {unknown('mode', str(mode), MODES)}")
            if not all(math.isfinite(loss) for nats in losses.values() for loss in nats.values()):
                raise FormatError(f"{path} holds losses that are not finite numbers")
            return cls(
                mode, str(data["method"]), int(data["n_tokens"]),
                data["text_sha256"], data["model_sha256"], losses,
            )  # fmt: skip
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
        """The losses of schemes that a recipe may use: palettes only where its default is one.

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
            if not any("palette" in text for nats in self.losses.values() for text in nats):
                raise UsageError(
                    "the sensitivity file has no palettes, but the default of the recipe is "
                    f"{base}; measure them too: edgeq sensitivity --palette"
                )
            return self
        losses = {
            name: {text: loss for text, loss in nats.items() if "palette" not in text}
            for name, nats in self.losses.items()
        }
        return replace(self, losses=losses)


def mode_for(model: Model, n_tokens: int) -> Mode:
    """The mode for a model where none is asked for: "kl" if that takes minutes, else "scaled".

    Args:
        model: of any size.
        n_tokens: of the text.
    """
    shapes = list(model.config.linears())
    # each matrix at some six numbers of bits takes the model from its layer on
    weights = sum(n * k for _, (n, k) in shapes)
    return "kl" if 3 * len(shapes) * n_tokens * weights <= EXACT_WORK else "scaled"


def measure_sensitivity(
    model: Model,
    calibration: CalibrationText,
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

    Memory is that of two replays (`edgeq.quant.decoder.replay`) and the second moments of one
    group's inputs.
    "kl" rounds each matrix by the method and walks on with it seven times, ten with palettes;
    "scaled" and "output" only round it without data, once for every scheme, and factor each group's
    moments; "scaled" then walks on once for each kind of matrix in each third of the layers, and
    six times for embedding and head.

    Args:
        model: float; of a quantized one, its weights as they are rounded count as exact.
        calibration: windows of text. A few thousand tokens are enough: what is compared is the
            same text with and without one tensor rounded.
        base: of the recipe's default; see `candidates`.
        method: the recipe's; embedding and head are rounded without data, as in an artifact.
        options: of the method, the recipe's; "use_quantized_inputs" has no effect here.
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
    check_method(method, METHOD_INPUTS.values())
    shapes = dict(model.config.linears())
    wanted = set(shapes if names is None else names)
    with Spill(scratch) as spill:
        trials = Trials(model, calibration, base, method, options or {}, mode, spill)
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
