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
                    mixed_keep and rest, see `edgeq.quant.graph.options.GraphOptions`

A file with a [graph] table may be used for decoders too, which leave the table out. Keys of the
table may stand beside the others, as in the metadata of quantized graphs, which `dict_of_fields`
writes; "equalise" and "fp16" are other spellings of equalize and f16.

What is not said in a decoder's recipe: embedding and head get 8 bits where no rule matches them.

The functions here return the fields of a `edgeq.quant.recipe.Recipe` by name, which that class
makes recipes of.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from edgeq.core.documents import read_document
from edgeq.core.errors import FormatError, SchemeError, unknown
from edgeq.formats.schemes import (
    BY_BITS,
    FLOAT_TAGS,
    FloatScheme,
    QuantScheme,
    Scheme,
    parse_scheme,
)
from edgeq.quant.graph.options import GraphOptions, check_graph_weights, scheme_with_method
from edgeq.quant.presets import PRESETS, SourceKind, presets_for
from edgeq.quant.rules import OUTER, Activations, Rule

OLD_OPTIONS = {"crossed": "use_quantized_inputs"}
"""Options under the names they have in artifacts and in recipes of earlier versions."""
_SHARED = ("rules", "default", "method", "activations")
_DECODER_KEYS = (*_SHARED, "transforms", "options", "training", "target")
_GRAPH_OPTIONS = tuple(part.name for part in fields(GraphOptions))
_GRAPH_KEYS = ("weights", "rules", "method", "activations", "observer", *_GRAPH_OPTIONS)
_SCHEMES = ("outer", "tables", "mixed_keep", "rest")
"""Options of graphs that are schemes."""


def read_recipe(path: Path) -> dict[str, Any]:
    """The table in a recipe's file, JSON or TOML.

    Args:
        path: of the file; TOML ends in .toml.

    Raises:
        FormatError: the file cannot be read, or contains no table.
    """
    data = read_document(path, "a recipe is JSON, or TOML if its name ends in .toml")
    if not isinstance(data, dict):
        raise FormatError(f'{path} contains no recipe; write a table with default = "w4-g32"')
    return data


@contextmanager
def readable(path: Path | None = None) -> Iterator[None]:
    """Where a recipe is made of what was read: errors say so, and name the file.

    Raises:
        FormatError: instead of what Python raises for a missing or wrong part.
    """
    try:
        try:
            yield
        except KeyError as err:
            raise FormatError(f"the recipe is not readable: it has no {err}") from err
        except (TypeError, ValueError, AttributeError) as err:
            raise FormatError(f"the recipe is not readable: {err}") from err
    except (FormatError, SchemeError) as err:
        if path is None:
            raise
        raise type(err)(f"{path}: {err}") from err


def named_fields(text: str, source: SourceKind) -> dict[str, Any]:
    """The fields of the recipe of a preset's name or of a scheme's text form.

    Raises:
        SchemeError: it is neither.
    """
    name = text.strip().lower()
    presets = presets_for(source)
    if name in presets:
        return completed_fields(presets[name], source)
    try:
        scheme = parse_scheme(name, method=source == "graph")
        if source == "graph":
            if isinstance(scheme, QuantScheme):
                check_graph_weights(scheme)
            return {"rules": (), "default": scheme, "graph": GraphOptions()}
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


def recipe_fields(data: Mapping[str, Any], source: SourceKind) -> dict[str, Any]:
    """The fields of a recipe from a dictionary that leaves nothing unsaid.

    Raises:
        FormatError: a key is missing or unknown.
        SchemeError: a scheme or pattern cannot be read.
        KeyError, TypeError, ValueError, AttributeError: a part is missing or of another kind.
    """
    return _graph_fields(data) if source == "graph" else _decoder_fields(data)


