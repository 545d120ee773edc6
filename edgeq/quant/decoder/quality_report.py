"""The quality report: the effect of quantization, measured on the tensors of the artifact.

The float source and the written model run the same windows of a text in parallel, layer by layer
(`edgeq.quant.decoder.replay`), so that the memory is about one layer of each:

    hidden states    SQNR after the embedding and after each layer
    logits           KL divergence, top-1 agreement, flips, and perplexity of both models
                     (`edgeq.evaluation.text`)

Both compute in float32, so that only the weights differ, and the inputs of matrices if the recipe
rounds activations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from edgeq.core.errors import FormatError
from edgeq.core.progress import Progress
from edgeq.evaluation.text import BLOCK_ELEMENTS, Evaluation, Tally, protocol_words
from edgeq.model.config import ModelConfig
from edgeq.model.formulas import Array, Linear
from edgeq.model.model import Model
from edgeq.quant.decoder.calibrate import CalibrationText
from edgeq.quant.decoder.replay import Replay
from edgeq.quant.kernels.products import squares
from edgeq.quant.rounders.rounding import sqnr_db

TEXT = "quality_text.txt"
"""The file beside this module with the default text of the report."""
CONTEXT = 256
"""Tokens per window."""
_WORK = 3 * 10**11
_TOKENS = (CONTEXT, 8 * CONTEXT)
_DIGITS = 7
_WIDEST = -1.2345678e-300
"""A number whose text is at least as long as that of any number in the report."""
_REASON = 300
"""Most characters of a reason, because its place in the file is reserved before it is known."""


@dataclass(frozen=True)
class Inputs:
    """How the inputs of the quantized model's matrices are rounded.

    Args:
        words: a description, for the protocol of the report.
        linear: wraps a product so that it rounds its input; None for no rounding.
    """

    words: str = "float32 arithmetic"
    linear: Callable[[Linear], Linear] | None = None


FLOAT = Inputs()
"""Inputs that are not rounded."""


@dataclass(frozen=True)
class HeldOut:
    """A text that is not used for quantization.

    Args:
        name: name of the text.
        cut: the windows of the text.
    """

    name: str
    cut: CalibrationText

    @property
    def n_tokens(self) -> int:
        """Number of tokens of all windows, including BOS."""
        return sum(window.size for window in self.cut.windows)

    def protocol(self, inputs: str) -> str:
        """A description of windows, scoring and arithmetic.

        Args:
            inputs: how the inputs of matrices are rounded, in words.
        """
        cut = protocol_words(self.cut.context, self.cut.bos is not None, "all", None)
        return (
            f"{cut}, {len(self.cut.windows)} windows spread over the text; "
            f"weights as written, {inputs}"
        )


@dataclass(frozen=True)
class QualityReport:
    """The difference between a quantized model and its source; None is "not measured".

    Args:
        reason: the reason why nothing was measured; None if it was measured.
        text: name of the text.
        text_sha256: SHA-256 of the text's bytes.
        evaluation: comparison of the model with its source.
        hidden_sqnr_db: SQNR of the hidden states in dB: of the embeddings, then after each layer;
            None if they are equal.
    """

    reason: str | None = None
    text: str | None = None
    text_sha256: str | None = None
    evaluation: Evaluation | None = None
    hidden_sqnr_db: tuple[float | None, ...] = field(default_factory=tuple)

    def __repr__(self) -> str:
        evaluation = self.evaluation
        if evaluation is None:
            return f"<QualityReport not measured: {self.reason}>"
        return (
            f"<QualityReport KL {figure(evaluation.kl_mean, 4)} nats per token, perplexity "
            f"{figure(evaluation.base_ppl, 3)} -> {figure(evaluation.ppl, 3)}, on {self.text}>"
        )

    def to_dict(self) -> dict[str, Any]:
        """The report as the artifact stores it in JSON, with numbers of seven digits."""
        if self.evaluation is None:
            return {"not_measured": (self.reason or "")[:_REASON]}
        measured = {
            name: _short(value)
            for name, value in asdict(self.evaluation).items()
            if name != "bits_per_byte"
        }
        return {
            "text": self.text,
            "text_sha256": self.text_sha256,
            **measured,
            "hidden_sqnr_db": [_short(value) for value in self.hidden_sqnr_db],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QualityReport:
        """Read a report that `to_dict` made.

        Raises:
            FormatError: a field is missing, unknown or of another type.
        """
        try:
            if "not_measured" in data:
                return cls(reason=str(data["not_measured"]))
            values = dict(data)
            hidden = tuple(values.pop("hidden_sqnr_db"))
            return cls(
                text=values.pop("text"),
                text_sha256=values.pop("text_sha256"),
                hidden_sqnr_db=hidden,
                evaluation=Evaluation(**values),
            )
        except (KeyError, TypeError) as err:
            raise FormatError(
                f"the quality report of the artifact is damaged: {err!r}; quantize the model again"
            ) from err

    @classmethod
    def widest(
        cls, config: ModelConfig, held_out: HeldOut, inputs: Inputs = FLOAT
    ) -> QualityReport:
        """A placeholder whose JSON is at least as long as any report of this model and text."""
        names = [name for name in Evaluation.__dataclass_fields__ if name != "protocol"]
        return cls(
            text=held_out.name + " " * _REASON,
            text_sha256="0" * 64,
            evaluation=Evaluation(held_out.protocol(inputs.words), **dict.fromkeys(names, _WIDEST)),  # type: ignore[arg-type]
            hidden_sqnr_db=(_WIDEST,) * (config.layers + 1),
        )


def card_tokens(weights: int) -> int:
    """Number of tokens for a report, which takes seconds for small models and 30 s at 1B."""
    least, most = _TOKENS
    return min(max(_WORK // weights // CONTEXT * CONTEXT, least), most)


def card_bytes(config: ModelConfig, held_out: HeldOut) -> int:
    """Most bytes of memory that `measure` needs in addition to those in use."""
    longest = max(window.size for window in held_out.cut.windows)
    widest = max(n * k for name, (n, k) in config.linears() if name != config.head_name)
    # gate and up of a layer as float32 for both models, and the matrix that is being converted
    layer = 2 * 2 * 4 * widest + 4 * widest
    logits = logits_bytes(config, longest)
    kept = 2 * config.hidden + max(config.ffn, config.mix_width)
    return 2 * 4 * held_out.n_tokens * kept + max(layer, logits)


def logits_bytes(config: ModelConfig, longest: int) -> int:
    """Most bytes of memory while the logits of two models for one window are compared.

    These are the logits of both models, a block of the head, and log-probabilities in float64.
    """
    return 2 * 4 * longest * config.vocab + (4 + 6 * 8) * BLOCK_ELEMENTS


def measure(
    model: Model,
    base: Model,
    held_out: HeldOut,
    *,
    inputs: Inputs = FLOAT,
    progress: Progress | None = None,
) -> QualityReport:
    """Compare a quantized model with its source.

    Args:
        model: the quantized model as it was written.
        base: the float source.
        held_out: a text that was not used for calibration.
        inputs: how the inputs of the model's matrices are rounded.
        progress: called with ("quality card", groups done, number of groups).

    Returns:
        the report; without numbers and with the reason if nothing could be measured.
    """
    move = progress or (lambda label, done, total: None)
    windows = held_out.cut.windows
    if max(window.size for window in windows) < 2:
        return QualityReport(reason=f"{held_out.name} is too short: no token has one before it")
    replays = [
        Replay(base, windows, progress=lambda _, *at: move("quality card", *at)),
        Replay(model, windows, linear=inputs.linear),
    ]
    ratios: list[float | None] = []
    for step, _ in zip(*replays, strict=True):
        if step.group.kind in ("attn_in", "head"):
            ratios.append(_hidden_sqnr(*(replay.state().hidden for replay in replays)))
    tally = Tally()
    try:
        for window, before, after in zip(
            windows, *(replay.logits() for replay in replays), strict=True
        ):
            tally.add(window[1:], after[:-1], before[:-1])
    except FormatError as err:
        return QualityReport(reason=str(err))
    return QualityReport(
        text=held_out.name,
        text_sha256=held_out.cut.text_sha256,
        evaluation=tally.result(held_out.protocol(inputs.words)),
        hidden_sqnr_db=tuple(ratios),
    )


def figure(value: float | None, digits: int) -> str:
    """A number of the report as text; a dash for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def _hidden_sqnr(base: Sequence[Array], model: Sequence[Array]) -> float | None:
    signal = _squares(base)
    return sqnr_db(signal, _squares(b - m for b, m in zip(base, model, strict=True)))


def _squares(arrays: Iterable[Array]) -> float:
    return sum(squares(x) for x in arrays)


def _short(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
