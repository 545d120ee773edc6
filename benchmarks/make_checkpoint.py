"""Write a Hugging Face checkpoint of a known model's shape, with random bfloat16 weights.

    python benchmarks/make_checkpoint.py --shape llama-3.2-1b --out checkpoint --shards 3

It has config.json, model.safetensors or shards with their index, and no tokenizer: enough to
measure how fast and in how much memory a real checkpoint of that size is quantized.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from edgeq.core.errors import EdgeqError, UnsupportedError
from edgeq.formats.tensor import float32_to_bf16
from edgeq.importers.shapes import SHAPES, shape
from edgeq.model.config import ModelConfig

CHUNK = 1 << 22
"""Weights made at a time."""
ONES = np.full(CHUNK, 0x3F80, np.uint16).tobytes()
"""Norm weights: a model of noise that stays of order one runs like a real one."""


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a llama, mistral, qwen2 or qwen3 shape."""
    classes = {
        "llama": "LlamaForCausalLM",
        "mistral": "MistralForCausalLM",
        "qwen2": "Qwen2ForCausalLM",
        "qwen3": "Qwen3ForCausalLM",
    }
    if config.family not in classes:
        raise UnsupportedError(
            f"no config.json is written for family {config.family}; use a shape of "
            f"{', '.join(classes)}"
        )
    (rope,) = config.ropes
    values: dict[str, Any] = {
        "architectures": [classes[config.family]],
        "model_type": config.family,
        "hidden_size": config.hidden,
        "intermediate_size": config.ffn,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": rope.base,
        "hidden_act": "silu",
        "sliding_window": config.blocks[0].window,
        "tie_word_embeddings": config.tied,
        "bos_token_id": config.bos,
        "eos_token_id": list(config.eos),
        "torch_dtype": "bfloat16",
    }
    if rope.scaling:
        scaling = rope.scaling
        values["rope_scaling"] = {
            "rope_type": scaling.kind,
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
    return values


def shard_tensors(
    tensors: list[tuple[str, tuple[int, ...]]], shards: int
) -> list[list[tuple[str, tuple[int, ...]]]]:
    """Cut the list into parts of about equal bytes, none of them empty."""
    total = sum(math.prod(size) for _, size in tensors)
    parts: list[list[tuple[str, tuple[int, ...]]]] = [[] for _ in range(shards)]
    done = 0
    for index, item in enumerate(tensors):
        at = min(done * shards // total, shards - 1)
        # leave one tensor at least for each part that is still to come
        parts[max(at, shards - (len(tensors) - index))].append(item)
        done += math.prod(item[1])
    return [part for part in parts if part]


def write_shard(
    path: Path, tensors: list[tuple[str, tuple[int, ...]]], chunks: Iterator[bytes]
) -> None:
    """Write one safetensors file; each tensor but the norms takes as many chunks as it needs."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, size in tensors:
        stop = position + 2 * math.prod(size)
        header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, size in tensors:
            nbytes = 2 * math.prod(size)
            _fill(file, nbytes, itertools.repeat(ONES) if "norm" in name else chunks)


def _fill(file: BinaryIO, nbytes: int, chunks: Iterator[bytes]) -> None:
    while nbytes:
        chunk = next(chunks)[:nbytes]
        file.write(chunk)
        nbytes -= len(chunk)


def random_chunks(seed: int, spread: float) -> Iterator[bytes]:
    """Endless normal bfloat16 numbers.

    A pool of normal numbers is drawn once and read from random places: good enough for sizes and
    speeds, and as fast as a disk.
    """
    rng = np.random.default_rng(seed)
    pool = float32_to_bf16(rng.standard_normal(2 * CHUNK, np.float32) * np.float32(spread))
    while True:
        start = int(rng.integers(0, CHUNK))
        yield pool[start : start + CHUNK].tobytes()


def make(name: str, out: Path, shards: int = 1, seed: int = 0, layers: int | None = None) -> int:
    """Write the checkpoint, perhaps with fewer layers; returns its weights' bytes."""
    config = shape(name)
    if layers is not None:
        config = replace(config, blocks=config.blocks[:layers])
    values = hf_config(config)
    out.mkdir(parents=True, exist_ok=True)
    tensors: list[tuple[str, tuple[int, ...]]] = [*config.linears(), *config.norms()]
    if config.family == "qwen2":
        tensors += [item for item in config.biases() if "o_proj" not in item[0]]
    parts = shard_tensors(tensors, shards)
    chunks = random_chunks(seed, config.hidden**-0.5)
    placed: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        file = "model.safetensors"
        if len(parts) > 1:
            file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        write_shard(out / file, part, chunks)
        placed |= {name: file for name, _ in part}
    total = sum(2 * math.prod(size) for _, size in tensors)
    if len(parts) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": placed}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (out / "config.json").write_text(json.dumps(values, indent=1))
    return total


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llama-3.2-1b", help=f"one of {', '.join(SHAPES)}")
    parser.add_argument("--out", required=True, type=Path, help="the folder to write")
    parser.add_argument("--shards", type=int, default=1, help="how many safetensors files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, help="only so many layers")
    given = parser.parse_args()
    for option in ("shards", "layers"):
        if (getattr(given, option) or 1) < 1:
            parser.error(f"--{option} must be at least 1")
    try:
        total = make(given.shape, given.out, given.shards, given.seed, given.layers)
    except EdgeqError as err:
        print(f"error: {err}", file=sys.stderr)
        return 1
    print(f"{given.out}: {total / 1e9:.2f} GB of weights in {given.shards} file(s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
