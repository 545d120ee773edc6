"""A converted graph beside its source: the same integers, and the same results.

The integers and scales of every weight and the grid of every value are read back from the file;
with the options of the conversion, every other constant and every operator is compared too. Then
both are run, on real inputs where there are any (`edgeq.converters.validate.graph_inputs`), and
the outputs
may differ by what right runtimes differ by (`edgeq.converters.validate.graph_yardstick`).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from edgeq._version import __version__
from edgeq.converters.validate.graph_inputs import RANDOM, Feeds, inputs_of
from edgeq.converters.validate.graph_parts import differing
from edgeq.converters.validate.graph_yardstick import Found, Kind, Yardstick
from edgeq.core.errors import EdgeqError, UsageError
from edgeq.core.progress import Progress
from edgeq.graph.ir import Graph, QuantWeight
from edgeq.quant.graph.stored_samples import META_SAMPLES

META_OPTIONS = "edgeq.options"
"""Key of a file's metadata: the options of its conversion, and edgeq's version."""
_NAMED = 5
"""Parts that are named for being different."""


@dataclass(frozen=True)
class Comparison:
    """A target beside its source.

    Args:
        runtime: what executed the target.
        source_runtime: what executed the source.
        inputs: what they were run on.
        runs: how many inputs that were.
        error: output -> root mean square error over root mean square of the right values; of whole
            numbers the part that differs.
        allowed: output -> largest error allowed.
        price: output -> what the rounding that the target's runtime does by itself changes.
        top1: part of the runs whose largest output is the same; None without scores.
        weights: packed constant -> whether integers and scales read back are the source's.
        quants: the same of rounded values.
        bits: packed constant -> bits a weight takes in the file; none for one that is not packed.
        asked: packed constant of the source -> its bits there.
        parts: how many constants and operators were compared with a new conversion's; 0 if none.
        different: those that are not the same.
        notes: what else there is to tell.
    """

    runtime: str
    source_runtime: str
    inputs: str
    runs: int
    error: Mapping[str, float]
    allowed: Mapping[str, float]
    price: Mapping[str, float]
    top1: float | None
    weights: Mapping[str, bool]
    quants: Mapping[str, bool]
    bits: Mapping[str, int]
    asked: Mapping[str, int]
    parts: int = 0
    different: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether it computes what its source does, from the same integers."""
        same = all(self.weights.values()) and all(self.quants.values()) and not self.different
        return same and all(error <= self.allowed[name] for name, error in self.error.items())

    def explain(self) -> str:
        """What differs, a line each."""
        missing = [name for name in self.weights if name not in self.bits]
        lines = [stayed_float(missing, len(self.weights))] if missing else []
        lines += [
            f"{name}: integers or scales differ from the source's"
            for held in (self.weights, self.quants)
            for name, same in held.items()
            if not same and name not in missing
        ]
        lines += [
            f"{name} is not what a conversion of the source makes"
            for name in self.different[:_NAMED]
        ]
        if len(self.different) > _NAMED:
            lines.append(f"and {len(self.different) - _NAMED} more constants or operators differ")
        lines += [
            f"{name}: differs by {error:.3g} of its size on {self.inputs}, and right runtimes by "
            f"at most {self.allowed[name]:.3g}"
            for name, error in self.error.items()
            if not error <= self.allowed[name]
        ]
        if self.inputs == RANDOM and lines and not (self.different or missing):
            lines.append("give --data with real inputs: random ones may lead a model astray")
        return "\n".join([*lines, *self.notes])


def compare_with(
    graph: Graph,
    path: Path,
    module: ModuleType,
    *,
    samples: Iterable[Feeds] | None = None,
    rebuilt: bool = False,
    threads: int = 1,
    progress: Progress | None = None,
) -> Comparison:
    """Run a graph and what was made of it, and read back the integers.

    Args:
        graph: the source.
        path: of the target's file.
        module: of the target, see `edgeq.converters.convert_graph`.
        samples: inputs; those that the record keeps, or random ones, if None.
        rebuilt: compare all constants and operators with those of a new conversion.
        threads: of the target's runtime.
        progress: called with what is done, how far, and of how much.

    Raises:
        UsageError: the file has other inputs or outputs than the graph.
        FormatError: edgeq did not write the file, or it is damaged.
        MissingDependencyError: a runtime is not installed.
    """
    from edgeq.graph.execute import require

    source = require()
    where, feeds = inputs_of(graph, samples)
    weights, bits = _weights(graph, module.stored_weights(path))
    held = module.stored_quants(path)
    quants = {name: held.get(name) == quant for name, quant in graph.quants.items() if name in held}
    runner = module.open_graph(path, threads=threads)
    try:
        _check_ends(graph, runner, path)
        count, different, notes = _rebuilt(graph, path, module, runner) if rebuilt else (0, [], [])
        kind, half = _kind(graph, runner)
        yardstick = Yardstick(graph, kind, half=half)
        for i, feed in enumerate(feeds):
            if progress:
                progress(f"comparing on {where}", i, len(feeds))
            yardstick.add(feed, runner(feed))
        runtime = runner.runtime
    finally:
        runner.close()
    found = yardstick.found()
    top1 = sum(yardstick.top1) / len(yardstick.top1) if yardstick.top1 else None
    return Comparison(
        runtime, f"onnxruntime {source.__version__}", where, len(feeds),
        {name: one.error for name, one in found.items()},
        {name: one.allowed for name, one in found.items()},
        {name: one.price for name, one in found.items()},
        top1, weights, quants, bits,
        {name: w.bits for name, w in _packed(graph).items() if name in weights},
        count, tuple(different), (*notes, *_told(found, kind)),
    )  # fmt: skip


