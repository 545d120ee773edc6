"""``edgeq inspect``: what a model file holds, tensor by tensor."""

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

if TYPE_CHECKING:
    from edgeq.model import Model
    from edgeq.tensor import Tensor

_RULES = 4
"""Rules shown; --format json has all."""


@command("inspect", "Show what a model file holds.")
@model_argument
@click.option("--card", "card", type=click.Path(dir_okay=False), default=None, metavar="FILE",
              help="Write a model card as Hugging Face shows it, such as README.md.")  # fmt: skip
@force_option
@result_options("text", "json", force=False)
def inspect(model: str, card: str | None, force: bool, form: str) -> None:
    """Show the tensors of MODEL, how each is held and what that cost, and where it came from.

    bpw is bits per weight from the bytes really held, scales and padding included. SQNR is the
    signal to quantization noise ratio, in dB, as measured when the tensor was quantized. Quality
    was measured then too: the written model beside its float source.

    Of a graph (.onnx, .tflite, and .ort or .mlpackage that edgeq wrote) each operator's precision
    is shown.
    """
    if graphs.is_graph(model, graphs.RUN):
        refuse_given(("card", "force"), "language models, and MODEL is a graph")
        graphs.inspect(model, form)
        return
    from edgeq.importers import load

    loaded = load(model)
    if card is not None:
        _write_card(loaded, Path(model).name, Path(card), force)
        return
    tensors = [_describe(loaded, name, tensor) for name, tensor in loaded.tensors.items()]
    if form == "json":
        found = {
            "path": model,
            "config": loaded.config.to_dict(),
            "n_params": sum(math.prod(t["shape"]) for t in tensors),
            "nbytes": loaded.nbytes,
            "bpw": _bpw(loaded.nbytes, sum(math.prod(t["shape"]) for t in tensors)),
            "tensors": tensors,
            "files": {name: len(content) for name, content in loaded.files.items()},
            "provenance": dict(loaded.provenance),
        }
        render.write(json.dumps(found, indent=2) + "\n")
    else:
        render.write(_text(loaded, tensors) + "\n")


def _write_card(model: Model, name: str, path: Path, force: bool) -> None:
    from edgeq.files import write_whole
    from edgeq.quant.card import model_card

    check_output(path, force, "--card")
    write_whole(path, [model_card(model, name).encode()], "the model card")
    render.write(f"{path}\n")


def _bpw(nbytes: int, weights: int) -> float:
    return 8 * nbytes / weights


def _describe(model: Model, name: str, tensor: Tensor) -> dict[str, Any]:
    from edgeq.packing import TILE, round_up
    from edgeq.tensor import FloatTensor, QuantTensor

    shape = [int(n) for n in tensor.shape]
    padded = None
    if isinstance(tensor, QuantTensor):
        held = str(tensor.scheme)
        full = [round_up(shape[0], TILE), tensor.scheme.padded_k(shape[1])]
        padded = full if full != shape else None
    elif isinstance(tensor, FloatTensor):
        held = tensor.dtype.lower()
    else:
        held = getattr(tensor, "kind", "float")
    sqnr = model.provenance.get("sqnr_db", {}).get(name)
    return {
        "name": name,
        "scheme": held,
        "shape": shape,
        "padded": padded,
        "nbytes": int(tensor.nbytes),
        "bpw": _bpw(tensor.nbytes, math.prod(shape)),
        "sqnr_db": sqnr,
    }