def dict_of_fields(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON-ready dictionary, the inverse of `recipe_fields`; parts not used are left out.

    Args:
        recipe: the fields of a recipe.
    """
    if recipe.get("graph") is not None:
        return _graph_dict(recipe, recipe["graph"])
    data: dict[str, Any] = {
        "method": recipe.get("method", "rtn"),
        "default": str(recipe["default"]),
        "rules": [[rule.pattern, str(rule.scheme)] for rule in recipe["rules"]],
    }
    if recipe.get("transforms"):
        data["transforms"] = list(recipe["transforms"])
    if activations := recipe.get("activations"):
        data["activations"] = {"mode": activations.mode, "observer": activations.observer}
    if recipe.get("options"):
        old = {name: other for other, name in OLD_OPTIONS.items()}
        data["options"] = {old.get(name, name): value for name, value in recipe["options"].items()}
    for name in ("training", "target"):
        if part := recipe.get(name):
            data[name] = dict(part)
    return data


def _graph_dict(recipe: Mapping[str, Any], options: GraphOptions) -> dict[str, Any]:
    """What the metadata of a quantized graph holds: all keys beside each other."""
    data: dict[str, Any] = {"weights": _graph_text(recipe["default"])}
    if activations := recipe.get("activations"):
        data["activations"] = activations.mode
        if activations.observer != "auto":
            data["observer"] = activations.observer
    given = {
        part.name: getattr(options, part.name)
        for part in fields(options)
        if getattr(options, part.name) != part.default
    }
    for name, value in given.items():
        key = "equalise" if name == "equalize" else name
        data[key] = _graph_text(value) if name in _SCHEMES else value
    if recipe["rules"]:
        data["rules"] = [[rule.pattern, _graph_text(rule.scheme)] for rule in recipe["rules"]]
    order = ("weights", "activations", "observer", "scope", "outer", "tables", "rules",
             "equalise", "bias_correction", "mixed", "mixed_keep", "rest")  # fmt: skip
    return {key: data[key] for key in order if key in data}


def _graph_text(scheme: Scheme) -> str:
    """The text form in a graph's metadata, where float16 is called fp16."""
    return "fp16" if scheme == FloatScheme("float16") else str(scheme)


def kind_of(data: Mapping[str, Any]) -> SourceKind:
    """What a recipe is for, by its keys."""
    ours = {"weights", "observer", "graph", "equalise", *_GRAPH_OPTIONS}
    return "graph" if ours & set(data) else "decoder"


def completed_fields(data: Mapping[str, Any], source: SourceKind) -> dict[str, Any]:
    """The fields of a recipe from what a file or preset says, and what it leaves unsaid.

    Raises:
        FormatError, SchemeError: as `recipe_fields`.
    """
    own = dict(data)
    if "preset" in own and "default" in own:
        raise FormatError("give either preset or default, which each say the weights' scheme")
    base = None
    if "preset" in own:
        try:
            base = named_fields(_text(own.pop("preset")), source)
        except TypeError as err:
            raise FormatError(f"preset: {err}") from err
    if source == "graph":
        return _graph_fields({**(dict_of_fields(base) if base else {}), **_flat(own)})
    own.pop("graph", None)
    return _completed_decoder(own, base)


def _completed_decoder(own: dict[str, Any], base: dict[str, Any] | None) -> dict[str, Any]:
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
    known = dict_of_fields(base)
    if own.get("method", known["method"]) != known["method"]:
        known.pop("options", None)  # which are the other method's
    patterns = [rule[0] for rule in rules if isinstance(rule, list) and rule]
    missing = [rule for rule in known["rules"] if rule[0] not in patterns]
    return _decoder_fields({**known, **own, "rules": [*rules, *missing]})


def _for_decoder(scheme: Scheme) -> dict[str, Any]:
    """Every matrix in a scheme, embedding and head with 8 bits at least."""
    outer: Scheme = BY_BITS[8]
    if isinstance(scheme, FloatScheme) or scheme.bits == 8:
        outer = scheme
    return {"rules": (Rule(OUTER, outer),), "default": scheme}


def _decoder_fields(data: Mapping[str, Any]) -> dict[str, Any]:
    if surplus := sorted(set(data) - set(_DECODER_KEYS)):
        raise FormatError(unknown("key of a recipe", surplus[0], _DECODER_KEYS))
    return {
        "rules": tuple(Rule(pattern, parse_scheme(text)) for pattern, text in data["rules"]),
        "default": parse_scheme(data["default"]),
        "method": _text(data["method"]),
        "transforms": tuple(map(_text, data.get("transforms", ()))),
        "activations": _activations(data, "minmax"),
        "options": dict(data.get("options") or {}),
        "training": dict(data["training"]) if data.get("training") else None,
        "target": dict(data["target"]) if data.get("target") else None,
    }


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


def _graph_fields(data: Mapping[str, Any]) -> dict[str, Any]:
    flat = _flat(data)
    if surplus := sorted(set(flat) - {*_GRAPH_KEYS, "equalise"}):
        if surplus[0] in _DECODER_KEYS:
            raise FormatError(f"{surplus[0]} is for decoders; leave it out of a graph's recipe")
        raise FormatError(unknown("key of a graph's recipe", surplus[0], _GRAPH_KEYS))
    if "weights" not in flat:
        raise FormatError('the recipe does not say weights; write weights = "w8-channel"')
    options = {name: flat[name] for name in _GRAPH_OPTIONS if name in flat}
    if "equalise" in flat:
        options["equalize"] = flat["equalise"]
    for name in _SCHEMES:
        if options.get(name) is not None:
            options[name] = _graph_scheme(options[name])
    default = _graph_scheme(flat["weights"])
    if "method" in flat:
        default = scheme_with_method(default, _text(flat["method"]))
    return {
        "rules": tuple(
            Rule(_text(pattern), _graph_scheme(scheme)) for pattern, scheme in flat.get("rules", ())
        ),
        "default": default,
        "activations": _activations(flat, "auto"),
        "graph": GraphOptions(**options),
    }


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
