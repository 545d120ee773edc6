"""Which tensor gets which scheme.

A recipe is a list of rules, each a regular expression and a scheme; the first that matches
somewhere in a tensor's name wins, else the default holds. Norms and biases are vectors: they stay
floating point, F32 unless a rule asks for another float type.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgeq.errors import FormatError, SchemeError, UsageError
from edgeq.schemes import BITS, K_BLOCK, PRESETS, FloatScheme, QuantScheme, Scheme, parse_scheme

DEFAULT_PRESET = "w4-g32"
OUTER = r"^(model\.embed_tokens|lm_head)\."
"""Embedding and head: the whole output hangs on them, so they get 8 bits unless told otherwise."""
VECTORS = FloatScheme("f32")
"""What norms and biases are kept in."""


@dataclass(frozen=True)
class Rule:
    """A scheme for the tensors whose name matches.

    Args:
        pattern: a regular expression, searched for anywhere in the name.
        scheme: what they get.

    Raises:
        SchemeError: the pattern is no regular expression.
    """

    pattern: str
    scheme: Scheme

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as err:
            raise SchemeError(f"{self.pattern!r} is no regular expression: {err}") from err

    @classmethod
    def parse(cls, text: str) -> Rule:
        """Read ``REGEX=SCHEME``, as in ``mlp.down_proj=w8-g32``.

        Raises:
            SchemeError: there is no "=", or either side cannot be read.
        """
        pattern, equals, scheme = text.rpartition("=")
        if not equals or not pattern:
            raise SchemeError(
                f"{text!r} is no tensor rule; write REGEX=SCHEME, as in 'mlp.down_proj=w8-g32'"
            )
        return cls(pattern, parse_scheme(scheme))

    def matches(self, name: str) -> bool:
        """Whether the pattern is found in the name."""
        return re.search(self.pattern, name) is not None


@dataclass(frozen=True)
class Recipe:
    """How a whole model is quantized.

    Args:
        rules: the first that matches a tensor wins.
        default: the scheme of matrices that no rule matches.
        method: how scales are chosen, "rtn" or "mse".
    """

    rules: tuple[Rule, ...]
    default: Scheme
    method: str = "rtn"

    @classmethod
    def from_options(
        cls,
        preset: str | None = None,
        bits: int | None = None,
        group: int | None = None,
        tensor_types: Iterable[str] = (),
        method: str = "rtn",
    ) -> Recipe:
        """A recipe from what a user says.

        Args:
            preset: a preset, or any scheme in its text form; w4-g32 if nothing is said.
            bits: instead of a preset: the first preset of so many bits.
            group: weights per scale along K, with or without ``bits`` (4).
            tensor_types: rules as ``REGEX=SCHEME``, tried before the built-in ones.
            method: "rtn" or "mse".

        Raises:
            SchemeError: a text cannot be read, or bits or group is not possible.
            UsageError: both a preset and bits or group are given.
        """
        scheme = _chosen(preset, bits, group)
        outer: Scheme = PRESETS["w8-channel"]
        if isinstance(scheme, FloatScheme) or scheme.bits == 8:
            outer = scheme
        rules = (*map(Rule.parse, tensor_types), Rule(OUTER, outer))
        return cls(rules, scheme, method)

    def scheme_for(self, name: str, shape: Sequence[int]) -> Scheme:
        """The scheme of one tensor; vectors are always floating point."""
        found = (rule.scheme for rule in self.rules if rule.matches(name))
        if len(shape) == 2:
            return next(found, self.default)
        return next((scheme for scheme in found if isinstance(scheme, FloatScheme)), VECTORS)

    def assign(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Scheme]:
        """The scheme of every tensor.

        Args:
            shapes: tensor name -> shape.

        Raises:
            SchemeError: a rule matches no tensor it could change, or a group is longer than
                the row it should divide.
        """
        for rule in self.rules:
            if rule.pattern != OUTER:
                _check_matches(rule, shapes)
        schemes = {name: self.scheme_for(name, shape) for name, shape in shapes.items()}
        for name, scheme in schemes.items():
            if isinstance(scheme, QuantScheme):
                _check_group(name, scheme, shapes[name][1])
        return schemes

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary, the inverse of `from_dict`."""
        return {
            "method": self.method,
            "default": str(self.default),
            "rules": [[rule.pattern, str(rule.scheme)] for rule in self.rules],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """Rebuild from `to_dict`.

        Raises:
            FormatError: something is missing or of another kind.
            SchemeError: a scheme or pattern cannot be read.
        """
        try:
            rules = tuple(Rule(pattern, parse_scheme(scheme)) for pattern, scheme in data["rules"])
            return cls(rules, parse_scheme(data["default"]), data["method"])
        except (KeyError, TypeError, ValueError, AttributeError) as err:
            raise FormatError(f"the recipe is not readable: {err!r}") from err


def _chosen(preset: str | None, bits: int | None, group: int | None) -> Scheme:
    if preset is not None:
        if bits is not None or group is not None:
            raise UsageError(
                f"preset {preset} already says bits and group; give either a preset or "
                "bits and group (a preset may be any scheme, such as w4-g64-asym)"
            )
        return parse_scheme(preset)
    if bits is None and group is None:
        return PRESETS[DEFAULT_PRESET]
    wanted = 4 if bits is None else bits
    base = next((scheme for scheme in PRESETS.values() if scheme.bits == wanted), None)
    if base is None:
        raise SchemeError(f"bits is {bits}; use one of {', '.join(map(str, BITS))}")
    if group is None:
        return base
    return QuantScheme(wanted, base.symmetric, "group", group)


def _check_matches(rule: Rule, shapes: Mapping[str, Sequence[int]]) -> None:
    matching = [name for name in shapes if rule.matches(name)]
    if not matching:
        plain = re.sub(r"[\\^$]", "", rule.pattern)
        near = [name for name in shapes if plain.split(".")[-1] in name][:3] or (
            difflib.get_close_matches(plain, shapes, n=3, cutoff=0.3)
        )
        hint = f"; near it are {', '.join(near)}" if near else ""
        raise SchemeError(f"the rule {rule.pattern!r} matches no tensor{hint}")
    if isinstance(rule.scheme, QuantScheme) and all(len(shapes[n]) != 2 for n in matching):
        raise SchemeError(
            f"the rule {rule.pattern!r} = {rule.scheme} matches only vectors ({matching[0]}), "
            "which stay floating point; give them f32, f16 or bf16"
        )


def _check_group(name: str, scheme: QuantScheme, k: int) -> None:
    size = scheme.group_size
    longest = -(-k // K_BLOCK) * K_BLOCK
    if size is None or size <= longest:
        return
    fits = [str(s) for s in (16, 32, 64, 128) if s <= longest]
    raise SchemeError(
        f"group_size {size} is longer than a row of {name} (K={k}); "
        f"use {', '.join(fits)} or a scale per channel (w{scheme.bits}-channel)"
    )