def _text(model: Model, tensors: list[dict[str, Any]]) -> str:
    config = model.config
    weights = sum(math.prod(t["shape"]) for t in tensors)
    heads = f"{config.heads} heads"
    if config.kv_heads != config.heads:
        heads += f" sharing {config.kv_heads} of keys and values"
    facts = [
        ("family", config.family),
        ("parameters", render.human_count(weights)),
        (
            "shape",
            f"{config.layers} layers, hidden {config.hidden}, feed-forward {config.ffn}, "
            f"{heads} of {config.head_dim}",
        ),
        ("vocabulary", f"{config.vocab}" + (", head tied to the embedding" if config.tied else "")),
        ("context", f"{config.context} tokens"),
        (
            "KV cache",
            f"{render.human_bytes(config.kv_bytes(1))} per token in 8 bits, "
            f"{render.human_bytes(config.kv_bytes(1, 16))} in 16",
        ),
        (
            "held",
            f"{render.human_bytes(model.nbytes)}, "
            f"{_bpw(model.nbytes, weights):.2f} bits per weight",
        ),
        *((f"held as {kind}", text) for kind, text in _kinds(tensors)),
        *_provenance(model.provenance),
        ("files", ", ".join(model.files)),
    ]
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
    summary = "\n".join(f"{name:20s}{text}" for name, text in facts if text)
    notes = _padding_note(tensors)
    return "\n\n".join(filter(None, [summary, render.aligned(head, rows, "llrrrrr"), notes]))


def _kinds(tensors: list[dict[str, Any]]) -> list[tuple[str, str]]:
    kinds: dict[str, list[dict[str, Any]]] = {}
    for tensor in tensors:
        kinds.setdefault(tensor["scheme"], []).append(tensor)
    found = []
    for kind, members in kinds.items():
        nbytes = sum(t["nbytes"] for t in members)
        weights = sum(math.prod(t["shape"]) for t in members)
        found.append(
            (
                kind,
                f"{len(members)} tensors, {render.human_bytes(nbytes)}, "
                f"{_bpw(nbytes, weights):.2f} bits per weight",
            )
        )
    return found


def _padding_note(tensors: list[dict[str, Any]]) -> str:
    columns = [t for t in tensors if t["padded"] and t["padded"][1] != t["shape"][1]]
    if not columns:
        return ""
    extra = sum(t["padded"][0] * t["padded"][1] - math.prod(t["shape"]) for t in columns)
    return (
        f"{len(columns)} tensors have rows that are no whole number of blocks of 32 or of groups; "
        f"they are padded with {extra} weights worth zero, which the sizes above include."
    )


def _provenance(provenance: Any) -> list[tuple[str, str]]:
    found = []
    for key, value in provenance.items():
        if key in ("sqnr_db", "target"):
            continue
        if key == "quality":
            found += _quality(value)
            continue
        if key == "recipe" and isinstance(value, dict):
            text = _recipe(value)
        elif key == "activations" and isinstance(value, dict):
            text = f"{value.get('mode')} int8, ranges by {value.get('observer')}"
        else:
            text = value if isinstance(value, str) else json.dumps(value)
        found.append((key.replace("_", " "), text))
    return found


def _recipe(recipe: dict[str, Any]) -> str:
    rules = [f"{pattern}={scheme}" for pattern, scheme in recipe.get("rules", ())]
    if len(rules) > _RULES:
        rules = [*rules[:_RULES], f"and {len(rules) - _RULES} rules more"]
    known = ("default", "method", "rules")
    rest = [f"{key} {json.dumps(value)}" for key, value in recipe.items() if key not in known]
    return ", ".join([str(recipe.get("default")), str(recipe.get("method")), *rest, *rules])


def _quality(data: dict[str, Any]) -> list[tuple[str, str]]:
    from edgeq.quant.quality import Quality, figure

    quality = Quality.from_dict(data)
    found = quality.evaluation
    if found is None:
        return [("quality", f"not measured: {quality.reason}")]
    hidden = ", ".join("equal" if db is None else f"{db:.1f}" for db in quality.hidden_sqnr_db)
    return [
        ("perplexity", f"{figure(found.base_ppl, 4)} float, {figure(found.ppl, 4)} quantized"),
        (
            "KL, nats a token",
            f"{found.kl_mean:.5f} mean, {found.kl_p99:.5f} 99th percentile, "
            f"{found.kl_max:.5f} maximum",
        ),
        (
            "same top token",
            f"{found.top1_agreement:.2%}; of {found.flips} that changed "
            f"{found.flips_base_right} were right before, {found.flips_right} are now",
        ),
        ("hidden states", f"SQNR {hidden} dB: embedding, then each layer"),
        (
            "measured on",
            f"{found.n_tokens} tokens of {quality.text}, sha256 {quality.text_sha256}: "
            f"{found.protocol}",
        ),
    ]
