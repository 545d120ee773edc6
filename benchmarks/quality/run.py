"""What every method costs in quality, and how it compares with llama.cpp's types.

    python benchmarks/quality/run.py --data ../shared

Writes docs/quality.json and docs/quality.md anew after every row. A whole run trains some twenty
small models and takes hours on one core; --keep takes over the rows that the file already has,
--model and --only choose some.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import llamacpp
from cases import BATCH, LEAN, STEPS, Case, cases
from report import write
from subjects import CALIBRATION, CONTEXT, ROOT, TRAINING, Subject, subjects

from edgeq import quantize
from edgeq._version import __version__
from edgeq.core.errors import EdgeqError
from edgeq.evaluation.text import Evaluation
from edgeq.importers import load
from edgeq.model.model import Model
from edgeq.model.reference import Reference
from edgeq.quant.decoder.calibrate import calibrate
from edgeq.quant.decoder.static import StaticActivations, dynamic_linear

OUT = ROOT / "docs" / "quality.json"


def sizes(model: Model, nbytes: int | None = None) -> dict[str, float]:
    """Bytes of the whole model, and bits held per weight of the layers' matrices."""
    inner = [t for n, t in model.tensors.items() if len(t.shape) == 2 and ".layers." in n]
    weights = sum(t.shape[0] * t.shape[1] for t in inner)
    held = sum(t.nbytes for t in inner)
    return {"bytes": nbytes or model.nbytes, "linear_bpw": 8 * held / weights}


def quality(found: Evaluation) -> dict[str, float | None]:
    """The figures of a row."""
    return {
        "nll": found.nll_per_token,
        "kl_mean": found.kl_mean,
        "kl_p99": found.kl_p99,
        "top1": found.top1_agreement,
    }


def measured(subject: Subject, case: Case, folder: Path) -> dict[str, Any]:
    """One row: quantize as ``edgeq quantize`` does, load the artifact, score it."""
    path = folder / "model.edgeq"
    recipe = case.recipe
    if case.like is not None:
        quantize(subject.path, path, case.like, threads=1)
        weights = sum(math.prod(t.shape) for t in subject.model.tensors.values())
        recipe = replace(recipe, target={"bpw": 8 * load(path).nbytes / weights})
    started = time.perf_counter()
    windows = subject.training if case.trains else subject.calibration
    summary = quantize(
        subject.path, path, recipe,
        calibration=windows if recipe.needs else None, threads=1,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    model = load(path)
    static, activations = StaticActivations.of(model), summary.recipe.activations
    linear = static.linear() if static else None
    if activations is not None and activations.mode == "dynamic":
        linear = dynamic_linear()
    reference = Reference(model, linear=linear) if linear else Reference(model, keep=True)
    return {
        **sizes(model),
        **quality(subject.score(reference.forward)),
        "seconds": seconds,
        "measured": time.strftime("%Y-%m-%d", time.gmtime()),
        "recipe": summary.recipe.to_dict(),
    }


def llamacpp_rows(subject: Subject, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """llama.cpp's types on the same text, with and without importance."""
    stats = calibrate(subject.model, subject.calibration)
    importance = {name: seen.mean_square for name, seen in stats.inputs.items()}
    for kind in llamacpp.TYPES:
        for weights in (None, importance):
            blocks = llamacpp.blocks_of(subject.model, kind, weights)
            model, nbytes = llamacpp.as_model(subject.model, blocks)
            path = folder / "model.gguf"
            llamacpp.write(subject.model, blocks, path)
            with llamacpp.running(path) as logits:
                own = quality(subject.score(logits))
            inner = [b for name, b in blocks.items() if ".layers." in name]
            bits = 8 * sum(b.raw.nbytes for b in inner)
            row = {
                "bytes": nbytes,
                "linear_bpw": bits / sum(b.values.size for b in inner),
                **quality(subject.score(Reference(model, keep=True).forward)),
                "by_llamacpp": own,
                "types": sorted({b.kind.name for b in inner}),
            }
            yield kind + (", imatrix" if weights else ""), row


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--model", action="append", help="of these models only")
    parser.add_argument("--only", default="", help="rows whose 'BITS LABEL' has this regex")
    parser.add_argument("--keep", action="store_true", help="measure only rows not there yet")
    parser.add_argument("-o", type=Path, default=OUT)
    args = parser.parse_args()
    known = subjects(args.data)
    results: dict[str, Any] = json.loads(args.o.read_text()) if args.o.exists() else {}
    results["edgeq"] = __version__
    results["protocol"] = {
        "context": CONTEXT,
        "calibration_windows": CALIBRATION,
        "training_windows": TRAINING,
        "lean": LEAN,
    }
    models = results.setdefault("models", {})
    for name in args.model or known:
        subject = known[name]()
        about = models.setdefault(name, {"rows": {}, "llamacpp": {}})
        about |= {
            "text": subject.text,
            "held_out_tokens": int(subject.held_out.size),
            "training_tokens": subject.training.n_tokens,
            "training_steps": STEPS[name],
            "batch": BATCH,
            "float": {**sizes(subject.model), **quality(subject.score(subject.base))},
        }
        order = [case.key for case in cases(name)]
        for group, key, row in _rows(subject, args.only, about if args.keep else None):
            about[group][key] = row
            about["rows"] = {k: about["rows"][k] for k in order if k in about["rows"]}
            args.o.write_text(json.dumps(results, indent=1) + "\n")
            write(results, args.o.with_suffix(".md"))
            print(name, key, _short(row), flush=True)


def _rows(
    subject: Subject, only: str, known: dict[str, Any] | None
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Group, label and figures of every row that is wanted and not known."""
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(subject.name):
            if not re.search(only, case.key) or (known and case.key in known["rows"]):
                continue
            try:
                yield "rows", case.key, measured(subject, case, Path(folder))
            except EdgeqError as err:  # a method that does not suit the model
                print(f"{subject.name} {case.key}: {err}", file=sys.stderr, flush=True)
        if re.search(only, "llama.cpp") and not (known and known["llamacpp"]):
            for label, row in llamacpp_rows(subject, Path(folder)):
                yield "llamacpp", label, row


def _short(row: dict[str, Any]) -> str:
    return (
        f"{row['bytes']} B, {row['linear_bpw']:.3f} bpw, NLL {row['nll']:.4f}, "
        f"KL {row['kl_mean']:.4f}, top-1 {row['top1']:.4f}"
    )


if __name__ == "__main__":
    main()
