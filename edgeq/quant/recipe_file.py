"""Recipes as text: files in JSON or TOML, dictionaries in artifacts and graphs, preset names.

One format serves decoders and graphs:

    preset          the recipe that the other keys change; its rules are tried after the file's
    default         the scheme of weights; graphs may call it weights
    method          how weights are rounded; the default may say it too, as w4-g32-gptq does, and in
                    graphs every scheme may, which is rounded to nearest where it does not
    rules           [regular expression, scheme]: the first found in a tensor's or node's name wins;
                    f32 or f16 keep it float
    activations     {mode = "static" | "dynamic", observer = ...}, or "static", "dynamic" or "float"
    observer        that of static activations, where activations is a text
    options, transforms, training, target
                    for decoders only, see `edgeq.quant.recipe.Recipe`
    [graph]         for graphs only: scope, outer, tables, equalize, bias_correction, mixed,
                    mixed_keep and rest, see `edgeq.quant.graph.recipe.GraphOptions`

A file with a [graph] table may be used for decoders too, which leave the table out. Keys of the
table may stand beside the others, as in the metadata of quantized graphs, which `recipe_to_dict`
writes; "equalise" and "fp16" are other spellings of equalize and f16.

What is not said in a decoder's recipe: embedding and head get 8 bits where no rule matches them.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import fields
from os import PathLike
from pathlib import Path
from typing import Any

from edgeq.core.errors import FormatError, SchemeError, check_type, unknown
from edgeq.formats.schemes import BY_BITS, FLOAT_TAGS, FloatScheme, Scheme, parse_scheme
from edgeq.quant.graph.recipe import GraphOptions
from edgeq.quant.presets import PRESETS, SourceKind, presets_for
from edgeq.quant.recipe import OLD_OPTIONS, OUTER, Activations, Recipe, Rule

_SHARED = ("rules", "default", "method", "activations")
_DECODER_KEYS = (*_SHARED, "transforms", "options", "training", "target")
_GRAPH_OPTIONS = tuple(part.name for part in fields(GraphOptions))
_GRAPH_KEYS = ("weights", "rules", "method", "activations", "observer", *_GRAPH_OPTIONS)
_SCHEMES = ("outer", "tables", "mixed_keep", "rest")
"""Options of graphs that are schemes."""


def read_recipe(path: str | Path, source: SourceKind | None = None) -> Recipe:
    """Read a recipe from JSON or TOML.

    Args:
        path: of the file; TOML ends in .toml.
        source: what the recipe is for; None for graphs if the file says something of graphs, else
            for decoders.

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
    except ValueError as err:  # broken UTF-8, JSON or TOML
        kind = "TOML" if path.suffix == ".toml" else "JSON"
        raise FormatError(f"{path} is not {kind}: {err} (TOML ends in .toml)") from err
    if not isinstance(data, dict):
        raise FormatError(f'{path} contains no recipe; write a table with default = "w4-g32"')
    try:
        return _completed(data, source or _kind(data))
    except (FormatError, SchemeError) as err:
        raise type(err)(f"{path}: {err}") from err


def named(text: str, source: SourceKind = "decoder") -> Recipe:
    """The recipe of a preset's name or of a scheme's text form.

    Raises:
        SchemeError: it is neither.
    """
    name = text.strip().lower()
    presets = presets_for(source)
    if name in presets:
        return _completed(presets[name], source)
    try:
        scheme = parse_scheme(name, method=source == "graph")
        if source == "graph":
            return Recipe((), scheme, graph=GraphOptions())
        return _for_decoder(scheme)
    except SchemeError as err:
        if not str(err).startswith("unknown scheme") and name not in PRESETS:
            raise
        if source == "graph":
            raise SchemeError(
                unknown("preset for a graph", text, presets)
                + "; or write the weights' scheme: w<8|4>-<tensor|channel|g16..g256>"
                "[-palette|-mse|-gptq]"
            ) from err
        raise SchemeError(
            unknown("preset", text, (*presets, *FLOAT_TAGS.values()))
            + "; or write w<bits>-<g16..g256|channel|tensor>[-asym|-palette], such as w4-g64-asym"
        ) from err


