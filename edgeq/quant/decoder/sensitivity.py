"""Sensitivity: the loss of a model when one tensor is stored in fewer bits.

The loss is measured for every tensor and every candidate scheme, in one of three modes:

    kl       KL divergence in nats per token between the float model and the model in which only
             this tensor is rounded, by the method of the recipe. It is measured once for each
             number of bits, and separately for palettes, by a replay from the tensor's layer on.
             The losses of other group sizes are scaled by their output errors, because the
             divergence of a small error grows with its square.
    scaled   an estimate in nats per token: the relative squared error of each matrix's output,
             multiplied by the divergence per unit of error. That factor is measured for each kind
             of matrix (q_proj, down_proj, ...) in each third of the layers, by rounding all
             matrices of the kind there together. Embedding and head, which are few and large, are
             measured as in the mode "kl"; a tied matrix is rounded at both of its uses.
    output   the relative squared error of the matrix's output, tr(E H E') / tr(W H W'), where H are
             the second moments of its inputs. One replay measures all of them. These errors are not
             additive over kinds of matrices, so bits cannot be chosen by them.

GPTQ is slow, so the modes "scaled" and "output" estimate its output error. With H = M D M'
(`edgeq.quant.rounders.gptq`) the error is the sum over columns k of D_k (rounding error)^2. The
distance of a number to the nearest level hardly depends on the column, so mean(D) |W - W'|^2, with
W' rounded to nearest, is an estimate of it.

The divergences of several tensors are nearly additive, which `edgeq.quant.decoder.allocate` relies
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
"""Most multiplications for which "kl" is the default mode, which take minutes."""
FORMAT_VERSION = 2


@dataclass(frozen=True)
class Sensitivity:
    """Losses of each tensor in each scheme.

    Args:
        mode: "kl" or "scaled" for losses in nats per token, "output" for relative squared errors.
        method: method by which tensors were rounded.
        n_tokens: number of tokens of the calibration text that were replayed.
        text_sha256: SHA-256 of the text.
        model_sha256: `model_sha256` of the float model.
        losses: name of a tensor -> text form of a scheme -> loss.
    """

    mode: Mode
    method: str
    n_tokens: int
    text_sha256: str
    model_sha256: str
    losses: Mapping[str, Mapping[str, float]]

    def to_json(self) -> str:
        """The losses as the text of a JSON file."""
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
        """Read a file that `to_json` made.

        Raises:
            FormatError: the file cannot be read, or is not a sensitivity file.
        """
        try:
            data = read_document(Path(path), "give a file that 'edgeq sensitivity' wrote")
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
                raise FormatError(
                    f"{path} has losses that are not finite numbers; measure again with "
                    "'edgeq sensitivity'"
                )
            return cls(
                mode, str(data["method"]), int(data["n_tokens"]),
                data["text_sha256"], data["model_sha256"], losses,
            )  # fmt: skip
        except (KeyError, TypeError, ValueError, AttributeError) as err:
            raise FormatError(f"{path} is not a sensitivity file: {err!r}") from err

    def check_model(self, model: Model) -> None:
        """Refuse a model on which these sensitivities were not measured.

        Raises:
            UsageError: the weights of the model differ.
        """
        if self.model_sha256 != model_sha256(model):
            raise UsageError(
                "the sensitivities were measured on another model (its SHA-256 differs); "
                "measure this model with 'edgeq sensitivity'"
            )

    def suited(self, base: QuantScheme) -> Sensitivity:
        """The losses of the schemes that a recipe may use: palettes only if its default is one.

        Raises:
            UsageError: the recipe uses palettes and their losses were not measured, or the losses
                are not in nats and therefore not additive.
        """
        if self.mode == "output":
            raise UsageError(
                "the sensitivities are relative output errors, which are not additive over "
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
    """The default mode for a model: "kl" if that takes only minutes, else "scaled".

    Args:
        model: the model.
        n_tokens: number of tokens of the text.
    """
    shapes = list(model.config.linears())
    # each matrix is measured at about six numbers of bits by a replay from its layer on
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
    """Measure the loss of every matrix of a float model in every candidate scheme.

    The memory is that of two replays (`edgeq.quant.decoder.replay`) and of the second moments of
    one group's inputs. "kl" rounds each matrix by the method and replays the model from its layer
    on seven times (ten times with palettes). "scaled" and "output" only round each matrix without
    data, once for every scheme, and factor the moments of each group. "scaled" then replays the
    model once for each kind of matrix in each third of the layers, and six times for embedding and
    head.

    Args:
        model: a float model. The rounded weights of a quantized model count as exact.
        calibration: windows of text. A few thousand tokens are enough, because the same text is
            compared with and without one rounded tensor.
        base: the default scheme of the recipe; see `candidates`.
        method: method of the recipe. Embedding and head are rounded without data, as in an
            artifact.
        options: options of the recipe's method; "use_quantized_inputs" has no effect here.
        mode: a name of `MODES`; None for the mode that `mode_for` gives.
        names: names of the matrices to measure; all if None.
        scratch: folder for a temporary file of rounded matrices ("scaled"); None for that of the
            system.
        progress: called with what is measured, steps done, and number of steps.

    Raises:
        UsageError: the mode or the method is unknown.
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
