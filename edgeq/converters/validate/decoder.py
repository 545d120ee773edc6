"""Does a converted model compute what its source does, and if not, where does it begin?

First everything in the file is compared with what its source gives: the integers, every other
constant, and the checksums of a certificate that lies beside it. A file that differs there is not
run. Then the target runs in its own runtime over real prompts, prefill and greedy decoding, and
NumPy's reference reads the same tokens. How near it must come depends on what the target
computes in:

    float32   logits within 0.001 of their range; greedy tokens equal, near ties aside
    float16   logits within 0.02 of their range; KL at most 0.005 nats on the mean
    int8      inputs or cache rounded to 8 bits: KL at most half as much again as that of the same
              rounding in NumPy, over some 300 positions of a text

At last each step of the decoder is computed from the target's own inputs to it, with the kernels'
rounding repeated (`kernels`), and must agree to 0.001 of its size (float16: 0.01). What the
rounding of inputs costs is no fault: it is reported as a cost, with what would avoid it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from edgeq.converters import Precision, Runner, Trace, require_target, target_module
from edgeq.converters.validate.bisect import Divergence, first_divergence, is_small
from edgeq.converters.validate.certified import changed_files
from edgeq.converters.validate.constants import compare_constants
from edgeq.converters.validate.integers import TensorFault, compare_integers
from edgeq.converters.validate.kernels import Kernels
from edgeq.converters.validate.logits import Cost, Decoding, measure_cost
from edgeq.converters.validate.prompts import passage
from edgeq.converters.validate.prompts import prompts as default_prompts
from edgeq.converters.validate.texts import TextsReport, compare_texts
from edgeq.core.errors import EdgeqError, MissingDependencyError, UsageError
from edgeq.core.progress import Progress
from edgeq.importers.huggingface.tokenizer import hf_tokenizer
from edgeq.model.model import Model

_COST_ROWS = 36
"""Tokens of the text in which a cost is measured, for each step: 288 by default. The divergences
of single rows spread about as widely as their mean, so that the mean of 288 is known to some 6 %,
that of 27 only to 20 %."""
_TRACE = 45
"""Tokens that the passes take in which steps are looked at."""
_WORTH_SAYING = 10.0
"""Seconds from which on it is said how long validation will take."""


@dataclass(frozen=True)
class Tolerance:
    """What a target may differ by.

    Args:
        logits: largest difference of a logit, as a part of the logits' range; None if any.
        kl: mean divergence, nats; None where it is judged by the cost of the rounding.
        greedy: whether the greedy tokens must be equal.
    """

    logits: float | None
    kl: float | None
    greedy: bool


TOLERANCES: Mapping[Precision, Tolerance] = {
    "float32": Tolerance(1e-3, 1e-3, True),
    "float16": Tolerance(2e-2, 5e-3, False),
    "int8": Tolerance(None, None, False),
}


@dataclass(frozen=True)
class Report:
    """What validation found.

    Args:
        target: its name.
        runtime: what executed it; "" if it was not run.
        precision: how it computes.
        integers: whether each quantized matrix is equal.
        constants: how many other constants were compared.
        tensor_faults: integers, constants and files that differ.
        divergence: the first step that computes something else, if one was looked for and found.
        trace_note: why no step could be looked at, if so.
        prompts: token ids given.
        greedy: token ids the target went on with, for each prompt.
        logits_max, logits_rms: difference of logits; of all compared ones.
        logits_range: of the right logits, largest less smallest.
        kl_mean, kl_max: nats from exact arithmetic on the source's own numbers.
        kl_error: standard error of the mean.
        kl_rows: positions that it is the mean of.
        kl_expected: the mean that the kernels' rounding has in NumPy; None if nothing is rounded.
        kl_allowed: what the mean may be.
        rounding: what the target's kernels round; "" if nothing.
        alternatives: what would avoid it.
        greedy_equal, greedy_compared: choices that are the reference's own.
        near_ties: choices that differ where the reference's two best are nearer than the
            tolerance.
        seconds: of it all.
        complaints: what of the logits is past the tolerance.
        texts: how the tokenizers compare; None if the output holds none.
        note: what was not done, a sentence; "" if all was.
    """

    target: str
    runtime: str
    precision: Precision
    integers: Mapping[str, bool]
    constants: int = 0
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
    kl_error: float = 0.0
    kl_rows: int = 0
    kl_expected: float | None = None
    kl_allowed: float = 0.0
    rounding: str = ""
    alternatives: str = ""
    greedy_equal: int = 0
    greedy_compared: int = 0
    near_ties: int = 0
    seconds: float = 0.0
    complaints: tuple[str, ...] = ()
    texts: TextsReport | None = None
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether it computes what its source does."""
        told = self.tensor_faults or self.divergence or self.complaints
        return not (told or (self.texts and self.texts.complaint))

    def explain(self) -> str:
        """What is wrong, most telling first; empty if nothing is."""
        lines = [f"tensor {fault}" for fault in self.tensor_faults[:5]]
        if len(self.tensor_faults) > 5:
            lines.append(f"and {len(self.tensor_faults) - 5} tensors more")
        if self.divergence:
            lines.append(f"first step that differs: {self.divergence}")
        lines += self.complaints
        if self.texts and self.texts.complaint:
            lines.append(f"tokenizer: {self.texts.complaint}")
        if self.complaints and self.trace_note:
            lines.append(self.trace_note)
        return "\n".join(lines)

    def cost(self) -> str:
        """What the target's rounding costs, and what would avoid it; empty if it rounds nothing."""
        if not self.rounding:
            return ""
        return (
            f"{self.rounding}. This costs {self.kl_mean:.2g} nats a token (KL, standard error "
            f"{self.kl_error:.1g}, {self.kl_rows} positions of a text). To avoid it, "
            f"{self.alternatives}."
        )


