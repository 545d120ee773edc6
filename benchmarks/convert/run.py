"""Convert a model of a known shape to every target: seconds, memory, bytes, and speed there.

    python benchmarks/convert/run.py                          qwen2.5-0.5b; writes docs/convert.md
    python benchmarks/convert/run.py --shape smollm2-135m --targets ort,gguf --out /tmp/table

Weights are random (speed and bytes do not depend on what they say), the tokenizer knows bytes and
is padded to the vocabulary. Each conversion and each run is a process of its own, so that its peak
of memory is its own; "library" is what importing the target's packages alone holds. Decode is one
thread, one token at a time through the target's own runtime, beside edgeq on the same integers:
edgeq, target, edgeq, target ..., medians.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))

TARGETS = ("ort", "genai", "tflite", "litertlm", "coreml", "gguf")
SUFFIX = {"tflite": ".tflite", "litertlm": ".litertlm", "coreml": ".mlpackage", "gguf": ".gguf"}
LIBRARIES = {
    "ort": "onnx", "genai": "onnx", "tflite": "ai_edge_litert.schema_py_generated",
    "litertlm": "litert_lm_builder", "coreml": "coremltools", "gguf": "gguf",
}  # fmt: skip
FIXED, CONTEXT = ("tflite", "litertlm", "coreml"), 512
"""Targets whose cache has a fixed length, and the one they get; the others' grows."""
PROMPT, STEPS = 16, 24
PACKAGES = ("onnxruntime", "onnxruntime-genai", "ai-edge-litert", "litert-lm-api", "coremltools",
            "llama-cpp-python", "gguf", "onnx", "numpy")  # fmt: skip


# --- what the processes do --------------------------------------------------------------------


def peak_bytes() -> int:
    """Most memory this process has held, bytes."""
    from edgeq.core.memory import peak_rss_bytes

    return peak_rss_bytes() or 0


def do_library(target: str) -> dict[str, Any]:
    """Import what the target needs, and no more."""
    import edgeq.converters.convert  # noqa: F401

    __import__(LIBRARIES[target])
    return {"peak": peak_bytes()}


def do_convert(target: str, artifact: str, out: str) -> dict[str, Any]:
    """Convert without running the result."""
    from edgeq.converters import Options
    from edgeq.converters.convert import convert

    options = Options(context=CONTEXT) if target in FIXED else None
    made = convert(artifact, target, out, options, force=True, validate=False)
    return {"seconds": made.seconds, "nbytes": made.nbytes, "peak": peak_bytes()}


def do_decode(target: str, path: str) -> dict[str, Any]:
    """Milliseconds of each decode step, by edgeq or in the target's runtime."""
    from edgeq.importers import load

    rng = np.random.default_rng(0)
    prompt = rng.integers(300, 20000, PROMPT)
    if target == "edgeq":
        from edgeq.runtime.engine import Engine

        engine: Any = Engine(load(path), context=256, threads=1)
        runtime = "edgeq"
    else:
        from edgeq.converters import target_named

        engine = target_named(target).open(Path(path), threads=1)
        runtime = engine.runtime
    engine.forward(prompt)
    token, times = 500, []
    for _ in range(STEPS):
        start = time.perf_counter()
        engine.forward(np.array([token]))
        times.append(time.perf_counter() - start)
    engine.close()
    return {"ms": 1e3 * statistics.median(times), "runtime": runtime, "peak": peak_bytes()}


# --- putting it together ----------------------------------------------------------------------


