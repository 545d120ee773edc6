"""Do our ONNX files run on the onnxruntime they name as the least, and on those since?

    python benchmarks/ort_versions.py [--cache FOLDER] [--versions 1.20.1 1.23.2 ...]

The demo model is converted in several ways that need different things of onnxruntime. Each file
is run, by a script that knows nothing of edgeq, in virtual environments with the version just
below what its metadata states, that version, one in between, and the newest; its greedy tokens
must be the reference's on all but the first, which must fail or go wrong: otherwise the stated
least is too high. Virtual environments are made with pip and kept in the cache folder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import textwrap
import venv
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

DEMO = Path(__file__).resolve().parent.parent / "edgeq" / "demo_model"
VERSIONS = ("1.20.1", "1.22.1", "1.23.2", "1.24.4", "1.26.0", "1.27.0", "1.29.0", "1.31.1")
PROMPT = [0, 403, 407, 261, 5, 9, 77, 30, 2, 8]
STEPS = 40

WORKER = textwrap.dedent(
    """
    import json, sys
    import numpy as np, onnxruntime
    path, prompt, steps = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    types = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}
    cache = {
        i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), types[i.type])
        for i in session.get_inputs() if i.name.startswith("past")
    }
    tokens, new, length = [], prompt, 0
    names = [o.name for o in session.get_outputs()]
    for _ in range(steps):
        length += len(new)
        feeds = {"input_ids": np.array([new]), "attention_mask": np.ones((1, length), np.int64)}
        found = dict(zip(names, session.run(names, feeds | cache)))
        cache = {name: found[name.replace("past_key_values", "present")] for name in cache}
        new = [int(found["logits"][0, -1].argmax())]
        tokens += new
    print(json.dumps(tokens))
    """
)
"""Runs in an environment of NumPy and onnxruntime alone."""


def cases(folder: Path) -> Iterator[tuple[str, Path, list[int], str]]:
    """Names, files, right tokens and stated least versions."""
    from edgeq import quantize
    from edgeq.converters import Options
    from edgeq.converters.ort.decoder import OrtDecoderTarget
    from edgeq.importers import load
    from edgeq.model import artifact
    from edgeq.model.reference import Reference
    from edgeq.quant import Recipe

    source = load(DEMO)
    blocks = tuple(replace(block, window=7) for block in source.config.blocks)
    windowed = replace(source.config, blocks=blocks)
    for name, recipe, embed, config, kv in (
        ("4 bits, float embedding", "w4-g32", "bf16", source.config, "float32"),
        ("4 bits, float16 cache", "w4-g32", "bf16", source.config, "float16"),
        ("4 bits, quantized embedding", "w4-g32", "w4-g32", source.config, "float32"),
        ("8 bits a channel", "w8-channel", "w8-channel", source.config, "float32"),
        ("2 bits with zero points", "w2-g16", "w8-channel", source.config, "float32"),
        ("2-bit embedding", "w4-g32", "w2-g32", source.config, "float32"),
        ("4-bit embedding, odd blocks", "w4-g32", "w4-g256-asym", source.config, "float32"),
        ("sliding window", "w4-g32", "w4-g32", windowed, "float32"),
        ("int8 cache", "w4-g32", "w4-g32", source.config, "int8"),
    ):
        packed, out = folder / f"{name}.edgeq", folder / name
        rule = f"embed_tokens|lm_head={embed}"
        chosen = Recipe.from_options(recipe, tensor_types=[rule])
        quantize(replace(source, config=config), packed, chosen, method="rtn", threads=1)
        model = artifact.load(packed)
        OrtDecoderTarget().write(model, out, Options(compute="float", kv=kv))
        if kv == "float32":
            reference = Reference(model, keep=True)
            cache, new, tokens = reference.new_cache(), PROMPT, []
            for _ in range(STEPS):
                new = [int(reference.forward(new, cache, all_logits=False).argmax())]
                tokens += new
        else:  # what is rounded need not choose as the reference does, but alike everywhere
            tokens = run(Path(sys.executable), out / "model.onnx")
        yield name, out / "model.onnx", tokens, least(out / "model.onnx")


def least(path: Path) -> str:
    """The least onnxruntime that a file's metadata states."""
    import onnx

    proto = onnx.load_model(path, load_external_data=False)
    return next(p.value for p in proto.metadata_props if p.key == "edgeq.minimum_onnxruntime")


def python_with(version: str, cache: Path) -> Path:
    """The interpreter of an environment with one onnxruntime, made if need be."""
    folder = cache / f"onnxruntime-{version}"
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True, clear=True)
        wanted = [f"onnxruntime=={version}", "numpy"]
        subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True)
        (folder / "ready").touch()
    return python


def run(python: Path, path: Path) -> list[int]:
    """Greedy tokens of a file.

    Raises:
        RuntimeError: onnxruntime refuses it; its last words.
    """
    command = [str(python), "-c", WORKER, str(path), json.dumps(PROMPT), str(STEPS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["killed"])[-1])
    return list(json.loads(done.stdout))


def key(version: str) -> tuple[int, ...]:
    """A version as numbers, without its patch level."""
    return tuple(map(int, version.split(".")[:2]))


def main() -> int:
    """Run all cases; 1 if a file does not do what it states."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/edgeq-ort-versions")
    parser.add_argument("--versions", nargs="+", default=VERSIONS)
    options = parser.parse_args()
    versions = sorted(options.versions, key=key)
    faults = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, path, right, stated in cases(Path(folder)):
            good = [v for v in versions if key(v) >= key(stated)]
            below = [v for v in versions if key(v) < key(stated)][-1:]
            for version in dict.fromkeys([*below, good[0], good[len(good) // 2], good[-1]]):
                try:
                    same = run(python_with(version, options.cache), path) == right
                    what = "right tokens" if same else "WRONG tokens, without an error"
                except RuntimeError as err:
                    same, what = False, f"refused: {str(err)[:70]}"
                fault = same == (version in below)
                faults += fault
                mark = "FAULT" if fault else "as stated"
                print(f"{name:30} needs {stated}  on {version:7} {mark:10} {what}", flush=True)
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
