"""Hash what edgeq writes and says, so that two states of the code can be compared.

    python benchmarks/identity.py record before.json
    python benchmarks/identity.py record after.json
    python benchmarks/identity.py compare before.json after.json

It records the SHA-256 of artifacts (eight presets of three small language models), of every
conversion of them, of 200 greedy tokens with one and two threads, of quantized graphs (eight
graphs of the test suite) and of their conversions. Everything goes through the command line or
through names that `edgeq` exports, so the internal layout of the package does not matter. Both
recordings have to be made on one machine with the same versions of the dependencies: results of
BLAS may differ between processors.

A step that fails is recorded as the first line of its error, so refusals are compared too.
`compare` exits with 1 when anything differs.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "edgeq" / "demo_model"
TEXT = DEMO / "heldout.txt"

PRESETS = (
    "w8-channel", "w4-g32", "w4-g64-asym", "w3-g32-mse", "palette4", "w8a8-static",
    "w4-g32-gptq", "palette3-gptq",
)  # fmt: skip
TARGETS = {
    "ort": "", "genai": "", "tflite": ".tflite", "litertlm": ".litertlm", "coreml": ".mlpackage",
    "gguf": ".gguf",
}  # fmt: skip
CONVERTED = ("w8-channel", "w4-g32", "palette4")
"""Presets whose artifacts are converted."""
GRAPHS = (
    "mobilenet_v2", "resnet", "keyword_spotter", "detector", "unet", "bert", "vit", "audio",
)  # fmt: skip
GRAPH_PRESETS = ("w8a8-static", "w4-channel")
GRAPH_TARGETS = {"ort": ".onnx", "tflite": ".tflite", "coreml": ".mlpackage"}
TOKENS = 200
UNIQUE = re.compile(rb"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|\d{4}-\d\d-\d\dT[\d:.]+\+00:00")
"""What LiteRT-LM's builder writes anew each time: a UUID and a timestamp."""

GREEDY = """
import sys, edgeq
model = edgeq.load(sys.argv[1])
tokenizer = edgeq.Tokenizer(model.files)
tokens = tokenizer.encode("Once upon a time, there was a")
with edgeq.Engine(model, threads=int(sys.argv[2])) as engine:
    logits = engine.forward(tokens)
    for _ in range(int(sys.argv[3])):
        tokens.append(int(logits.argmax()))
        logits = engine.forward(tokens[-1:])
print(tokens)
"""


def made_checkpoint(family: str, folder: Path) -> Path:
    """A small random checkpoint in Hugging Face layout, with the demo model's tokenizer."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(7)
    hidden, ffn, layers, heads, kv_heads, head_dim, vocab = 96, 160, 4, 6, 2, 16, 2048
    config: dict[str, object] = {
        "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim,
        "vocab_size": vocab, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    if family == "gemma3":
        config |= {
            "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"],
            "hidden_activation": "gelu_pytorch_tanh", "rope_theta": 1e6,
            "rope_local_base_freq": 1e4, "sliding_window": 24, "sliding_window_pattern": 2,
            "query_pre_attn_scalar": 16,
        }  # fmt: skip
    else:
        config |= {
            "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_act": "silu",
            "rope_theta": 1e6,
        }  # fmt: skip
    base = 0.0 if family == "gemma3" else 1.0
    tensors: dict[str, np.ndarray] = {}

    def norm(name: str, size: int) -> None:
        tensors[name] = (base + 0.1 * rng.standard_normal(size)).astype(np.float32)

    def linear(name: str, rows: int, columns: int, scale: float = 1.0) -> None:
        weight = scale * rng.standard_normal((rows, columns)) / columns**0.5
        tensors[name] = weight.astype(np.float32)

    # small, so that what the layers add decides the next token
    linear("model.embed_tokens.weight", vocab, hidden, 0.2)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        norm(prefix + "input_layernorm.weight", hidden)
        norm(prefix + "post_attention_layernorm.weight", hidden)
        if family == "gemma3":
            norm(prefix + "pre_feedforward_layernorm.weight", hidden)
            norm(prefix + "post_feedforward_layernorm.weight", hidden)
        norm(prefix + "self_attn.q_norm.weight", head_dim)
        norm(prefix + "self_attn.k_norm.weight", head_dim)
        linear(prefix + "self_attn.q_proj.weight", heads * head_dim, hidden)
        linear(prefix + "self_attn.k_proj.weight", kv_heads * head_dim, hidden)
        linear(prefix + "self_attn.v_proj.weight", kv_heads * head_dim, hidden)
        linear(prefix + "self_attn.o_proj.weight", hidden, heads * head_dim)
        linear(prefix + "mlp.gate_proj.weight", ffn, hidden)
        linear(prefix + "mlp.up_proj.weight", ffn, hidden)
        linear(prefix + "mlp.down_proj.weight", hidden, ffn)
    norm("model.norm.weight", hidden)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((DEMO / name).read_bytes())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def digest(path: Path) -> str:
    """SHA-256 of a file, or of a folder's names and files; certificates are left out."""
    total = hashlib.sha256()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for file in files:
        if not file.name.endswith("certificate.json"):
            total.update(str(file.relative_to(path)).encode() + b"\0")
            data = file.read_bytes()
            if file.suffix == ".litertlm":  # its builder puts a random number and the time in
                data = UNIQUE.sub(b"", data[:16384]) + data[16384:]
            total.update(data)
    return total.hexdigest()


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run Python on the checkout's own edgeq."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "10000"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True,
    )  # fmt: skip