def validate(
    out: str | Path,
    against: Model,
    target: str,
    *,
    steps: int = 8,
    prompts: Sequence[Sequence[int]] | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    announce: Callable[[str], None] | None = None,
) -> Report:
    """Run a converted model and compare it with its source.

    Args:
        out: the converted file or folder.
        against: its source.
        target: what it was converted to.
        steps: greedy tokens decoded after each prompt, at least 2. The text in which a target's
            rounding is measured is 36 times as long, so that time grows with the steps.
        prompts: token ids; three of different lengths if None.
        threads: of the target's runtime; all cores if None.
        progress: called with what is done, how far, and of how much.
        announce: called with a sentence that says how long it will take, where that is long.

    Raises:
        UsageError: too few steps, or no room for a prompt.
        MissingDependencyError: the target's runtime is not installed.
        FormatError: the target does not open.

    Example:
        >>> conversion = edgeq.convert("model.edgeq", "gguf", "checked.gguf", validate=False)
        >>> edgeq.validate("checked.gguf", edgeq.load("model.edgeq"), "gguf").passed
        True
    """
    started = time.perf_counter()
    require_target(target)
    path, module = Path(out), target_module(target)
    if steps < 2:
        raise UsageError(f"steps is {steps}; decode at least 2 tokens")
    integers, faults = compare_integers(against, partial(module.stored, path), progress)
    known = [fault.name for fault in faults]
    count, more = compare_constants(against, module, path, known)
    faults += more + changed_files(path)
    if faults:
        # a runtime may crash on a damaged file, and there is nothing left to find
        return Report(
            target, "", "float32", integers, count, tuple(faults),
            seconds=time.perf_counter() - started, note="it was not run, as the file is not right",
        )  # fmt: skip
    kernels: Kernels = module.kernels(path, against)
    missing = (module.not_run() if hasattr(module, "not_run") else None) or ""
    try:
        runner: Runner = module.open(path, threads=threads)
    except MissingDependencyError:
        if not missing:
            raise
        return Report(
            target, "", "float32", integers, count,
            seconds=time.perf_counter() - started, note=missing,
        )  # fmt: skip
    decoding = Decoding(against, keep=is_small(against))
    cost: Cost | None = None
    try:
        runtime, precision = runner.runtime, runner.precision
        asked = prompts if prompts is not None else _prompts(against, runner, steps)
        text: list[int] = []
        if kernels.rounds:
            text = passage(against, min(_COST_ROWS * steps, _room(against, runner)))
        clock = _Clock(len(asked) * (steps + 1), len(text), len(kernels.products), progress)
        for done, prompt in enumerate(asked):
            decoding.compare(runner, prompt, steps, clock.stepped)
            if not done and announce:
                clock.announce(announce, steps)
        if text:
            cost = measure_cost(against, runner, kernels, text, clock.stepped)
    finally:
        runner.close()
    report = _report(Report(target, runtime, precision, integers, count), decoding, cost)
    divergence = note = None
    try:
        longest = max(asked, key=len)
        tracer: AbstractContextManager[Trace] = module.tracer(path)
        with tracer as trace:
            divergence = first_divergence(
                against, trace, longest, precision, kernels,
                long=bool(report.complaints) or is_small(against), progress=progress,
            )  # fmt: skip
    except EdgeqError as err:
        note = f"no step could be looked at: {err}"
    return replace(
        report,
        divergence=divergence,
        trace_note=note,
        prompts=tuple(tuple(int(t) for t in p) for p in asked),
        greedy=tuple(decoding.chosen),
        rounding=kernels.rounding,
        alternatives=kernels.alternatives,
        seconds=time.perf_counter() - started,
        texts=_texts(path, against, module),
        note=missing,
    )


