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
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from edgeq.converters.certificate import changed_files
from edgeq.converters.runners import Precision
from edgeq.converters.target import DecoderTarget
from edgeq.converters.targets import require_target, target_named
from edgeq.converters.validate.bisect import first_divergence, is_small, traced_passes
from edgeq.converters.validate.constants import compare_constants
from edgeq.converters.validate.integers import compare_integers
from edgeq.converters.validate.kernels import Kernels
from edgeq.converters.validate.logits import (
    Cost,
    Decoding,
    continue_prompt,
    measure_cost,
    read_text,
)
from edgeq.converters.validate.prompts import passage
from edgeq.converters.validate.prompts import prompts as default_prompts
from edgeq.converters.validate.report import DecoderFindings, ValidationReport
from edgeq.converters.validate.tokenizer import TextsReport, compare_texts
from edgeq.core.errors import EdgeqError, MissingDependencyError, UsageError
from edgeq.core.memory import trim
from edgeq.core.progress import Progress
from edgeq.formats.mapped_file import release
from edgeq.formats.spill import Spill
from edgeq.importers.huggingface.tokenizer import hf_tokenizer
from edgeq.model.formulas import dense
from edgeq.model.model import Model
from edgeq.model.mtp import without_mtp
from edgeq.model.rotary import config_at

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
    """The differences that are accepted.

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


def validate_decoder(
    path: Path,
    model: Model,
    target: str,
    *,
    steps: int = 8,
    prompts: Sequence[Sequence[int]] | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    announce: Callable[[str], None] | None = None,
) -> ValidationReport:
    """Run a converted decoder and compare it with its source.

    Args:
        path: the converted file or folder.
        model: its source.
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
    """
    started = time.perf_counter()
    require_target(target)
    module = target_named(target).decoder_target()
    if steps < 2:
        raise UsageError(f"steps is {steps}; decode at least 2 tokens")
    model = without_mtp(model)
    integers, faults = compare_integers(model, partial(module.read_weights, path), progress)
    known = [fault.name for fault in faults]
    count, more = compare_constants(model, module, path, known)
    faults += more + changed_files(path)
    if faults:
        # a runtime may crash on a damaged file, and there is nothing left to learn
        return ValidationReport(
            target, "", integers,
            decoder=DecoderFindings(constants=count, tensor_faults=tuple(faults)),
            notes=("it was not run, as the file is not right",),
            seconds=time.perf_counter() - started,
        )  # fmt: skip
    kernels = module.kernels(path, model)
    missing = module.why_not_run()
    notes = (missing,) if missing else ()
    with Spill(what="the target's logits") as spill:
        ran = _run(
            path, model, module, kernels,
            steps=steps, prompts=prompts, threads=threads, spill=spill, progress=progress,
            announce=announce, may_be_absent=bool(missing),
        )  # fmt: skip
    if ran is None:
        return ValidationReport(
            target, "", integers, decoder=DecoderFindings(constants=count), notes=notes,
            seconds=time.perf_counter() - started,
        )  # fmt: skip
    findings = _measured(DecoderFindings(ran.precision, count), ran.decoding, ran.cost)
    divergence = trace_note = None
    trim()
    try:
        with Spill(what="the target's results") as spill:
            long = bool(findings.complaints) or is_small(model)
            with module.tracer(path) as trace:
                passes = traced_passes(trace, max(ran.prompts, key=len), spill, long=long)
            del trace
            trim()
            divergence = first_divergence(
                ran.source, passes, ran.precision, kernels, progress=progress
            )
            del passes
    except EdgeqError as err:
        trace_note = f"no step could be looked at: {err}"
    trim()
    findings = replace(
        findings,
        divergence=divergence,
        trace_note=trace_note,
        prompts=ran.prompts,
        greedy=tuple(ran.decoding.chosen),
        rounding=kernels.rounding,
        alternatives=kernels.alternatives,
        texts=_texts(path, model, module),
    )
    return ValidationReport(
        target, ran.runtime, integers, decoder=findings, notes=notes,
        seconds=time.perf_counter() - started,
    )  # fmt: skip


@dataclass(frozen=True)
class _Ran:
    """A target that was run, and how its logits compare.

    Args:
        runtime, precision: of its runner.
        prompts: that it continued.
        decoding: what it said after them, compared.
        cost: of its rounding; None if it rounds nothing.
        source: the model, with the rotary positions of the target's context.
    """

    runtime: str
    precision: Precision
    prompts: tuple[tuple[int, ...], ...]
    decoding: Decoding
    cost: Cost | None
    source: Model


def _run(
    path: Path,
    model: Model,
    module: DecoderTarget,
    kernels: Kernels,
    *,
    steps: int,
    prompts: Sequence[Sequence[int]] | None,
    threads: int | None,
    spill: Spill,
    progress: Progress | None,
    announce: Callable[[str], None] | None,
    may_be_absent: bool,
) -> _Ran | None:
    """Run a target over prompts and a text, close it, and compare its logits with the reference's.

    The target and the reference are never in memory together.
    """
    # the tokenizer of a large vocabulary takes more memory than some models, so it goes first
    room = model.config.context
    asked = prompts if prompts is not None else _prompts(model, room, steps)
    text = passage(model, min(_COST_ROWS * steps, room)) if kernels.rounds else []
    _release(model)
    trim()
    try:
        runner = module.open_frugal(path, threads=threads)
    except MissingDependencyError:
        if may_be_absent:
            return None
        raise
    try:
        runtime, precision = runner.runtime, runner.precision
        if prompts is None and max(map(len, asked)) + steps > runner.context:
            asked = _prompts(model, runner.context, steps)
        text = text[: runner.context]
        clock = _RemainingTime(len(asked), steps, len(text), progress)
        continued = []
        for done, prompt in enumerate(asked):
            continued.append(continue_prompt(runner, prompt, steps, spill, clock.stepped))
            if not done and announce:
                clock.announce(announce, _seconds_of_a_pass(model, len(prompt)))
        rows = read_text(runner, text, spill, clock.stepped)
    finally:
        runner.close()
    model = replace(model, config=config_at(model.config, runner.context))
    del runner
    trim()
    decoding = Decoding(model, keep=is_small(model))
    for each in continued:
        decoding.compare(each)
        clock.stepped(steps + 1)
    cost = measure_cost(model, kernels, text, rows, clock.stepped) if text else None
    asked_ids = tuple(each.prompt for each in continued)
    return _Ran(runtime, precision, asked_ids, decoding, cost, model)


def _release(model: Model) -> None:
    """Give the pages of the model's file back to the system."""
    for tensor in model.tensors.values():
        release(tensor)


