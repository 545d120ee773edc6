"""How a graph is quantized: weights, activations, and which operators stay as they are.

    weights         the scheme of constants of Conv, ConvTranspose, Linear and tables of Gather:
                    w<8|4>-<tensor|channel|g16..g256>[-rtn|-mse|-gptq|-palette], or f32
    activations     "static" with ranges found on samples, "dynamic" with those of the moment,
                    "float" for none
    observer        how a static range is chosen, see `edgeq.quant.observers`; "auto" takes that
                    with the least squared error ("mse") for classifiers, and one that leaves out
                    no value ("minmax") for encoders, whose outliers mean something
    scope           which operators compute in integers, where activations are static: "all" that
                    can, or the "layers" Conv, ConvTranspose and Linear, with smoothed inputs
                    (`edgeq.quant.graph.smooth`) and all else in float; "auto": layers where there
                    is a LayerNormalization (residual streams of transformers have outliers), else
                    all
    tables          the scheme of tables of Gather, of which a run reads a few rows alone
    outer           the scheme of the first and the last layer and of depthwise convolutions
    rules           [regular expression, scheme]: the first found in a node's name wins; f32 or
                    fp16 keep the node float
    equalise        cross-layer equalisation; null for where there are depthwise convolutions
    bias_correction add the mean error of each output channel to its bias; in scope "layers" it
                    gains nothing and is left out
    mixed           keep the layers that lose most in ``mixed_keep``, until the loss is this part
                    of what it was
    rest            how float constants are stored: f32 or fp16

A recipe file is JSON or TOML of these names (`GraphRecipe.from_file`); ``preset`` in it names the
recipe that the others change.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from edgeq.core.errors import FormatError, SchemeError, UsageError, unknown
from edgeq.graph.ir import Node
from edgeq.quant.graph.presets import DEFAULT_PRESET, PRESETS
from edgeq.quant.graph.weights import METHODS, WeightScheme
from edgeq.quant.observers import OBSERVERS
from edgeq.quant.patterns import Pattern, split_rule

Float = Literal["f32", "fp16"]
Choice = WeightScheme | Float
"""What a node's weight is held in; a float one makes the node compute in float."""
FLOATS = ("f32", "fp16")
ACTIVATIONS = ("static", "dynamic", "float")
SCOPES = ("auto", "all", "layers")
_SCHEME = re.compile(rf"w([48])-(tensor|channel|g\d+)(?:-({'|'.join(METHODS)}))?")


def parse_choice(text: str) -> Choice:
    """Read a scheme's text form, as ``w4-g32-gptq`` or ``fp16``.

    Raises:
        SchemeError: it is none.
    """
    name = text.strip().lower()
    if name in ("f32", "float"):
        return "f32"
    if name == "fp16":
        return "fp16"
    match = _SCHEME.fullmatch(name)
    if match is None:
        raise SchemeError(
            f"{text!r} is not a scheme for the weights of a graph; write "
            "w<8|4>-<tensor|channel|g16..g256>[-mse|-gptq|-palette], such as w4-g32, or f32, fp16"
        )
    group = int(match[2][1:]) if match[2].startswith("g") else None
    return WeightScheme(
        bits=8 if match[1] == "8" else 4,
        granularity="group" if group else "tensor" if match[2] == "tensor" else "channel",
        group_size=group,
        method=match[3] or "rtn",  # type: ignore[arg-type]  # the expression allows no other
    )


def choice_text(choice: Choice) -> str:
    """The text form, the inverse of `parse_choice`."""
    if isinstance(choice, str):
        return choice
    middle = f"g{choice.group_size}" if choice.granularity == "group" else choice.granularity
    return f"w{choice.bits}-{middle}" + ("" if choice.method == "rtn" else f"-{choice.method}")


@dataclass(frozen=True)
class GraphRule(Pattern):
    """A scheme for the nodes whose name matches.

    Args:
        pattern: a regular expression, searched for anywhere in the name.
        choice: what they get.

    Raises:
        SchemeError: the pattern is no regular expression.
    """

    choice: Choice

    @classmethod
    def parse(cls, text: str) -> GraphRule:
        """Read ``REGEX=SCHEME``, as in ``head=w8-channel``.

        Raises:
            SchemeError: there is no "=", or either side cannot be read.
        """
        pattern, scheme = split_rule(text, "rule for nodes", "head=w8-channel")
        return cls(pattern, parse_choice(scheme))


