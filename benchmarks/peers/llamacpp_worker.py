"""llama.cpp as one of the runtimes that are compared; see `protocol` for how it is talked to.

It is called by its C interface, one batch a call, with logits for the last token alone, so that
no wrapper's Python counts against it. Each setting is the one llama-bench uses.
"""

from __future__ import annotations

import ctypes
import os
import platform
from dataclasses import dataclass
from typing import Any

import llama_cpp as api
import numpy as np
from protocol import clock, repeat, serve

BATCH = 512
CACHES = {"f16": api.GGML_TYPE_F16, "q8_0": api.GGML_TYPE_Q8_0}
FLASH = {
    "auto": api.LLAMA_FLASH_ATTN_TYPE_AUTO,
    "on": api.LLAMA_FLASH_ATTN_TYPE_ENABLED,
    "off": api.LLAMA_FLASH_ATTN_TYPE_DISABLED,
}


@dataclass
class Session:
    """A context of a model: its KV cache, and how many tokens are in it."""

    context: Any
    memory: Any
    vocab: int
    threads: int
    filled: int = 0


_models: dict[str, Any] = {}
_sessions: dict[str, Session] = {}


def info() -> dict[str, Any]:
    """Versions, and what the library was compiled for."""
    return {
        "llama-cpp-python": api.__version__,
        "llama.cpp built for": api.llama_print_system_info().decode().strip(),
        "python": platform.python_version(),
    }


def open_session(
    session: str, model: str, path: str, threads: int, context: int, cache: str, flash: str
) -> None:
    """Make a context; the model is loaded once for all of them."""
    if session in _sessions:
        return
    if model not in _models:
        params = api.llama_model_default_params()
        _models[model] = api.llama_model_load_from_file(os.fsencode(path), params)
        if not _models[model]:
            raise RuntimeError(f"llama.cpp cannot load {path}")
    settings = api.llama_context_default_params()
    settings.n_ctx = -(-context // 256) * 256  # only as much as is filled is ever looked at
    settings.n_batch = settings.n_ubatch = BATCH
    settings.n_threads = settings.n_threads_batch = threads
    settings.type_k = settings.type_v = CACHES[cache]
    settings.flash_attn_type = FLASH[flash]
    handle = api.llama_init_from_model(_models[model], settings)
    if not handle:
        raise RuntimeError(f"llama.cpp cannot make a context with cache {cache}, flash {flash}")
    vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(_models[model]))
    _sessions[session] = Session(handle, api.llama_get_memory(handle), vocab, threads)


def _tokens(vocab: int, n: int) -> Any:
    tokens = np.random.default_rng(1).integers(0, vocab, n)
    return (api.llama_token * n)(*tokens.tolist())


def _decode(s: Session, tokens: Any) -> None:
    code = api.llama_decode(s.context, api.llama_batch_get_one(tokens, len(tokens)))
    if code:
        raise RuntimeError(f"llama_decode returned {code}")
    api.llama_synchronize(s.context)


def _logits(s: Session) -> Any:
    pointer = api.llama_get_logits_ith(s.context, -1)
    return np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), (s.vocab,))


def _keep(s: Session, n: int) -> None:
    if not n:
        api.llama_memory_clear(s.memory, False)
    elif not api.llama_memory_seq_rm(s.memory, 0, n, -1):
        raise RuntimeError(f"llama.cpp cannot keep the first {n} tokens")
    s.filled = n


def logits(session: str, n: int, path: str) -> None:
    """Save the logits after a prompt of n tokens, to be compared."""
    s = _sessions[session]
    _keep(s, 0)
    _decode(s, _tokens(s.vocab, n))
    np.save(path, _logits(s))
    s.filled = n


def read(session: str, n: int, budget: float) -> list[float]:
    """Seconds of readings of a prompt of n tokens, for ``budget`` seconds."""
    s = _sessions[session]
    tokens = _tokens(s.vocab, n)

    def once() -> float:
        _keep(s, 0)
        start = clock()
        _decode(s, tokens)
        _logits(s)
        return clock() - start

    found = repeat(once, budget)
    s.filled = n
    return found


def generate(session: str, n: int, depth: int, budget: float) -> list[float]:
    """Seconds of generations of n tokens with ``depth`` in the cache, for ``budget`` seconds."""
    s = _sessions[session]
    if s.filled < depth:
        _keep(s, 0)
        every = len(os.sched_getaffinity(0))
        api.llama_set_n_threads(s.context, every, every)
        tokens = _tokens(s.vocab, depth)
        for i in range(0, depth, BATCH):
            _decode(s, (api.llama_token * min(BATCH, depth - i))(*tokens[i : i + BATCH]))
        api.llama_set_n_threads(s.context, s.threads, s.threads)
    one = (api.llama_token * 1)()

    def once() -> float:
        _keep(s, depth)
        one[0] = 1
        start = clock()
        for _ in range(n):
            _decode(s, one)
            one[0] = int(_logits(s).argmax())
        seconds = clock() - start
        s.filled = depth + n
        return seconds

    return repeat(once, budget)


def close_session(session: str) -> None:
    """Free a context."""
    api.llama_free(_sessions.pop(session).context)


if __name__ == "__main__":
    api.llama_backend_init()
    serve({f.__name__: f for f in (info, open_session, logits, read, generate, close_session)})
