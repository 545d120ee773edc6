"""What a layout of quantized weights is: settings that have been read, and how a matrix is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from numpy.typing import NDArray

from edgeq.core.errors import FormatError, UnsupportedError
from edgeq.importers import unread
from edgeq.importers.huggingface.quantized.stored import KeptMatrix


class Part(NamedTuple):
    """A stored array of a matrix.

    Args:
        name: of the tensor, for messages.
        dtype: safetensors' name of its type.
        values: a view of the file; bfloat16 as uint16 bit patterns.
    """

    name: str
    dtype: str
    values: NDArray[Any]


class Parts(Protocol):
    """The stored tensors of one linear layer."""

    module: str

    def type_of(self, end: str) -> str | None:
        """The type of the tensor "module.end", or None where there is none."""

    def get(self, end: str, dtypes: tuple[str, ...], axes: int = 2) -> Part:
        """The tensor "module.end".

        Raises:
            FormatError: it is missing, or has another type or number of axes.
        """


class Layout(Protocol):
    """A layout of quantized weights, with its settings."""

    def matrix(self, parts: Parts) -> KeptMatrix | None:
        """The matrix of a layer, or None where the layer is not quantized.

        Raises:
            FormatError: an array is missing or damaged.
            UnsupportedError: a layout that edgeq does not keep.
        """


ReadLayout = Callable[["Settings"], Layout]
"""Makes a layout of its settings, every one of which it reads."""

FLOATS = ("F16", "BF16", "F32")
"""Types of scales."""


class Settings:
    """Checked access to the settings of a quantization, which remembers what has been read."""

    def __init__(self, where: str, raw: Mapping[str, Any]) -> None:
        self.where = where
        self.raw = raw
        self._read: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """A value; null counts as absent."""
        self._read.add(key)
        value = self.raw.get(key)
        return default if value is None else value

    def whole(self, key: str, allowed: tuple[int, ...] | None = None) -> int:
        """A whole number, one of those that are allowed."""
        value = self.get(key)
        if type(value) is not int or (allowed is None and value != -1 and value < 1):
            raise FormatError(
                f"{self.where}: {key} is {unread.shown(value)}; it must be a whole number"
            )
        if allowed is not None and value not in allowed:
            raise UnsupportedError(
                f"{self.where}: {key} is {value}; edgeq keeps {', '.join(map(str, allowed))}"
            )
        return value

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.get(key, default)
        if type(value) is not bool:
            raise FormatError(
                f"{self.where}: {key} is {unread.shown(value)}; it must be true or false"
            )
        return value

    def one_of(self, key: str, allowed: tuple[str, ...], default: str, fix: str) -> str:
        """A text, one of those that are allowed, in lower case."""
        value = self.get(key, default)
        if not isinstance(value, str) or value.lower() not in allowed:
            raise UnsupportedError(
                f"{self.where}: {key} is {unread.shown(value)}, which edgeq does not read; it "
                f"reads {', '.join(allowed)}; {fix}"
            )
        return value.lower()

    def mapping(self, key: str) -> Mapping[str, Any]:
        """An object, empty where there is none."""
        value = self.get(key, {})
        if not isinstance(value, dict):
            raise FormatError(f"{self.where}: {key} is {unread.shown(value)}; it must be an object")
        return value

    def only_off(self, *keys: str) -> None:
        """Refuse settings unless they are switched off."""
        for key in keys:
            if self.get(key):
                raise UnsupportedError(
                    f"{self.where}: {key} is {unread.shown(self.raw[key])}, which edgeq cannot "
                    "run; use the float checkpoint, or one that was quantized without it"
                )

    def ignore(self, *keys: str) -> None:
        """Settings that say how the integers were chosen, and not what they mean."""
        self._read.update(keys)

    def check_all_read(self) -> None:
        """Refuse what no code has read and what may change the arithmetic."""
        offenders = {
            key: value
            for key, value in self.raw.items()
            if key not in self._read and not unread.is_harmless(key, value)
        }
        if offenders:
            raise UnsupportedError(f"{self.where}: {unread.refusal(offenders)}")


def check_shape(part: Part, shape: tuple[int, ...], why: str) -> None:
    """Raise FormatError unless a part has the shape that the others give it."""
    if part.values.shape != shape:
        raise FormatError(
            f"tensor {part.name} has shape {list(part.values.shape)}; {why} ask for {list(shape)}"
        )


def where(path: Path, key: str) -> str:
    """How messages name the place of a setting."""
    return f"{path}: {key}"
