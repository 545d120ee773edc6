"""The measuring harness: candidates take turns reading a prompt and generating, every time is kept.

Each candidate first runs ``warmup`` times untimed. Then come the timed rounds: in each, every
candidate runs once, in the opposite order from round to round, so that a machine that slows down
treats all of them alike.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import UsageError
from edgeq.core.progress import Progress


@dataclass(frozen=True)
class Workload:
    """What every round runs.

    Args:
        n_prompt: tokens read at once; 0 starts with generating.
        n_gen: tokens generated after the first, one by one; of a graph, whole runs.
        n_depth: tokens in the cache before the clock starts.
        warmup: untimed rounds.
        repeats: timed rounds, at least.
        min_seconds: rounds go on until they have taken so long together.
        seed: of the random tokens.

    Example:
        >>> edgeq.Workload(n_prompt=512, n_gen=0).label
        'pp512'
    """

    n_prompt: int = 128
    n_gen: int = 64
    n_depth: int = 0
    warmup: int = 1
    repeats: int = 5
    min_seconds: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.n_prompt, self.n_gen, self.n_depth, self.warmup) < 0:
            raise UsageError(f"{self}: no count may be negative")
        if not self.n_prompt + self.n_gen:
            raise UsageError("nothing to time: n_prompt and n_gen are both 0")
        if self.repeats < 1:
            raise UsageError(f"repeats is {self.repeats}; must be at least 1")

    @property
    def tokens(self) -> int:
        """Number of tokens that the clock covers."""
        return self.n_prompt + self.n_gen

    @property
    def positions(self) -> int:
        """Positions of the cache that a round fills."""
        return self.n_depth + self.tokens

    @property
    def context(self) -> int:
        """Context to make room for: one position more without a prompt, as a runtime's own
        profiler decodes one token more than is counted."""
        return self.positions + (not self.n_prompt)

    @property
    def label(self) -> str:
        """llama-bench's name of the test, such as ``pp512`` or ``tg128 @ d1024``."""
        parts = [f"{kind}{n}" for kind, n in (("pp", self.n_prompt), ("tg", self.n_gen)) if n]
        return "+".join(parts) + (f" @ d{self.n_depth}" if self.n_depth else "")


@dataclass(frozen=True)
class Round:
    """Raw times of one round of one candidate.

    Args:
        round: its number; those before the first timed one are negative.
        start_ns: `time.monotonic_ns` at its beginning.
        prefill_ns: nanoseconds until the first token was known (TTFT); None without a prompt.
        step_ns: nanoseconds of each token after it (TPOT), or of each run of a graph; one entry
            for all tokens that were generated in one call.
    """

    round: int
    start_ns: int
    prefill_ns: int | None
    step_ns: tuple[int, ...]

    @property
    def decode_start_ns(self) -> int:
        """When the prompt had been read."""
        return self.start_ns + (self.prefill_ns or 0)

    @property
    def end_ns(self) -> int:
        """When the last token was known."""
        return self.decode_start_ns + sum(self.step_ns)

    def to_json(self) -> dict[str, Any]:
        """A form that JSON can hold."""
        return {
            "round": self.round,
            "start_ns": self.start_ns,
            "prefill_ns": self.prefill_ns,
            "step_ns": list(self.step_ns),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Round:
        """The sample that `to_json` wrote."""
        return cls(data["round"], data["start_ns"], data["prefill_ns"], tuple(data["step_ns"]))


class Candidate(Protocol):
    """Something that a session can time: see `edgeq.profiling.candidates`."""

    unit: Literal["token", "run"]
    """What a step is: a token of a decoder, or a run of a graph, which reads no prompt."""
    vocab: int
    """Tokens are below this."""

    def facts(self, workload: Workload) -> dict[str, Any]:
        """Its description in the document; see `edgeq.profiling.document`."""

    def begin(self, tokens: NDArray[np.int64]) -> None:
        """Forget everything but these tokens."""

    def read(self, tokens: NDArray[np.int64]) -> int:
        """Read a prompt; the token that follows."""

    def step(self, token: int) -> int:
        """Read one token; the one that follows."""

    def generate(self, token: int, n: int) -> None:
        """Read one token and generate ``n`` in one call."""

    def close(self) -> None:
        """Release its memory and threads."""


def run(
    candidates: Sequence[Candidate],
    workload: Workload,
    progress: Progress | None = None,
    *,
    in_one_call: bool = False,
) -> list[list[Round]]:
    """Time candidates in turns.

    Args:
        candidates: what to time.
        workload: what each of them does in a round.
        progress: called after every round.
        in_one_call: generate all tokens of a round in one call and time them together.

    Returns:
        For each candidate its rounds in order, those of the warm-up included.
    """
    rounds: list[list[Round]] = [[] for _ in candidates]
    order = list(range(len(candidates)))
    begun = time.monotonic_ns()
    number = -workload.warmup
    while number < workload.repeats or _seconds_since(begun) < workload.min_seconds:
        if number == 0:
            begun = time.monotonic_ns()
        for i in order:
            rounds[i].append(_round(candidates[i], workload, number, in_one_call))
        order.reverse()
        number += 1
        if progress:
            passed = _seconds_since(begun) if number > 0 else 0.0
            if passed < workload.min_seconds:
                progress("measuring", int(passed), int(workload.min_seconds))
            else:
                progress("measuring", max(number, 0), max(workload.repeats, number))
    return rounds


def random_tokens(candidate: Candidate, workload: Workload) -> NDArray[np.int64]:
    """The tokens of a round: int64 [n_depth + max(n_prompt, 1)]."""
    rng = np.random.default_rng(workload.seed)
    return rng.integers(0, candidate.vocab, workload.n_depth + max(workload.n_prompt, 1))


def _seconds_since(begun: int) -> float:
    return (time.monotonic_ns() - begun) / 1e9


def _round(candidate: Candidate, workload: Workload, number: int, in_one_call: bool) -> Round:
    tokens = random_tokens(candidate, workload)
    before, prompt = tokens[: workload.n_depth], tokens[workload.n_depth :]
    candidate.begin(before)
    token, prefill = int(prompt[0]), None
    start = last = time.monotonic_ns()
    if workload.n_prompt and candidate.unit == "token":
        token = candidate.read(prompt)
        last = time.monotonic_ns()
        prefill = last - start
    if in_one_call and workload.n_gen:
        candidate.generate(token, workload.n_gen)
        return Round(number, start, prefill, (time.monotonic_ns() - last,))
    steps = []
    for _ in range(workload.n_gen):
        token = candidate.step(token)
        now = time.monotonic_ns()
        steps.append(now - last)
        last = now
    return Round(number, start, prefill, tuple(steps))
