"""How a whole model is quantized: which tensor gets which scheme, and by what means.

A recipe's rules are regular expressions with a scheme each; the first that matches somewhere in
a tensor's name wins, else the default holds. Norms and biases are vectors: they stay floating
point, F32 unless a rule asks for another float type.

    transforms    equal rewritings of the float model, in this order
    target        bits per weight or bytes: rules are then solved for, between transforms and method
    method        how weights are rounded
    training      what is learned after that
    activations   how inputs of matrices are rounded when the model runs, where that is not left
                  to the target

A recipe file is JSON or TOML of these names (`Recipe.from_file`).
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from edgeq.core.errors import FormatError, SchemeError, UsageError, check_type, unknown
from edgeq.formats.schemes import (
    BITS,
    FLOAT_TYPES,
    K_BLOCK,
    PRESETS,
    FloatScheme,
    QuantScheme,
    Scheme,
    parse_scheme,
)
from edgeq.quant.patterns import Pattern, split_rule
from edgeq.quant.presets import PRESETS as RECIPES

DEFAULT_PRESET = "w4-g32"
OUTER = r"^(model\.embed_tokens|lm_head)\."
"""Embedding and head: the whole output hangs on them, so they get 8 bits unless told otherwise."""
VECTORS = FloatScheme("f32")
"""What norms and biases are kept in."""
OPTIONS: Mapping[str, tuple[type, ...]] = {
    "damping": (int, float),
    "act_order": (bool,),
    "crossed": (bool,),
    "block": (int,),
    "sweeps": (int,),
}
"""Options of methods, and what they are: those of `edgeq.quant.rounders.gptq`."""
TARGETS = ("bpw", "bytes")
_KEYS = (
    "preset", "rules", "default", "method", "transforms", "activations", "options", "training",
    "target",
)  # fmt: skip


@dataclass(frozen=True)
class Rule(Pattern):
    """A scheme for the tensors whose name matches.

    Args:
        pattern: a regular expression, searched for anywhere in the name.
        scheme: what they get.

    Raises:
        SchemeError: the pattern is no regular expression.
    """

    scheme: Scheme

    def __post_init__(self) -> None:
        check_type("scheme", self.scheme, QuantScheme, FloatScheme)
        super().__post_init__()

    @classmethod
    def parse(cls, text: str) -> Rule:
        """Read ``REGEX=SCHEME``, as in ``mlp.down_proj=w8-g32``.

        Raises:
            SchemeError: there is no "=", or either side cannot be read.
        """
        pattern, scheme = split_rule(text, "tensor rule", "mlp.down_proj=w8-g32")
        return cls(pattern, parse_scheme(scheme))


@dataclass(frozen=True)
class Activations:
    """INT8 inputs of the matrices.

    Args:
        mode: "static" with ranges found on a text, or "dynamic" with those of the moment.
        observer: how a static range is chosen, see `edgeq.quant.observers`.

    Raises:
        SchemeError: another mode.
    """

    mode: Literal["static", "dynamic"]
    observer: str = "minmax"

    def __post_init__(self) -> None:
        if self.mode not in ("static", "dynamic"):
            raise SchemeError(unknown("mode of activations", str(self.mode), ("static", "dynamic")))


@dataclass(frozen=True)
class Recipe:
    """How a whole model is quantized.

    Args:
        rules: the first that matches a tensor wins.
        default: the scheme of matrices that no rule matches.
        method: how weights are rounded, a name of `edgeq.quant.METHODS`.
        transforms: names of `edgeq.quant.decoder.transforms.TRANSFORMS`, in order.
        activations: how the inputs of matrices are rounded; None leaves it to the target.
        options: of the method, see `OPTIONS`.
        training: {"method": "distill"} and other fields of `edgeq.quant.training.Settings`; None
        for
            no training.
        target: {"bpw": bits per weight} or {"bytes": size of the file}: rules for matrices are
            solved for, and tried after the given ones; palettes are among them where the default
            is one.

    Raises:
        SchemeError: a part that cannot be.
        UsageError: a setting of training out of range.

    Example:
        >>> recipe = edgeq.Recipe.from_options("w4-g64", tensor_types=["mlp=w8-g32"])
        >>> str(recipe.scheme_for("model.layers.0.mlp.down_proj.weight", (256, 1024)))
        'w8-g32'
    """

    rules: tuple[Rule, ...]
    default: Scheme
    method: str = "rtn"
    transforms: tuple[str, ...] = ()
    activations: Activations | None = None
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    training: Mapping[str, Any] | None = field(default=None, hash=False)
    target: Mapping[str, float] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        check_type("rules", self.rules, tuple, list)
        for rule in self.rules:
            check_type("a rule", rule, Rule)
        check_type("default", self.default, QuantScheme, FloatScheme)
        check_type("method", self.method, str)
        check_type("transforms", self.transforms, tuple, list)
        check_type("activations", self.activations, Activations, None)
        check_type("options", self.options, Mapping)
        check_type("training", self.training, Mapping, None)
        check_type("target", self.target, Mapping, None)
        for name, value in self.options.items():
            if name not in OPTIONS:
                raise SchemeError(unknown("option", name, OPTIONS))
            if type(value) not in OPTIONS[name]:
                kinds = " or ".join(kind.__name__ for kind in OPTIONS[name])
                raise SchemeError(f"option {name} is {value!r}; it must be {kinds}")
        if self.training is not None:
            _check_training(self.training)
        if self.target is not None:
            _check_target(self.target)

    @classmethod
    def from_options(
        cls,
        preset: str | None = None,
        bits: int | None = None,
        group: int | None = None,
        tensor_types: Iterable[str] = (),
        method: str | None = None,
    ) -> Recipe:
        """A recipe from what a user says.

        Args:
            preset: a preset (`edgeq.quant.presets`), or any scheme in its text form; w4-g32 if
                nothing is said.
            bits: instead of a preset: the first scheme preset of so many bits.
            group: weights per scale along K, with or without ``bits`` (4).
            tensor_types: rules as ``REGEX=SCHEME``, tried before the preset's own.
            method: instead of the preset's.

        Raises:
            SchemeError: a text cannot be read, or bits or group is not possible.
            UsageError: both a preset and bits or group are given.
        """
        check_type("preset", preset, str, None)
        check_type("bits", bits, int, None)
        check_type("group", group, int, None)
        check_type("tensor_types", tensor_types, Iterable)
        check_type("method", method, str, None)
        if isinstance(tensor_types, str):
            tensor_types = (tensor_types,)
        if preset is None:
            base = _from_default(_chosen(bits, group))
        elif bits is not None or group is not None:
            raise UsageError(
                f"preset {preset} sets bits and group already; give either a preset or "
                "bits and group (a preset may be any scheme, such as w4-g64-asym)"
            )
        else:
            base = named(preset)
        rules = (*map(Rule.parse, tensor_types), *base.rules)
        if method is not None and method != base.method:
            base = replace(base, method=method, options={})
        return replace(base, rules=rules)

    @classmethod
    def from_file(cls, path: str | Path) -> Recipe:
        """Read a recipe from JSON or TOML.

        The keys are those of `to_dict`, all optional but ``default``; without it ``preset`` names
        the recipe that the others change, its rules being tried after the file's. Embedding and
        head get 8 bits where no rule matches them.

        Raises:
            FormatError: the file cannot be read, or is no recipe.
            SchemeError: a scheme, pattern or other part cannot be.
        """
        check_type("path", path, str, PathLike)
        path = Path(path)
        try:
            text = path.read_text("utf-8")
            data = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
        except OSError as err:
            raise FormatError(f"{path} cannot be read: {err.strerror or err}") from err
        except (UnicodeDecodeError, json.JSONDecodeError, tomllib.TOMLDecodeError) as err:
            kind = "TOML" if path.suffix == ".toml" else "JSON"
            raise FormatError(f"{path} is not {kind}: {err} (TOML ends in .toml)") from err
        if not isinstance(data, dict):
            raise FormatError(f'{path} contains no recipe; write a table with default = "w4-g32"')
        try:
            return _completed(data)
        except FormatError as err:
            raise FormatError(f"{path}: {err}") from err
        except SchemeError as err:
            raise SchemeError(f"{path}: {err}") from err

    def __repr__(self) -> str:
        parts = [str(self.default), self.method, *self.transforms]
        if self.activations:
            parts.append(f"{self.activations.mode} int8 activations")
        if self.target:
            parts += [f"{value:g} {name}" for name, value in self.target.items()]
        if self.training:
            parts.append(str(self.training.get("method")))
        rules = f"{len(self.rules)} rule{'' if len(self.rules) == 1 else 's'}"
        return f"<Recipe {', '.join(parts)}, {rules}>"

    @property
    def needs(self) -> frozenset[str]:
        """What must be learned from a text before tensors can be rounded.

        Any of "importance" and "ranges", which saved statistics give as well; "hessian",
        "transforms", "target" and "training", which take the text itself.
        """
        from edgeq.quant.rounders.rounding import NEEDS

        found = {NEEDS[self.method]} if self.method in NEEDS else set()
        if self.activations is not None and self.activations.mode == "static":
            found.add("ranges")
        parts = {
            "transforms": self.transforms, "target": self.target, "training": self.training,
        }  # fmt: skip
        return frozenset(found | {name for name, part in parts.items() if part})

    @property
    def extra(self) -> str | None:
        """The extra that the recipe needs, as in ``pip install 'edgeq[train]'``."""
        return "train" if self.training else None

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
        """A JSON-ready dictionary, the inverse of `from_dict`; parts not used are left out."""
        found: dict[str, Any] = {
            "method": self.method,
            "default": str(self.default),
            "rules": [[rule.pattern, str(rule.scheme)] for rule in self.rules],
        }
        if self.transforms:
            found["transforms"] = list(self.transforms)
        if self.activations:
            found["activations"] = {
                "mode": self.activations.mode, "observer": self.activations.observer,
            }  # fmt: skip
        for name in ("options", "training", "target"):
            if part := getattr(self, name):
                found[name] = dict(part)
        return found

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """Rebuild from `to_dict`.

        Raises:
            FormatError: something is missing, unknown or of another kind.
            SchemeError: a scheme or pattern cannot be read.
        """
        check_type("data", data, Mapping)
        if surplus := sorted(set(data) - set(_KEYS[1:])):
            raise FormatError(unknown("key of a recipe", surplus[0], _KEYS[1:]))
        try:
            activations = data.get("activations")
            return cls(
                rules=tuple(Rule(pattern, parse_scheme(text)) for pattern, text in data["rules"]),
                default=parse_scheme(data["default"]),
                method=_text(data["method"]),
                transforms=tuple(map(_text, data.get("transforms", ()))),
                activations=Activations(**activations) if activations else None,
                options=dict(data.get("options") or {}),
                training=dict(data["training"]) if data.get("training") else None,
                target=dict(data["target"]) if data.get("target") else None,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as err:
            raise FormatError(f"the recipe is not readable: {err!r}") from err


def named(text: str) -> Recipe:
    """The recipe of a preset's name or a scheme's text form.

    Raises:
        SchemeError: it is neither.
    """
    name = text.strip().lower()
    if name in RECIPES:
        return _completed(RECIPES[name])
    try:
        return _from_default(parse_scheme(name))
    except SchemeError as err:
        if not str(err).startswith("unknown scheme"):
            raise
        raise SchemeError(
            unknown("preset", text, (*RECIPES, *FLOAT_TYPES))
            + "; or write w<bits>-<g16..g256|channel|tensor>[-asym|-palette], such as w4-g64-asym"
        ) from err


def _completed(data: Mapping[str, Any]) -> Recipe:
    """A recipe from what a file or preset says, and what it leaves unsaid."""
    own = dict(data)
    rules = own.pop("rules", [])
    if not isinstance(rules, list):
        raise FormatError(f"rules is {rules!r}; write a list of [pattern, scheme]")
    if "preset" in own and "default" in own:
        raise FormatError("give either preset or default, which each say the weights' scheme")
    try:
        if "preset" in own:
            base = named(_text(own.pop("preset")))
        else:
            base = _from_default(parse_scheme(_text(own["default"])))
    except KeyError:
        raise FormatError(
            'the recipe has neither default nor preset; write default = "w4-g32", for example'
        ) from None
    except TypeError as err:
        raise FormatError(f"the scheme of a recipe's matrices: {err}") from err
    known = base.to_dict()
    if own.get("method", base.method) != base.method:
        known.pop("options", None)  # which are the other method's
    said = [rule[0] for rule in rules if isinstance(rule, list) and rule]
    missing = [rule for rule in known["rules"] if rule[0] not in said]
    return Recipe.from_dict({**known, **own, "rules": [*rules, *missing]})


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _from_default(scheme: Scheme) -> Recipe:
    """Every matrix in a scheme, embedding and head with 8 bits at least."""
    outer: Scheme = PRESETS["w8-channel"]
    if isinstance(scheme, FloatScheme) or scheme.bits == 8:
        outer = scheme
    return Recipe((Rule(OUTER, outer),), scheme)


def _chosen(bits: int | None, group: int | None) -> Scheme:
    if bits is None and group is None:
        return PRESETS[DEFAULT_PRESET]
    wanted = 4 if bits is None else bits
    base = next((scheme for scheme in PRESETS.values() if scheme.bits == wanted), None)
    if base is None:
        raise SchemeError(f"bits is {bits}; use one of {', '.join(map(str, BITS))}")
    if group is None:
        return base
    return QuantScheme(wanted, base.symmetric, "group", group)


def _check_training(training: Mapping[str, Any]) -> None:
    from edgeq.quant.training.settings import Settings

    known = [setting.name for setting in fields(Settings)]
    for name in training:
        if name not in known:
            raise SchemeError(unknown("option of training", name, known))
    Settings(**training)


def _check_target(target: Mapping[str, float]) -> None:
    if len(target) != 1 or next(iter(target)) not in TARGETS:
        raise SchemeError(
            f"the target is {dict(target)}; give one number, as {{bpw = 4.5}} or "
            "{bytes = 300000000}"
        )
    (value,) = target.values()
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise SchemeError(f"the target is {value!r}; it must be a positive number")


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
