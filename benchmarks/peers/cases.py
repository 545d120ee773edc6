"""What is compared with what: every case names the two sides and how each is asked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from edgeq.importers.shapes import shape
from edgeq.model.config import ModelConfig

SHAPES = ("llama-3.2-1b", "qwen2.5-0.5b", "smollm2-135m")
PROMPTS = (8, 64, 512)
MATMULS = ((2048, 2048), (8192, 2048), (2048, 8192))
ROWS = (1, 8, 128)
Q4_0_BYTES = 18 / 32
"""Bytes a weight takes in Q4_0, and in w4-g32 too: 32 codes of 4 bits and a float16 scale."""
MATMUL_BYTES = {"edgeq": Q4_0_BYTES, "onnxruntime": 1 / 2 + 4 / 32, "numpy": 4.0}
"""Bytes a weight takes in a single matmul: onnxruntime is given scales in float32."""
CACHE_BYTES = {"f16": 2.0, "q8_0": 34 / 32}


@dataclass(frozen=True)
class Side:
    """One of the things a case compares.

    Args:
        runtime: which worker does it.
        name: what the table calls it.
        do: the request that is timed.
        args: of that request, ``inner`` aside.
        opening: the request that makes it ready, and its arguments.
        busy: another process keeps a core busy meanwhile.
        token_bytes: bytes one generated token (or a matmul) reads, where that is known
            beforehand.
    """

    runtime: str
    name: str
    do: str
    args: dict[str, Any]
    opening: tuple[str, dict[str, Any]]
    busy: bool = False
    token_bytes: int | None = None


@dataclass(frozen=True)
class Case:
    """One row of a table for every peer.

    Args:
        section: the table.
        keys: the first cells of the row: what is compared.
        threads: of both sides.
        ours: edgeq.
        peers: what it is compared with.
        tokens: how many a run makes or reads; 0 for a matmul.
        depth: tokens in the cache halfway through, for the bytes that are read.
        goals: peer's name -> the ratio that is wanted.
    """

    section: str
    keys: tuple[str, ...]
    threads: int
    ours: Side
    peers: tuple[Side, ...]
    tokens: int = 0
    depth: int = 0
    goals: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What ``--only`` is matched with."""
        return f"{self.section} {' '.join(self.keys)} t{self.threads}"


@dataclass(frozen=True)
class Scale:
    """How much is measured.

    Args:
        shapes: of the models.
        generated: tokens per run of decode.
        depth: tokens in the cache for the long-context cases.
        matmuls: (N, K) of the single matmuls.
        repeats: alternating runs.
        seconds: a run repeats its work until it has taken so long.
    """

    shapes: tuple[str, ...] = SHAPES
    generated: int = 64
    depth: int = 4096
    matmuls: tuple[tuple[int, int], ...] = MATMULS
    repeats: int = 7
    seconds: float = 0.5


QUICK = Scale(SHAPES[-1:], 32, 1024, MATMULS[:1], 2, 0.1)

_DECODE_GOALS = {
    ("llama-3.2-1b", 1): 1.4, ("qwen2.5-0.5b", 1): 1.5, ("smollm2-135m", 1): 2.0,
    ("llama-3.2-1b", 2): 1.15, ("qwen2.5-0.5b", 2): 1.3, ("smollm2-135m", 2): 2.0,
}  # fmt: skip


def llamacpp_token_bytes(config: ModelConfig, cached: int, cache: str) -> int:
    """Bytes llama.cpp reads for a token: every matrix once in Q4_0, and the cache."""
    matrices = dict(config.linears())
    if not config.tied:
        matrices.pop("model.embed_tokens.weight")
    weights = sum(n * k for n, k in matrices.values()) * Q4_0_BYTES
    values = 2 * config.layers * config.kv_heads * config.head_dim * cached
    return int(weights + values * CACHE_BYTES[cache])


def _edgeq(model: str, path: str | None, threads: int, context: int, **more: Any) -> Side:
    session = f"{model} t{threads} c{context} int8"
    opening = {
        "session": session, "model": model, "path": path, "threads": threads,
        "context": context, "cache": "int8",
    }  # fmt: skip
    more["args"] = {"session": session, **more["args"]}
    return Side("edgeq", more.pop("name", "edgeq"), opening=("open_session", opening), **more)


def _llamacpp(
    model: str, path: str, threads: int, context: int, cache: str, flash: str, **more: Any
) -> Side:
    session = f"{model} t{threads} c{context} {cache} {flash}"
    opening = {
        "session": session, "model": model, "path": path, "threads": threads,
        "context": context, "cache": cache, "flash": flash,
    }  # fmt: skip
    more["args"] = {"session": session, **more["args"]}
    more.setdefault("name", "llama.cpp")
    return Side("llama.cpp", opening=("open_session", opening), **more)


