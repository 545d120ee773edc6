"""The options of a recipe that only graphs have."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from edgeq.core.errors import SchemeError, UsageError, check_type, unknown
from edgeq.formats.schemes import FloatScheme, QuantScheme, Scheme

SCOPES = ("auto", "all", "layers")
SINGLE, HALF = FloatScheme("float32"), FloatScheme("float16")
GRAPH_METHODS = ("rtn", "mse", "gptq", "palette")
"""The values of ``--method`` for graphs; "palette" gives the weights a table of values."""


@dataclass(frozen=True)
class GraphOptions:
    """The options of a recipe that only graphs have.

    Args:
        scope: the operators that compute on integers, if activations are static. "all" is every
            operator that can. "layers" is Conv, ConvTranspose and Linear, with smoothed inputs
            (`edgeq.quant.graph.smooth`) and all other operators in float. "auto" is "layers" for
            transformers, whose residual streams have outliers, and "all" for other graphs.
        outer: scheme of the first and the last layer and of depthwise convolutions; None for the
            recipe's default.
        tables: scheme of the tables of Gather, of which one run reads only a few rows; None for
            the recipe's default.
        equalize: whether to equalize the ranges of channels across layers. None does so for graphs
            with depthwise convolutions, or with channels that are far larger than others.
        bias_correction: whether to subtract the mean error of each output channel from its bias. It
            is left out in scope "layers", where it gains nothing.
        mixed: search for the layers with the largest loss and give them the scheme ``mixed_keep``,
            until the loss is this fraction of what it was. None for no search.
        mixed_keep: the scheme of those layers.
        rest: the type in which float constants are stored: f32 or f16.

    Raises:
        SchemeError: a value is invalid.
    """

    scope: Literal["auto", "all", "layers"] = "auto"
    outer: Scheme | None = None
    tables: Scheme | None = None
    equalize: bool | None = None
    bias_correction: bool = False
    mixed: float | None = None
    mixed_keep: Scheme = HALF
    rest: FloatScheme = SINGLE

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise SchemeError(unknown("scope", str(self.scope), SCOPES))
        check_type("outer", self.outer, QuantScheme, FloatScheme, None)
        check_type("tables", self.tables, QuantScheme, FloatScheme, None)
        check_type("mixed_keep", self.mixed_keep, QuantScheme, FloatScheme)
        if not isinstance(self.rest, FloatScheme):
            raise SchemeError(f"rest is {self.rest}; use f32 or f16 for float constants")
        for name in ("equalize", "bias_correction"):
            value = getattr(self, name)
            if not isinstance(value, bool) and not (name == "equalize" and value is None):
                raise SchemeError(f"{name} is {value!r}; use true or false")
        if self.mixed is not None and not (isinstance(self.mixed, float) and 0 < self.mixed < 1):
            raise SchemeError(f"mixed is {self.mixed!r}; use a number between 0 and 1")


def scheme_with_method(scheme: Scheme, method: str) -> QuantScheme:
    """The scheme of a graph's weights with another rounding method.

    Args:
        scheme: scheme of the weights.
        method: a name of `GRAPH_METHODS`.

    Raises:
        SchemeError: there is no method of that name for graphs.
        UsageError: the weights stay float.
    """
    if method not in GRAPH_METHODS:
        raise SchemeError(unknown("method", method, GRAPH_METHODS))
    if isinstance(scheme, FloatScheme):
        raise UsageError(
            f"the weights stay {scheme}, so {method} has nothing to round; leave --method out"
        )
    palette: Literal["palette"] | None = "palette" if method == "palette" else None
    return replace(scheme, codebook=palette, method=None if palette else method)


def check_graph_weights(scheme: QuantScheme) -> None:
    """Refuse a scheme that weights of graphs cannot have.

    Raises:
        SchemeError: graphs do not support the bits, the asymmetry or the method of the scheme.
    """
    if scheme.bits not in (4, 8):
        raise SchemeError(f"weights of a graph cannot have {scheme.bits} bits; use 4 or 8")
    if not scheme.symmetric:
        raise SchemeError(
            f"weights of a graph are symmetric, and the scheme is {scheme}; leave out -asym"
        )
    if scheme.method == "imatrix":
        raise SchemeError(unknown("method", scheme.method, GRAPH_METHODS))
