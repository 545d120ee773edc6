"""Quantize a float graph by a recipe, step by step.

own constants   copy a weight or bias that nodes share if the nodes round it differently
equalize        equalize the ranges of channels, see `edgeq.quant.graph.equalize`
calibrate       choose the values to round (`plan_integers`) and measure their ranges
weights         round the weights, by GPTQ if the recipe says so
assemble        replace floats by integers, activation parameters and int32 biases
correct         subtract mean errors from the biases
mixed           give the layers with the largest loss more bits, and repeat the steps for them
store           convert the remaining float constants to the type of the recipe
check           check that all weights that the recipe names are integers
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from edgeq.core.errors import SchemeError, UsageError
from edgeq.core.progress import Progress
from edgeq.formats.schemes import FloatScheme, QuantScheme, Scheme
from edgeq.graph.feeds import RunGraph
from edgeq.graph.finite import check_finite_weights
from edgeq.graph.ir import Constant, Graph, Node, QuantWeight
from edgeq.graph.operators import LAYERS, is_depthwise
from edgeq.quant.graph.bias import correct_biases
from edgeq.quant.graph.calibrate import ranges
from edgeq.quant.graph.choices import choices, float_nodes, own_constants
from edgeq.quant.graph.equalize import equalize, replace_unmet_clips, uneven
from edgeq.quant.graph.float_precision import hidden_terms
from edgeq.quant.graph.functions import functions_behind
from edgeq.quant.graph.hessians import Array, hessians, weight_name
from edgeq.quant.graph.integer_plan import (
    IntegerPlan,
    Scope,
    activation_behind,
    activation_params,
    data_inputs,
    plan_integers,
    rounded_constant,
    scope_of,
)
from edgeq.quant.graph.recipe import check_rules, options_of
from edgeq.quant.graph.sample_warnings import sample_warnings
from edgeq.quant.graph.samples import LEAST, Samples
from edgeq.quant.graph.sensitivity import keep_float, sensitivity
from edgeq.quant.graph.smooth import smooth
from edgeq.quant.graph.stored_samples import stored_samples_entry
from edgeq.quant.graph.summary import (
    Agreement,
    GraphSummary,
    arena_bytes,
    compare,
    constants_bytes,
    operator_rows,
    with_sqnr,
)
from edgeq.quant.graph.weights import (
    int_bias,
    needs_hessian,
    round_weight,
    weight_nodes,
    with_room,
)
from edgeq.quant.histogram import Range
from edgeq.quant.recipe import Recipe

META_RECIPE, META_ACTIVATIONS = "edgeq.recipe", "edgeq.activations"
_MEASURED = 8
"""Number of samples on which the error of each operator is measured."""
_PROBED = 32
"""Number of samples on which the sensitivity of each layer is measured."""
_COMPARED = 64
"""Number of samples on which the outputs are compared."""


def quantize_graph(
    graph: Graph,
    recipe: Recipe,
    samples: Samples | None = None,
    *,
    threads: int = 1,
    progress: Progress | None = None,
) -> GraphSummary:
    """Quantize a graph.

    Args:
        graph: a canonical float graph.
        recipe: schemes of weights and activations.
        samples: inputs from which ranges and second moments are measured. Recipes that need no
            samples only measure the loss on them.
        threads: number of threads of onnxruntime.
        progress: called with the step, how much of it is done, and of how much (or 0).

    Returns:
        the quantized graph and measurements of it.

    Raises:
        UsageError: the graph is quantized already, or samples are missing or too few.
        SchemeError: the recipe does not fit the graph, or fewer weights would be integers than the
            recipe asks for.
        FormatError: a weight is NaN, or a sample or a value is not finite.
    """
    started = time.perf_counter()
    options = options_of(recipe)
    _check(graph, recipe, samples)
    quantizer = _GraphQuantizer(own_constants(graph, recipe), recipe, samples, threads, progress)
    schemes = choices(quantizer.graph, recipe)
    quantized = quantizer.quantize(schemes)
    kept: tuple[str, ...] = ()
    if options.mixed is not None:
        kept = quantizer.most_sensitive(quantized, schemes)
        schemes |= dict.fromkeys(kept, options.mixed_keep)
        quantized = quantizer.quantize(schemes)
    quantized = _stored(quantized, recipe, schemes)
    check_packed(quantized, schemes)
    meta = {**graph.meta, **_meta(recipe, samples)}
    if samples is not None:
        meta |= stored_samples_entry(quantized, samples)
    quantized = replace(quantized, meta=meta)
    rows = operator_rows(quantized)
    agreement = None
    if samples is not None:
        open_session = quantizer.session_of
        rows = with_sqnr(rows, quantizer.graph, quantized, samples.first(_MEASURED), open_session)
        agreement = compare(graph, quantized, samples.first(_COMPARED), open_session)
    float_bytes, _ = constants_bytes(graph)
    return GraphSummary(
        quantized,
        recipe,
        rows,
        float_bytes,
        constants_bytes(quantized)[1],
        arena_bytes(graph),
        arena_bytes(quantized),
        kept,
        agreement,
        time.perf_counter() - started,
        () if samples is None else _warnings(graph, samples, quantizer, agreement),
    )


ALIKE = 1e-4
"""Fraction of the outputs' power that differs between samples, below which the outputs count as
equal."""


def _warnings(
    graph: Graph, samples: Samples, quantizer: _GraphQuantizer, agreement: Agreement | None
) -> tuple[str, ...]:
    """Warnings about doubtful samples, and about measurements that say little because of them."""
    warnings = list(sample_warnings(graph, samples, quantizer.session_of))
    if agreement is not None and agreement.undefined:
        warnings.append(
            f"{agreement.undefined:.1%} of the outputs of the float model itself are NaN or "
            "infinite on the samples, and are left out of the figures below; check that the "
            "samples are prepared as in training (scale, mean, type)"
        )
    if agreement is None or agreement.samples < 2:
        return tuple(warnings)
    if agreement.varied < ALIKE:
        warnings.append(
            "the float model gives nearly the same outputs for all samples "
            f"({agreement.varied:.1g} of their power differs), so the agreement of the outputs "
            "says little; calibrate on inputs that the model tells apart"
        )
    elif agreement.classes == 1:
        warnings.append(
            "the float model gives every sample the same top class, so the agreement of the top "
            "class says nothing; calibrate on samples of several classes"
        )
    return tuple(warnings)


@dataclass
class _GraphQuantizer:
    """One quantization, with the ranges, second moments and weights it has computed so far."""

    graph: Graph
    recipe: Recipe
    samples: Samples | None
    threads: int
    progress: Progress | None
    ranges: dict[str, Range] = field(default_factory=dict)
    moments: dict[str, Array] = field(default_factory=dict)
    rounded: dict[tuple[str, Scheme, float | None], QuantWeight] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.options = options_of(self.recipe)
        wanted = self.options.equalize
        if wanted is None:
            wanted = bool(self.recipe.weight_schemes) and (
                any(is_depthwise(self.graph, node) for node in weight_nodes(self.graph))
                or uneven(self.graph)
            )
        if wanted:
            if self.samples is not None:
                self.graph = replace_unmet_clips(
                    self.graph, self.samples,
                    session_of=self.session_of, progress=self.progress,
                )  # fmt: skip
            self.graph = equalize(self.graph)
        if self._static() and self._scope() == "layers":
            assert self.samples is not None
            self.graph = smooth(
                self.graph, self.samples, session_of=self.session_of, progress=self.progress
            )

    def session_of(self, graph: Graph, watch: Sequence[str]) -> RunGraph:
        """Open a session of onnxruntime."""
        from edgeq.graph.execute import Session

        return Session(graph, watch, self.threads)

    def quantize(self, picked: Mapping[str, Scheme]) -> Graph:
        """Quantize the graph.

        Args:
            picked: name of a node -> the scheme of its weight.
        """
        schemes = {name: c for name, c in picked.items() if isinstance(c, QuantScheme)}
        nodes = [node for node in weight_nodes(self.graph) if node.name in schemes]
        plan, ratios = None, {}
        if self._static():
            plan = self._plan(schemes)
            ratios = step_ratios(self.graph, plan, self.ranges)
        weights = self._weights(nodes, schemes, ratios)
        graph = assemble(self.graph, weights, plan, self.ranges)
        if self.options.bias_correction and self._scope() == "all":
            assert self.samples is not None
            graph = correct_biases(
                self.graph, graph, self.samples, session_of=self.session_of,
                functions=functions_behind(self.graph, plan.groups) if plan else None,
                progress=self.progress,
            )  # fmt: skip
        return graph

    def most_sensitive(self, made: Graph, picked: Mapping[str, Scheme]) -> tuple[str, ...]:
        """Names of the nodes that get the scheme ``mixed_keep``.

        Args:
            made: the quantized graph without such nodes.
            picked: name of a node -> the scheme of its weight.
        """
        assert self.samples is not None
        assert self.options.mixed is not None
        rows = sensitivity(
            self.graph, made, self.samples.first(_PROBED),
            session_of=self.session_of, progress=self.progress,
        )  # fmt: skip
        keep = self.options.mixed_keep
        gains = {
            name
            for name, choice in picked.items()
            if isinstance(choice, QuantScheme)
            and (isinstance(keep, FloatScheme) or choice.bits < keep.bits)
        }
        kept = keep_float([row for row in rows if row.node in gains], self.options.mixed)
        return tuple(name for name in picked if name in kept)

    def _static(self) -> bool:
        return self.recipe.activations is not None and self.recipe.activations.mode == "static"

    def _scope(self) -> Scope:
        return scope_of(self.graph) if self.options.scope == "auto" else self.options.scope

    def _observer(self) -> str:
        activations = self.recipe.activations
        if activations is not None and activations.observer != "auto":
            return activations.observer
        return "mse" if self._scope() == "all" else "minmax"

    def _plan(self, packed: Mapping[str, QuantScheme]) -> IntegerPlan:
        """Plan which values are rounded, and measure the ranges that are still missing."""
        assert self.samples is not None
        floats = set(float_nodes(self.graph, self.recipe))
        while True:
            chosen = plan_integers(self.graph, self._scope(), packed, floats)
            new = [name for name in chosen.sources if name not in self.ranges]
            if new:
                self.ranges |= ranges(
                    self.graph, new, self.samples,
                    session_of=self.session_of, observer=self._observer(),
                    functions=functions_behind(self.graph, chosen.groups), progress=self.progress,
                )  # fmt: skip
            known = {value: self.ranges[source] for value, source in _observed(chosen)}
            hidden = hidden_terms(self.graph, known) & chosen.integer
            if not hidden:
                return chosen
            floats |= hidden

    def _weights(
        self,
        nodes: list[Node],
        schemes: Mapping[str, QuantScheme],
        ratios: Mapping[str, float],
    ) -> dict[str, QuantWeight]:
        """Round the weights that are not rounded yet, and return all: constant -> weight."""
        keys = {node.name: (node.name, schemes[node.name], ratios.get(node.name)) for node in nodes}
        new = [node for node in nodes if keys[node.name] not in self.rounded]
        wanted = [
            node
            for node in new
            if node.name not in self.moments
            and needs_hessian(node, schemes[node.name])
            and (self.samples is not None or schemes[node.name].method == "gptq")
        ]
        if wanted:
            assert self.samples is not None
            self.moments |= hessians(
                self.graph, wanted, self.samples,
                session_of=self.session_of, progress=self.progress,
            )  # fmt: skip
        for i, node in enumerate(new):
            if self.progress is not None:
                self.progress("rounding weights", i, len(new))
            scheme = schemes[node.name]
            w = self.graph.array(weight_name(node))
            hessian = self.moments.get(node.name)
            weight = round_weight(w, node, scheme, hessian, ratios.get(node.name))
            self.rounded[keys[node.name]] = weight
        return {weight_name(node): self.rounded[keys[node.name]] for node in nodes}


def _observed(plan: IntegerPlan) -> list[tuple[str, str]]:
    """Values of a plan with a measured range, each with the value on which it was measured."""
    own = {group: value for value, group in reversed(list(plan.sources.items()))}
    return [
        (value, value if value in plan.sources else own[group])
        for value, group in plan.groups.items()
        if value in plan.sources or group in own
    ]


def step_ratios(graph: Graph, plan: IntegerPlan, seen: Mapping[str, Range]) -> dict[str, float]:
    """The output scale divided by the input scale, for layers that compute on integers.

    Layers that share a weight are left out, because the weight has one scale and the ratios differ.

    Args:
        graph: the float graph.
        plan: the values that are rounded.
        seen: the range of each source of ``plan``.

    Returns:
        name of a layer -> the ratio.
    """
    quants, ratios = activation_params(plan, seen), {}
    for node in graph.nodes:
        if node.name not in plan.integer or node.op not in LAYERS:
            continue
        joined = activation_behind(graph, node)
        out = joined.output if node.output not in quants and joined else node.output
        if out in quants and len(graph.consumers[weight_name(node)]) == 1:
            ratios[node.name] = quants[out].scale / quants[node.inputs[0]].scale
    return ratios


def assemble(
    graph: Graph,
    weights: Mapping[str, QuantWeight],
    plan: IntegerPlan | None,
    seen: Mapping[str, Range],
) -> Graph:
    """Replace float constants of a graph by integers, and add the parameters of activations.

    Args:
        graph: the float graph.
        weights: name of a constant -> the rounded weight.
        plan: the values that are rounded; None if activations stay float.
        seen: the range of each source of ``plan``.
    """
    constants: dict[str, Constant] = {**graph.constants, **weights}
    if plan is None:
        return replace(graph, constants=constants)
    quants = activation_params(plan, seen)
    nodes = []
    places: dict[str, list[int]] = {}
    for name, place in plan.constants:
        places.setdefault(name, []).append(place)
    for node in graph.nodes:
        inputs = list(node.inputs)
        for place in places.get(node.name, ()):
            own = f"{inputs[place]}.int8"
            constants[own] = rounded_constant(graph.array(inputs[place]))
            inputs[place] = own
        if node.name in plan.integer and node.op in LAYERS and _bias(node):
            scale = quants[data_inputs(node)[0]].scale
            name, b = weight_name(node), graph.array(_bias(node))
            constant = constants[name]
            assert isinstance(constant, QuantWeight)
            constants[name] = constant = with_room(b, scale, constant)
            constants[_bias(node)] = int_bias(b, scale, constant, _bias(node))
        nodes.append(replace(node, inputs=tuple(inputs)))
    used = {name for node in nodes for name in node.inputs} | set(graph.outputs)
    kept = {name: constant for name, constant in constants.items() if name in used}
    return replace(graph, nodes=tuple(nodes), constants=kept, quants=quants)


def _bias(node: Node) -> str:
    return node.inputs[2] if len(node.inputs) > 2 else ""


def _check(graph: Graph, recipe: Recipe, samples: Samples | None) -> None:
    if graph.quants or any(isinstance(c, QuantWeight) for c in graph.constants.values()):
        raise UsageError(
            f"the graph {graph.name} is quantized already; give the float model it was made from"
        )
    check_rules(recipe, graph.nodes)
    if recipe.weight_schemes and not weight_nodes(graph):
        raise SchemeError(
            f"the graph {graph.name} has no weights to quantize: no Conv, ConvTranspose, Linear or "
            "Gather with a float constant; give another model"
        )
    check_finite_weights(graph)
    if samples is None:
        if recipe.needs:
            raise UsageError(
                "the recipe needs calibration samples; give a folder, an .npz file or "
                "script.py:function with --calib, or a recipe that needs none (w8-dynamic, w4-g32)"
            )
        return
    if recipe.needs:
        count = samples.first(LEAST).count()
        if count < LEAST:
            raise UsageError(
                f"{samples.source} has {count} samples; give at least {LEAST}, better some hundred"
            )


def _stored(graph: Graph, recipe: Recipe, picked: Mapping[str, Scheme]) -> Graph:
    """Convert float constants to float16 if the recipe says so."""
    rest, half_type = options_of(recipe).rest, FloatScheme("float16")
    half = {node.name for node in graph.nodes if picked.get(node.name, rest) == half_type}
    constants = dict(graph.constants)
    for node in graph.nodes:
        for name in node.inputs:
            constant = constants.get(name)
            if (
                isinstance(constant, np.ndarray)
                and constant.dtype == np.float32
                and node.name in half
            ):
                constants[name] = _halved(constant)
    return replace(graph, constants=constants)


def _halved(x: np.ndarray) -> np.ndarray:
    """Convert an array to float16 if its range fits; small arrays stay float32."""
    most, half = float(np.abs(x).max(initial=0)), np.finfo(np.float16)
    if x.size < _FEW or most > float(half.max) or 0 < most < float(half.tiny):
        return x
    return x.astype(np.float16)


_FEW = 16


def check_packed(graph: Graph, picked: Mapping[str, Scheme]) -> None:
    """Refuse a graph in which fewer weights are integers than the recipe asks for.

    Args:
        graph: the quantized graph.
        picked: name of a node -> the scheme that its weight should have.

    Raises:
        SchemeError: a weight has another scheme; the message names the nodes.
    """
    short = []
    for node in graph.nodes:
        choice = picked.get(node.name)
        if not isinstance(choice, QuantScheme):
            continue
        weight = graph.constants[weight_name(node)]
        if not isinstance(weight, QuantWeight) or weight.bits != choice.bits:
            short.append(str(node))
    if short:
        raise SchemeError(
            f"{len(short)} weights are not packed as the recipe asked for: {', '.join(short[:5])}"
        )


def _meta(recipe: Recipe, samples: Samples | None) -> dict[str, str]:
    meta = {
        META_RECIPE: json.dumps(recipe.to_dict()),
        META_ACTIVATIONS: recipe.activations.mode if recipe.activations else "float",
    }
    if samples is None or not samples.pictures:
        return meta  # arrays are inputs already; how they were preprocessed is not known
    return meta | samples.preprocess.to_meta()
