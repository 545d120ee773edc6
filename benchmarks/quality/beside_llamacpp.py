"""The ladder of presets beside whole files of llama.cpp, on a published model.

    python benchmarks/quality/beside_llamacpp.py MODEL.gguf [--text NAME=FILE:WINDOWS ...] \\
        [--files FOLDER] [--row REGEX] [--imatrix-part N]

MODEL is of the llama architecture, and its own values count as the float model. llama.cpp writes
each of its kinds of files from these values in float32, with an importance matrix and without one.
The matrix is the mean square of every input on the text that edgeq calibrates with by default, or
on every N-th window of it. All files are measured alike: with float32 arithmetic on the weights
that they hold, on the text of the quality card and on the last windows of each FILE, and with the
bytes of the whole file.

The figures go into docs/quality.json and docs/quality.md after every row; rows that are there
already, and files that FOLDER holds already, are not made again.
"""

from __future__ import annotations

import argparse
import gzip
import json
import pickle
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from gguf_files import FTYPES, RefusedError, held_by, quantize_file
from numpy.typing import NDArray
from report import write
from run import OUT, quality
from subjects import CONTEXT, remembered

from edgeq import quantize
from edgeq.calibration_text import held_out, own_calibration
from edgeq.cli.quantize import TARGET_PRESET
from edgeq.core.cpu import available_cores, this_cpu
from edgeq.evaluation.text import Tally
from edgeq.importers import load
from edgeq.model.model import Model
from edgeq.model.reference import Reference
from edgeq.quant.decoder.calibrate import (
    CalibrationStats,
    CalibrationText,
    calibrate,
    cut_windows,
)
from edgeq.quant.presets import LADDER
from edgeq.quant.recipe import Recipe
from edgeq.runtime.tokenizer import Tokenizer

TARGETS = {"bits chosen, 3.75": 3.75, "bits chosen, 4.75": 4.75}
"""Rows of ``--target-bpw``: label -> bits per weight, by the method of the presets."""
WITH_IMATRIX = ", imatrix"
PROTOCOL = "every token after a window's first"


@dataclass
class Bench:
    """A float model, its texts, and the files that are made of it.

    Args:
        path: of the model.
        folder: for the files.
        model: the float model.
        texts: name -> windows int64 [T] measured on.
        imatrix_part: importance is measured on every so-manieth window of the calibration text.
    """

    path: Path
    folder: Path
    model: Model
    texts: dict[str, tuple[NDArray[np.int64], ...]]
    imatrix_part: int = 1
    imatrix_tokens: int = 0

    @cached_property
    def base(self) -> Callable[[NDArray[np.int64]], NDArray[np.floating]]:
        """The float model's logits."""
        return remembered(Reference(self.model, keep=True).forward)

    @cached_property
    def calibration(self) -> CalibrationText:
        """What both sides calibrate with; sampled once for a folder."""
        path = self.folder / "calibration.pickle"
        if not path.exists():
            path.write_bytes(pickle.dumps(own_calibration(self.model)))
        text: CalibrationText = pickle.loads(path.read_bytes())
        return text

    @cached_property
    def importance(self) -> dict[str, NDArray[np.float32]]:
        """Mean square of the inputs of each matrix of a layer, as llama.cpp's tool has them."""
        path = self.folder / f"inputs-{self.imatrix_part}.stats"
        if path.exists():
            stats = CalibrationStats.load(path)
        else:
            windows = self.calibration.windows[:: self.imatrix_part]
            stats = calibrate(self.model, replace(self.calibration, windows=windows))
            stats.save(path)
        self.imatrix_tokens = stats.n_tokens
        return {n: seen.mean_square for n, seen in stats.inputs.items() if ".layers." in n}

    @cached_property
    def float_file(self) -> Path:
        """The model in float32, as a GGUF file."""
        path = self.folder / "float.gguf"
        if not path.exists():
            quantize_file(self.path, path, "F32")
        held, _ = held_by(path, self.model)
        for name, tensor in self.model.tensors.items():
            if not np.array_equal(held.tensors[name].numpy(), tensor.numpy()):
                raise RuntimeError(f"{name}: the float file holds other values than the source")
        return path

    def score(self, model: Model) -> dict[str, Any]:
        """Quality on all texts together, and KL on each."""
        reference, tally = Reference(model, keep=True), Tally()
        seen, total, by_text = 0, 0.0, {}
        for name, windows in self.texts.items():
            for window in windows:
                logits, base = reference.forward(window), self.base(window)
                tally.add(window[1:], logits[:-1], base[:-1])
            found = tally.result(PROTOCOL)
            sum_of_kl = (found.kl_mean or 0.0) * found.n_tokens
            by_text[name] = (sum_of_kl - total) / (found.n_tokens - seen)
            seen, total = found.n_tokens, sum_of_kl
        return {**quality(found), "kl_by_text": by_text}

    def own(self, label: str) -> dict[str, Any]:
        """A row of edgeq's: a preset, or bits chosen for a size."""
        path = self.folder / f"{label.replace(' ', '_')}.edgeq"
        if not path.exists():
            recipe: Any = label
            if label in TARGETS:
                recipe = Recipe.from_options(preset=TARGET_PRESET)
                recipe = replace(recipe, target={"bpw": TARGETS[label]})
            part = path.with_name(f"part-{path.name}")
            quantize(self.path, part, recipe, calibration=self.calibration, requantize=True)
            part.rename(path)
        model = load(path)
        return {"bytes": path.stat().st_size, "tensor_bytes": model.nbytes, **self.score(model)}

    def theirs(self, label: str) -> dict[str, Any]:
        """A row of llama.cpp's."""
        kind, imatrix, _ = label.partition(WITH_IMATRIX)
        path = self.folder / f"{label.replace(', ', '-')}.gguf"
        if not path.exists():
            weights = self.importance if imatrix else None
            part = path.with_name(f"part-{path.name}")
            quantize_file(self.float_file, part, kind, weights, available_cores())
            part.rename(path)
        model, kinds = held_by(path, self.model)
        row = {"bytes": path.stat().st_size, "types": kinds, **self.score(model)}
        return row | {"imatrix_tokens": self.imatrix_tokens} if imatrix else row


