"""What validation measured: one report for decoders and graphs, with the particulars of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgeq.converters.runners import Execution, Precision
    from edgeq.converters.validate.bisect import Divergence
    from edgeq.converters.validate.integers import TensorFault
    from edgeq.converters.validate.tokenizer import TextsReport

_LISTED = 5
"""Faults that are listed by name."""


@dataclass(frozen=True)
class DecoderFindings:
    """What validation of a converted decoder measured.

    Args:
        precision: how the target computes.
        constants: number of other constants that were compared.
        tensor_faults: integers, constants and files that differ.
        divergence: the first step whose result differs, if one was looked for and exists.
        trace_note: why no step could be examined, if so.
        prompts: token ids of the prompts.
        greedy: token ids that the target generated after each prompt.
        logits_max, logits_rms: largest and root mean square difference of the logits.
        logits_range: largest right logit minus the smallest.
        kl_mean, kl_max: nats, from exact arithmetic on the source's own numbers.
        kl_error: standard error of the mean.
        kl_rows: positions that the mean is over.
        kl_expected: the mean that the kernels' rounding causes in NumPy; None if nothing is
            rounded.
        kl_allowed: the largest mean that is accepted.
        rounding: what the target's kernels round, in words; "" if nothing.
        alternatives: what avoids that rounding.
        greedy_equal, greedy_compared: choices that are the reference's own, of all compared.
        near_ties: choices that differ where the reference's two best logits are nearer than the
            tolerance.
        complaints: which measurements of the logits exceed the tolerance.
        texts: how the tokenizers compare; None if the output stores none.
    """

    precision: Precision = "float32"
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
    complaints: tuple[str, ...] = ()
    texts: TextsReport | None = None

    @property
    def passed(self) -> bool:
        """Whether nothing differs by more than the tolerance."""
        wrong = self.tensor_faults or self.divergence or self.complaints
        return not (wrong or (self.texts and self.texts.complaint))

    def faults(self) -> list[str]:
        """What is wrong, the most telling first, one line each."""
        lines = [f"tensor {fault}" for fault in self.tensor_faults[:_LISTED]]
        if len(self.tensor_faults) > _LISTED:
            lines.append(f"and {len(self.tensor_faults) - _LISTED} tensors more")
        if self.divergence:
            lines.append(f"first step that differs: {self.divergence}")
        lines += self.complaints
        if self.texts and self.texts.complaint:
            lines.append(f"tokenizer: {self.texts.complaint}")
        if self.complaints and self.trace_note:
            lines.append(self.trace_note)
        return lines

    def cost(self) -> str:
        """What the target's rounding costs, and what avoids it; "" if nothing is rounded."""
        if not self.rounding:
            return ""
        return (
            f"{self.rounding}. This costs {self.kl_mean:.2g} nats a token (KL, standard error "
            f"{self.kl_error:.1g}, {self.kl_rows} positions of a text). To avoid it, "
            f"{self.alternatives}."
        )


@dataclass(frozen=True)
class GraphFindings:
    """What validation of a converted graph measured.

    Args:
        source_runtime: what executed the source.
        inputs: what kind of inputs both were run on.
        runs: number of inputs.
        error: output -> root mean square error relative to the root mean square of the right
            values; of integers, the fraction that differs.
        allowed: output -> largest error that is accepted.
        rounding_error: output -> change caused by rounding that the target's runtime does itself.
        top1: fraction of the runs whose largest output is the same; None without scores.
        quants: rounded value -> whether scale and zero point read back are the source's.
        source_quants: number of rounded values in the source.
        bits: packed constant -> bits of each weight in the file; absent if it is not packed.
        source_bits: packed constant of the source -> its bits there.
        parts: number of constants and operators compared with a new conversion; 0 if none.
        different: those that are not the same.
        random: whether the inputs were random.
    """

    source_runtime: str
    inputs: str
    runs: int
    error: Mapping[str, float]
    allowed: Mapping[str, float]
    rounding_error: Mapping[str, float]
    top1: float | None
    quants: Mapping[str, bool]
    source_quants: int
    bits: Mapping[str, int]
    source_bits: Mapping[str, int]
    parts: int = 0
    different: tuple[str, ...] = ()
    random: bool = False

    @property
    def passed(self) -> bool:
        """Whether nothing differs by more than the tolerance, the integers of weights aside."""
        same = all(self.quants.values()) and not self.different
        return same and all(error <= self.allowed[name] for name, error in self.error.items())

    def faults(self, integers: Mapping[str, bool]) -> list[str]:
        """What differs, one line each.

        Args:
            integers: whether each packed weight is the source's.
        """
        missing = [name for name in integers if name not in self.bits]
        lines = [stayed_float(missing, len(integers))] if missing else []
        lines += [
            f"{name}: integers or scales differ from the source's"
            for compared in (integers, self.quants)
            for name, same in compared.items()
            if not same and name not in missing
        ]
        lines += [
            f"{name} is not what a conversion of the source makes"
            for name in self.different[:_LISTED]
        ]
        if len(self.different) > _LISTED:
            lines.append(f"and {len(self.different) - _LISTED} more constants or operators differ")
        lines += [
            f"{name}: differs by {error:.3g} of its size on {self.inputs}, and right runtimes by "
            f"at most {self.allowed[name]:.3g}"
            for name, error in self.error.items()
            if not error <= self.allowed[name]
        ]
        if self.random and lines and not (self.different or missing):
            lines.append("give --data with real inputs: random ones may lead a model astray")
        return lines


