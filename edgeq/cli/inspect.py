"""``edgeq inspect``: show a summary of a model file, and with --tensors each tensor."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeq.cli import graphs, render
from edgeq.cli.options import (
    check_output,
    command,
    force_option,
    model_argument,
    refuse_given,
    result_options,
)
from edgeq.importers import source_kind

if TYPE_CHECKING:
    from edgeq.model.model import Model

_RULES = 4
"""Most rules of a recipe that are shown; --format json shows all."""
_WORST = 3
"""Number of tensors with the largest errors that are named."""


@command("inspect", "Show a summary of a model file, or each of its tensors.")
@model_argument
@click.option("--card", "card", type=click.Path(dir_okay=False), default=None, metavar="FILE",
              help="Write a Hugging Face model card to this file, such as README.md.")  # fmt: skip
@click.option("--tensors", "details", is_flag=True, show_default=False,
              help="List each tensor; for graphs, each operator.")  # fmt: skip
@force_option
@result_options("text", "json", force=False)
def inspect(model: str, card: str | None, details: bool, force: bool, form: str) -> None:
    """Show a summary of MODEL: family, size, quantization schemes, context length, tokenizer,
    source and quality. --tensors lists each tensor as well; --format json contains everything.

    Bits per weight (bpw) are computed from the stored bytes, including scales and padding. SQNR is
    the signal-to-quantization-noise ratio in dB. SQNR and quality were measured against the float
    model when MODEL was quantized.

    For graphs (.onnx, .tflite, and .ort or .mlpackage files that edgeq wrote), the operators and
    their precision are shown.
    """
    if source_kind(model) != "model":
        refuse_given(("card",), "language models, and MODEL is a graph")
        graphs.inspect(model, form, details)
        return
    from edgeq.api.inspect import inspect as describe
    from edgeq.importers import load

    loaded = load(model)
    if card is not None:
        _write_card(loaded, Path(model).name, Path(card), force)
        return
    record = describe(loaded, path=model)
    if form == "json":
        render.write(json.dumps(record, indent=2) + "\n")
    else:
        render.write(_text(loaded, Path(model), record["tensors"], details) + "\n")


def _write_card(model: Model, name: str, path: Path, force: bool) -> None:
    from edgeq.core.files import write_whole
    from edgeq.quant.decoder.model_card import model_card

    check_output(path, force, "--card")
    write_whole(path, [model_card(model, name).encode()], "the model card")
    render.write(f"{path}\n")


def bits_per_weight(nbytes: int, weights: int) -> float:
    """Bits per weight of stored bytes."""
    return 8 * nbytes / weights


def _text(model: Model, path: Path, tensors: list[dict[str, Any]], details: bool) -> str:
    from edgeq.model.block import OTHER_MIXERS
    from edgeq.model.memory_layout import position_bytes, state_bytes

    config = model.config
    weights = sum(math.prod(t["shape"]) for t in tensors)
    sizes = sorted({config.head_dim_of(i) for i in range(config.layers)})
    widths = sorted({config.ffn_of(i) for i in range(config.layers)})
    heads = f"{config.heads} attention heads of size {' and '.join(map(str, sizes))}"
    if config.kv_heads != config.heads:
        heads += f" ({config.kv_heads} for keys and values)"
    attending = [i for i, block in enumerate(config.blocks) if block.mixer == "attention"]
    cached = {
        bits: render.human_bytes(sum(position_bytes(config, bits, i) for i in attending))
        for bits in (8, 4, 16)
    }
    shared = sum(block.kv_from is not None for block in config.blocks)
    tables = sum(model.tensors[name].nbytes for name in config.tables)
    states = sum(state_bytes(config, layer) for layer in range(config.layers))
    layers = f"{config.layers} layers"
    for mixer, kind in OTHER_MIXERS.items():
        if count := sum(block.mixer == mixer for block in config.blocks):
            layers += f" ({count} of them {kind})"
    facts = [
        ("model", path.name or str(path)),
        ("family", config.family),
        ("parameters", render.human_count(weights)),
        (
            "architecture",
            f"{layers}, hidden size {config.hidden}, "
            f"feed-forward size {' and '.join(map(str, widths))}, {heads}",
        ),
        ("context", f"{config.context} tokens"),
        (
            "KV cache",
            f"{cached[8]} per token in 8 bits, {cached[4]} in 4 bits, {cached[16]} in 16 bits"
            + (f"; {shared} layers read that of others" if shared else ""),
        ),
        ("recurrent state", render.human_bytes(states) if states else ""),
        (
            "size",
            f"{render.human_bytes(model.nbytes)}, "
            f"{bits_per_weight(model.nbytes, weights):.2f} bits per weight",
        ),
        (
            "  in the file",
            f"{render.human_bytes(tables)}, a table of which only the rows of the tokens at hand "
            "are read"
            if tables
            else "",
        ),
        *((f"  {kind}", text) for kind, text in _kinds(tensors)),
        (
            "vocabulary",
            f"{config.vocab} tokens"
            + (", output head tied to the embedding" if config.tied else ""),
        ),
        ("tokenizer", "yes" if "tokenizer.json" in model.files else "no"),
        ("chat template", "yes" if _has_chat_template(model) else "no"),
        ("integers", _integers(model)),
        *_provenance(model.provenance, details),
        ("largest errors", _worst(tensors)),
        ("files", ", ".join(model.files)),
    ]
    summary = render.facts(facts, 16)
    if not details:
        return f"{summary}\n\n--tensors lists each tensor"
    rows = [
        [
            t["name"],
            t["scheme"],
            "x".join(map(str, t["shape"])),
            "x".join(map(str, t["padded"])) if t["padded"] else "",
            render.human_bytes(t["nbytes"]),
            f"{t['bpw']:.2f}",
            "" if t["sqnr_db"] is None else f"{t['sqnr_db']:.1f}",
        ]
        for t in tensors
    ]
    head = ["tensor", "scheme", "shape", "padded to", "size", "bpw", "SQNR dB"]
    table = render.aligned(head, rows, "llrrrrr")
    return "\n\n".join(filter(None, [summary, table, _padding_note(tensors)]))


def _integers(model: Model) -> str:
    """The origin of the integers, as text; empty for a float model."""
    from edgeq.quant.decoder.source import type_counts

    counts = model.integers()
    if counts is None:
        return ""
    parts = []
    if counts["kept"]:
        parts.append(f"kept from {' and '.join(counts['formats'])} ({type_counts(counts['kept'])})")
    if counts["rounded"]:
        parts.append(f"rounded by edgeq ({type_counts(counts['rounded'])})")
    return ", ".join(parts)


def _has_chat_template(model: Model) -> bool:
    from edgeq.core.errors import EdgeqError
    from edgeq.runtime.chat_template import render_chat

    try:
        return bool(render_chat(model.files, [{"role": "user", "content": "Hello"}]))
    except EdgeqError:
        return False


def _kinds(tensors: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Each scheme with the number and size of its tensors, the largest total size first."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for tensor in tensors:
        kinds.setdefault(tensor["scheme"], []).append(tensor)
    rows = []
    for kind, members in kinds.items():
        nbytes = sum(t["nbytes"] for t in members)
        weights = sum(math.prod(t["shape"]) for t in members)
        count = f"{len(members)} tensor{'s' * (len(members) > 1)}"
        rows.append(
            (
                nbytes,
                kind,
                f"{count}, {render.human_bytes(nbytes)}, "
                f"{bits_per_weight(nbytes, weights):.2f} bits per weight",
            )
        )
    return [(kind, text) for _, kind, text in sorted(rows, reverse=True)]


def _worst(tensors: list[dict[str, Any]]) -> str:
    """The tensors with the largest errors; empty if none were measured."""
    measured = sorted((t["sqnr_db"], t["name"]) for t in tensors if t["sqnr_db"] is not None)
    named = ", ".join(f"{name} {db:.1f} dB" for db, name in measured[:_WORST])
    return f"SQNR of {named}" if named else ""


def _padding_note(tensors: list[dict[str, Any]]) -> str:
    columns = [t for t in tensors if t["padded"] and t["padded"][1] != t["shape"][1]]
    if not columns:
        return ""
    extra = sum(t["padded"][0] * t["padded"][1] - math.prod(t["shape"]) for t in columns)
    return render.wrapped(
        f"The rows of {len(columns)} tensors are padded with zeros to whole blocks of 32 or whole "
        f"groups: {extra} weights, which the sizes above include.",
        render.prose_width(),
    )


def _provenance(provenance: Any, details: bool) -> list[tuple[str, str]]:
    rows = []
    for key, value in provenance.items():
        if key in ("sqnr_db", "target", "kept") or value is None:
            continue
        if key == "quality":
            rows += _quality(value, details)
            continue
        if key == "recipe" and isinstance(value, dict):
            text = _recipe(value)
        elif key == "activations" and isinstance(value, dict):
            text = f"{value.get('mode')} int8, ranges by {value.get('observer')}"
        elif key == "calibration" and isinstance(value, dict) and not details:
            known = (name for name in ("windows", "context", "tokens", "sampled") if name in value)
            text = ", ".join(f"{name} {value[name]}" for name in known) or "yes"
        elif key == "sensitive_layers" and isinstance(value, dict) and not details:
            text = _sensitive_layers(value)
        else:
            text = value if isinstance(value, str) else json.dumps(value)
        if key == "source_sha256" and not details:
            text = f"{text[:16]}..."
        name = {"edgeq_version": "edgeq version", "source_sha256": "source SHA-256"}.get(key)
        rows.append((name or key.replace("_", " "), text))
    return rows


def _sensitive_layers(value: dict[str, Any]) -> str:
    names, losses = value.get("chosen", []), value.get("losses", {})
    layers = ", ".join(str(name).removeprefix("model.layers.").split(".")[0] for name in names)
    some = f"down_proj in {value.get('scheme')} in layers {layers}" if names else "none"
    return f"{some}, of {len(losses)} measured"


def _recipe(recipe: dict[str, Any]) -> str:
    rules = [f"{pattern}={scheme}" for pattern, scheme in recipe.get("rules", ())]
    if len(rules) > _RULES:
        rules = [*rules[:_RULES], f"and {len(rules) - _RULES} more rules"]
    known = ("default", "method", "rules")
    rest = [f"{key} {json.dumps(value)}" for key, value in recipe.items() if key not in known]
    return ", ".join([str(recipe.get("default")), str(recipe.get("method")), *rest, *rules])


def _quality(data: dict[str, Any], details: bool) -> list[tuple[str, str]]:
    from edgeq.quant.decoder.quality_report import QualityReport, figure

    quality = QualityReport.from_dict(data)
    scores = quality.evaluation
    if scores is None:
        return [("quality", f"not measured: {quality.reason}")]
    rows = [
        (
            "quality",
            f"perplexity {figure(scores.base_ppl, 4)} float, {figure(scores.ppl, 4)} quantized",
        ),
        (
            "",
            f"KL {scores.kl_mean:.5f} nats per token mean, {scores.kl_p99:.5f} 99th percentile, "
            f"{scores.kl_max:.5f} maximum",
        ),
        (
            "",
            f"same top token {scores.top1_agreement:.2%}; of {scores.flips} that changed, "
            f"{scores.flips_base_right} were correct before and {scores.flips_right} are now",
        ),
    ]
    if not details:
        return [*rows, ("", f"measured on {scores.n_tokens} tokens of {quality.text}")]
    hidden = ", ".join("equal" if db is None else f"{db:.1f}" for db in quality.hidden_sqnr_db)
    return [
        *rows,
        ("", f"SQNR of the hidden states {hidden} dB (embedding, then each layer)"),
        (
            "",
            f"measured on {scores.n_tokens} tokens of {quality.text}, SHA-256 "
            f"{quality.text_sha256}: {scores.protocol}",
        ),
    ]