def recipe_from_dict(data: Mapping[str, Any]) -> Recipe:
    """Rebuild from `recipe_to_dict`.

    Raises:
        FormatError: something is missing, unknown or of another kind.
        SchemeError: a scheme or pattern cannot be read.
    """
    check_type("data", data, Mapping)
    return _graph_recipe(data) if _kind(data) == "graph" else _decoder_recipe(data)


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """A JSON-ready dictionary; parts not used are left out."""
    if recipe.graph is not None:
        return _graph_dict(recipe, recipe.graph)
    data: dict[str, Any] = {
        "method": recipe.method,
        "default": str(recipe.default),
        "rules": [[rule.pattern, str(rule.scheme)] for rule in recipe.rules],
    }
    if recipe.transforms:
        data["transforms"] = list(recipe.transforms)
    if recipe.activations:
        data["activations"] = {
            "mode": recipe.activations.mode, "observer": recipe.activations.observer,
        }  # fmt: skip
    if recipe.options:
        old = {name: other for other, name in OLD_OPTIONS.items()}
        data["options"] = {old.get(name, name): value for name, value in recipe.options.items()}
    for name in ("training", "target"):
        if part := getattr(recipe, name):
            data[name] = dict(part)
    return data


def _graph_dict(recipe: Recipe, options: GraphOptions) -> dict[str, Any]:
    """What the metadata of a quantized graph holds: all keys beside each other."""
    data: dict[str, Any] = {"weights": _graph_text(recipe.default)}
    if recipe.activations is not None:
        data["activations"] = recipe.activations.mode
        if recipe.activations.observer != "auto":
            data["observer"] = recipe.activations.observer
    given = {
        part.name: getattr(options, part.name)
        for part in fields(options)
        if getattr(options, part.name) != part.default
    }
    for name, value in given.items():
        key = "equalise" if name == "equalize" else name
        data[key] = _graph_text(value) if name in _SCHEMES else value
    if recipe.rules:
        data["rules"] = [[rule.pattern, _graph_text(rule.scheme)] for rule in recipe.rules]
    order = ("weights", "activations", "observer", "scope", "outer", "tables", "rules",
             "equalise", "bias_correction", "mixed", "mixed_keep", "rest")  # fmt: skip
    return {key: data[key] for key in order if key in data}


def _graph_text(scheme: Scheme) -> str:
    """The text form in a graph's metadata, where float16 is called fp16."""
    return "fp16" if scheme == FloatScheme("float16") else str(scheme)


def _kind(data: Mapping[str, Any]) -> SourceKind:
    """What a recipe is for, by its keys."""
    ours = {"weights", "observer", "graph", "equalise", *_GRAPH_OPTIONS}
    return "graph" if ours & set(data) else "decoder"


def _completed(data: Mapping[str, Any], source: SourceKind) -> Recipe:
    """A recipe from what a file or preset says, and what it leaves unsaid."""
    own = dict(data)
    if "preset" in own and "default" in own:
        raise FormatError("give either preset or default, which each say the weights' scheme")
    base = None
    if "preset" in own:
        try:
            base = named(_text(own.pop("preset")), source)
        except TypeError as err:
            raise FormatError(f"preset: {err}") from err
    if source == "graph":
        return _graph_recipe({**(recipe_to_dict(base) if base else {}), **_flat(own)})
    own.pop("graph", None)
    return _completed_decoder(own, base)


def _completed_decoder(own: dict[str, Any], base: Recipe | None) -> Recipe:
    rules = own.pop("rules", [])
    if not isinstance(rules, list):
        raise FormatError(f"rules is {rules!r}; write a list of [pattern, scheme]")
    if base is None:
        try:
            scheme = parse_scheme(_text(own["default"]), method=True)
        except KeyError:
            raise FormatError(
                'the recipe has neither default nor preset; write default = "w4-g32", for example'
            ) from None
        except TypeError as err:
            raise FormatError(f"the scheme of a recipe's matrices: {err}") from err
        if not isinstance(scheme, FloatScheme) and scheme.method is not None:
            if own.setdefault("method", scheme.method) != scheme.method:
                raise FormatError(
                    f"default is {scheme} and method is {own['method']!r}; say the method once"
                )
            scheme = scheme.stored
            own["default"] = str(scheme)
        base = _for_decoder(scheme)
    known = recipe_to_dict(base)
    if own.get("method", base.method) != base.method:
        known.pop("options", None)  # which are the other method's
    said = [rule[0] for rule in rules if isinstance(rule, list) and rule]
    missing = [rule for rule in known["rules"] if rule[0] not in said]
    return _decoder_recipe({**known, **own, "rules": [*rules, *missing]})


