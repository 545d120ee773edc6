"""Does a converted model compute what its source does, and if not, where does it begin?

The target runs in its own runtime over real prompts: prefill, then greedy decoding. NumPy's
reference reads the same tokens, and logits, their distributions and the greedy choices are held
side by side; the integers are read back from the file. How near it must come depends on what the
target computes in:

    float32   logits within 0.001 of their range; greedy tokens equal, near ties aside
    float16   logits within 0.02 of their range; KL at most 0.005 nats on the mean
    int8      activations or cache rounded to 8 bits: KL at most 0.01 nats on the mean

A failure is traced to a tensor (whose integers differ) or to a step (which differs though its
inputs are right). Of a small model every step is looked at even if nothing else shows a fault.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.converters import Precision, Progress, Runner, target_module
from edgeq.converters.bisect import Divergence, first_divergence, is_small
from edgeq.converters.integers import TensorFault, compare_integers
from edgeq.converters.prompts import prompts as default_prompts
from edgeq.errors import EdgeqError, FormatError, UsageError
from edgeq.evaluate import kl_divergence, log_softmax
from edgeq.model import Model
from edgeq.reference import Reference


@dataclass(frozen=True)
class Tolerance:
    """What a target may differ by.

    Args:
        logits: largest difference of a logit, as a part of the logits' range; None if any.
        kl: mean divergence, nats.
        greedy: whether the greedy tokens must be equal.
    """

    logits: float | None
    kl: float
    greedy: bool


TOLERANCES: Mapping[Precision, Tolerance] = {
    "float32": Tolerance(1e-3, 1e-3, True),
    "float16": Tolerance(2e-2, 5e-3, False),
    "int8": Tolerance(None, 1e-2, False),
}


@dataclass(frozen=True)
class Report:
    """What validation found.

    Args:
        target: its name.
        runtime: what executed it.
        precision: how it computes.
        integers: whether each quantized matrix is equal.
        tensor_faults: the matrices that are not.
        divergence: the first step that computes something else, if one was looked for and found.
        trace_note: why no step could be looked at, if so.
        prompts: token ids given.
        greedy: token ids the target went on with, for each prompt.
        logits_max, logits_rms: difference of logits; of all compared ones.
        logits_range: of the right logits, largest less smallest.
        kl_mean, kl_max: nats.
        greedy_equal, greedy_compared: choices that are the reference's own.
        near_ties: choices that differ where the reference's two best are nearer than the
            tolerance.
        seconds: of it all.
        complaints: what of the logits is past the tolerance.
    """

    target: str
    runtime: str
    precision: Precision
    integers: Mapping[str, bool]
    tensor_faults: tuple[TensorFault, ...] = ()
    divergence: Divergence | None = None
    trace_note: str | None = None
    prompts: tuple[tuple[int, ...], ...] = ()
    greedy: tuple[tuple[int, ...], ...] = ()
    logits_max: float = 0.0
    logits_rms: float = 0.0
    logits_range: float = 0.0
    kl_mean: float = 0.0
    kl_max: float = 0.0
    greedy_equal: int = 0
    greedy_compared: int = 0
    near_ties: int = 0
    seconds: float = 0.0
    complaints: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether it computes what its source does."""
        return not (self.tensor_faults or self.divergence or self.complaints)

    def explain(self) -> str:
        """What is wrong, most telling first; empty if nothing is."""
        lines = [f"tensor {fault}" for fault in self.tensor_faults[:5]]
        if len(self.tensor_faults) > 5:
            lines.append(f"and {len(self.tensor_faults) - 5} tensors more")
        if self.divergence:
            lines.append(f"first step that differs: {self.divergence}")
        lines += self.complaints
        if self.complaints and self.trace_note:
            lines.append(self.trace_note)
        return "\n".join(lines)


