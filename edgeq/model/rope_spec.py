"""Rotary position embeddings, as data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from edgeq.core.errors import FormatError
from edgeq.model.limits import is_count, is_finite

ScalingKind = Literal["linear", "llama3", "yarn", "longrope", "dynamic"]
_ABOVE_ZERO = (
    "factor", "low_freq_factor", "high_freq_factor", "original_context", "attention_factor",
    "beta_fast", "beta_slow",
)  # fmt: skip


@dataclass(frozen=True)
class RopeScaling:
    """Stretching of rotary frequencies, so that a model reads more than it was first trained on.

    Args:
        kind: "linear" divides all frequencies by the factor. "llama3" (Llama 3.1) and "yarn"
            divide those of pairs that turn slowly. "longrope" has a divisor for each pair, from
            one of two lists: a sequence of at most ``original_context`` tokens uses the short
            factors, a longer one the long factors. "dynamic" (NTK) raises the base for a sequence
            longer than ``original_context``, the more the longer it is.
        factor: how many times the context is stretched; of "longrope" no frequency depends on it.
        low_freq_factor, high_freq_factor: of "llama3", in turns within the original context.
        original_context: tokens of the context before stretching; of all kinds but "linear".
        attention_factor: multiplies what is rotated, of "yarn" and "longrope".
        beta_fast, beta_slow: of "yarn": pairs that make more turns than ``beta_fast`` within the
            original context are not stretched, those that make less than ``beta_slow`` in full.
        truncate: of "yarn": whether the pairs of these two numbers are rounded to whole ones.
        short_factors, long_factors: of "longrope", a divisor for each rotated pair.

    Raises:
        FormatError: an unknown kind, or a value of the wrong type or out of range.
    """

    kind: ScalingKind
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in get_args(ScalingKind):
            raise FormatError(
                f"rope scaling is of kind {self.kind!r}; it must be one of "
                f"{', '.join(map(repr, get_args(ScalingKind)))}"
            )
        for name in _ABOVE_ZERO:
            value = getattr(self, name)
            if not is_finite(value) or value <= 0:
                raise FormatError(f"rope scaling: {name} is {value!r}; it must be above 0")
        if not isinstance(self.truncate, bool):
            raise FormatError(
                f"rope scaling: truncate is {self.truncate!r}; it must be true or false"
            )
        for name in ("short_factors", "long_factors"):
            factors: object = getattr(self, name)
            good = isinstance(factors, tuple) and all(is_finite(f) and f > 0 for f in factors)
            if not good or bool(factors) != (self.kind == "longrope"):
                raise FormatError(
                    f"rope scaling: {name} is {factors!r}; it must be a tuple of numbers above 0 "
                    "for longrope, and empty for other kinds"
                )


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding of the queries and keys of a layer.

    Args:
        base: of the frequencies, ``rope_theta`` in Hugging Face's configs.
        dim: how many dimensions of a head rotate, counted from its first; even.
        scaling: stretching of the frequencies, or None.
        temperature: queries, but not keys, at position p are multiplied by ``1 + temperature *
            ln(1 + floor(p / temperature_length))`` (Ministral 3); 0 for none. All dimensions of
            a head must rotate.
        temperature_length: see ``temperature``; 0 without one.
        still: how many of the pairs, the last ones, have a frequency of zero, so that they keep
            their place while the frequencies of the others go by ``dim`` (Gemma 4).

    Raises:
        FormatError: a value of the wrong type or out of range.
    """

    base: float
    dim: int
    scaling: RopeScaling | None = None
    temperature: float = 0.0
    temperature_length: int = 0
    still: int = 0

    def __post_init__(self) -> None:
        if not is_finite(self.base) or self.base <= 0:
            raise FormatError(f"model config: rope base is {self.base!r}; it must be above 0")
        if not is_count(self.dim) or self.dim < 2 or self.dim % 2:
            raise FormatError(
                f"model config: rope dim is {self.dim!r}; it must be an even number of at least 2"
            )
        if self.scaling is not None and not isinstance(self.scaling, RopeScaling):
            raise FormatError(
                f"model config: rope scaling is {self.scaling!r}; it must be a RopeScaling or None"
            )
        self._check_scaling()
        if not is_finite(self.temperature) or self.temperature < 0:
            raise FormatError(
                f"model config: rope temperature is {self.temperature!r}; it must be at least 0"
            )
        length = self.temperature_length
        if not is_count(length) or bool(length) != bool(self.temperature):
            raise FormatError(
                f"model config: rope temperature_length is {length!r}; it must be a positive "
                "number of tokens with a temperature, and 0 without one"
            )
        if not is_count(self.still) or self.still >= self.dim // 2:
            raise FormatError(
                f"model config: {self.still!r} pairs of a rope keep still; of {self.dim // 2} "
                "pairs, one at least must turn"
            )
        if self.still and self.scaling is not None and self.scaling.kind != "linear":
            raise FormatError(
                f"rope scaling: pairs that keep still go with the linear kind alone, and the kind "
                f"is {self.scaling.kind!r}"
            )

    def _check_scaling(self) -> None:
        scaling = self.scaling
        if scaling is None:
            return
        for name in ("short_factors", "long_factors"):
            count = len(getattr(scaling, name))
            if scaling.kind == "longrope" and count != self.dim // 2:
                raise FormatError(
                    f"rope scaling: {name} holds {count} numbers; {self.dim // 2} pairs rotate, "
                    "each with one"
                )
        if scaling.kind == "dynamic" and self.dim == 2:
            raise FormatError("rope scaling: the dynamic kind needs a rope dim of at least 4")
        if scaling.kind == "yarn" and self.base == 1:
            raise FormatError("rope scaling: the yarn kind needs a rope base other than 1")

    @property
    def for_keys(self) -> RopeSpec:
        """What keys are rotated by: the same without a temperature."""
        return replace(self, temperature=0.0, temperature_length=0) if self.temperature else self
