"""What a session times: a model in edgeq's engine, a converted one in its runtime, or a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgeq._version import __version__
from edgeq.core.errors import UsageError
from edgeq.devices.model_header import facts_of
from edgeq.devices.roofline import cache_read_bytes, values_seen
from edgeq.profiling.session import Workload

if TYPE_CHECKING:
    from edgeq.converters.runners import DecoderRunner
    from edgeq.model.config import ModelConfig
    from edgeq.model.model import Model
    from edgeq.runtime.engine import Engine


class EngineCandidate:
    """A model in edgeq's engine.

    Args:
        engine: runs it; its context must hold the workload.
        model: what it runs.
        name: its name in the document.
    """

    unit: Literal["token", "run"] = "token"

    def __init__(self, engine: Engine, model: Model, name: str) -> None:
        self.engine, self.model, self.name = engine, model, name
        self.vocab = model.config.vocab

    def facts(self, workload: Workload) -> dict[str, Any]:
        """See `edgeq.profiling.document`."""
        c, e = self.model.config, self.engine
        middle = workload.n_depth + workload.n_prompt + workload.n_gen // 2
        kernel: str | None = None
        if e.backend == "numba":
            from edgeq.runtime.kernels import KERNEL

            kernel = KERNEL
        return {
            "name": self.name,
            "runtime": f"edgeq {__version__}",
            "unit": self.unit,
            "backend": e.backend,
            "kernel": kernel,
            "threads": e.threads,
            "kv_bits": e.kv_bits,
            "context": e.context,
            "family": c.family,
            "layers": c.layers,
            "parameters": sum(int(np.prod(t.shape)) for t in self.model.tensors.values()),
            "weights_bytes": self.model.nbytes,
            "kv_bytes": e.kv_bytes,
            "scratch_bytes": e.scratch_bytes,
            "bytes_per_token": bytes_read_per_token(self.model, middle, e.kv_bits),
            "macs_per_token": macs(c, 1, middle),
            "macs_prefill": macs(c, workload.n_prompt, workload.n_depth),
        }

    def begin(self, tokens: NDArray[np.int64]) -> None:
        """Put these tokens into the cache; those that it has already are kept."""
        rest = self.engine.reuse([*tokens.tolist(), -1])[:-1]  # of no token but these
        if rest:
            self.engine.forward(rest)

    def read(self, tokens: NDArray[np.int64]) -> int:
        """Prefill, and the likeliest token."""
        return int(self.engine.forward(tokens).argmax())

    def step(self, token: int) -> int:
        """Decode one token."""
        return self.engine.greedy(token, 1)[0]

    def generate(self, token: int, n: int) -> None:
        """Decode ``n`` tokens in the compiled loop."""
        self.engine.greedy(token, n)

    def close(self) -> None:
        """Close the engine."""
        self.engine.close()


class RunnerCandidate:
    """A converted model in its own runtime.

    Args:
        runner: of `edgeq.converters`.
        vocab: tokens are below this.
        facts: its description in the document.
    """

    unit: Literal["token", "run"] = "token"

    def __init__(self, runner: DecoderRunner, vocab: int, facts: Mapping[str, Any]) -> None:
        self.runner, self.vocab, self._facts = runner, vocab, facts

    def facts(self, workload: Workload) -> dict[str, Any]:
        """See `edgeq.profiling.document`."""
        if workload.context > self.runner.context:
            raise UsageError(
                f"the workload needs a context of {workload.context} tokens, but this file was "
                f"converted for {self.runner.context}; use fewer tokens, or convert with a "
                "longer context"
            )
        return {**self._facts, "unit": self.unit, "context": self.runner.context}

    def begin(self, tokens: NDArray[np.int64]) -> None:
        """Start again."""
        self.runner.reset()
        if tokens.size:
            self.runner.forward(tokens)

    def read(self, tokens: NDArray[np.int64]) -> int:
        """Prefill, and the likeliest token."""
        return int(self.runner.forward(tokens)[-1].argmax())

    def step(self, token: int) -> int:
        """Decode one token."""
        return self.read(np.array([token], np.int64))

    def generate(self, token: int, n: int) -> None:
        """Decode ``n`` tokens one by one."""
        for _ in range(n):
            token = self.step(token)

    def close(self) -> None:
        """Close its session."""
        self.runner.close()


class GraphCandidate:
    """A graph that is run on the same inputs again and again.

    Args:
        execute: runs it once.
        facts: its description in the document.
        release: closes its session.
    """

    unit: Literal["token", "run"] = "run"
    vocab = 1

    def __init__(
        self, execute: Callable[[], Any], facts: Mapping[str, Any], release: Callable[[], Any]
    ) -> None:
        self._execute, self._facts, self._release = execute, facts, release

    def facts(self, workload: Workload) -> dict[str, Any]:
        """See `edgeq.profiling.document`."""
        if not workload.n_gen:
            raise UsageError("a graph has no prompt; give the number of inferences with --n-gen")
        return {**self._facts, "unit": self.unit}

    def begin(self, tokens: NDArray[np.int64]) -> None:
        """A graph remembers nothing."""

    def read(self, tokens: NDArray[np.int64]) -> int:
        """Run it once."""
        return self.step(0)

    def step(self, token: int) -> int:
        """Run it once."""
        self._execute()
        return token

    def generate(self, token: int, n: int) -> None:
        """Run ``n`` times."""
        for _ in range(n):
            self._execute()

    def close(self) -> None:
        """Close its session."""
        self._release()


def bytes_read_per_token(model: Model, cached: int, kv_bits: int) -> int:
    """Bytes that generating one token has to read.

    Every weight once, except that an embedding which is not the head too is read by one row; and
    the keys and values of ``cached`` tokens, or of a layer's window.
    """
    weights = facts_of(model, "the model").read_bytes
    return weights + cache_read_bytes(model.config, cached, kv_bits)


def macs(config: ModelConfig, tokens: int, past: int) -> int:
    """Multiply-adds of reading tokens after ``past`` others, logits of the last one only.

    Linears and attention; a windowed layer sees its window only. Norms, rotation, softmax and short
    convolutions are left out, which are a few in a thousand.
    """
    if not tokens:
        return 0
    sizes = dict(config.linears())
    head = int(np.prod(sizes[config.head_name]))
    linears = sum(
        n * k * config.tokens_share(name)
        for name, (n, k) in sizes.items()
        if name.startswith("model.layers.")
    )
    seen = sum(values_seen(config, past + t + 1) for t in range(tokens))
    return int(tokens * linears) + head + 2 * seen * config.heads
