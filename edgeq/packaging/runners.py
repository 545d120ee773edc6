"""Open the forms of a package in their runtimes, from the folder of the package alone."""

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
"""The target of forms that are not converted: edgeq's own engine runs the artifact."""


class EngineRunner:
    """edgeq's engine as a `DecoderRunner`.

    Args:
        model: the model to run.
        context: length of the KV cache, in tokens.
        threads: number of threads; the results do not depend on it.
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
        """Append tokens to the KV cache and return the logits [1, V] of the last one."""
        return self._engine.forward([int(token) for token in tokens])[None]

    def reset(self) -> None:
        """Empty the KV cache."""
        self._engine.reset()

    def close(self) -> None:
        """Release threads and memory."""
        self._engine.close()


def open_decoder(target: str, path: Path, context: int) -> DecoderRunner:
    """Open a form of a language model in its runtime.

    Args:
        target: the target that the form was converted to.
        path: file or folder of the form.
        context: length of the KV cache of edgeq's engine, in tokens. Other forms store their own.

    Raises:
        MissingDependencyError: the runtime is not installed.
        FormatError: the file is damaged.
    """
    if target == ENGINE:
        return EngineRunner(load(path), context)
    require_target(target)
    # with one thread, because another order of the sums changes the last digits
    return target_named(target).decoder_target().open_runner(path, threads=1)


def open_graph(target: str, path: Path) -> GraphRunner:
    """Open a form of a graph in its runtime.

    Raises:
        MissingDependencyError: the runtime is not installed.
        FormatError: the file is damaged.
    """
    require_target(target)
    return graph_target(target).open_runner(path, threads=1)
