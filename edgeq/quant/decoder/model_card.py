"""The model card of an artifact in the form of Hugging Face: a README.md with front matter."""

from __future__ import annotations

import json
import math
from typing import Any

from edgeq.core.markdown import table
from edgeq.formats.schemes import FLOAT_TAGS
from edgeq.formats.tensor import FloatTensor, QuantTensor, Tensor
from edgeq.importers.huggingface.families import FAMILIES
from edgeq.model.model import Model
from edgeq.quant.decoder.quality_report import QualityReport, figure
from edgeq.quant.decoder.source import type_counts


def model_card(model: Model, name: str) -> str:
    """The model card of an artifact, derived only from the artifact.

    Args:
        model: a model that was loaded from an artifact.
        name: the heading.

    Returns:
        Markdown that ends with a newline.

    Raises:
        FormatError: the quality report in the artifact is damaged.
    """
    source = model.provenance.get("source")
    parts = [
        _front_matter(model),
        f"# {name}",
        _lead(model, source),
        f'## Use\n\n```\nedgeq run {name} -p "Once upon a time"\nedgeq inspect {name}\n```',
        "## Quality",
        _quality(model),
        "## Tensors",
        _tensors(model),
    ]
    if origin := _origin(model):
        parts += ["## How it was made", origin]
    return "\n\n".join(parts) + "\n"


def n_weights(model: Model) -> int:
    """Number of weights of all tensors."""
    return sum(math.prod(tensor.shape) for tensor in model.tensors.values())


def _front_matter(model: Model) -> str:
    fields: dict[str, Any] = {"library_name": "edgeq", "pipeline_tag": "text-generation"}
    if source := model.provenance.get("source"):
        fields["base_model"] = source
        fields["base_model_relation"] = "quantized"
    family = model.config.family
    known = FAMILIES.get(family)
    tags = ["edgeq", "quantized", (known and known.hub_tag) or family]
    if scheme := _layers_held_as(model):
        tags.append(scheme)
    # JSON strings and lists are valid YAML
    lines = [f"{key}: {json.dumps(value)}" for key, value in {**fields, "tags": tags}.items()]
    return "\n".join(["---", *lines, "---"])


def _layers_held_as(model: Model) -> str | None:
    """The scheme of all quantized matrices of the layers; "mixed-precision" if they differ."""
    schemes = {
        str(tensor.scheme)
        for name, tensor in model.tensors.items()
        if isinstance(tensor, QuantTensor) and ".layers." in name
    }
    if len(schemes) > 1:
        return "mixed-precision"
    return schemes.pop() if schemes else None


def _lead(model: Model, source: Any) -> str:
    weights = n_weights(model)
    of = f" of {source}" if source else ""
    return (
        f"A quantization{of}: {weights / 1e6:.2f} million weights of the {model.config.family} "
        f"family in {model.nbytes / 1e6:.2f} MB, {8 * model.nbytes / weights:.2f} bits per weight "
        "with scales, embedding and norms counted."
    )


def _quality(model: Model) -> str:
    raw = model.provenance.get("quality")
    if raw is None:
        return "Not measured."
    quality = QualityReport.from_dict(raw)
    evaluation = quality.evaluation
    if evaluation is None:
        return f"Not measured: {quality.reason}."
    rows = [
        ("perplexity", figure(evaluation.base_ppl, 4), figure(evaluation.ppl, 4)),
        (
            "nats per token",
            figure(evaluation.base_nll_per_token, 4),
            figure(evaluation.nll_per_token, 4),
        ),
        ("KL divergence, mean, nats per token", "", figure(evaluation.kl_mean, 5)),
        ("KL divergence, 99th percentile", "", figure(evaluation.kl_p99, 5)),
        ("KL divergence, maximum", "", figure(evaluation.kl_max, 5)),
        ("same top token", "", f"{100 * (evaluation.top1_agreement or 0):.2f} %"),
        ("top token changed", "", f"{evaluation.flips}"),
        ("of those, right", f"{evaluation.flips_base_right}", f"{evaluation.flips_right}"),
    ]
    hidden = [
        ("embedding" if i == 0 else f"layer {i}", "equal" if db is None else f"{db:.1f}")
        for i, db in enumerate(quality.hidden_sqnr_db)
    ]
    return "\n\n".join(
        [
            table(["", "float", "quantized"], rows, "lrr"),
            f"Measured on {evaluation.n_tokens} tokens of {quality.text} "
            f"(sha256 `{quality.text_sha256}`): {evaluation.protocol}. Perplexities compare only "
            "at "
            "the same text, tokenizer and protocol.",
            "Signal to quantization noise of the hidden states:",
            table(["after", "dB"], hidden, "lr"),
        ]
    )


def _tensors(model: Model) -> str:
    kinds: dict[str, list[Tensor]] = {}
    for tensor in model.tensors.values():
        kinds.setdefault(_held_as(tensor), []).append(tensor)
    rows = []
    for kind, members in kinds.items():
        weights = sum(math.prod(t.shape) for t in members)
        nbytes = sum(t.nbytes for t in members)
        rows.append(
            (kind, f"{len(members)}", f"{weights}", f"{nbytes}", f"{8 * nbytes / weights:.2f}")
        )
    return table(["held as", "tensors", "weights", "bytes", "bits per weight"], rows, "lrrrr")


def _held_as(tensor: Tensor) -> str:
    if isinstance(tensor, QuantTensor):
        return str(tensor.scheme)
    return FLOAT_TAGS[tensor.dtype] if isinstance(tensor, FloatTensor) else "float"


def _origin(model: Model) -> str:
    facts = model.provenance
    rows = [
        (key.replace("_", " "), f"`{facts[key]}`")
        for key in ("source", "source_sha256", "edgeq_version")
        if facts.get(key)
    ]
    calibration = facts.get("calibration")
    if calibration:
        sampled = calibration.get("sampled", 0)
        words = f"{calibration['tokens'] - sampled} tokens of the text with sha256 "
        words += f"`{calibration['text_sha256']}`"
        if sampled:
            words += f", and {sampled} sampled from the model itself"
        rows.append(("calibrated with", words))
    parts = [table(["", ""], rows)] if rows else []
    if requantized := facts.get("requantized"):
        parts.append(
            f"The source was quantized already ({type_counts(requantized)}): the figures above "
            "are against its rounded weights."
        )
    if recipe := facts.get("recipe"):
        parts.append(f"```json\n{json.dumps(recipe, indent=2)}\n```")
    return "\n\n".join(parts)
