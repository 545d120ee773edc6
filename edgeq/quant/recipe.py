"""How a model is quantized: which weights get which scheme, and by what means.

A recipe's rules are regular expressions with a scheme each; the first that matches somewhere in
a name wins, else the default holds. Names are those of tensors in a decoder and of nodes in a
graph. In a decoder, norms and biases are vectors: they stay floating point, F32 unless a rule asks
for another float type.

    transforms    equal rewritings of the float model, in this order            (decoders)
    target        bits per weight or bytes: rules are then solved for, between transforms and
                  method                                                        (decoders)
    method        how weights are rounded where their scheme does not say it
    training      what is learned after that                                    (decoders)
    activations   how inputs of matrices are rounded when the model runs, where that is not left
                  to the target
    graph         what concerns graphs alone, see `edgeq.quant.graph.options.GraphOptions`

`edgeq.quant.recipe_file` reads recipes from files and dictionaries.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any

from edgeq.core.errors import SchemeError, UsageError, check_type, unknown
from edgeq.formats.schemes import (
    BITS,
    BY_BITS,
    K_BLOCK,
    FloatScheme,
    QuantScheme,
    Scheme,
    parse_scheme,
)
from edgeq.model.block import ROUTER
from edgeq.quant.graph.options import (
    GraphOptions,
    check_graph_weights,
    scheme_with_method,
)
from edgeq.quant.presets import DEFAULTS, SourceKind
from edgeq.quant.recipe_file import (
    OLD_OPTIONS,
    completed_fields,
    dict_of_fields,
    kind_of,
    named_fields,
    read_recipe,
    readable,
    recipe_fields,
)
from edgeq.quant.rules import BUILT_IN, HEAD_GATES, Activations, Rule, check_rounded

VECTORS = FloatScheme("float32")
"""What norms and biases are kept in."""
OPTIONS: Mapping[str, tuple[type, ...]] = {
    "damping": (int, float),
    "act_order": (bool,),
    "use_quantized_inputs": (bool,),
    "relative_errors": (bool,),
    "calibrated_head": (bool,),
    "sensitive_layers": (str,),
    "block": (int,),
    "sweeps": (int,),
    "signed_scales": (bool,),
}
"""Options of methods and their types: those of `edgeq.quant.rounders.gptq.round_gptq`, and whether
the error of quantized inputs is compensated too (Qronos, GPTAQ), with errors of the residual stream
in parts of its size, and whether the head is rounded by its inputs: see
`edgeq.quant.decoder.calibrated`; and the scheme of ``down_proj`` in the layers where rounding it
costs the most: see `edgeq.quant.decoder.sensitive_layers`."""
TARGETS = ("bpw", "bytes")


@dataclass(frozen=True)
class Recipe:
    """How a model is quantized.

    Args:
        rules: the first that matches a tensor or node wins.
        default: the scheme of weights that no rule matches.
        method: how weights are rounded, a name of `edgeq.quant.METHODS`.
        transforms: names of `edgeq.quant.decoder.transforms.TRANSFORMS`, in order.
        activations: how the inputs of matrices are rounded; None leaves it to the target, and
            keeps them float in a graph.
        options: of the method, see `OPTIONS`.
        training: {"method": "distill"} and other fields of
            `edgeq.quant.training.TrainingSettings`; None for no training.
        target: {"bpw": bits per weight} or {"bytes": size of the file}: rules for matrices are
            solved for, and tried after the given ones; palettes are among them where the default
            is one.
        graph: what is said of graphs; None for a recipe for decoders.

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
    graph: GraphOptions | None = None

    def __post_init__(self) -> None:
        check_type("rules", self.rules, tuple, list)
        for rule in self.rules:
            check_type("a rule", rule, Rule)
        check_type("default", self.default, QuantScheme, FloatScheme)
        check_rounded(self.default)
        check_type("method", self.method, str)
        check_type("transforms", self.transforms, tuple, list)
        check_type("activations", self.activations, Activations, None)
        check_type("options", self.options, Mapping)
        check_type("training", self.training, Mapping, None)
        check_type("target", self.target, Mapping, None)
        check_type("graph", self.graph, GraphOptions, None)
        options = {OLD_OPTIONS.get(name, name): value for name, value in self.options.items()}
        object.__setattr__(self, "options", options)
        for name, value in options.items():
            if name not in OPTIONS:
                raise SchemeError(unknown("option", name, OPTIONS))
            if type(value) not in OPTIONS[name]:
                kinds = " or ".join(kind.__name__ for kind in OPTIONS[name])
                raise SchemeError(f"option {name} is {value!r}; it must be {kinds}")
            if name == "sensitive_layers" and not isinstance(parse_scheme(value), QuantScheme):
                raise SchemeError(f"option {name} is {value}; use a quantized scheme, as w6-g32")
        if self.training is not None:
            _check_training(self.training)
        if self.target is not None:
            _check_target(self.target)
        if self.graph is not None:
            _check_graph(self, self.graph)
        else:
            _check_decoder(self)

    @classmethod
    def named(cls, text: str, source: SourceKind = "decoder") -> Recipe:
        """The recipe of a preset's name or of a scheme's text form.

        Args:
            text: the name or the text form.
            source: what the recipe is for.

        Raises:
            SchemeError: it is neither.
        """
        return cls(**named_fields(text, source))

    @classmethod
    def from_options(
        cls,
        preset: str | None = None,
        bits: int | None = None,
        group: int | None = None,
        tensor_types: Iterable[str] = (),
        method: str | None = None,
        *,
        file: str | Path | None = None,
        observer: str | None = None,
        source: SourceKind = "decoder",
    ) -> Recipe:
        """A recipe from what a user says.

        Args:
            preset: a preset (`edgeq.quant.presets`), or any scheme in its text form; if nothing
                is said, w4-g32 for decoders and w8a8-static for graphs.
            bits: instead of a preset: the usual scheme of so many bits (decoders).
            group: weights per scale along K, with or without ``bits`` (4; decoders).
            tensor_types: rules as ``REGEX=SCHEME``, tried before the preset's own.
            method: instead of the preset's; for a graph, that of weights no rule is for.
            file: instead of a preset, see `from_file`.
            observer: of static activations, instead of the preset's.
            source: what the recipe is for.

        Raises:
            FormatError: the file cannot be read, or is no recipe.
            SchemeError: a text cannot be read, or bits or group is not possible.
            UsageError: two of preset, file, and bits or group are given, or a method for weights
                that stay float.

        Example:
            >>> str(Recipe.from_options(bits=3).default)
            'w3-g32'
        """
        check_type("preset", preset, str, None)
        check_type("bits", bits, int, None)
        check_type("group", group, int, None)
        check_type("tensor_types", tensor_types, Iterable)
        check_type("method", method, str, None)
        if isinstance(tensor_types, str):
            tensor_types = (tensor_types,)
        sized = bits is not None or group is not None
        if preset is not None and sized:
            raise UsageError(
                f"preset {preset} sets bits and group already; give either a preset or "
                "bits and group (a preset may be any scheme, such as w4-g64-asym)"
            )
        if file is not None and (preset is not None or sized):
            raise UsageError(
                "give either a preset or a recipe's file, which each say it all, not both"
            )
        if file is not None:
            base = cls.from_file(file, source)
        elif sized:
            base = cls.named(str(_scheme_of_size(bits, group)), source)
        else:
            base = cls.named(DEFAULTS[source] if preset is None else preset, source)
        rules = (Rule.parse(text, method=source == "graph") for text in tensor_types)
        base = replace(base, rules=(*rules, *base.rules))
        if method is not None:
            base = base.with_method(method)
        if observer is not None and base.activations is not None:
            base = replace(base, activations=replace(base.activations, observer=observer))
        return base

    @classmethod
    def from_file(cls, path: str | Path, source: SourceKind | None = None) -> Recipe:
        """Read a recipe from JSON or TOML, see `edgeq.quant.recipe_file`.

        Args:
            path: of the file; TOML ends in .toml.
            source: what the recipe is for; None for graphs if the file says something of graphs,
                else for decoders.

        Raises:
            FormatError: the file cannot be read, or is no recipe.
            SchemeError: a scheme, pattern or other part cannot be.
        """
        check_type("path", path, str, PathLike)
        data = read_recipe(Path(path))
        with readable(Path(path)):
            return cls(**completed_fields(data, source or kind_of(data)))

    def with_method(self, method: str) -> Recipe:
        """The recipe with another method for weights; in a graph, for those no rule is for.

        Args:
            method: of `edgeq.quant.METHODS`; for graphs of
                `edgeq.quant.graph.options.GRAPH_METHODS`.

        Raises:
            SchemeError: there is none of that name for graphs.
            UsageError: the weights of the graph stay float.
        """
        if self.graph is None:
            return self if method == self.method else replace(self, method=method, options={})
        return replace(self, default=scheme_with_method(self.default, method))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """Rebuild from `to_dict`.

        Raises:
            FormatError: something is missing, unknown or of another kind.
            SchemeError: a scheme or pattern cannot be read.
        """
        check_type("data", data, Mapping)
        with readable():
            return cls(**recipe_fields(data, kind_of(data)))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary, the inverse of `from_dict`; parts not used are left out."""
        return dict_of_fields(vars(self))

    def __repr__(self) -> str:
        parts = [str(self.default), self.method, *self.transforms]
        if self.activations:
            parts.append(f"{self.activations.mode} int8 activations")
        if self.target:
            parts += [f"{value:g} {name}" for name, value in self.target.items()]
        if self.training:
            parts.append(str(self.training.get("method")))
        if self.graph:
            parts.append("for graphs")
        rules = f"{len(self.rules)} rule{'' if len(self.rules) == 1 else 's'}"
        return f"<Recipe {', '.join(parts)}, {rules}>"

    @property
    def needs(self) -> frozenset[str]:
        """What must be given or learned before weights can be rounded.

        For decoders any of "importance" and "ranges", which saved statistics give as well, and
        "hessian", "transforms", "target" and "training", which take a text itself. For graphs
        "samples".
        """
        if self.graph is not None:
            return frozenset({"samples"} if self._needs_samples(self.graph) else ())
        from edgeq.quant.rounders.rounding import METHOD_INPUTS

        needs = {METHOD_INPUTS[self.method]} if self.method in METHOD_INPUTS else set()
        if self.activations is not None and self.activations.mode == "static":
            needs.add("ranges")
        parts = {
            "transforms": self.transforms, "target": self.target, "training": self.training,
        }  # fmt: skip
        return frozenset(needs | {name for name, part in parts.items() if part})

    def _needs_samples(self, options: GraphOptions) -> bool:
        return (
            (self.activations is not None and self.activations.mode == "static")
            or options.bias_correction
            or options.mixed is not None
            or any(scheme.method == "gptq" for scheme in self.weight_schemes)
        )

    @property
    def extra(self) -> str | None:
        """The extra that the recipe needs, as in ``pip install 'edgeq[train]'``."""
        return "train" if self.training else None

    @property
    def weight_schemes(self) -> tuple[QuantScheme, ...]:
        """All schemes that a weight of a graph may get."""
        schemes = [self.default, *(rule.scheme for rule in self.rules)]
        if (options := self.graph) is not None:
            schemes += [scheme for scheme in (options.outer, options.tables) if scheme is not None]
            if options.mixed is not None:
                schemes.append(options.mixed_keep)
        return tuple(scheme for scheme in schemes if isinstance(scheme, QuantScheme))

    def scheme_for(self, name: str, shape: Sequence[int]) -> Scheme:
        """The scheme of one tensor of a decoder; vectors are always floating point.

        A rule of a preset does not apply to a matrix whose rows are shorter than its groups. The
        projections to strengths and decays of gated delta nets have a row for each head, and stay
        float32 unless a rule asks for another scheme. So does the router of experts: a rounded one
        sends tokens to other experts.
        """
        if name.endswith(f".{ROUTER}.weight"):
            own = (rule.scheme for rule in self.rules if ROUTER.split(".")[-1] in rule.pattern)
            return next(own, self.default if isinstance(self.default, FloatScheme) else VECTORS)
        matching = (
            rule.scheme
            for rule in self.rules
            if rule.matches(name)
            and not (rule.pattern in BUILT_IN and _too_long(rule.scheme, shape))
        )
        if len(shape) == 2:
            small = re.search(HEAD_GATES, name) is not None
            return next(matching, VECTORS if small else self.default)
        return next((scheme for scheme in matching if isinstance(scheme, FloatScheme)), VECTORS)

    def assign(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Scheme]:
        """The scheme of every tensor of a decoder.

        Args:
            shapes: tensor name -> shape.

        Raises:
            SchemeError: a rule matches no tensor it could change, or a group is longer than
                the row it should divide.
        """
        for rule in self.rules:
            if rule.pattern not in BUILT_IN:
                _check_matches(rule, shapes)
        schemes = {name: self.scheme_for(name, shape) for name, shape in shapes.items()}
        for name, scheme in schemes.items():
            if isinstance(scheme, QuantScheme):
                _check_group(name, scheme, shapes[name])
        return schemes


def _scheme_of_size(bits: int | None, group: int | None) -> Scheme:
    wanted = 4 if bits is None else bits
    if wanted not in BY_BITS:
        raise SchemeError(f"bits is {bits}; use one of {', '.join(map(str, BITS))}")
    base = BY_BITS[wanted]
    return base if group is None else QuantScheme(wanted, base.symmetric, "group", group)


def _check_decoder(recipe: Recipe) -> None:
    for scheme in recipe.weight_schemes:
        if scheme.method is not None:
            raise SchemeError(
                f"{scheme} names a method, and all weights of a decoder are rounded by one; write "
                f"{scheme.stored}, and method = {scheme.method!r} in the recipe"
            )


def _check_graph(recipe: Recipe, options: GraphOptions) -> None:
    for part in ("transforms", "training", "target", "options"):
        if getattr(recipe, part):
            raise SchemeError(f"{part} is for decoders; leave it out of a recipe for graphs")
    for scheme in recipe.weight_schemes:
        check_graph_weights(scheme)
    floats = [rule.scheme for rule in recipe.rules]
    floats += [recipe.default, options.mixed_keep, options.rest]
    if FloatScheme("bfloat16") in floats:
        raise SchemeError("constants of a graph cannot be bf16; use f32 or f16 for float constants")
    if recipe.activations is None or recipe.activations.mode != "static":
        return
    if isinstance(recipe.default, FloatScheme):
        raise SchemeError(
            f"static activations need integer weights, and weights is {recipe.default}; "
            "write weights = 'w8-channel', say, or activations = 'float'"
        )
    grouped = [scheme for scheme in recipe.weight_schemes if scheme.granularity == "group"]
    if grouped:
        raise SchemeError(
            f"static activations take scales for a channel or tensor of weights, not "
            f"{grouped[0]}; use granularity channel or tensor"
        )


def _check_training(training: Mapping[str, Any]) -> None:
    from edgeq.quant.training.settings import TrainingSettings

    known = [setting.name for setting in fields(TrainingSettings)]
    for name in training:
        if name not in known:
            raise SchemeError(unknown("option of training", name, known))
    TrainingSettings(**training)


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


def _longest_group(k: int) -> int:
    """The longest group that a row of k weights is divided by."""
    return -(-k // K_BLOCK) * K_BLOCK


def _too_long(scheme: Scheme, shape: Sequence[int]) -> bool:
    """Whether the groups of a scheme are longer than a matrix's rows."""
    size = scheme.group_size if isinstance(scheme, QuantScheme) else None
    return size is not None and len(shape) == 2 and size > _longest_group(shape[1])


def _check_group(name: str, scheme: QuantScheme, shape: Sequence[int]) -> None:
    if not _too_long(scheme, shape):
        return
    k = shape[1]
    fits = [str(s) for s in (16, 32, 64, 128) if s <= _longest_group(k)]
    raise SchemeError(
        f"group_size {scheme.group_size} is longer than a row of {name} (K={k}); "
        f"use {', '.join(fits)} or a scale per channel (w{scheme.bits}-channel)"
    )
