"""Which observer finds the ranges of rounded values best, settled without any test data.

    python benchmarks/vision/settle.py --data ../shared/data

Each classifier is quantized by w8a8-static with each observer, and compared with the float model
on samples that are neither those it is calibrated on nor those of docs/vision.md: by how often the
largest score is the same, and by the Kullback-Leibler divergence of the scores. Labels have no
part in it. Writes docs/vision-observers.json, which docs/vision.md shows a table of.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from run import FILES, STATIC, Recorded
from subjects import ROOT, SUBJECTS, Subject

from edgeq.graph.execute import Session
from edgeq.graph.ir import Graph
from edgeq.quant.graph.quantize import quantize_graph
from edgeq.quant.observers import OBSERVERS
from edgeq.quant.recipe import Recipe

OUT = ROOT / "docs" / "vision-observers.json"

Rows = NDArray[np.float64]


def scores(graph: Graph, subject: Subject) -> Rows:
    """What a graph gives for the validation samples, as probabilities."""
    session = Recorded(Session(graph))
    for i in range(len(next(iter(subject.validation.values())))):
        session({name: array[i : i + 1] for name, array in subject.validation.items()})
    x = np.stack(session.rows).astype(np.float64)
    if graph.producers[graph.outputs[0]].op == "Softmax":
        return x
    x = np.exp(x - x.max(axis=1, keepdims=True))
    return np.asarray(x / x.sum(axis=1, keepdims=True))


def divergence(p: Rows, q: Rows) -> float:
    """Mean Kullback-Leibler divergence of q from p, in nats."""
    least = 1e-9
    return float((p * np.log((p + least) / (q + least))).sum(axis=1).mean())


def tried(subject: Subject) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each observer with what it came to."""
    want = scores(subject.graph, subject)
    for observer in OBSERVERS:
        recipe = Recipe.from_dict({**Recipe.named(STATIC, "graph").to_dict(), "observer": observer})
        made = quantize_graph(subject.graph, recipe, subject.samples(FILES)).graph
        got = scores(made, subject)
        same = float((got.argmax(1) == want.argmax(1)).mean())
        yield observer, {"agreement": same, "divergence": divergence(want, got), "n": len(want)}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("-o", type=Path, default=OUT)
    args = parser.parse_args()
    FILES.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    for name, make in SUBJECTS.items():
        subject = make(args.data, FILES)
        if subject.encoder:
            continue
        results[name] = {}
        for observer, figures in tried(subject.held_out()):
            results[name][observer] = figures
            print(f"{name} {observer}: {figures}", flush=True)
            args.o.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