def _for_decoder(scheme: Scheme) -> Recipe:
    """Every matrix in a scheme, embedding and head with 8 bits at least."""
    outer: Scheme = BY_BITS[8]
    if isinstance(scheme, FloatScheme) or scheme.bits == 8:
        outer = scheme
    return Recipe((Rule(OUTER, outer),), scheme)


def _decoder_recipe(data: Mapping[str, Any]) -> Recipe:
    if surplus := sorted(set(data) - set(_DECODER_KEYS)):
        raise FormatError(unknown("key of a recipe", surplus[0], _DECODER_KEYS))
    try:
        return Recipe(
            rules=tuple(Rule(pattern, parse_scheme(text)) for pattern, text in data["rules"]),
            default=parse_scheme(data["default"]),
            method=_text(data["method"]),
            transforms=tuple(map(_text, data.get("transforms", ()))),
            activations=_activations(data, "minmax"),
            options=dict(data.get("options") or {}),
            training=dict(data["training"]) if data.get("training") else None,
            target=dict(data["target"]) if data.get("target") else None,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        raise FormatError(f"the recipe is not readable: {err!r}") from err


def _flat(data: Mapping[str, Any]) -> dict[str, Any]:
    """A graph's recipe with the [graph] table beside the other keys, each in one spelling."""
    flat = dict(data)
    options = flat.pop("graph", {})
    if not isinstance(options, Mapping):
        raise FormatError(f"graph is {options!r}; write a table [graph]")
    if surplus := sorted(set(options) - {*_GRAPH_OPTIONS, "equalise"}):
        raise FormatError(unknown("key of a recipe's [graph]", surplus[0], _GRAPH_OPTIONS))
    flat |= options
    for other, name in (("default", "weights"), ("equalize", "equalise")):
        if other in flat:
            flat[name] = flat.pop(other)
    return flat


def _graph_recipe(data: Mapping[str, Any]) -> Recipe:
    flat = _flat(data)
    if surplus := sorted(set(flat) - {*_GRAPH_KEYS, "equalise"}):
        if surplus[0] in _DECODER_KEYS:
            raise FormatError(f"{surplus[0]} is for decoders; leave it out of a graph's recipe")
        raise FormatError(unknown("key of a graph's recipe", surplus[0], _GRAPH_KEYS))
    if "weights" not in flat:
        raise FormatError('the recipe does not say weights; write weights = "w8-channel"')
    try:
        options = {name: flat[name] for name in _GRAPH_OPTIONS if name in flat}
        if "equalise" in flat:
            options["equalize"] = flat["equalise"]
        for name in _SCHEMES:
            if options.get(name) is not None:
                options[name] = _graph_scheme(options[name])
        recipe = Recipe(
            rules=tuple(
                Rule(_text(pattern), _graph_scheme(scheme))
                for pattern, scheme in flat.get("rules", ())
            ),
            default=_graph_scheme(flat["weights"]),
            activations=_activations(flat, "auto"),
            graph=GraphOptions(**options),
        )
        return recipe.with_method(_text(flat["method"])) if "method" in flat else recipe
    except (TypeError, ValueError, AttributeError) as err:
        raise FormatError(f"the recipe is not readable: {err}") from err


def _graph_scheme(text: object) -> Scheme:
    return parse_scheme(_text(text), method=True)


def _activations(data: Mapping[str, Any], observer: str) -> Activations | None:
    """How inputs of matrices are rounded, from a table or the name of a mode."""
    given = data.get("activations")
    own = {"observer": data["observer"]} if "observer" in data else {}
    if isinstance(given, str):
        given = None if given == "float" else {"mode": given}
    if not given:
        if own:
            Activations("static", **own)  # refuses an observer that does not exist
        return None
    return Activations(**{"observer": observer, **own, **given})


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value