def _texts(path: Path, model: Model, module: DecoderTarget) -> TextsReport | None:
    """Whether the output's tokenizer makes the same ids; None if it stores no tokenizer."""
    if "tokenizer.json" not in model.files:
        return None
    source = hf_tokenizer(model.files)
    target = module.tokenizer(path, source)
    return None if target is None else compare_texts(source, target)


def _prompts(model: Model, room: int, steps: int) -> Sequence[Sequence[int]]:
    if room <= steps:
        raise UsageError(f"{steps} steps and a prompt do not fit in {room} tokens; decode fewer")
    return default_prompts(model, room - steps)


def _seconds_of_a_pass(model: Model, tokens: int) -> float:
    """About how long the reference takes to read some tokens: the first layer's share, scaled."""
    sizes = {name: n * k for name, (n, k) in model.config.linears()}
    first = [name for name in sizes if name.startswith("model.layers.0.")]
    began = time.perf_counter()
    for name in first:
        weight = model.tensors[name]
        dense(name, np.zeros((tokens, weight.shape[1]), np.float32), weight)
    return (time.perf_counter() - began) * sum(sizes.values()) / sum(sizes[n] for n in first)


class _RemainingTime:
    """An estimate of how long validation will take, from its first prompt.

    Args:
        prompts: how many the target continues.
        steps: tokens it reads after each.
        text: tokens of the text.
        progress: called with how many tokens were computed by the target or compared, and of how
            many.
    """

    def __init__(self, prompts: int, steps: int, text: int, progress: Progress | None) -> None:
        self._prompts, self._steps, self._text = prompts, steps, text
        self._decoded = prompts * (steps + 1)
        self._progress = progress
        self._began = time.perf_counter()
        self._done = 0

    def stepped(self, n: int) -> None:
        """Count tokens that the target computed, or that were compared with the reference."""
        self._done += n
        if self._progress:
            self._progress("tokens", self._done, 2 * (self._decoded + self._text))

    def announce(self, say: Callable[[str], None], reference: float) -> None:
        """Say how long the rest will take, once the target has continued the first prompt.

        Args:
            say: called with a sentence.
            reference: seconds of a pass of the reference.
        """
        step = (time.perf_counter() - self._began) / self._done
        prompts = (self._decoded - self._done) * step + 2 * self._prompts * reference
        # in the text the reference computes twice: exactly, and rounded as the target does
        text = self._text * step + self._text / 32 * 2 * reference
        trace = _TRACE * step / 4 + 5 * reference
        seconds = prompts + text + trace
        if seconds < _WORTH_SAYING:
            return
        least = trace + (prompts + text) * 2 / self._steps
        say(
            f"validating takes about {_human(seconds)} more (estimated from the first prompt)"
            + (f"; --steps 2 would take about {_human(least)}" if self._steps > 2 else "")
        )


def _human(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def _measured(findings: DecoderFindings, decoding: Decoding, cost: Cost | None) -> DecoderFindings:
    """The measurements of the logits, and which of them exceed the tolerance."""
    limit = TOLERANCES[findings.precision]
    tie = 2 * (limit.logits or 2e-2) * decoding.range
    near_ties = sum(m <= tie for m in decoding.margins)
    rows = decoding.kl if cost is None else [float(k) for k in cost.target]
    mean = sum(rows) / len(rows)
    spread = (sum((k - mean) ** 2 for k in rows) / len(rows)) ** 0.5
    # a target that rounds nothing but its cache is allowed what float16 is
    allowed = cost.allowed if cost else limit.kl or TOLERANCES["float16"].kl or 0.0
    complaints = []
    # written so that NaN is a complaint too
    if limit.logits is not None and not decoding.max <= limit.logits * decoding.range:
        complaints.append(
            f"logits differ by up to {decoding.max:.3g} in a range of {decoding.range:.3g} "
            f"(allowed {limit.logits:g} of it)"
        )
    if not mean <= allowed:
        complaints.append(
            f"KL is {mean:.3g} nats on the mean of {len(rows)} positions (allowed {allowed:.3g}"
            + (f", as the target's rounding alone causes {cost.expected:.3g})" if cost else ")")
        )
    if limit.greedy and len(decoding.margins) > near_ties:
        complaints.append(
            f"{len(decoding.margins) - near_ties} of {decoding.count} greedy tokens differ, "
            "and are no near ties"
        )
    return replace(
        findings,
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
        complaints=tuple(complaints),
    )