def validate(
    out: str | Path,
    against: Model,
    target: str,
    *,
    steps: int = 8,
    prompts: Sequence[Sequence[int]] | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Run a converted model and hold it against its source.

    Args:
        out: the converted file or folder.
        against: its source.
        target: what it was converted to.
        steps: greedy tokens decoded after each prompt, at least 2.
        prompts: token ids; three of different lengths if None.
        threads: of the target's runtime; all cores if None.
        progress: called with what is done, how far, and of how much.

    Raises:
        UsageError: too few steps, or no room for a prompt.
        MissingDependencyError: the target's runtime is not installed.
        FormatError: the target does not open.
    """
    started = time.perf_counter()
    path, module = Path(out), target_module(target)
    if steps < 2:
        raise UsageError(f"steps is {steps}; decode at least 2 tokens")
    integers, faults = compare_integers(against, partial(module.stored, path), progress)
    runner: Runner = module.open(path, threads=threads)
    try:
        runtime, precision = runner.runtime, runner.precision
        asked = prompts if prompts is not None else _prompts(against, runner, steps)
        found = _Logits(against, precision)
        for done, prompt in enumerate(asked):
            found.compare(runner, prompt, steps)
            if progress:
                progress("prompts", done + 1, len(asked))
    finally:
        runner.close()
    complaints = found.complaints()
    divergence = note = None
    if not faults and (complaints or is_small(against)):
        longest = max(asked, key=len)
        try:
            divergence = first_divergence(
                against, partial(module.trace, path), longest, precision, long=bool(complaints)
            )
        except EdgeqError as err:
            note = f"no step could be looked at: {err}"
    return Report(
        target,
        runtime,
        precision,
        integers,
        tuple(faults),
        divergence,
        note,
        tuple(tuple(int(t) for t in p) for p in asked),
        tuple(found.chosen),
        **found.numbers(),
        seconds=time.perf_counter() - started,
        complaints=tuple(complaints),
    )


def _prompts(model: Model, runner: Runner, steps: int) -> Sequence[Sequence[int]]:
    fits = min(model.config.context, runner.context)
    if fits <= steps:
        raise UsageError(f"{steps} steps and a prompt do not fit in {fits} tokens; decode fewer")
    return default_prompts(model, fits - steps)


class _Logits:
    """Logits of the target beside the reference's, gathered prompt by prompt."""

    def __init__(self, model: Model, precision: Precision) -> None:
        self._reference = Reference(model, keep=is_small(model))
        self._vocab = model.config.vocab
        self._tolerance = TOLERANCES[precision]
        self.chosen: list[tuple[int, ...]] = []
        self._kl: list[NDArray[np.float64]] = []
        self._max = self._square = 0.0
        self._low, self._high = np.inf, -np.inf
        self._margins: list[float] = []
        self._count = self._equal = 0
        self._values = 0

    def compare(self, runner: Runner, prompt: Sequence[int], steps: int) -> None:
        """Let the target read a prompt and go on greedily; the reference reads what it said."""
        runner.reset()
        rows = [runner.forward(np.asarray(prompt, np.int64))[-1]]
        said: list[int] = []
        for _ in range(steps):
            said.append(int(np.argmax(rows[-1])))
            rows.append(runner.forward(np.asarray(said[-1:], np.int64))[-1])
        self.chosen.append((*said, int(np.argmax(rows[-1]))))
        theirs = np.stack(rows).astype(np.float64)
        if theirs.shape[1] != self._vocab:
            raise FormatError(
                f"the converted model has {theirs.shape[1]} tokens in its vocabulary and the "
                f"source {self._vocab}; was it converted from another model?"
            )
        ours = self._reference.forward([*prompt, *said])[len(prompt) - 1 :].astype(np.float64)
        difference = theirs - ours
        self._max = max(self._max, float(np.abs(difference).max()))
        self._square += float((difference**2).sum())
        self._values += difference.size
        self._low, self._high = min(self._low, ours.min()), max(self._high, ours.max())
        with np.errstate(all="ignore"):  # NaN is complained of, not warned of
            self._kl.append(kl_divergence(log_softmax(ours), log_softmax(theirs)))
        best, taken = ours.argmax(axis=1), theirs.argmax(axis=1)
        each = np.arange(len(ours))
        self._count += len(ours)
        self._equal += int((best == taken).sum())
        apart = ours[each, best] - ours[each, taken]
        self._margins += [float(m) for m in apart[best != taken]]

    def numbers(self) -> dict[str, Any]:
        """The report's figures."""
        kl = np.concatenate(self._kl)
        return {
            "logits_max": self._max,
            "logits_rms": (self._square / self._values) ** 0.5,
            "logits_range": float(self._high - self._low),
            "kl_mean": float(kl.mean()),
            "kl_max": float(kl.max()),
            "greedy_equal": self._equal,
            "greedy_compared": self._count,
            "near_ties": sum(m <= self._tie() for m in self._margins),
        }

    def _tie(self) -> float:
        return 2 * (self._tolerance.logits or 2e-2) * float(self._high - self._low)

    def complaints(self) -> list[str]:
        """What is past the tolerance."""
        found, limit = self.numbers(), self._tolerance
        said = []
        # written so that NaN is a complaint too
        if (
            limit.logits is not None
            and not found["logits_max"] <= limit.logits * found["logits_range"]
        ):
            said.append(
                f"logits differ by up to {found['logits_max']:.3g} in a range of "
                f"{found['logits_range']:.3g} (allowed {limit.logits:g} of it)"
            )
        if not found["kl_mean"] <= limit.kl:
            said.append(f"KL is {found['kl_mean']:.3g} nats on the mean (allowed {limit.kl:g})")
        different = len(self._margins) - found["near_ties"]
        if limit.greedy and different:
            said.append(
                f"{different:.0f} of {found['greedy_compared']:.0f} greedy tokens differ, "
                "and are no near ties"
            )
        return said
