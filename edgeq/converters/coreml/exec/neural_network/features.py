"""Core ML's models of tables and features: linear, trees, and what prepares their inputs.

Each takes the features its description names, and gives those it names. Together with networks
they are the stages of a pipeline.

Source: mlmodel/format/*.proto in github.com/apple/coremltools.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import UnsupportedError

Array = NDArray[Any]
Model = Callable[[Any, Mapping[str, Any]], dict[str, Any]]
"""(the model's message, features by name) -> features by name"""


def class_labels(params: Any) -> list[Any] | None:
    """Labels of a classifier, or None if it has none."""
    which = params.WhichOneof("ClassLabels")
    return list(getattr(params, which).vector) if which else None


def classified(spec: Any, labels: list[Any], values: Array) -> dict[str, Any]:
    """The best label, and every label's value, under the names the model gives them."""
    description = spec.description
    flat = np.asarray(values, np.float64).reshape(-1)
    if flat.size != len(labels):
        raise UnsupportedError(f"{flat.size} values for {len(labels)} class labels")
    outputs: dict[str, Any] = {description.predictedFeatureName: labels[int(flat.argmax())]}
    if description.predictedProbabilitiesName:
        outputs[description.predictedProbabilitiesName] = {
            label: float(v) for label, v in zip(labels, flat, strict=True)
        }
    return outputs


def _vector(spec: Any, features: Mapping[str, Any]) -> Array:
    """Concatenate all input features into one vector."""
    parts = [np.asarray(features[i.name], np.float64).reshape(-1) for i in spec.description.input]
    return np.concatenate(parts)


def _one(spec: Any, value: Any) -> dict[str, Any]:
    return {spec.description.output[0].name: value}


def _logistic(x: Array) -> Array:
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x))


def _probit(x: Array) -> Array:
    from math import erf, sqrt

    return np.array([0.5 * (1 + erf(v / sqrt(2))) for v in x])


def _linear(params: Any, x: Array) -> Array:
    rows = np.array([list(w.value) for w in params.weights], np.float64)
    return rows @ x + np.array(params.offset, np.float64)


def _glm_regressor(spec: Any, features: Mapping[str, Any]) -> dict[str, Any]:
    params = spec.glmRegressor
    y = _linear(params, _vector(spec, features))
    y = (lambda v: v, _logistic, _probit)[params.postEvaluationTransform](y)
    return _one(spec, float(y[0]) if y.size == 1 else y)


def _glm_classifier(spec: Any, features: Mapping[str, Any]) -> dict[str, Any]:
    params = spec.glmClassifier
    scores = _linear(params, _vector(spec, features))
    values = (_logistic, _probit)[params.postEvaluationTransform](scores)
    labels = class_labels(params) or []
    if len(labels) == 2 and values.size == 1:
        values = np.array([1 - values[0], values[0]])
    elif params.classEncoding == params.ReferenceClass:
        odds = np.concatenate([[1.0], np.exp(scores)])
        values = odds / odds.sum()
    else:
        values = values / values.sum()  # one against the rest
    return classified(spec, labels, values)


def _dict_vectorizer(spec: Any, features: Mapping[str, Any]) -> dict[str, Any]:
    params = spec.dictVectorizer
    names = list(getattr(params, params.WhichOneof("Map")).vector)
    words = features[spec.description.input[0].name]
    place = {name: i for i, name in enumerate(names)}
    kind = spec.description.output[0].type.WhichOneof("Type")
    if kind == "dictionaryType":
        return _one(spec, {place[k]: float(v) for k, v in words.items() if k in place})
    out = np.zeros(len(names))
    for key, value in words.items():
        if key in place:
            out[place[key]] = value
    return _one(spec, out)


def _feature_vectorizer(spec: Any, features: Mapping[str, Any]) -> dict[str, Any]:
    parts = []
    for column in spec.featureVectorizer.inputList:
        value = features[column.inputColumn]
        if isinstance(value, Mapping):  # a sparse vector
            row = np.zeros(column.inputDimensions)
            for at, number in value.items():
                row[int(at)] = number
            value = row
        parts.append(np.asarray(value, np.float64).reshape(-1))
    return _one(spec, np.concatenate(parts))


def _scaler(spec: Any, features: Mapping[str, Any]) -> dict[str, Any]:
    params = spec.scaler
    x = np.asarray(features[spec.description.input[0].name], np.float64)
    shift = np.array(params.shiftValue) if len(params.shiftValue) else 0.0
    scale = np.array(params.scaleValue) if len(params.scaleValue) else 1.0
    return _one(spec, (x + shift) * scale)


def _normalizer(spec: Any, features: Mapping[str, Any]) -> dict[str, Any]:
    x = np.asarray(features[spec.description.input[0].name], np.float64)
    size = (np.abs(x).max(), np.abs(x).sum(), np.sqrt((x * x).sum()))[spec.normalizer.normType]
    return _one(spec, x / size if size else x)


