"""Checked access to a GGUF file's metadata.

Every key of the architecture (``llama.*`` in a llama file) is read by some reader, known to leave
the arithmetic alone, at the value that switches it off, or refused by its name.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeq.core.errors import FormatError, UnsupportedError
from edgeq.importers.unread import is_harmless, refusal, shown

_HARMLESS = frozenset(
    (
        "vocab_size",
        "pooling_type",
        "rope.scaling.original_context_length",
        "rope.scaling.finetuned",
        "decoder_start_token_id",
    )
)
_ONLY: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.temperature_scale": (0,),
    "rope.scaling.yarn_ext_factor": (0, -1),  # by any other llama.cpp mixes in yarn's frequencies
    "tensor_data_layout": ("Meta AI original pth", "reference"),
}
"""Keys that are harmless at these values alone."""


class Keys:
    """Checked access to metadata; ``{arch}`` in a key stands for the architecture.

    Attributes:
        path: the file, for messages.
        metadata: its keys.
        read: the keys that have been asked for.
    """

    def __init__(self, path: Path, metadata: Mapping[str, Any]) -> None:
        self.path = path
        self.metadata = metadata
        self.read: set[str] = set()

    def name(self, key: str) -> str:
        """The key as it stands in the file."""
        return key.replace("{arch}", str(self.metadata.get("general.architecture")))

    def get(self, key: str, default: Any = None) -> Any:
        """The value, or a default where the key is absent."""
        self.read.add(self.name(key))
        return self.metadata.get(self.name(key), default)

    def text(self, key: str) -> str:
        """A value that must be text."""
        value = self.get(key)
        if not isinstance(value, str):
            self._refuse(key, value, "text")
        return str(value)

    def number(self, key: str, default: float | None = None) -> float:
        """A number, finite and not negative; of a per-layer array, the one all layers share."""
        value = self.get(key, default)
        if isinstance(value, list) and len({str(part) for part in value}) == 1:
            value = value[0]
        elif isinstance(value, list):
            raise UnsupportedError(
                f"{self.path}: {self.name(key)} differs from layer to layer, which edgeq does not "
                "compute; it computes models whose layers have one size"
            )
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not 0 <= value < math.inf
        ):
            self._refuse(key, value, "a number")
        return float(value) if isinstance(value, float) else value

    def count(self, key: str, default: int | None = None) -> int:
        """A positive whole number."""
        value = self.number(key, default)
        if value != int(value) or not 0 < value < 1 << 31:
            self._refuse(key, value, "a positive whole number")
        return int(value)

    def check_unread(self) -> None:
        """Refuse keys of the architecture that nothing has read and that may change arithmetic.

        Raises:
            UnsupportedError: names them and their values.
        """
        start = self.name("{arch}.")
        offenders = {}
        for key, value in self.metadata.items():
            if not key.startswith(start) or key in self.read:
                continue
            own = key.removeprefix(start)
            if own in _ONLY:
                harmless = value in _ONLY[own]
            else:
                harmless = own in _HARMLESS or is_harmless(own, value)
            if not harmless:
                offenders[key] = value
        if offenders:
            raise UnsupportedError(f"{self.path}: {refusal(offenders)}")

    def _refuse(self, key: str, value: Any, expected: str) -> None:
        name = self.name(key)
        if value is None:
            raise FormatError(f"{self.path}: {name} is missing; it must be {expected}")
        raise FormatError(f"{self.path}: {name} is {shown(value)}; it must be {expected}")
