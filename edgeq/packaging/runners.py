"""The models of a package in their own runtimes, from the package's folder alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeq._version import __version__
from edgeq.converters.runners import DecoderRunner, GraphRunner, Precision
from edgeq.converters.targets import graph_target, require_target, target_named
from edgeq.importers import load
from edgeq.model.config import ModelConfig
from edgeq.model.model import Model
from edgeq.runtime.engine import Engine

ENGINE = "edgeq"
"""The target that is no conversion: the artifact as edgeq's own engine runs it."""


class EngineRunner:
    """edgeq's engine as a `DecoderRunner`.

    Args:
        model: to run.
        context: tokens of the cache.
        threads: of the engine; its results do not depend on them.
    """

    runtime = f"edgeq {__version__}"
    precision: Precision = "int8"

    def __init__(self, model: Model, context: int, threads: int | None = None) -> None:
        self._engine = Engine(model, context=context, threads=threads, mmap=True)
        self.context = self._engine.context

    @property
    def config(self) -> ModelConfig:
        """The model's hyperparameters."""
        return self._engine.config

    def forward(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Append tokens to the cache; gives logits [1, V] of the last one."""
        return self._engine.forward([int(token) for token in tokens])[None]

    def reset(self) -> None:
        """Empty the cache."""
        self._engine.reset()

    def close(self) -> None:
        """Release threads and memory."""
        self._engine.close()


def open_decoder(target: str, path: Path, context: int) -> DecoderRunner:
    """A language model of a package in its runtime.

    Args:
        target: what it was converted to.
        path: its file or folder.
        context: tokens that edgeq's engine makes room for; other forms have their own.

    Raises:
        MissingDependencyError: the runtime is not installed.
        FormatError: the file is damaged.
    """
    if target == ENGINE:
        return EngineRunner(load(path), context)
    require_target(target)
    # one thread: sums in another order would give other last digits
    return target_named(target).decoder_target().open_runner(path, threads=1)


def open_graph(target: str, path: Path) -> GraphRunner:
    """A graph of a package in its runtime.

    Raises:
        MissingDependencyError: the runtime is not installed.
        FormatError: the file is damaged.
    """
    require_target(target)
    return graph_target(target).open_runner(path, threads=1)