def model_cases(
    name: str, ours: str | None, theirs: str, threads: tuple[int, ...], scale: Scale
) -> Iterator[Case]:
    """Decode, prefill and long-context cases of one shape.

    Args:
        name: the shape.
        ours: path of the packed model, or None to make it in memory.
        theirs: path of the same model as GGUF.
        threads: numbers of threads.
        scale: how much.
    """
    config, n = shape(name), scale.generated
    prompts = [length for length in PROMPTS if length <= config.context]
    short = max(*prompts, n)

    def generating(depth: int) -> dict[str, Any]:
        return {"do": "generate", "args": {"n": n, "depth": depth}}

    def reads(depth: int, cache: str) -> int:
        return llamacpp_token_bytes(config, depth + n // 2, cache)

    for t in threads:
        goal = _DECODE_GOALS.get((name, t))
        yield Case(
            "decode", (name,), t,
            _edgeq(name, ours, t, short, **generating(0)),
            (_llamacpp(name, theirs, t, short, "f16", "auto", **generating(0),
                       token_bytes=reads(0, "f16")),),
            n, n // 2, {"llama.cpp": goal} if goal else {},
        )  # fmt: skip
    for t in threads:
        for length in prompts:
            reading = {"do": "read", "args": {"n": length}}
            yield Case(
                "prefill", (name, f"pp{length}"), t,
                _edgeq(name, ours, t, short, **reading),
                (_llamacpp(name, theirs, t, short, "f16", "auto", **reading),),
                length, 0, {"llama.cpp": 2.0} if length == 512 else {},
            )  # fmt: skip
    long = scale.depth + n
    for t in threads if long <= config.context else ():
        peers = tuple(
            _llamacpp(
                name, theirs, t, long, cache, flash, **generating(scale.depth),
                name=f"llama.cpp {cache}, flash {flash}", token_bytes=reads(scale.depth, cache),
            )
            for cache, flash in (("q8_0", "on"), ("f16", "on"), ("f16", "off"))
        )  # fmt: skip
        yield Case(
            "depth", (name, f"d{scale.depth}"), t,
            _edgeq(name, ours, t, long, **generating(scale.depth)),
            peers, n, scale.depth + n // 2, {peer.name: 1.3 for peer in peers},
        )  # fmt: skip
    if 2 in threads:
        alone = _edgeq(name, ours, 1, short, **generating(0), name="edgeq, 1 thread alone")
        busy = _llamacpp(
            name, theirs, 2, short, "f16", "auto", **generating(0), busy=True,
            name="llama.cpp, core busy too",
        )  # fmt: skip
        yield Case(
            "busy", (name,), 2,
            _edgeq(name, ours, 2, short, **generating(0), busy=True),
            (alone, busy), n, n // 2, {alone.name: 0.9},
        )  # fmt: skip


def matmul_cases(threads: tuple[int, ...], scale: Scale, cache_bytes: int) -> Iterator[Case]:
    """Single matmuls, with weights that stay in the last cache and weights that do not."""
    for t in threads:
        for n, k in scale.matmuls:
            one = n * k * Q4_0_BYTES
            for place, total in (
                ("cache", cache_bytes / 2),
                ("memory", max(4 * cache_bytes, 128e6)),
            ):
                copies = max(1, int(total / one))
                for m in ROWS:
                    yield _matmul(n, k, m, t, place, copies)


def _matmul(n: int, k: int, m: int, threads: int, place: str, copies: int) -> Case:
    session = f"{n} {k} {m} {place} {threads}"
    opening = {"session": session, "n": n, "k": k, "m": m, "threads": threads}
    args = {"session": session}
    # with more rows there is more to compute than to read
    reads = n * k if m == 1 else 0
    ours = Side(
        "edgeq", "edgeq", "matmul", args, ("open_matmul", {**opening, "copies": copies}),
        token_bytes=int(reads * MATMUL_BYTES["edgeq"]) or None,
    )  # fmt: skip
    peers = []
    for kind in ("onnxruntime", "numpy"):
        if kind == "numpy":
            if place == "cache":
                continue  # float weights are seven times as large
            copies = max(1, copies // 7)
        here = {**opening, "copies": copies, "session": f"{kind} {session}"}
        peers.append(
            Side(
                f"matmul t{threads}", {"numpy": "NumPy float32"}.get(kind, kind), "matmul",
                {"session": here["session"]}, ("open_matmul", {**here, "kind": kind}),
                token_bytes=int(reads * MATMUL_BYTES[kind]) or None,
            )
        )  # fmt: skip
    goal = {1: 1.5, 128: 1.2}.get(m)
    return Case(
        "matmul", (f"{n} x {k}", f"M={m}", place), threads, ours, tuple(peers),
        goals={"onnxruntime": goal} if goal else {},
    )  # fmt: skip