def _imputer(spec: Any, features: Mapping[str, Any]) -> dict[str, Any]:
    params = spec.imputer
    value = features[spec.description.input[0].name]
    imputed = getattr(params, params.WhichOneof("ImputedValue"))
    imputed = np.array(imputed.vector) if hasattr(imputed, "vector") else imputed
    replaced = params.WhichOneof("ReplaceValue")
    marker = getattr(params, replaced) if replaced else float("nan")
    x = np.asarray(value)
    if x.dtype.kind in "US":
        return _one(spec, imputed if value == marker else value)
    x = x.astype(np.float64)
    missing = np.isnan(x) if marker != marker else x == marker
    return _one(spec, np.where(missing, imputed, x))


def _one_hot(spec: Any, features: Mapping[str, Any]) -> dict[str, Any]:
    params = spec.oneHotEncoder
    names = list(getattr(params, params.WhichOneof("CategoryType")).vector)
    value = features[spec.description.input[0].name]
    if value not in names:
        if params.handleUnknown == params.ErrorOnUnknown:
            raise UnsupportedError(f"the model knows no category {value!r}")
        return _one(spec, {} if params.outputSparse else np.zeros(len(names)))
    at = names.index(value)
    return _one(spec, {at: 1.0} if params.outputSparse else np.eye(len(names))[at])


def _extractor(spec: Any, features: Mapping[str, Any]) -> dict[str, Any]:
    x = np.asarray(features[spec.description.input[0].name]).reshape(-1)
    selected = x[np.array(spec.arrayFeatureExtractor.extractIndex, np.intp)]
    return _one(spec, selected.item() if selected.size == 1 else selected)


def _mapping(spec: Any, features: Mapping[str, Any]) -> dict[str, Any]:
    params = spec.categoricalMapping
    table = dict(getattr(params, params.WhichOneof("MappingType")).map)
    value = features[spec.description.input[0].name]
    unknown = params.WhichOneof("ValueOnUnknown")
    if value not in table and unknown is None:
        raise UnsupportedError(f"the model maps no {value!r}")
    return _one(spec, table.get(value, getattr(params, unknown) if unknown else None))


def _identity(spec: Any, features: Mapping[str, Any]) -> dict[str, Any]:
    names = (i.name for i in spec.description.input), (o.name for o in spec.description.output)
    return {out: features[into] for into, out in zip(*names, strict=True)}


# --- trees ------------------------------------------------------------------------------------


def _trees(params: Any, x: Array) -> Array:
    """The sum over all trees of what their leaves say, for each output."""
    total = np.array(params.basePredictionValue, np.float64)
    total = np.resize(total, params.numPredictionDimensions) if total.size else np.zeros(
        params.numPredictionDimensions
    )  # fmt: skip
    nodes = {(n.treeId, n.nodeId): n for n in params.nodes}
    children = {c for n in params.nodes for c in ((n.treeId, n.trueChildNodeId),
                                                 (n.treeId, n.falseChildNodeId))
                if n.nodeBehavior != n.LeafNode}  # fmt: skip
    for key in sorted(set(nodes) - children):
        node = nodes[key]
        while node.nodeBehavior != node.LeafNode:
            yes = _branch(node, float(x[node.branchFeatureIndex]))
            node = nodes[node.treeId, node.trueChildNodeId if yes else node.falseChildNodeId]
        for leaf in node.evaluationInfo:
            total[leaf.evaluationIndex] += leaf.evaluationValue
    return total


def _branch(node: Any, value: float) -> bool:
    if np.isnan(value):
        return bool(node.missingValueTracksTrueChild)
    limit = float(node.branchFeatureValue)
    matches = (
        value <= limit, value < limit, value >= limit, value > limit, value == limit,
        value != limit,
    )  # fmt: skip
    return matches[node.nodeBehavior]


def _transformed(kind: int, scores: Array) -> Array:
    if kind == 0:
        return scores
    if kind == 1:
        e = np.exp(scores - scores.max())
        return np.asarray(e / e.sum())
    if kind == 2:
        return _logistic(scores)
    odds = np.concatenate([[0.0], scores])
    e = np.exp(odds - odds.max())
    return np.asarray(e / e.sum())


def _tree_regressor(spec: Any, features: Mapping[str, Any]) -> dict[str, Any]:
    params = spec.treeEnsembleRegressor
    y = _trees(params.treeEnsemble, _vector(spec, features))
    y = _transformed(params.postEvaluationTransform, y)
    return _one(spec, float(y[0]) if y.size == 1 else y)


def _tree_classifier(spec: Any, features: Mapping[str, Any]) -> dict[str, Any]:
    params = spec.treeEnsembleClassifier
    y = _trees(params.treeEnsemble, _vector(spec, features))
    values = _transformed(params.postEvaluationTransform, y)
    labels = class_labels(params) or []
    if len(labels) == 2 and values.size == 1:
        values = np.array([1 - values[0], values[0]])
    return classified(spec, labels, values)


MODELS: dict[str, Model] = {
    "arrayFeatureExtractor": _extractor,
    "categoricalMapping": _mapping,
    "dictVectorizer": _dict_vectorizer,
    "featureVectorizer": _feature_vectorizer,
    "glmClassifier": _glm_classifier,
    "glmRegressor": _glm_regressor,
    "identity": _identity,
    "imputer": _imputer,
    "normalizer": _normalizer,
    "oneHotEncoder": _one_hot,
    "scaler": _scaler,
    "treeEnsembleClassifier": _tree_classifier,
    "treeEnsembleRegressor": _tree_regressor,
}
"""Type of model -> what it does."""
