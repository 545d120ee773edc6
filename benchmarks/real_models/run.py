"""Published models through every command: read, quantized, converted, compared on real inputs.

    make dev
    python benchmarks/real_models/run.py --data ../shared/data

Writes docs/real-models.json and docs/real-models.md anew after every row. --only chooses rows, and
--keep takes over the others that the file already has.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from inputs import ROOT, Feeds, Model, models
from language import LANGUAGE, language_row
from table import write

from edgeq.converters import open_graph
from edgeq.converters.convert import convert
from edgeq.core.errors import EdgeqError
from edgeq.evaluation.graph import cosine
from edgeq.graph.execute import Session
from edgeq.graph.ir import Graph
from edgeq.quant.graph.quantize import quantize_graph
from edgeq.quant.graph.samples import samples_of
from edgeq.quant.recipe import Recipe

OUT = ROOT / "docs" / "real-models.json"
TARGETS = {"ort": ".onnx", "tflite": ".tflite", "coreml": ".mlpackage"}
PRESET = "w8a8-static"
PACKAGE = "basic-pitch-mlpackage"
FIX = "precision=float32"
"""What a refusal of Core ML may name as the way out, which is then tried."""
TESTED = 16
"""Inputs on which outputs are measured."""


def graph_row(model: Model, work: Path, preset: str = PRESET) -> dict[str, Any]:
    """A graph: read, quantized, and both converted to every target.

    Args:
        model: with its inputs.
        work: for the files.
        preset: of the quantization.
    """
    row: dict[str, Any] = {"name": model.name, "about": model.about, "preset": preset}
    try:
        graph = model.load()
    except EdgeqError as err:
        return row | {"taken": False, "why": str(err)}
    feeds = model.inputs(graph)
    cut = 2 * len(feeds) // 3
    calibration, tested = feeds[:cut], feeds[cut:][:TESTED]
    right = [Session(graph)(feed) for feed in tested]
    row |= {"taken": True, "calibration": len(calibration), "tested": len(tested)}
    row["float"] = converted(graph, model, work, "float", tested, right)
    began = time.process_time()
    try:
        made = quantize_graph(graph, Recipe.named(preset, "graph"), samples_of(graph, calibration))
    except EdgeqError as err:
        return row | {"why": str(err)}
    row["cpu_seconds"] = time.process_time() - began
    row["bytes"] = {"float": made.float_bytes, "packed": made.packed_bytes}
    row["warnings"] = list(getattr(made, "warnings", ()))
    row["record"] = measured(Session(made.graph), model, tested, right)
    row["quantized"] = converted(made.graph, model, work, "int8", tested, right)
    return row


def converted(
    graph: Graph, model: Model, work: Path, kind: str, tested: list[Feeds], right: Sequence[Feeds]
) -> dict[str, Any]:
    """The graph in every target's form, measured against the float model's outputs."""
    found: dict[str, Any] = {}
    for target, suffix in TARGETS.items():
        path = work / f"{model.name}-{kind}{suffix}"
        began = time.process_time()
        options: dict[str, str] = {}
        samples = tested[: model.checked]
        try:
            try:
                done = convert(graph, target, path, samples=samples, force=True)
            except EdgeqError as err:
                if FIX not in str(err):
                    raise
                options = dict([FIX.split("=")])
                done = convert(graph, target, path, options, samples=samples, force=True)
        except Exception as err:  # noqa: BLE001 - a fault of edgeq itself is listed too
            fault = "" if isinstance(err, EdgeqError) else f"internal error, {type(err).__name__}: "
            found[target] = {"passed": False, "why": f"{fault}{err}"}
            continue
        seconds = time.process_time() - began
        runner = open_graph(path)
        try:
            figures = measured(runner, model, tested, right)
        finally:
            runner.close()
        assert done.certificate is not None
        found[target] = figures | {
            "passed": True, "cpu_seconds": seconds, "nbytes": done.nbytes,
            "to_record": max(done.certificate["error"].values()),
            "notes": done.certificate["notes"], "options": options,
        }  # fmt: skip
    return found


def measured(
    run: Callable[[Any], Mapping[str, Any]],
    model: Model,
    tested: Sequence[Feeds],
    right: Sequence[Feeds],
) -> dict[str, Any]:
    """Relative error of all outputs, and how often what users take from them is the same."""
    wrong = size = 0.0
    same: list[float] = []
    for feed, want in zip(tested, right, strict=True):
        got = run(feed)
        for name, array in want.items():
            a, b = array.astype(np.float64), np.asarray(got[name], np.float64)
            wrong, size = wrong + float(((b - a) ** 2).sum()), size + float((a**2).sum())
        mine, theirs = model.decide(dict(got)), model.decide(dict(want))
        if mine.dtype == np.bool_:  # of what either finds, the part that both find
            either = int((mine | theirs).sum())
            same.append(int((mine & theirs).sum()) / either if either else 1.0)
        elif mine.dtype.kind == "f":  # an embedding: the cosine between them
            same.append(float(cosine(mine.reshape(1, -1), theirs.reshape(1, -1)).mean()))
        else:
            same.append(float((mine == theirs).mean()))
    return {"error": (wrong / size) ** 0.5 if size else wrong**0.5, "same": float(np.mean(same))}


def package_row(folder: Path, work: Path) -> dict[str, Any]:
    """What each command does with the Core ML package of Basic Pitch."""
    path = folder / "basic_pitch" / "saved_models" / "icassp_2022" / "nmp.mlpackage"
    commands = {
        "inspect": ["inspect", path], "validate": ["validate", path],
        "quantize": ["quantize", path, "-o", work / "p.onnx"],
        "convert": ["convert", path, "--to", "tflite", "-o", work / "p.tflite"],
        "profile": ["profile", path], "bench": ["bench", path],
    }  # fmt: skip
    found = {}
    for name, words in commands.items():
        done = subprocess.run(
            [sys.executable, "-m", "edgeq", *map(str, words)],
            capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        lines = [x for x in (done.stderr if done.returncode else done.stdout).splitlines() if x]
        text = (lines[-1] if done.returncode else lines[0]) if lines else ""
        found[name] = {"code": done.returncode, "says": text.replace(str(path), path.name)}
    return {"name": PACKAGE, "about": "Basic Pitch (basic-pitch), .mlpackage", "commands": found}


def _written() -> dict[str, Any]:
    """Rows of the file, by name."""
    return {r["name"]: r for r in json.loads(OUT.read_text())["rows"]} if OUT.exists() else {}


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", type=Path, default=Path(sys.prefix) / "models")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--only", nargs="*", help="names of rows, the beginning is enough")
    parser.add_argument("--keep", action="store_true", help="keep rows that the file already has")
    parser.add_argument("--preset", default=PRESET)
    parser.add_argument("--work", type=Path, help="keep the files that are made here")
    given = parser.parse_args()
    rows = _written() if given.keep else {}
    work = given.work or Path(tempfile.mkdtemp(prefix="edgeq-real-"))
    work.mkdir(parents=True, exist_ok=True)
    known = {model.name: model for model in models(given.models, given.data, work)}
    names = [*known, PACKAGE, *LANGUAGE]
    asked = [n for n in names if not given.only or any(n.startswith(o) for o in given.only)]
    for name in asked:
        began = time.process_time()
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            if name in known:
                row = graph_row(known[name], work, given.preset)
            elif name == PACKAGE:
                row = package_row(given.models, work)
            else:
                row = language_row(name, given.models, work)
        except (OSError, ImportError, subprocess.TimeoutExpired) as err:
            row = {"name": name, "about": name, "taken": False, "why": f"not measured: {err}"}
        if "why" in row:
            row["why"] = row["why"].replace(f"{given.models}/", "")
        if given.keep:  # another run may have written rows in the meantime
            rows |= _written()
        rows[name] = row | {"row_seconds": time.process_time() - began}
        ordered = [rows[n] for n in names if n in rows]
        write(OUT, ordered)
        print(f"{name}: {rows[name]['row_seconds']:.0f} s", file=sys.stderr, flush=True)
    if given.work is None:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
