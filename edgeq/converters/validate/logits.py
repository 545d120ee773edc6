"""A target's logits compared with those of the reference, row by row.

    `Decoding`   prompts and the target's greedy continuations: logits, greedy tokens
    `Cost`       a text that the target reads token by token: the divergence that its kernels'
                 rounding of inputs causes, and the same of that rounding repeated in NumPy. From
                 layer to layer roundings fall differently and results drift apart, so that the
                 two are no nearer to each other than to exact arithmetic; but a right file costs
                 what its rounding costs

The target runs first and is closed before the reference begins, so that the two are never in
memory together; its logits wait in a temporary file. Rows are compared a few at a time, as 300
rows of a vocabulary of 262144 would take 600 MB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.runners import DecoderRunner
from edgeq.converters.validate.kernels import Kernels, sparing
from edgeq.core.errors import FormatError
from edgeq.evaluation.text import kl_divergence, log_softmax
from edgeq.formats.mapped_file import release
from edgeq.formats.spill import Spill
from edgeq.model.formulas import dense
from edgeq.model.model import Model
from edgeq.model.reference import Reference

_FED = 32
"""Tokens of a text that the reference reads at once."""
_ROWS = 8
"""Rows of logits compared at once."""

Stepped = Callable[[int], None]
"""Called with how many tokens the target has computed."""


@dataclass(frozen=True)
class Continued:
    """The greedy continuation of a prompt by a target.

    Args:
        prompt: tokens.
        chosen: the tokens it chose, of which it has read all but the last.
        rows: logits after the prompt and after each of those tokens: float32 [len(chosen), V].
    """

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rows: NDArray[np.float32]


def continue_prompt(
    runner: DecoderRunner, prompt: Sequence[int], steps: int, spill: Spill, stepped: Stepped
) -> Continued:
    """Let the target continue a prompt.

    Args:
        runner: the target.
        prompt: tokens.
        steps: tokens that it reads after the prompt.
        spill: keeps its logits.
        stepped: called with how many more calls of the target were made.
    """
    runner.reset()
    rows = [runner.forward(np.asarray(prompt, np.int64))[-1]]
    stepped(1)
    chosen = [int(np.argmax(rows[-1]))]
    for _ in range(steps):
        rows.append(runner.forward(np.asarray(chosen[-1:], np.int64))[-1])
        chosen.append(int(np.argmax(rows[-1])))
        stepped(1)
    return Continued(tuple(int(t) for t in prompt), tuple(chosen), *spill.arrays([np.stack(rows)]))


def read_text(
    runner: DecoderRunner, tokens: Sequence[int], spill: Spill, stepped: Stepped
) -> list[NDArray[np.float32]]:
    """Let the target read a text token by token.

    Args:
        runner: the target.
        tokens: the text.
        spill: keeps its logits.
        stepped: called with how many more calls of the target were made.

    Returns:
        its logits, some rows at a time.
    """
    runner.reset()
    pieces = []
    for start in range(0, len(tokens), _FED):
        rows = []
        for token in tokens[start : start + _FED]:
            rows.append(runner.forward(np.asarray([token], np.int64))[-1])
            stepped(1)
        pieces += spill.arrays([np.stack(rows)])
    return pieces


class Decoding:
    """Logits after prompts compared with the reference's, prompt by prompt.

    Args:
        model: the source.
        keep: hold the reference's weights as float32; for small models.
    """

    def __init__(self, model: Model, *, keep: bool) -> None:
        linear = None if keep else sparing(dense)
        self._reference = Reference(model, linear=linear, keep=keep)
        self._vocab = model.config.vocab
        self.chosen: list[tuple[int, ...]] = []
        self.kl: list[float] = []
        self.margins: list[float] = []
        """The reference's logit of its own choice less that of the target's, where they differ."""
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
        """The range of the correct logits: the largest less the smallest."""
        return float(self._high - self._low)

    def compare(self, continued: Continued) -> None:
        """Read the tokens of the target, and compare its logits.

        Raises:
            FormatError: the output has another vocabulary.
        """
        prompt, generated, rows = continued.prompt, continued.chosen[:-1], continued.rows
        self.chosen.append(continued.chosen)
        if rows.shape[1] != self._vocab:
            raise FormatError(
                f"the output knows {rows.shape[1]} tokens, the source {self._vocab}; "
                "was it converted from another model?"
            )
        cache = self._reference.new_cache()
        right = [self._reference.forward(prompt, cache, all_logits=False)]
        right += list(self._reference.forward(generated, cache))
        for ours, theirs in zip(right, rows, strict=True):
            self._row(ours.astype(np.float64), theirs.astype(np.float64))
        release(rows)

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
        """Mean of the target."""
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
        """The largest mean that passes: 1.5 times the expected one, plus its statistical error and
        a negligible amount."""
        chance = float(self.kernels.std() / self.kernels.size**0.5)
        return 1.5 * self.expected + 3 * chance + 1e-3


def measure_cost(
    model: Model,
    kernels: Kernels,
    tokens: Sequence[int],
    rows: Iterable[NDArray[np.float32]],
    stepped: Stepped,
) -> Cost:
    """Compare what the target made of a text.

    Args:
        model: the source.
        kernels: how the target rounds.
        tokens: the text.
        rows: the target's logits, of `read_text`.
        stepped: called with how many more tokens were read.
    """
    exact = Reference(model, linear=sparing(dense))
    rounded = Reference(model, linear=sparing(kernels.products[0]), kv=kernels.cache)
    caches = exact.new_cache(), rounded.new_cache()
    target: list[NDArray[np.float64]] = []
    ours: list[NDArray[np.float64]] = []
    start = 0
    for theirs in rows:
        piece = list(tokens[start : start + len(theirs)])
        start += len(piece)
        right, repeated = exact.forward(piece, caches[0]), rounded.forward(piece, caches[1])
        for a in range(0, len(piece), _ROWS):
            some = slice(a, a + _ROWS)
            target.append(divergence(right[some], theirs[some]))
            ours.append(divergence(right[some], repeated[some]))
        release(theirs)
        stepped(len(piece))
    return Cost(np.concatenate(target), np.concatenate(ours))


def divergence(right: NDArray[np.floating], got: NDArray[np.floating]) -> NDArray[np.float64]:
    """KL of each row [T, V]; NaN where there are logits that are no numbers."""
    with np.errstate(all="ignore"):  # NaN is reported as an error
        return kl_divergence(
            log_softmax(right.astype(np.float64)), log_softmax(got.astype(np.float64))
        )
