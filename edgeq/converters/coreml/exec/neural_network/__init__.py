"""Core ML models that are no ML Programs: neural networks, pipelines, trees, linear models.

edgeq never writes such files. They are executed so that ``edgeq validate`` can run any Core ML file
once, other people's included; nothing of the validation of edgeq's own packages is here.

    network                  runs a neural network of the older format, layer by layer
    layers, layers_shape     its layers, each by the operators of ML Programs
    features                 linear models, trees, and what prepares their inputs
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from edgeq.converters.coreml.exec.neural_network import features, network
from edgeq.core.errors import UnsupportedError

PIPELINES = ("pipeline", "pipelineClassifier", "pipelineRegressor")


def run_spec(spec: Any, features_in: Mapping[str, Any]) -> dict[str, Any]:
    """Run a network, a model of features, or a pipeline of them."""
    kind = str(spec.WhichOneof("Type"))
    if kind in network.KINDS:
        return network.run(spec, features_in)
    if kind in features.MODELS:
        return features.MODELS[kind](spec, features_in)
    if kind not in PIPELINES:
        raise UnsupportedError(f"a model of type {kind} cannot be executed")
    values = dict(features_in)
    stages = _stages(spec)
    last: dict[str, Any] = {}
    for stage in stages:
        last = run_spec(stage, values)
        values.update(last)
    wanted = [item.name for item in spec.description.output]
    return {name: values[name] for name in wanted if name in values} or last


def _stages(spec: Any) -> list[Any]:
    pipeline = getattr(spec, spec.WhichOneof("Type"))
    return list((pipeline if hasattr(pipeline, "models") else pipeline.pipeline).models)


def parts(spec: Any) -> tuple[Counter[str], set[str]]:
    """Types of layers and models inside, and which of them cannot be executed."""
    kind = str(spec.WhichOneof("Type"))
    if kind in network.KINDS:
        return network.layer_counts(spec), {name for name, _ in network.unsupported(spec)}
    if kind in PIPELINES:
        counts: Counter[str] = Counter()
        missing: set[str] = set()
        for stage in _stages(spec):
            inner, absent = parts(stage)
            counts += inner
            missing |= absent
        return counts, missing
    return Counter([kind]), set() if kind in features.MODELS else {kind}


def vocabulary(spec: Any) -> list[Any]:
    """Words that the first stage of a pipeline knows."""
    kind = spec.WhichOneof("Type")
    if kind in PIPELINES:
        return next((w for s in _stages(spec) if (w := vocabulary(s))), [])
    field_ = {"dictVectorizer": "Map", "oneHotEncoder": "CategoryType"}.get(kind)
    if field_ is None:
        return []
    params = getattr(spec, kind)
    return list(getattr(params, params.WhichOneof(field_)).vector)
