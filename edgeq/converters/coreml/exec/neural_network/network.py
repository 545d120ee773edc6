"""Runs Core ML's older NeuralNetwork format, layer by layer; the layers are in `layers`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.coreml.exec.neural_network.features import class_labels, classified
from edgeq.converters.coreml.exec.neural_network.layers import LAYERS
from edgeq.core.errors import EdgeqError, UnsupportedError

Array = NDArray[Any]
KINDS = ("neuralNetwork", "neuralNetworkClassifier", "neuralNetworkRegressor")


def _network(spec: Any) -> Any:
    return getattr(spec, spec.WhichOneof("Type"))


def layer_counts(spec: Any) -> Counter[str]:
    """Layer type -> how many there are."""
    return Counter(str(layer.WhichOneof("layer")) for layer in _network(spec).layers)


def unsupported(spec: Any) -> list[tuple[str, str]]:
    """(type, name) of each layer that cannot be executed."""
    return [
        (str(layer.WhichOneof("layer")), layer.name)
        for layer in _network(spec).layers
        if layer.WhichOneof("layer") not in LAYERS
    ]


def run(spec: Any, features: Mapping[str, Any]) -> dict[str, Any]:
    """Run a network.

    Args:
        spec: the model's message.
        features: by name; images are arrays [C, H, W].

    Returns:
        the outputs that the description names.

    Raises:
        UnsupportedError: a layer that cannot be executed; names it.
    """
    network = _network(spec)
    if bad := unsupported(spec):
        kinds = sorted({kind for kind, _ in bad})
        raise UnsupportedError(
            f"the layer {bad[0][1]!r} of type {bad[0][0]} cannot be executed; "
            f"not supported here: {', '.join(kinds)}"
        )
    values = dict(_inputs(spec, network, features))
    for layer in network.layers:
        kind = str(layer.WhichOneof("layer"))
        inputs = [values[name] for name in layer.input]
        try:
            with np.errstate(all="ignore"):  # infinities and NaN are results, as on a device
                outputs = LAYERS[kind](getattr(layer, kind), inputs)
        except EdgeqError as err:
            raise type(err)(f"layer {layer.name!r} of type {kind}: {err}") from err
        except (ValueError, IndexError, TypeError, KeyError) as err:
            shapes = [list(a.shape) for a in inputs]
            raise UnsupportedError(
                f"layer {layer.name!r} of type {kind} failed on {shapes}: {err}"
            ) from err
        results = outputs if isinstance(outputs, tuple) else (outputs,)
        for name, value in zip(layer.output, results, strict=False):
            values[name] = np.asarray(value, np.float32)
    return _outputs(spec, network, values)


def _inputs(spec: Any, network: Any, features: Mapping[str, Any]) -> Iterator[tuple[str, Array]]:
    prepare = {p.featureName: p for p in network.preprocessing}
    for item in spec.description.input:
        x = np.asarray(features[item.name], np.float32)
        image = item.type.WhichOneof("Type") == "imageType"
        if (image and item.name in prepare) or (image and len(prepare) == 1 and "" in prepare):
            x = _prepared(prepare.get(item.name) or prepare[""], x)
        if image:
            x = x.reshape(1, 1, *x.shape) if network.imageInputShapeMapping == 0 else x[None]
        elif network.arrayInputShapeMapping == 0:
            x = _rank5(x)
        yield item.name, x


def _rank5(x: Array) -> Array:
    """[C] or [C, H, W] as [S, B, C, H, W]."""
    if x.ndim == 1:
        return x.reshape(1, 1, -1, 1, 1)
    if x.ndim == 2:  # a sequence of vectors
        return x.reshape(x.shape[0], 1, x.shape[1], 1, 1)
    return x.reshape((1,) * (5 - x.ndim) + x.shape)


def _prepared(p: Any, x: Array) -> Array:
    """Scaled and shifted, channel by channel, or less a mean image."""
    if p.WhichOneof("preprocessor") == "meanImage":
        return x - np.array(p.meanImage.meanImage, np.float32).reshape(x.shape)
    s = p.scaler
    gray = x.shape[0] == 1
    bias = [s.grayBias] if gray else [s.redBias, s.greenBias, s.blueBias]
    return x * np.float32(s.channelScale) + np.array(bias, np.float32).reshape(-1, 1, 1)


def _outputs(spec: Any, network: Any, values: Mapping[str, Array]) -> dict[str, Any]:
    labels = class_labels(network) if spec.WhichOneof("Type") == KINDS[1] else None
    outputs: dict[str, Any] = {}
    if labels is not None:
        # probabilities are what the last layer gives, unless a layer is named
        name = network.labelProbabilityLayerName or network.layers[-1].output[0]
        outputs.update(classified(spec, labels, values[name]))
    for item in spec.description.output:
        if item.name in outputs or item.name not in values:
            continue
        value = values[item.name]
        shape = list(item.type.multiArrayType.shape)
        if shape and value.size == np.prod(shape):
            value = value.reshape(shape)
        elif network.arrayInputShapeMapping == 0 and value.ndim == 5:
            value = _unranked(value)
        outputs[item.name] = value
    return outputs


def _unranked(x: Array) -> Array:
    """Remove the sequence and batch axes if they are 1, and height and width if both are."""
    leading = [d for d in x.shape[:2] if d > 1]
    tail = list(x.shape[2:])
    return x.reshape(leading + (tail[:1] if tail[1:] == [1, 1] else tail))
