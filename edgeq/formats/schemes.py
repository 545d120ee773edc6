"""How the numbers of a tensor are stored: the quantization scheme and its text form.

A weight of an integer scheme is ``scale * (code - zero_point)`` with an unsigned ``code`` of
``bits`` bits. A symmetric scheme has the fixed zero point ``2 ** (bits - 1)`` and stores none. A
scheme with a float minimum has no zero point: its weight is ``scale * code + minimum``.

Text form, of decoders and graphs alike:

    w<bits>-<granularity>[-asym|-min|-palette][-<method>]     w4-g32  w8-channel  w2-g16-asym
    f32 | f16 | bf16                                          tensors that stay floating point

where granularity is ``g16`` .. ``g256``, ``channel`` or ``tensor``, and the method says how codes
are chosen (`METHOD_NAMES`). A method belongs to recipes only: a stored tensor's scheme has none.

``g16x256`` and ``g32x256`` are groups with two-level scales, as GGUF's K-quants have them: a
group's scale is an 8-bit integer times a float16 scale that 256 weights of a row share, and so is
its minimum. Schemes with a minimum or two-level scales come from checkpoints that others quantized;
edgeq keeps their integers and does not round to them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from edgeq.core.errors import SchemeError, check_type, unknown

Granularity = Literal["tensor", "channel", "group"]

BITS = (2, 3, 4, 5, 6, 8)
SUPERBLOCK = 256
"""Weights of a row that share the upper scale of a scheme with two-level scales."""
GROUP_SIZES = (16, 32, 64, 128, 256)
MOST_PALETTE_BITS = 4
"""The most bits of the codes of a palette: a table of 16 values."""
METHOD_NAMES = ("rtn", "mse", "imatrix", "gptq")
"""How scales and codes are chosen; `edgeq.quant.METHODS` describes each."""
FloatType = Literal["float32", "float16", "bfloat16"]
FLOAT_TAGS: Mapping[FloatType, str] = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
"""Float types -> their text form in recipes and artifacts; safetensors has it in capitals."""
_FLOAT_TEXTS: Mapping[str, FloatType] = {
    **{tag: dtype for dtype, tag in FLOAT_TAGS.items()},
    **{dtype: dtype for dtype in FLOAT_TAGS},
    "float": "float32",
    "fp16": "float16",
}
"""All texts that stand for a float type."""
K_BLOCK = 32
"""Weights are stored in blocks of 32 along K; a row is padded to a whole number of them."""
_ASYMMETRIC = "w2-g16"
"""Two bits need zero points, so the plain text means them; w2-g16-sym has none."""


@dataclass(frozen=True)
class QuantScheme:
    """How one weight matrix [N, K] is quantized.

    Args:
        bits: 2, 3, 4, 5, 6 or 8 bits per code.
        symmetric: True for the fixed zero point ``2 ** (bits - 1)``.
        granularity: which weights share a scale: the tensor, a row ("channel"), or a run of
            ``group_size`` weights along K ("group").
        group_size: 16, 32, 64, 128 or 256 for "group", otherwise None.
        codebook: None for evenly spaced codes, "palette" for a table of values per tensor.
        minimum: whether each group has a float minimum instead of a zero point; such a scheme is
            not symmetric.
        two_level: whether the scales of groups are integers times a scale for 256 weights.
        method: how codes are chosen, of `METHOD_NAMES`; None where the recipe says it for all
            tensors, and for tensors that are quantized already.

    Raises:
        SchemeError: an impossible combination.
    """

    bits: int
    symmetric: bool = True
    granularity: Granularity = "group"
    group_size: int | None = 32
    codebook: Literal["palette"] | None = None
    method: str | None = None
    minimum: bool = False
    two_level: bool = False

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
        if self.codebook == "palette" and (self.bits > MOST_PALETTE_BITS or not self.symmetric):
            raise SchemeError(
                f"a palette has 2 to {MOST_PALETTE_BITS} bits and is symmetric; use w4-g32-palette"
            )
        if self.method is not None and self.method not in METHOD_NAMES:
            raise SchemeError(unknown("method", str(self.method), METHOD_NAMES))
        check_type("minimum", self.minimum, bool)
        check_type("two_level", self.two_level, bool)
        if self.minimum and self.symmetric:
            raise SchemeError("a scheme with a minimum is not symmetric; pass symmetric=False")
        if self.minimum and self.granularity != "group":
            raise SchemeError("only groups have a minimum; use granularity 'group'")
        if self.two_level and self.group_size not in (16, 32):
            raise SchemeError(
                f"group_size is {self.group_size} with two-level scales; use 16 or 32"
            )
        if self.two_level and not (self.symmetric or self.minimum):
            raise SchemeError("two-level scales come without zero points; use a minimum")

    @property
    def has_zero_points(self) -> bool:
        """Whether each group has an integer zero point of its own."""
        return not self.symmetric and not self.minimum

    @property
    def kept_only(self) -> bool:
        """Whether no rounder makes it: tensors of this scheme keep the integers of a checkpoint."""
        return self.minimum or self.two_level

    @property
    def packs_nibbles(self) -> bool:
        """Whether a group's integer scale and minimum are 4 bits each, in one byte (Q2_K)."""
        return self.two_level and self.minimum and self.bits == 2

    @property
    def mid(self) -> int:
        """The zero point of a symmetric scheme."""
        return 1 << (self.bits - 1)

    @property
    def n_codes(self) -> int:
        """How many different codes there are."""
        return 1 << self.bits

    @property
    def stored(self) -> QuantScheme:
        """The scheme without its method: what a quantized tensor of it has."""
        return self if self.method is None else replace(self, method=None)

    def padded_k(self, k: int) -> int:
        """K rounded up to whole 32-wide blocks, whole groups and whole spans of an upper scale."""
        step = SUPERBLOCK if self.two_level else max(K_BLOCK, self.group_size or 0)
        return -(-k // step) * step

    def n_groups(self, k: int) -> int:
        """How many scales a row of K weights has."""
        return self.padded_k(k) // self.group_size if self.group_size else 1

    def __str__(self) -> str:
        middle = f"g{self.group_size}" if self.granularity == "group" else self.granularity
        middle += f"x{SUPERBLOCK}" if self.two_level else ""
        if self.codebook:
            end = "-palette"
        else:
            end = "" if self.symmetric else "-min" if self.minimum else "-asym"
        text = f"w{self.bits}-{middle}{end}"
        if text == _ASYMMETRIC:
            text += "-sym"
        return text if self.method is None else f"{text}-{self.method}"


@dataclass(frozen=True)
class FloatScheme:
    """A tensor that stays floating point.

    Args:
        dtype: "float32", "float16" or "bfloat16".

    Raises:
        SchemeError: another type.
    """

    dtype: FloatType

    def __post_init__(self) -> None:
        if self.dtype not in FLOAT_TAGS:
            raise SchemeError(unknown("float type", self.dtype, FLOAT_TAGS))

    def __str__(self) -> str:
        return FLOAT_TAGS[self.dtype]


Scheme = QuantScheme | FloatScheme

_TEXT = re.compile(
    rf"w(\d+)-(?:g(\d+)(x{SUPERBLOCK})?|(channel|tensor))(?:-(asym|sym|min|palette))?"
    rf"(?:-({'|'.join(METHOD_NAMES)}))?"
)

BY_BITS: Mapping[int, QuantScheme] = {
    8: QuantScheme(8, granularity="channel", group_size=None),
    6: QuantScheme(6),
    5: QuantScheme(5),
    4: QuantScheme(4),
    3: QuantScheme(3),
    2: QuantScheme(2, symmetric=False, group_size=16),
}
"""Bits -> the scheme of so many bits where nothing else is said."""


def parse_scheme(text: str, *, method: bool = False) -> Scheme:
    """Read the text form of a scheme.

    Args:
        text: such as "w4-g32", "w2-g16-asym" or "f16".
        method: whether the text may name a method, as "w4-g32-gptq" does.

    Raises:
        SchemeError: the text is neither a scheme nor a float type.

    Example:
        >>> edgeq.parse_scheme("W4-G32").bits
        4
        >>> edgeq.parse_scheme("w8-channel-gptq", method=True).method
        'gptq'
    """
    check_type("scheme", text, str)
    name = text.strip().lower()
    if name in _FLOAT_TEXTS:
        return FloatScheme(_FLOAT_TEXTS[name])
    match = _TEXT.fullmatch(name)
    if not match or (match[6] and not method):
        ending = "[-asym|-palette]" + (f"[-{'|-'.join(METHOD_NAMES)}]" if method else "")
        known = (*map(str, BY_BITS.values()), "w8-g32", "w4-g128", "w2-g16", *FLOAT_TAGS.values())
        raise SchemeError(
            unknown("scheme", text, known)
            + f"; or write w<bits>-<g16..g256|channel|tensor>{ending}, such as w4-g64-asym"
        )
    bits, group, upper, whole, suffix, rounding = match.groups()
    granularity: Granularity = "group"
    if whole == "channel":
        granularity = "channel"
    elif whole == "tensor":
        granularity = "tensor"
    return QuantScheme(
        bits=int(bits),
        symmetric=suffix not in ("asym", "min")
        and not (suffix is None and not upper and f"w{bits}-g{group}" == _ASYMMETRIC),
        granularity=granularity,
        group_size=int(group) if group else None,
        codebook="palette" if suffix == "palette" else None,
        method=rounding,
        minimum=suffix == "min",
        two_level=upper is not None,
    )