def _room(model: Model, runner: Runner) -> int:
    return min(model.config.context, runner.context)


def _texts(path: Path, model: Model, module: Any) -> TextsReport | None:
    """Whether the output's tokenizer makes the same ids; None if it holds no tokenizer."""
    if "tokenizer.json" not in model.files or not hasattr(module, "tokenizer"):
        return None
    source = hf_tokenizer(model.files)
    target = module.tokenizer(path, source)
    return None if target is None else compare_texts(source, target)


def _prompts(model: Model, runner: Runner, steps: int) -> Sequence[Sequence[int]]:
    fits = _room(model, runner)
    if fits <= steps:
        raise UsageError(f"{steps} steps and a prompt do not fit in {fits} tokens; decode fewer")
    return default_prompts(model, fits - steps)


class _Clock:
    """How long validation will take, from its first prompt.

    Args:
        decoded: calls of the target after prompts.
        text: calls of the target in the text.
        products: ways of multiplying the steps may be compared with.
        progress: called with how many calls there were, and of how many.
    """

    def __init__(self, decoded: int, text: int, products: int, progress: Progress | None) -> None:
        self._decoded, self._text, self._products = decoded, text, products
        self._progress = progress
        self._began = time.perf_counter()
        self._done = 0
        self._in_target = 0.0

    def stepped(self, n: int) -> None:
        """Count calls of the target."""
        self._done += n
        self._in_target = time.perf_counter() - self._began
        if self._progress:
            self._progress("tokens", self._done, self._decoded + self._text)

    def announce(self, say: Callable[[str], None], steps: int) -> None:
        """Say how long the rest will take, once the first prompt was compared."""
        whole = time.perf_counter() - self._began
        step, reference = self._in_target / self._done, whole - self._in_target
        prompts = (self._decoded - self._done) * step + 2 * reference
        text = self._text * step + self._text / 32 * reference
        trace = _TRACE * step / 4 + 5 * reference
        left = prompts + text + trace
        if left < _WORTH_SAYING:
            return
        least = trace + (prompts + text) * 2 / steps
        say(
            f"validating takes about {_human(left)} more (estimated from the first prompt)"
            + (f"; --steps 2 would take about {_human(least)}" if steps > 2 else "")
        )


def _human(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def _report(report: Report, decoding: Decoding, cost: Cost | None) -> Report:
    """The figures of the logits, and what of them is past the tolerance."""
    limit = TOLERANCES[report.precision]
    tie = 2 * (limit.logits or 2e-2) * decoding.range
    near_ties = sum(m <= tie for m in decoding.margins)
    rows = decoding.kl if cost is None else [float(k) for k in cost.target]
    mean = sum(rows) / len(rows)
    spread = (sum((k - mean) ** 2 for k in rows) / len(rows)) ** 0.5
    # a target that rounds nothing but its cache is allowed what float16 is
    allowed = cost.allowed if cost else limit.kl or TOLERANCES["float16"].kl or 0.0
    said = []
    # written so that NaN is a complaint too
    if limit.logits is not None and not decoding.max <= limit.logits * decoding.range:
        said.append(
            f"logits differ by up to {decoding.max:.3g} in a range of {decoding.range:.3g} "
            f"(allowed {limit.logits:g} of it)"
        )
    if not mean <= allowed:
        said.append(
            f"KL is {mean:.3g} nats on the mean of {len(rows)} positions (allowed {allowed:.3g}"
            + (f", as the target's rounding alone causes {cost.expected:.3g})" if cost else ")")
        )
    if limit.greedy and len(decoding.margins) > near_ties:
        said.append(
            f"{len(decoding.margins) - near_ties} of {decoding.count} greedy tokens differ, "
            "and are no near ties"
        )
    return replace(
        report,
        logits_max=decoding.max,
        logits_rms=decoding.rms,
        logits_range=decoding.range,
        kl_mean=mean,
        kl_max=max(rows),
        kl_error=spread / len(rows) ** 0.5,
        kl_rows=len(rows),
        kl_expected=cost.expected if cost else None,
        kl_allowed=allowed,
        greedy_equal=decoding.equal,
        greedy_compared=decoding.count,
        near_ties=near_ties,
        complaints=tuple(said),
    )
