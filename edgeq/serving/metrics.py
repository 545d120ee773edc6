"""Counters of a server in the text format of Prometheus.

Source: https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
TTFT_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
TPOT_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)

Labels = Mapping[str, str]


class TimeHistogram:
    """A histogram of times in seconds.

    Args:
        bounds: upper bounds of the buckets, in seconds, in ascending order.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        """Count a time, in seconds."""
        place = next((i for i, bound in enumerate(self._bounds) if value <= bound), -1)
        self._counts[place] += 1
        self._sum += value

    def lines(self, name: str, labels: Labels) -> Iterable[str]:
        """The lines of the histogram in the text format."""
        named = [*(f"{bound:g}" for bound in self._bounds), "+Inf"]
        for bound, count in zip(named, accumulate(self._counts), strict=True):
            yield sample(f"{name}_bucket", {**labels, "le": bound}, count)
        yield sample(f"{name}_sum", labels, round(self._sum, 6))
        yield sample(f"{name}_count", labels, sum(self._counts))


class ModelMetrics:
    """Counters of one model."""

    def __init__(self) -> None:
        self.prompt = self.cached = self.generated = 0
        self.drafted = self.accepted = 0
        self.prompts = self.hits = 0
        self.ttft = TimeHistogram(TTFT_BOUNDS)
        self.tpot = TimeHistogram(TPOT_BOUNDS)


class Metrics:
    """Counters of a server. Only the event loop may use them.

    Args:
        models: names of the models.
    """

    def __init__(self, models: Iterable[str]) -> None:
        self.models = {name: ModelMetrics() for name in models}
        self.requests: Counter[tuple[str, int]] = Counter()


def sample(name: str, labels: Labels, value: float) -> str:
    """The line of one value with its labels."""
    escaped = (
        text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        for text in labels.values()
    )
    listed = ",".join(f'{key}="{text}"' for key, text in zip(labels, escaped, strict=True))
    return f"{name}{{{listed}}} {value}" if listed else f"{name} {value}"


def family(name: str, kind: str, about: str, lines: Iterable[str]) -> list[str]:
    """The lines of a metric with its help and type; no lines if the metric has no values."""
    found = list(lines)
    return [f"# HELP {name} {about}", f"# TYPE {name} {kind}", *found] if found else []