def _kind(graph: Graph, runner: Any) -> tuple[Kind, bool]:
    """How the target computes, and whether its floats are float16."""
    precision = getattr(runner, "precision", "float32")
    half = precision == "float16"
    kind = graph.meta.get("edgeq.activations", "float")
    if graph.quants:
        return "static", half
    if kind == "dynamic" or precision == "int8":
        return "dynamic", half
    return ("half" if half else "float"), half


def _told(found: Mapping[str, Found], kind: Kind) -> list[str]:
    notes = [f"{name}: {one.note}" for name, one in found.items() if one.note]
    dear = {name: one.price for name, one in found.items() if one.price > DEAR}
    if kind == "dynamic" and dear:
        worst = max(dear, key=dear.__getitem__)
        notes.append(
            f"rounding values to 8 bits as the model runs changes {worst} by {dear[worst]:.2g} of "
            "its size; --set compute=float of tflite, or a preset of weights only, avoids it"
        )
    return notes


DEAR = 0.05
"""Change of an output by the runtime's own rounding from which on it is told."""


def with_options(graph: Graph, options: Mapping[str, Any]) -> Graph:
    """The graph as it is written: its metadata says how, and keeps no samples."""
    meta = {key: text for key, text in graph.meta.items() if key != META_SAMPLES}
    meta[META_OPTIONS] = json.dumps({"edgeq": __version__, "options": dict(options)})
    return replace(graph, meta=meta)


def _rebuilt(
    graph: Graph, path: Path, module: ModuleType, runner: Any
) -> tuple[int, list[str], list[str]]:
    """How many parts were compared with a new conversion's, those that differ, and notes."""
    try:
        told = json.loads(runner.metadata[META_OPTIONS])
        version, options = told["edgeq"], dict(told["options"])
    except (KeyError, TypeError, ValueError):
        return 0, [], ["constants that are not integers were not compared: the file does not say "
                       "with which options it was made; convert again"]  # fmt: skip
    if version != __version__:
        return 0, [], [f"constants that are not integers were not compared: edgeq {version} made "
                       f"the file, and this is {__version__}; convert again"]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="edgeq-") as folder:
        right = Path(folder) / path.name
        module.write(with_options(graph, options), right, options, None)
        count, different = differing(path, right)
    return count, different, []


def _check_ends(graph: Graph, runner: Any, path: Path) -> None:
    """Refuse a file that was made from another graph."""
    for what, mine, there in (
        ("takes", graph.inputs, runner.inputs),
        ("gives", graph.outputs, runner.outputs),
    ):
        want, got = ({name: list(ends[name].shape) for name in ends}
                     for ends in ({n: graph.info(n) for n in mine}, there))  # fmt: skip
        if want != got:
            raise UsageError(
                f"{path} {what} {_listed(got)}, and {graph.name!r} {_listed(want)}; compare it "
                "with what it was converted from"
            )


def _listed(ends: Mapping[str, list[int]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in ends.items())


def _weights(
    graph: Graph, stored: Iterable[tuple[str, QuantWeight]]
) -> tuple[dict[str, bool], dict[str, int]]:
    """Whether each packed constant came back, and in how many bits it is held.

    A bias of integers counts where the target has such; in Core ML it is of floats.
    """
    same = {name: False for name, held in _packed(graph).items() if held.bits != 32}
    bits: dict[str, int] = {}
    for name, found in stored:
        mine = graph.constants.get(name)
        if isinstance(mine, QuantWeight):
            same[name] = np.array_equal(found.levels, mine.levels) and np.array_equal(
                np.broadcast_to(found.wide_scales(), mine.shape),
                np.broadcast_to(mine.wide_scales(), mine.shape),
            )
            bits[name] = found.bits
        elif mine is not None:  # float in the source
            same[name], bits[name] = False, found.bits
    return same, bits


def _packed(graph: Graph) -> dict[str, QuantWeight]:
    """Constants that are integers."""
    return {name: w for name, w in graph.constants.items() if isinstance(w, QuantWeight)}


def check_packed(graph: Graph, path: Path, target: str, module: ModuleType) -> None:
    """Refuse a file in which a weight stayed float that the source has as integers."""
    weights, bits = _weights(graph, module.stored_weights(path))
    if missing := [name for name in weights if name not in bits]:
        raise EdgeqError(f"the {target} output is not kept: {stayed_float(missing, len(weights))}")


def stayed_float(missing: list[str], total: int) -> str:
    """A message about weights that are not packed."""
    return (
        f"{len(missing)} of {total} weights that the source has as integers are not packed in the "
        f"file: {', '.join(missing)}; please report it"
    )