def ask(*args: str) -> dict[str, Any]:
    """One of the above in a process of its own."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "run.py"), "--do", *args]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(args)} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def byte_tokenizer(vocab: int) -> dict[str, str]:
    """Files of a tokenizer that knows bytes, with as many tokens as the model."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    entries = {letter: i for i, letter in enumerate(letters)}
    for i in range(len(letters), vocab - 1):
        entries[f"filler{i}"] = i
    tokenizer = Tokenizer(models.BPE(entries, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>",
                "add_bos_token": False}  # fmt: skip
    return {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": json.dumps(settings)}


def make_artifact(shape: str, home: Path) -> Path:
    """A w4-g32 artifact of the shape, embedding and head in w8-channel; kept between runs."""
    from edgeq import quantize
    from edgeq.importers import load
    from edgeq.quant import Recipe

    artifact = home / f"{shape}.edgeq"
    if not artifact.exists():
        checkpoint = home / shape
        script = str(ROOT / "benchmarks" / "make_checkpoint.py")
        subprocess.run(
            [sys.executable, script, "--shape", shape, "--out", str(checkpoint)],
            env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True,
        )  # fmt: skip
        for name, text in byte_tokenizer(load(checkpoint).config.vocab).items():
            (checkpoint / name).write_text(text, "utf-8")
        quantize(checkpoint, artifact, Recipe.from_options("w4-g32"))
    return artifact


def measured(target: str, artifact: Path, home: Path, repeats: int) -> dict[str, Any]:
    """A row of the table."""
    out = home / f"{artifact.stem}{SUFFIX.get(target, '-' + target)}"
    row = {"target": target, "library_bytes": ask("library", target)["peak"]}
    row |= ask("convert", target, str(artifact), str(out))
    if target == "coreml":
        return row  # its executor here is for checking; speed is Apple's hardware's
    ours, theirs = [], []
    for _ in range(repeats):
        ours.append(ask("decode", "edgeq", str(artifact))["ms"])
        found = ask("decode", target, str(out))
        theirs.append(found["ms"])
    ratio = statistics.median(t / o for o, t in zip(ours, theirs, strict=True))
    return row | {
        "runtime": found["runtime"],
        "tokens_per_s": 1e3 / statistics.median(theirs),
        "edgeq_tokens_per_s": 1e3 / statistics.median(ours),
        "ratio": ratio,
    }


def markdown(result: dict[str, Any]) -> str:
    """The table as a page."""
    size = result["artifact_bytes"]
    head = ("target | seconds | peak memory | of that the library | bytes | of the artifact | "
            "decode there, tok/s | edgeq beside it | edgeq is")  # fmt: skip
    lines = [f"| {head} |", "| :--- |" + " ---: |" * 8]
    for row in result["rows"]:
        speed = [f"{row['tokens_per_s']:.1f}", f"{row['edgeq_tokens_per_s']:.1f}",
                 f"{row['ratio']:.2f}x as fast"] if "ratio" in row else ["", "", ""]  # fmt: skip
        cells = [
            row["target"], f"{row['seconds']:.1f}", f"{row['peak'] / 1e6:.0f} MB",
            f"{row['library_bytes'] / 1e6:.0f} MB", f"{row['nbytes'] / 1e6:.1f} MB",
            f"{row['nbytes'] / size:.4f}x", *speed,
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return (
        f"# {result['shape']} to every target\n\n"
        "Written by `python benchmarks/convert/run.py`: random weights in w4-g32 with an 8-bit "
        f"embedding and head, an artifact of {size / 1e6:.1f} MB. Every conversion is a process of "
        'its own, without validation; "library" is what importing the target\'s packages alone '
        "holds. Decode is one thread and one token at a time, the target in its own runtime as "
        "edgeq drives it, medians of alternating runs. Caches of fixed length have "
        f"{CONTEXT} tokens.\n\n"
        + "\n".join(lines)
        + f"\n\n- Machine: {result['machine']}\n- Versions: {versions}\n- When: {result['when']}\n"
    )


def main() -> None:
    """Run everything, or one of the processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", default="qwen2.5-0.5b")
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--home", type=Path, default=Path.home() / ".cache" / "edgeq-convert")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "convert")
    parser.add_argument("--do", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.do:
        task, *args = options.do
        print(
            json.dumps(
                {"library": do_library, "convert": do_convert, "decode": do_decode}[task](*args)
            )
        )
        return
    options.home.mkdir(parents=True, exist_ok=True)
    artifact = make_artifact(options.shape, options.home)
    result: dict[str, Any] = {
        "shape": options.shape,
        "artifact_bytes": artifact.stat().st_size,
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"{platform.system()} {platform.release()}",
        "when": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": {p: importlib.metadata.version(p) for p in PACKAGES},
        "rows": [],
    }
    for target in options.targets.split(","):
        result["rows"].append(measured(target, artifact, options.home, options.repeats))
        print(json.dumps(result["rows"][-1]), file=sys.stderr)
    options.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    options.out.with_suffix(".md").write_text(markdown(result), "utf-8")
    print(markdown(result))


if __name__ == "__main__":
    main()