@dataclass(frozen=True)
class ValidationReport:
    """What validation of a converted file measured.

    Args:
        target: name of the target.
        runtime: what executed it, with its version; "" if it was not run.
        integers: quantized weight -> whether integers and scales read back are the source's.
        decoder: the particulars of a decoder that was compared with its source.
        graph: the particulars of a graph that was compared with its source.
        execution: of a file that was run without a source.
        notes: what was not done, and what else to know, one sentence each.
        seconds: duration of the validation.
    """

    target: str
    runtime: str
    integers: Mapping[str, bool] = field(default_factory=dict)
    decoder: DecoderFindings | None = None
    graph: GraphFindings | None = None
    execution: Execution | None = None
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether the file computes what its source does, from the same integers."""
        findings = self.decoder or self.graph
        return all(self.integers.values()) and (findings is None or findings.passed)

    def explain(self) -> str:
        """What is wrong, one line each; "" if nothing is. Of graphs the notes too."""
        if self.graph:
            return "\n".join([*self.graph.faults(self.integers), *self.notes])
        return "\n".join(self.decoder.faults()) if self.decoder else ""

    def to_dict(self) -> dict[str, Any]:
        """The report as ``edgeq validate --format json`` prints it."""
        if self.decoder:
            return {"passed": self.passed, "target": self.target, **self._decoder(self.decoder)}
        if self.graph:
            return {"passed": self.passed, "target": self.target, **self._graph(self.graph)}
        return {"target": self.target, "runtime": self.runtime}

    def measurements(self) -> dict[str, Any]:
        """What was measured of a decoder, as certificates and reports store it."""
        d = self.decoder
        if d is None:
            return {}
        return {
            "integers": dict(self.integers),
            "constants_equal": d.constants,
            "logits": {"max": d.logits_max, "rms": d.logits_rms, "range": d.logits_range},
            "kl": {
                "mean": d.kl_mean,
                "standard_error": d.kl_error,
                "max": d.kl_max,
                "positions": d.kl_rows,
                "expected_of_rounding": d.kl_expected,
                "allowed": d.kl_allowed,
            },
            "cost": d.cost() or None,
            "greedy_tokens": {
                "compared": d.greedy_compared,
                "equal": d.greedy_equal,
                "near_ties": d.near_ties,
            },
            "prompts": [list(prompt) for prompt in d.prompts],
            "greedy": [list(tokens) for tokens in d.greedy],
            "texts": d.texts.to_dict() if d.texts else None,
            "seconds": round(self.seconds, 3),
        }

    def _decoder(self, d: DecoderFindings) -> dict[str, Any]:
        return {
            "runtime": self.runtime,
            "precision": d.precision,
            "note": " ".join(self.notes) or None,
            **self.measurements(),
            "tensor_faults": [
                {"name": f.name, "row": f.row, "group": f.group, "what": f.what}
                for f in d.tensor_faults
            ],
            "first_divergence": d.divergence and {
                "step": d.divergence.step,
                "error": d.divergence.error,
                "allowed": d.divergence.allowed,
                "when": d.divergence.when,
                "also": list(d.divergence.also),
            },
            "complaints": list(d.complaints),
        }  # fmt: skip

    def _graph(self, g: GraphFindings) -> dict[str, Any]:
        return {
            "runtime": self.runtime,
            "source_runtime": g.source_runtime,
            "inputs": g.inputs,
            "runs": g.runs,
            "error": {n: e if isfinite(e) else None for n, e in g.error.items()},
            "allowed": dict(g.allowed),
            "price": dict(g.rounding_error),
            "top1": g.top1,
            "weights": dict(self.integers),
            "quants": dict(g.quants),
            "bits": dict(g.bits),
            "asked": dict(g.source_bits),
            "parts": g.parts,
            "different": list(g.different),
            "notes": list(self.notes),
        }


def stayed_float(missing: list[str], total: int) -> str:
    """A message about weights that are not packed."""
    return (
        f"{len(missing)} of {total} weights that the source has as integers are not packed in the "
        f"file: {', '.join(missing)}; please report it"
    )
