"""Converted models in their own runtimes: the interface of every runner."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:  # the command line reads the table of targets and needs no NumPy for it
    import numpy as np
    from numpy.typing import NDArray

    from edgeq.graph.feeds import Feeds
    from edgeq.graph.ir import Info
    from edgeq.model.config import ModelConfig

Precision = Literal["float32", "float16", "int8"]
"""The least precise type among activations, KV cache and arithmetic of a converted model."""


class Runner(Protocol):
    """A converted model in its own runtime."""

    runtime: str
    """What executes it, with its version: "onnxruntime 1.31.1"."""

    @property
    def precision(self) -> Precision:
        """How it computes; this decides how close to its source it must come."""

    def close(self) -> None:
        """Release everything."""


class DecoderRunner(Runner, Protocol):
    """A converted decoder, with a KV cache that each call extends."""

    context: int
    """How many tokens the cache has room for."""

    @property
    def config(self) -> ModelConfig | None:
        """The model's hyperparameters, if the file records them."""

    def forward(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Append tokens to the cache.

        Returns:
            logits [T, V] of all tokens, or [1, V] of the last one where the file computes no
            others.
        """

    def reset(self) -> None:
        """Empty the cache."""


class GraphRunner(Runner, Protocol):
    """A converted graph, called by the names, shapes and float types of its source."""

    @property
    def inputs(self) -> Mapping[str, Info]:
        """Shape and type of each input, by name."""

    @property
    def outputs(self) -> Mapping[str, Info]:
        """Shape and type of each output, by name."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """Metadata of the source: recipe, preprocessing."""

    def __call__(self, feeds: Feeds) -> dict[str, NDArray[Any]]:
        """Run the graph once; gives the outputs by name."""


@dataclass(frozen=True)
class Execution:
    """A run on random inputs of a file in a target's format, whether or not edgeq wrote it.

    Args:
        runtime: what executed it, with its version.
        ops: number of operators of each type.
        inputs: shape of each input, by name.
        outputs: each output, by name.
    """

    runtime: str
    ops: Mapping[str, int]
    inputs: Mapping[str, tuple[int, ...]]
    outputs: Mapping[str, NDArray[Any]]


Past = Sequence[int] | Sequence[Sequence[int]]
"""Tokens fed before a pass: all at once, or in pieces, such as a prompt and then single tokens."""
Trace = Callable[[Sequence[int], Past], "Mapping[str, NDArray[np.float32]]"]
"""(tokens, past) -> every named result of the pass over the tokens, the cache holding ``past``."""


def pieces(past: Past) -> list[list[int]]:
    """The pieces in which the tokens of ``past`` are fed."""
    if len(past) and hasattr(past[0], "__len__"):
        return [list(piece) for piece in past]  # type: ignore[arg-type]
    return [list(past)] if len(past) else []  # type: ignore[arg-type]
