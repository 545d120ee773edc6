"""The options of a recipe that concern graphs alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from edgeq.core.errors import SchemeError, UsageError, check_type, unknown
from edgeq.formats.schemes import FloatScheme, QuantScheme, Scheme

SCOPES = ("auto", "all", "layers")
SINGLE, HALF = FloatScheme("float32"), FloatScheme("float16")
GRAPH_METHODS = ("rtn", "mse", "gptq", "palette")
"""What ``--method`` may say for a graph; "palette" gives the weights a table of values."""


@dataclass(frozen=True)
class GraphOptions:
    """What a recipe says of graphs alone.

    Args:
        scope: which operators compute in integers, where activations are static: "all" that can,
            or the "layers" Conv, ConvTranspose and Linear, with smoothed inputs
            (`edgeq.quant.graph.smooth`) and all else in float; "auto": layers where there is a
            LayerNormalization (residual streams of transformers have outliers), else all.
        outer: the scheme of the first and the last layer and of depthwise convolutions; None for
            the recipe's default.
        tables: the scheme of tables of Gather, of which a run reads a few rows alone; None for
            the recipe's default.
        equalize: whether ranges of channels are brought together across layers; None for where
            there are depthwise convolutions, or channels far larger than others.
        bias_correction: add the mean error of each output channel to its bias; in scope "layers"
            it gains nothing and is left out.
        mixed: give the layers that lose most the scheme ``mixed_keep``, until the loss is this
            part of what it was; None for no such search.
        mixed_keep: the scheme of those layers.
        rest: what float constants are stored in: f32 or f16.

    Raises:
        SchemeError: a part that cannot be.
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
            raise SchemeError(f"rest is {self.rest}; float constants are stored in f32 or fp16")
        for name in ("equalize", "bias_correction"):
            value = getattr(self, name)
            if not isinstance(value, bool) and not (name == "equalize" and value is None):
                raise SchemeError(f"{name} is {value!r}; it must be true or false")
        if self.mixed is not None and not (isinstance(self.mixed, float) and 0 < self.mixed < 1):
            raise SchemeError(f"mixed is {self.mixed!r}; it must be between 0 and 1")


def scheme_with_method(scheme: Scheme, method: str) -> QuantScheme:
    """The scheme of a graph's weights, rounded by another method.

    Args:
        scheme: of the weights.
        method: of `GRAPH_METHODS`.

    Raises:
        SchemeError: there is no method of that name for graphs.
        UsageError: the weights stay float.
    """
    if method not in GRAPH_METHODS:
        raise SchemeError(unknown("method", method, GRAPH_METHODS))
    if isinstance(scheme, FloatScheme):
        raise UsageError(f"weights stay {scheme}: there is nothing to round")
    palette: Literal["palette"] | None = "palette" if method == "palette" else None
    return replace(scheme, codebook=palette, method=None if palette else method)


def check_graph_weights(scheme: QuantScheme) -> None:
    """Refuse a scheme that weights of graphs cannot have.

    Raises:
        SchemeError: names what is not possible.
    """
    if scheme.bits not in (4, 8):
        raise SchemeError(f"weights of a graph have 4 or 8 bits, not {scheme.bits}")
    if not scheme.symmetric:
        raise SchemeError(f"weights of a graph are symmetric; write {scheme} without -asym")
    if scheme.method == "imatrix":
        raise SchemeError(unknown("method", scheme.method, GRAPH_METHODS))
