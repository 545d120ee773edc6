"""A target's logits compared with those of the reference, row by row.

    `Decoding`   prompts and what the target says after them, greedily: logits, greedy tokens
    `Cost`       a text that the target reads token by token: the divergence that its kernels'
                 rounding of inputs causes, and the same of that rounding repeated in NumPy. From
                 layer to layer roundings fall differently and results drift apart, so that the
                 two are no nearer to each other than to exact arithmetic; but a right file costs
                 what its rounding costs

Rows are compared a few at a time, as 300 rows of a vocabulary of 262144 would take 600 MB.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.runners import DecoderRunner
from edgeq.converters.validate.kernels import Kernels
from edgeq.core.errors import FormatError
from edgeq.evaluation.text import kl_divergence, log_softmax
from edgeq.model.model import Model
from edgeq.model.reference import Reference
from edgeq.model.trace import TracedReference

_FED = 32
"""Tokens of a text between two passes of the reference."""
_ROWS = 8
"""Rows of logits compared at once."""

Stepped = Callable[[int], None]
"""Called with how many tokens the target has computed."""


class Decoding:
    """Logits after prompts, gathered prompt by prompt.

    Args:
        model: the source.
        keep: hold the reference's weights as float32; for small models.
    """

    def __init__(self, model: Model, *, keep: bool) -> None:
        self._reference = Reference(model, keep=keep)
        self._vocab = model.config.vocab
        self.chosen: list[tuple[int, ...]] = []
        self.kl: list[float] = []
        self.margins: list[float] = []
        """Logits by which the reference prefers its own choice, where the target's is another."""
        self.max = self._square = 0.0
        self._low, self._high = np.inf, -np.inf
        self.count = self.equal = 0
        self._values = 0

    @property
    def rms(self) -> float:
        """Root mean square difference of all logits."""
        return float((self._square / max(self._values, 1)) ** 0.5)

    @property
    def range(self) -> float:
        """The right logits' largest less their smallest."""
        return float(self._high - self._low)

    def compare(
        self, runner: DecoderRunner, prompt: Sequence[int], steps: int, stepped: Stepped
    ) -> None:
        """Let the target continue a prompt greedily, and the reference read the same tokens.

        Raises:
            FormatError: the output has another vocabulary.
        """
        runner.reset()
        rows = [runner.forward(np.asarray(prompt, np.int64))[-1]]
        stepped(1)
        generated: list[int] = []
        for _ in range(steps):
            generated.append(int(np.argmax(rows[-1])))
            rows.append(runner.forward(np.asarray(generated[-1:], np.int64))[-1])
            stepped(1)
        self.chosen.append((*generated, int(np.argmax(rows[-1]))))
        if rows[0].size != self._vocab:
            raise FormatError(
                f"the output knows {rows[0].size} tokens, the source {self._vocab}; "
                "was it converted from another model?"
            )
        cache = self._reference.new_cache()
        right = [self._reference.forward(prompt, cache, all_logits=False)]
        right += list(self._reference.forward(generated, cache))
        for ours, theirs in zip(right, rows, strict=True):
            self._row(ours.astype(np.float64), theirs.astype(np.float64))

    def _row(self, ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> None:
        difference = theirs - ours
        largest = float(np.abs(difference).max())
        # written so that NaN stays
        self.max = largest if not largest <= self.max else self.max
        self._square += float((difference**2).sum())
        self._values += difference.size
        self._low, self._high = min(self._low, ours.min()), max(self._high, ours.max())
        self.kl.append(float(divergence(ours[None], theirs[None])[0]))
        best, chosen = int(ours.argmax()), int(theirs.argmax())
        self.count += 1
        self.equal += best == chosen
        if best != chosen:
            self.margins.append(float(ours[best] - ours[chosen]))


@dataclass(frozen=True)
class Cost:
    """The cost of a target's rounding on a text, in nats.

    Args:
        target: divergence of the target from exact arithmetic, of each row.
        kernels: of the same rounding in NumPy from exact arithmetic, of each row.
    """

    target: NDArray[np.float64]
    kernels: NDArray[np.float64]

    @property
    def mean(self) -> float:
        """Of the target."""
        return float(self.target.mean())

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return float(self.target.std() / self.target.size**0.5)

    @property
    def expected(self) -> float:
        """Mean of the rounding in NumPy."""
        return float(self.kernels.mean())

    @property
    def allowed(self) -> float:
        """What the target's mean may be: half as much again as expected, the chance of rows and
        what is too little to matter aside."""
        chance = float(self.kernels.std() / self.kernels.size**0.5)
        return 1.5 * self.expected + 3 * chance + 1e-3


def measure_cost(
    model: Model,
    runner: DecoderRunner,
    kernels: Kernels,
    tokens: Sequence[int],
    stepped: Stepped,
) -> Cost:
    """Let the target read a text token by token.

    Args:
        model: the source.
        runner: the target.
        kernels: how it rounds.
        tokens: the text.
        stepped: called with how many more tokens were read.
    """
    runner.reset()
    reference = Reference(model)
    cache = reference.new_cache()
    rounded = TracedReference(model, linear=kernels.products[0], kv=kernels.cache)
    target: list[NDArray[np.float64]] = []
    ours: list[NDArray[np.float64]] = []
    for start in range(0, len(tokens), _FED):
        piece = list(tokens[start : start + _FED])
        theirs = np.empty((len(piece), model.config.vocab), np.float32)
        for i, token in enumerate(piece):
            theirs[i] = runner.forward(np.asarray([token], np.int64))[-1]
            stepped(1)
        right = reference.forward(piece, cache)
        repeated = rounded.trace(piece)["logits"]
        for a in range(0, len(piece), _ROWS):
            rows = slice(a, a + _ROWS)
            target.append(divergence(right[rows], theirs[rows]))
            ours.append(divergence(right[rows], repeated[rows]))
    return Cost(np.concatenate(target), np.concatenate(ours))


def divergence(right: NDArray[np.floating], got: NDArray[np.floating]) -> NDArray[np.float64]:
    """KL of each row [T, V]; NaN where there are logits that are no numbers."""
    with np.errstate(all="ignore"):  # NaN is complained of, not warned of
        return kl_divergence(
            log_softmax(right.astype(np.float64)), log_softmax(got.astype(np.float64))
        )
