"""How a tensor's numbers are held: the quantization scheme, its text form and its presets.

A weight of an integer scheme is ``scale * (code - zero_point)`` with an unsigned ``code`` of
``bits`` bits. A symmetric scheme has the fixed zero point ``2 ** (bits - 1)`` and stores none.

Text form: ``w<bits>-<granularity>[-asym]`` where granularity is ``g16``..``g256``, ``channel``
or ``tensor`` (``w4-g32``, ``w8-channel``, ``w2-g16-asym``), or ``f32`` / ``f16`` / ``bf16`` for
tensors that stay floating point.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from edgeq.core.errors import SchemeError, check_type, unknown

Granularity = Literal["tensor", "channel", "group"]

BITS = (2, 3, 4, 8)
GROUP_SIZES = (16, 32, 64, 128, 256)
FLOAT_TYPES = ("f32", "f16", "bf16")
K_BLOCK = 32
"""Weights are stored in blocks of 32 along K; a row is padded to a whole number of them."""


@dataclass(frozen=True)
class QuantScheme:
    """How one weight matrix [N, K] is quantized.

    Args:
        bits: 2, 3, 4 or 8 bits per code.
        symmetric: True for the fixed zero point ``2 ** (bits - 1)``.
        granularity: which weights share a scale: the tensor, a row ("channel"), or a run of
            ``group_size`` weights along K ("group").
        group_size: 16, 32, 64, 128 or 256 for "group", otherwise None.
        codebook: None for evenly spaced codes, "palette" for a table of values per tensor.

    Raises:
        SchemeError: an impossible combination.
    """

    bits: int
    symmetric: bool = True
    granularity: Granularity = "group"
    group_size: int | None = 32
    codebook: Literal["palette"] | None = None

    def __post_init__(self) -> None:
        check_type("bits", self.bits, int)
        if self.bits not in BITS:
            raise SchemeError(f"bits is {self.bits}; use one of {', '.join(map(str, BITS))}")
        check_type("symmetric", self.symmetric, bool)
        check_type("granularity", self.granularity, str)
        if self.granularity not in ("tensor", "channel", "group"):
            raise SchemeError(
                unknown("granularity", self.granularity, ("tensor", "channel", "group"))
            )
        check_type("group_size", self.group_size, int, None)
        if self.granularity == "group":
            if self.group_size not in GROUP_SIZES:
                raise SchemeError(
                    f"group_size is {self.group_size}; "
                    f"use one of {', '.join(map(str, GROUP_SIZES))}"
                )
        elif self.group_size is not None:
            raise SchemeError(
                f"group_size is {self.group_size} with granularity {self.granularity!r}; "
                "leave it out, or use granularity 'group'"
            )
        if self.codebook not in (None, "palette"):
            raise SchemeError(unknown("codebook", str(self.codebook), ("palette",)))
        if self.codebook == "palette" and (self.bits == 8 or not self.symmetric):
            raise SchemeError("a palette has 2, 3 or 4 bits and is symmetric; use w4-g32-palette")

    @property
    def mid(self) -> int:
        """The zero point of a symmetric scheme."""
        return 1 << (self.bits - 1)

    @property
    def n_codes(self) -> int:
        """How many different codes there are."""
        return 1 << self.bits

    def padded_k(self, k: int) -> int:
        """K rounded up to whole 32-wide blocks and whole groups."""
        step = max(K_BLOCK, self.group_size or 0)
        return -(-k // step) * step

    def n_groups(self, k: int) -> int:
        """How many scales a row of K weights has."""
        return self.padded_k(k) // self.group_size if self.group_size else 1

    def __str__(self) -> str:
        middle = f"g{self.group_size}" if self.granularity == "group" else self.granularity
        end = "-palette" if self.codebook else ("" if self.symmetric else "-asym")
        text = f"w{self.bits}-{middle}{end}"
        # a preset of that name may mean something else, as w2-g16 does
        return text if PRESETS.get(text, self) == self else text + "-sym"


@dataclass(frozen=True)
class FloatScheme:
    """A tensor that stays floating point.

    Args:
        dtype: "f32", "f16" or "bf16".

    Raises:
        SchemeError: another type.
    """

    dtype: Literal["f32", "f16", "bf16"]

    def __post_init__(self) -> None:
        if self.dtype not in FLOAT_TYPES:
            raise SchemeError(unknown("float type", self.dtype, FLOAT_TYPES))

    def __str__(self) -> str:
        return self.dtype


Scheme = QuantScheme | FloatScheme

_TEXT = re.compile(r"w(\d+)-(?:g(\d+)|(channel|tensor))(?:-(asym|sym|palette))?")

PRESETS: dict[str, QuantScheme] = {
    "w8-channel": QuantScheme(8, granularity="channel", group_size=None),
    "w8-g32": QuantScheme(8),
    "w4-g32": QuantScheme(4),
    "w4-g128": QuantScheme(4, group_size=128),
    "w3-g32": QuantScheme(3),
    "w2-g16": QuantScheme(2, symmetric=False, group_size=16),
}
"""Schemes with a name of their own; any other scheme may be written out in its text form."""


def parse_scheme(text: str) -> Scheme:
    """Read a scheme's text form or preset name.

    Raises:
        SchemeError: the text is neither a preset, a scheme, nor a float type.

    Example:
        >>> edgeq.parse_scheme("w4-g32").bits
        4
    """
    check_type("scheme", text, str)
    name = text.strip().lower()
    if name in FLOAT_TYPES:
        return FloatScheme(name)  # type: ignore[arg-type]
    if name in PRESETS:
        return PRESETS[name]
    match = _TEXT.fullmatch(name)
    if not match:
        raise SchemeError(
            unknown("scheme", text, (*PRESETS, *FLOAT_TYPES))
            + "; or write w<bits>-<g16..g256|channel|tensor>[-asym], such as w4-g64-asym"
        )
    bits, group, whole, suffix = match.groups()
    granularity: Granularity = "group"
    if whole == "channel":
        granularity = "channel"
    elif whole == "tensor":
        granularity = "tensor"
    return QuantScheme(
        bits=int(bits),
        symmetric=suffix != "asym",
        granularity=granularity,
        group_size=int(group) if group else None,
        codebook="palette" if suffix == "palette" else None,
    )