def text_of(path: Path) -> str:
    """A text, or of a file of programming tasks (.jsonl.gz) each task with its solution."""
    if path.suffixes[-2:] != [".jsonl", ".gz"]:
        return path.read_text("utf-8")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        tasks = [json.loads(line) for line in lines]
    return "\n\n".join(task["prompt"] + task["canonical_solution"] for task in tasks)


def windows_of(model: Model, file: Path, count: int) -> tuple[NDArray[np.int64], ...]:
    """The last windows of a text, as many as are wanted."""
    tokenizer = Tokenizer(model.files)
    # no text has more characters for a token on average
    end = text_of(file)[-16 * CONTEXT * count :]
    ids = tokenizer.encode(end, add_bos=False)
    text = cut_windows(ids, context=CONTEXT, n_windows=None, bos=tokenizer.text_bos)
    whole = [window for window in text.windows if window.size == CONTEXT]
    if len(whole) < count:
        raise SystemExit(f"{file} has {len(whole)} windows of {CONTEXT} tokens; {count} are needed")
    return tuple(whole[-count:])


def texts_of(model: Model, wanted: list[str]) -> dict[str, tuple[NDArray[np.int64], ...]]:
    """The quality card's text, and those given as NAME=FILE:WINDOWS."""
    card = held_out(model, None)
    if isinstance(card, str):
        raise SystemExit(card)
    texts = {"card": card.cut.windows}
    for one in wanted:
        name, _, rest = one.partition("=")
        file, _, count = rest.rpartition(":")
        if not (name and file and count.isdigit() and int(count)):
            raise SystemExit(f"--text {one}: give NAME=FILE:WINDOWS")
        texts[name] = windows_of(model, Path(file), int(count))
    return texts


def wanted_rows(bench: Bench, only: str, known: set[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Labels and figures of the rows that are wanted and not known."""
    rows: dict[str, Callable[[str], dict[str, Any]]] = {
        f"edgeq {name}": bench.own for name in (*reversed(LADDER), *TARGETS)
    }
    for kind in FTYPES:
        rows[f"llama.cpp {kind}"] = bench.theirs
        if kind not in ("F32", "Q8_0"):  # which round without importance
            rows[f"llama.cpp {kind}{WITH_IMATRIX}"] = bench.theirs
    del rows["llama.cpp F32"]
    for label, measure in rows.items():
        if label in known or not re.search(only, label):
            continue
        started = time.process_time()
        try:
            row = measure(label.split(" ", 1)[1])
        except RefusedError as err:
            row = {"refused": str(err)}
        yield label, row | {"cpu_seconds": round(time.process_time() - started)}


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", action="append", default=[], help="NAME=FILE:WINDOWS")
    parser.add_argument("--files", type=Path, help="folder for the files, which are kept")
    parser.add_argument("--row", default="", help="rows whose label has this regex")
    parser.add_argument("--imatrix-part", type=int, default=1, help="every N-th window")
    parser.add_argument("-o", type=Path, default=OUT)
    args = parser.parse_args()
    model = load(args.model)
    texts = texts_of(model, args.text)
    tokens = {name: sum(w.size - 1 for w in windows) for name, windows in texts.items()}
    results: dict[str, Any] = json.loads(args.o.read_text())
    about = results.setdefault("published", {}).setdefault(args.model.stem, {})
    if about.get("tokens", tokens) != tokens:
        raise SystemExit(f"rows in {args.o} were measured on other texts; remove them first")
    about |= {"tokens": tokens, "machine": this_cpu().name}
    rows = about.setdefault("rows", {})
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.files or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        bench = Bench(args.model, folder, model, texts, args.imatrix_part)
        for label, row in wanted_rows(bench, args.row, set(rows)):
            rows[label] = row | {"measured": time.strftime("%Y-%m-%d", time.gmtime())}
            args.o.write_text(json.dumps(results, indent=1) + "\n")
            write(results, args.o.with_suffix(".md"))
            print(label, rows[label], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