@dataclass(frozen=True)
class GraphRecipe:
    """How a graph is quantized; the module says what each part means.

    Raises:
        SchemeError: a part that cannot be.
    """

    weights: Choice
    activations: Literal["static", "dynamic", "float"] = "float"
    observer: str = "auto"
    scope: Literal["auto", "all", "layers"] = "auto"
    outer: Choice | None = None
    tables: Choice | None = None
    rules: tuple[GraphRule, ...] = ()
    equalise: bool | None = None
    bias_correction: bool = False
    mixed: float | None = None
    mixed_keep: Choice = "fp16"
    rest: Float = "f32"

    def __post_init__(self) -> None:
        for what, got, known in (
            ("kind of activations", self.activations, ACTIVATIONS),
            ("scope", self.scope, SCOPES),
            ("rest", self.rest, FLOATS),
            ("observer", self.observer, ("auto", *OBSERVERS)),
        ):
            if got not in known:
                raise SchemeError(unknown(what, str(got), known))
        for name in ("equalise", "bias_correction"):
            value = getattr(self, name)
            if not isinstance(value, bool) and not (name == "equalise" and value is None):
                raise SchemeError(f"{name} is {value!r}; it must be true or false")
        if self.activations == "static" and isinstance(self.weights, str):
            raise SchemeError(
                f"static activations need integer weights, and weights is {self.weights}; "
                "write weights = 'w8-channel', say, or activations = 'float'"
            )
        grouped = [s for s in self.schemes if s.granularity == "group"]
        if self.activations == "static" and grouped:
            raise SchemeError(
                f"static activations take scales for a channel or tensor of weights, not "
                f"{choice_text(grouped[0])}; use granularity channel or tensor"
            )
        if self.mixed is not None and not (isinstance(self.mixed, float) and 0 < self.mixed < 1):
            raise SchemeError(f"mixed is {self.mixed!r}; it must be between 0 and 1")

    @property
    def schemes(self) -> tuple[WeightScheme, ...]:
        """All that a weight may get."""
        choices = [self.weights, self.outer, self.tables, *(rule.choice for rule in self.rules)]
        if self.mixed is not None:
            choices.append(self.mixed_keep)
        return tuple(choice for choice in choices if isinstance(choice, WeightScheme))

    @property
    def needs_samples(self) -> bool:
        """Whether samples must be given."""
        return (
            self.activations == "static"
            or self.bias_correction
            or self.mixed is not None
            or any(scheme.method == "gptq" for scheme in self.schemes)
        )

    def choice_for(self, node: Node, *, outer: bool = False) -> Choice:
        """What a node gets.

        Args:
            node: any.
            outer: whether it is one that ``outer`` is for.
        """
        for rule in self.rules:
            if rule.matches(node.name):
                return rule.choice
        if node.op == "Gather" and self.tables is not None:
            return self.tables
        return self.outer if outer and self.outer is not None else self.weights

    def check(self, nodes: Iterable[Node]) -> None:
        """Refuse a rule that no node matches.

        Raises:
            SchemeError: names the rule and some of the nodes.
        """
        names = [node.name for node in nodes]
        for rule in self.rules:
            if not any(map(rule.matches, names)):
                shown = ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
                raise SchemeError(f"the rule {rule.pattern!r} matches no node (nodes: {shown})")

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary, the inverse of `from_dict`; what was not said is left out."""
        found: dict[str, Any] = {}
        for part in fields(self):
            value = getattr(self, part.name)
            if part.name == "weights":
                found["weights"] = choice_text(value)
            elif value == part.default:
                continue
            elif part.name in ("outer", "tables", "mixed_keep"):
                found[part.name] = choice_text(value)
            elif part.name == "rules":
                found["rules"] = [[rule.pattern, choice_text(rule.choice)] for rule in value]
            else:
                found[part.name] = value
        return found

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GraphRecipe:
        """Rebuild from `to_dict`.

        Raises:
            FormatError: something is missing, unknown or of another kind.
            SchemeError: a scheme or another part cannot be.
        """
        known = tuple(part.name for part in fields(cls))
        if surplus := sorted(set(data) - set(known)):
            raise FormatError(unknown("key of a graph's recipe", surplus[0], known))
        if "weights" not in data:
            raise FormatError('the recipe does not say weights; write weights = "w8-channel"')
        given = dict(data)
        try:
            for name in ("weights", "outer", "tables", "mixed_keep"):
                if given.get(name) is not None:
                    given[name] = parse_choice(_text(given[name]))
            given["rules"] = tuple(
                GraphRule(_text(pattern), parse_choice(_text(scheme)))
                for pattern, scheme in given.get("rules", ())
            )
            return cls(**given)
        except (TypeError, ValueError) as err:
            raise FormatError(f"the recipe is not readable: {err}") from err

    @classmethod
    def named(cls, text: str) -> GraphRecipe:
        """The recipe of a preset's name, or of a scheme's text form for weights alone.

        Raises:
            SchemeError: it is neither.
        """
        name = text.strip().lower()
        if name in PRESETS:
            return cls.from_dict(PRESETS[name][1])
        try:
            return cls(parse_choice(name))
        except SchemeError as err:
            if "is not a scheme" not in str(err):
                raise
            raise SchemeError(
                unknown("preset for a graph", text, PRESETS)
                + "; or write the weights' scheme: w<8|4>-<tensor|channel|g16..g256>"
                "[-mse|-gptq|-palette]"
            ) from err

    @classmethod
    def from_file(cls, path: str | Path) -> GraphRecipe:
        """Read a recipe from JSON or TOML; ``preset`` in it names one that the rest changes.

        Raises:
            FormatError: the file cannot be read, or is no recipe.
            SchemeError: a scheme, pattern or other part cannot be.
        """
        path = Path(path)
        try:
            text = path.read_text("utf-8")
            data = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
        except OSError as err:
            raise FormatError(f"{path} cannot be read: {err.strerror or err}") from err
        except ValueError as err:  # broken UTF-8, JSON or TOML
            kind = "TOML" if path.suffix == ".toml" else "JSON"
            raise FormatError(f"{path} is not {kind}: {err} (TOML ends in .toml)") from err
        if not isinstance(data, dict):
            raise FormatError(
                f'{path} contains no recipe; write a table with weights = "w8-channel"'
            )
        try:
            base = data.pop("preset", None)
            if base is not None:
                data = {**cls.named(_text(base)).to_dict(), **data}
            return cls.from_dict(data)
        except TypeError as err:
            raise FormatError(f"{path}: preset: {err}") from err
        except (FormatError, SchemeError) as err:
            raise type(err)(f"{path}: {err}") from err

    @classmethod
    def from_options(
        cls,
        preset: str | None = None,
        file: str | Path | None = None,
        *,
        rules: Iterable[str] = (),
        method: str | None = None,
        observer: str | None = None,
    ) -> GraphRecipe:
        """A recipe from what a user says.

        Args:
            preset: a preset's name or a scheme; w8a8-static if nothing is said.
            file: instead of a preset, see `from_file`.
            rules: as ``REGEX=SCHEME``, tried before the recipe's own.
            method: how weights are rounded, instead of the recipe's.
            observer: instead of the recipe's.

        Raises:
            UsageError: both a preset and a file, or a method for float weights.
            SchemeError, FormatError: a part cannot be read.
        """
        if preset is not None and file is not None:
            raise UsageError("give either a preset or a recipe's file, which each say it all")
        recipe = cls.from_file(file) if file is not None else cls.named(preset or DEFAULT_PRESET)
        if method is not None:
            if method not in METHODS:
                raise SchemeError(unknown("method", method, METHODS))
            if isinstance(recipe.weights, str):
                raise UsageError(f"weights stay {recipe.weights}: there is nothing to round")
            recipe = replace(
                recipe,
                weights=replace(recipe.weights, method=method),  # type: ignore[arg-type]
            )
        if observer is not None:
            recipe = replace(recipe, observer=observer)
        return replace(recipe, rules=(*map(GraphRule.parse, rules), *recipe.rules))


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value
