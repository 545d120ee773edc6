"""Parts of a recipe: rules, which give weights a scheme, and how activations are rounded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from edgeq.core.errors import SchemeError, check_type, unknown
from edgeq.formats.schemes import BITS, FloatScheme, QuantScheme, Scheme, parse_scheme

OUTER = r"^(model\.embed_tokens|lm_head)\."
"""Embedding and head: every output depends on them, so they get 8 bits unless a rule says
otherwise."""
HEAD_GATES = r"\.linear_attn\.in_proj_[ab]\.weight$"
"""Projections to one number for each head of a gated delta net: few weights, on whose results
exponentials depend."""
STAY_FLOAT = rf"{HEAD_GATES}|\.mlp\.router\.weight$"
"""Small matrices that stay floating point beside quantized ones."""
KINDS = {kind: rf"\.{kind}_proj\.weight$" for kind in ("k", "v", "o", "down")}
"""Matrices of layers that presets give more bits."""
BUILT_IN = (OUTER, *KINDS.values())
"""Patterns of presets, which need not match a tensor of every model."""
MODES = ("static", "dynamic")


@dataclass(frozen=True)
class Rule:
    """A scheme for the tensors or nodes whose name matches.

    Args:
        pattern: a regular expression, searched for anywhere in the name.
        scheme: what they get.

    Raises:
        SchemeError: the pattern is no regular expression, or no rounder makes the scheme.
    """

    pattern: str
    scheme: Scheme

    def __post_init__(self) -> None:
        check_type("pattern", self.pattern, str)
        check_type("scheme", self.scheme, QuantScheme, FloatScheme)
        check_rounded(self.scheme)
        try:
            re.compile(self.pattern)
        except re.error as err:
            raise SchemeError(f"{self.pattern!r} is not a regular expression: {err}") from err

    @classmethod
    def parse(cls, text: str, *, method: bool = False) -> Rule:
        """Read ``REGEX=SCHEME``, as in ``mlp.down_proj=w8-g32``.

        Args:
            text: the rule.
            method: whether the scheme may name a method, as it may for graphs.

        Raises:
            SchemeError: there is no "=", or either side cannot be read.
        """
        check_type("a tensor rule", text, str)
        pattern, equals, scheme = text.rpartition("=")
        if not equals or not pattern:
            raise SchemeError(
                f"{text!r} is not a tensor rule; write REGEX=SCHEME, as in 'mlp.down_proj=w8-g32'"
            )
        return cls(pattern, parse_scheme(scheme, method=method))

    def matches(self, name: str) -> bool:
        """Whether the pattern is found in the name."""
        return re.search(self.pattern, name) is not None


def check_rounded(scheme: Scheme) -> None:
    """Refuse a scheme that edgeq does not round to.

    Raises:
        SchemeError: the scheme stands for integers of other programs.
    """
    if isinstance(scheme, QuantScheme) and scheme.kept_only:
        raise SchemeError(
            f"edgeq keeps tensors of {scheme} as other programs rounded them and does not round to "
            f"it; use bits of {', '.join(map(str, BITS))} with groups, -asym or -palette, "
            "such as w4-g32"
        )


@dataclass(frozen=True)
class Activations:
    """INT8 inputs of the matrices.

    Args:
        mode: "static" with ranges from calibration, or "dynamic" with those of the moment.
        observer: how a static range is chosen, see `edgeq.quant.observers`. "auto", for graphs
            only, takes that with the least squared error ("mse") for classifiers, and one that
            leaves out no value ("minmax") for encoders, whose outliers mean something.

    Raises:
        SchemeError: another mode or observer.
    """

    mode: Literal["static", "dynamic"]
    observer: str = "minmax"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise SchemeError(unknown("mode of activations", str(self.mode), MODES))
        from edgeq.quant.observers import OBSERVERS  # they compute; the names of rules do not

        if self.observer not in ("auto", *OBSERVERS):
            raise SchemeError(unknown("observer", str(self.observer), ("auto", *OBSERVERS)))
