"""Core ML packages that edgeq wrote, executed by `edgeq.converters.coreml.exec`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.coreml.exec.load import File, Function, functions, open_file
from edgeq.converters.coreml.exec.machine import Arithmetic, Machine, State
from edgeq.converters.coreml.program import function_name
from edgeq.converters.runners import Precision
from edgeq.core.errors import FormatError, UsageError
from edgeq.model.config import ModelConfig
from edgeq.model.decoder import HEAD_STEPS, LAYER_STEPS, OUTER_STEPS

ENTRY, FORMAT = "edgeq", 1
"""Entry of the model's user-defined metadata, and its version."""
RUNTIME = f"edgeq.converters.coreml.exec (NumPy {np.__version__})"
_KEPT = 64 << 20
"""Bytes of weights that stay decompressed from call to call; those of a larger model are all
decompressed again, so that a package takes little more memory than it has bytes."""
STEP = re.compile(rf"layers_(\d+)_({'|'.join(LAYER_STEPS)})|{'|'.join(OUTER_STEPS)}")
"""Names in the program of the steps of `decoder`."""


class DecoderPackage:
    """An open package with a language model that edgeq converted."""

    def __init__(self, path: str | Path) -> None:
        self.file: File = open_file(path)
        entry = self.file.metadata.get(ENTRY)
        if entry is None or self.file.spec.WhichOneof("Type") != "mlProgram":
            raise FormatError(
                f"{path} is not a language model that edgeq wrote; give its own inputs to run it"
            )
        try:
            about = json.loads(entry)
            if about["format"] != FORMAT:
                raise FormatError(
                    f"{path} was written by another version of edgeq: its format is "
                    f"{about['format']}, this edgeq reads {FORMAT}"
                )
            self.config = ModelConfig.from_dict(about["config"])
            self.target, self.context = str(about["target_os"]), int(about["context"])
            self.lengths = [int(n) for n in about["lengths"]]
            self.enumerated = bool(about["enumerated"])
            self.precision: Precision = about["precision"]
            self.arithmetic = str(about.get("arithmetic", "mixed"))
            self.version = str(about.get("edgeq", ""))
        except (ValueError, KeyError, TypeError) as err:
            raise FormatError(f"{path}: its description is damaged ({err})") from err
        self.functions = functions(self.file)

    def function(self, tokens: int) -> Function:
        """The function for so many tokens."""
        name = "main" if self.enumerated else function_name(tokens)
        if name not in self.functions:
            raise FormatError(f"{self.file.path} has no function {name!r}")
        return self.functions[name]


class CoreMLRunner:
    """A package in edgeq's executor of Core ML programs.

    ``call`` is all that touches the executor: with another in its place, the same feeding of
    tokens runs the package elsewhere.

    Args:
        path: of the package.
        arithmetic: what float16 is held as, the cache included.
    """

    def __init__(self, path: str | Path, arithmetic: Arithmetic = "float32") -> None:
        self._package = DecoderPackage(path)
        exact = self._package.precision == "float32" and arithmetic == "float32"
        self.precision: Precision = "float32" if exact else "float16"
        self.context, self.config = self._package.context, self._package.config
        weights = 4 * sum(n * k for _, (n, k) in self.config.linears())
        self._machine = Machine(arithmetic, _KEPT if weights <= _KEPT else 0, overwrite=True)
        self.runtime = RUNTIME
        self.reset()

    def call(
        self, function: str, inputs: Mapping[str, Any], watch: Sequence[str] = ()
    ) -> dict[str, Any]:
        """Run a function of the package on the state that was kept."""
        return self._machine.run(self._package.functions[function], inputs, self._state, watch)

    @property
    def steps(self) -> tuple[str, ...]:
        """Names in the program of the decoder's steps."""
        block = self._package.function(1).block
        return tuple(name for op in block.ops for name, _ in op.outputs if STEP.fullmatch(name))

    def reset(self) -> None:
        """Empty the cache."""
        package = self._package
        first = package.function(1)
        self._state: State = self._machine.new_state(first)
        self._past: dict[str, NDArray[Any]] = {}
        if package.target == "ios16":
            c = package.config
            shape = (c.layers, c.kv_heads, package.context, c.head_dim)
            self._past = {
                name: np.zeros(shape, np.float32) for name in ("key_cache", "value_cache")
            }
        self.n_past = 0

    def close(self) -> None:
        """Release everything."""
        self._state, self._past = {}, {}

    def forward(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits of what follows the last token: [1, V].

        Raises:
            UsageError: there are no tokens, or more than the cache holds.
        """
        logits: NDArray[np.float32] | None = None
        for results in self.passes(tokens):
            logits = results["logits"]
        if logits is None:
            raise UsageError("there are no tokens; give at least one")
        return logits

    def passes(
        self, tokens: Sequence[int] | NDArray[np.integer], watch: Sequence[str] = ()
    ) -> Iterator[dict[str, NDArray[Any]]]:
        """Feed tokens in pieces that the package has a length for.

        Yields:
            for each piece, logits and what was asked for by its name in the program; rows that
            are padding are cut off.
        """
        ids = np.asarray(tokens, np.int32).reshape(-1)
        room = self._package.context - self.n_past
        if ids.size > room:
            raise UsageError(
                f"{ids.size} tokens for the {room} places left of {self._package.context}; "
                "convert with a longer context"
            )
        at = 0
        while at < ids.size:
            length, n = self._length(ids.size - at)
            piece = np.zeros((1, length), np.int32)
            piece[0, :n] = ids[at : at + n]
            yield self._pass(piece, n, watch)
            at += n

    def _length(self, left: int) -> tuple[int, int]:
        """A length of the package for ``left`` more tokens, and how many of them it takes."""
        room = self._package.context - self.n_past
        usable = [n for n in self._package.lengths if n <= room]
        enough = [n for n in usable if n >= left]
        length = min(enough) if enough else max(usable)
        return length, min(length, left)

    def _pass(self, piece: NDArray[np.int32], n: int, watch: Sequence[str]) -> dict[str, Any]:
        function = self._package.function(piece.shape[1])
        position, last = np.array([self.n_past], np.int32), np.array([n - 1], np.int32)
        inputs = {"tokens": piece, "position": position, **self._past}
        if "last" in function.inputs:
            inputs["last"] = last
        results = self.call(function.name, inputs, watch)
        for cache, new in (("key_cache", "new_keys"), ("value_cache", "new_values")):
            if new in results:
                self._past[cache][:, :, self.n_past : self.n_past + n] = results.pop(new)[:, :, :n]
        self.n_past += n
        return {k: v if k in HEAD_STEPS else v[:n] for k, v in results.items()}
