"""edgeq as one of the runtimes that are compared; see `protocol` for how it is talked to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from protocol import clock, repeat, serve

from edgeq._version import __version__
from edgeq.formats.schemes import QuantScheme, parse_scheme
from edgeq.importers import load
from edgeq.importers.shapes import random_model, shape
from edgeq.model import artifact
from edgeq.model.model import Model
from edgeq.profiling import bytes_read_per_token, read_bandwidth
from edgeq.runtime.engine import Engine

if TYPE_CHECKING:
    from chain import Chain

SCHEME = "w4-g32"

_models: dict[str, Model] = {}
_engines: dict[str, Engine] = {}
_chains: dict[str, Chain] = {}


def _random(name: str) -> Model:
    config = shape(name)
    return random_model(config, lambda _name, _shape: parse_scheme(SCHEME))


def info() -> dict[str, Any]:
    """Versions and the kernel that was chosen."""
    import llvmlite
    import numba

    from edgeq.runtime.kernels import KERNEL

    return {
        "edgeq": __version__,
        "kernel": KERNEL,
        "numba": numba.__version__,
        "llvmlite": llvmlite.__version__,
        "numpy": np.__version__,
    }


def make(name: str, path: str) -> int:
    """Write random weights of a known shape, every matrix in 4 bits; its bytes."""
    return artifact.save(_random(name), Path(path))


def bandwidth(threads: int) -> float:
    """Read bandwidth now, in GB/s."""
    return read_bandwidth(threads)


def open_session(
    session: str, model: str, path: str | None, threads: int, context: int, cache: str
) -> None:
    """Make an engine. ``path`` None: the weights are made in memory instead of mapped."""
    if session in _engines:
        return
    if model not in _models:
        _models[model] = _random(model) if path is None else load(path)
    _engines[session] = Engine(
        _models[model], context=context, threads=threads, kv_bits=8 if cache == "int8" else 16
    )


def _tokens(vocab: int, n: int) -> Any:
    return np.random.default_rng(1).integers(0, vocab, n)


def logits(session: str, n: int, path: str) -> None:
    """Save the logits after a prompt of n tokens, to be compared."""
    engine = _engines[session]
    engine.reset()
    np.save(path, engine.forward(_tokens(engine.config.vocab, n)))


def read(session: str, n: int, budget: float) -> list[float]:
    """Seconds of readings of a prompt of n tokens, for ``budget`` seconds."""
    engine = _engines[session]
    tokens = _tokens(engine.config.vocab, n)

    def once() -> float:
        engine.reset()
        start = clock()
        engine.forward(tokens)
        return clock() - start

    return repeat(once, budget)


def generate(session: str, n: int, depth: int, budget: float) -> list[float]:
    """Seconds of generations of n tokens with ``depth`` in the cache, for ``budget`` seconds."""
    engine = _engines[session]
    if engine.n_past < depth:
        engine.reset()
        engine.forward(_tokens(engine.config.vocab, depth))

    def once() -> float:
        engine.truncate(depth)
        start = clock()
        engine.greedy(1, n)
        return clock() - start

    return repeat(once, budget)


def token_bytes(session: str, depth: int) -> int:
    """Bytes that one generated token reads."""
    engine = _engines[session]
    return bytes_read_per_token(engine.model, depth, engine.kv_bits)


def close_session(session: str) -> None:
    """Free an engine."""
    _engines.pop(session).close()


def open_matmul(session: str, n: int, k: int, m: int, copies: int, threads: int) -> None:
    """Make ready a run of ``copies`` matmuls of m rows, each with weights of its own."""
    from chain import Chain

    scheme = parse_scheme(SCHEME)
    assert isinstance(scheme, QuantScheme)
    _chains[session] = Chain(scheme, n, k, m, copies, threads)


def matmul(session: str, budget: float) -> list[float]:
    """Seconds per matmul of runs of all copies, for ``budget`` seconds."""
    chain = _chains[session]
    return [seconds / len(chain.weights) for seconds in repeat(chain.run, budget)]


def check_matmul(session: str) -> float:
    """The relative error of the last product against float64."""
    return _chains[session].error()


def close_matmul(session: str) -> None:
    """Free a run of matmuls."""
    _chains.pop(session).close()


if __name__ == "__main__":
    serve(
        {
            f.__name__: f
            for f in (
                info, make, bandwidth, open_session, logits, read, generate, token_bytes,
                close_session, open_matmul, matmul, check_matmul, close_matmul,
            )
        }
    )  # fmt: skip