def written(out: Path, *arguments: str | Path) -> str:
    """Run an edgeq command that writes ``out``: its hash, or the first line of the error."""
    done = run("-m", "edgeq", *arguments, "-o", out)
    if done.returncode == 0:
        return digest(out)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error")]
    return " ".join((lines or ["error without a message"])[0].replace(str(out), "OUT").split())


def language_models(folder: Path, wanted: str) -> Iterator[tuple[str, str]]:
    """Artifacts, tokens and conversions of the language models, as (name, hash)."""
    sources = {"demo": DEMO}
    sources |= {name: made_checkpoint(name, folder / name) for name in ("qwen3", "gemma3")}
    for source_name, source in sources.items():
        for preset in PRESETS:
            name = f"{source_name}/{preset}"
            if not fnmatch.fnmatch(name, wanted):
                continue
            artifact = folder / f"{source_name}-{preset}.edgeq"
            yield name, written(
                artifact, "quantize", source, "--preset", preset, "--calib", TEXT,
                "--calib-windows", "8", "--calib-context", "128", "--no-card",
            )  # fmt: skip
            if not artifact.exists():
                continue
            for threads in (1, 2):
                done = run("-c", GREEDY, artifact, str(threads), str(TOKENS))
                if done.returncode:
                    raise RuntimeError(done.stderr)
                yield f"{name}/tokens-{threads}", hashlib.sha256(done.stdout.encode()).hexdigest()
            if preset not in CONVERTED:
                continue
            for target, suffix in TARGETS.items():
                out = folder / f"{source_name}-{preset}-{target}{suffix}"
                yield (
                    f"{name}/{target}",
                    written(out, "convert", artifact, "--to", target, "-c", "256", "--no-validate"),
                )


def graphs(folder: Path, wanted: str) -> Iterator[tuple[str, str]]:
    """Quantized graphs and their conversions, as (name, hash)."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import graph_zoo

    for graph in GRAPHS:
        source = graph_zoo.save(graph, folder)
        samples = [graph_zoo.feeds(graph_zoo.canonical(graph, folder), seed) for seed in range(8)]
        calibration = folder / f"{graph}.npz"
        np.savez(calibration, **{
            name: np.concatenate([sample[name] for sample in samples]) for name in samples[0]
        })  # fmt: skip
        shapes = [
            part
            for name, value in samples[0].items()
            for part in ("--shape", f"{name}={','.join(map(str, value.shape))}")
        ]
        for preset in GRAPH_PRESETS:
            name = f"graph-{graph}/{preset}"
            if not fnmatch.fnmatch(name, wanted):
                continue
            quantized = folder / f"{graph}-{preset}.onnx"
            yield (
                name,
                written(
                    quantized,
                    "quantize",
                    source,
                    "--preset",
                    preset,
                    "--calib",
                    calibration,
                    *shapes,
                ),
            )
            if not quantized.exists():
                continue
            for target, suffix in GRAPH_TARGETS.items():
                out = folder / f"{graph}-{preset}-{target}{suffix}"
                yield (
                    f"{name}/{target}",
                    written(out, "convert", quantized, "--to", target, "--no-validate"),
                )


def record(out: Path, wanted: str) -> int:
    """Write the hashes to a JSON file, and show each as it comes."""
    hashes: dict[str, str] = {}
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        for part in (language_models, graphs):
            for name, value in part(Path(temporary), wanted):
                hashes[name] = value
                print(f"{time.monotonic() - start:6.0f} s  {name:44} {value[:100]}", flush=True)
    out.write_text(json.dumps(hashes, indent=1) + "\n")
    return 0


def compare(before: Path, after: Path) -> int:
    """Print what differs between two recordings; 1 if anything does."""
    old, new = (json.loads(path.read_text()) for path in (before, after))
    different = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    for name in different:
        print(f"{name}: {old.get(name, 'absent')[:100]} -> {new.get(name, 'absent')[:100]}")
    print(f"{len({*old, *new}) - len(different)} equal, {len(different)} different")
    return 1 if different else 0


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    recording = verbs.add_parser("record", help="write hashes to a JSON file")
    recording.add_argument("out", type=Path)
    recording.add_argument("--only", default="*", help="names such as 'demo/*' or 'graph-*'")
    comparing = verbs.add_parser("compare", help="compare two recordings")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    arguments = parser.parse_args()
    if arguments.verb == "record":
        return record(arguments.out, arguments.only)
    return compare(arguments.before, arguments.after)


if __name__ == "__main__":
    sys.exit(main())
