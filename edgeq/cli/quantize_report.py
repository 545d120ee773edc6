"""The summary that ``edgeq quantize`` prints for a language model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from edgeq.cli import render

if TYPE_CHECKING:
    from edgeq.quant.decoder.quantize import Summary

FRONT_SHOWN = 6
"""Most points of the Pareto front that are shown."""


def report(summary: Summary, out: Path, form: str) -> None:
    """Print the summary of a quantization.

    Args:
        summary: the summary.
        out: the file that was written.
        form: "text" or "json".
    """
    recipe = summary.recipe
    if summary.continued_layers:
        render.note(
            "continued an interrupted run, which had rounded the first "
            f"{summary.continued_layers} layers"
        )
    if form == "json":
        record = {"path": str(out)} | summary.to_dict()
        render.write(json.dumps(record, indent=2) + "\n")
        return
    peak = summary.peak_rss_bytes
    render.lines(
        f"{out}: {render.human_bytes(summary.file_bytes)}, {summary.bpw:.2f} bits per weight "
        f"({_layer_scheme(summary)}, {recipe.method}), "
        f"from {render.human_bytes(summary.source_bytes)} in {summary.seconds:.1f} s"
        + (f", peak memory {render.human_bytes(peak)}" if peak else "")
    )
    worst = sorted(
        (t for t in summary.tensors if t.sqnr_db is not None), key=lambda t: t.sqnr_db or 0.0
    )[:3]
    if worst:
        lost = ", ".join(f"{t.name} {t.sqnr_db:.1f} dB" for t in worst)
        render.lines(f"largest errors (SQNR of weights): {lost}")
    for line in (*_target_lines(summary), *_card_lines(summary)):
        render.lines(line)


def _layer_scheme(summary: Summary) -> str:
    """The scheme of the layers' matrices in the artifact."""
    schemes = {str(t.scheme) for t in summary.tensors if len(t.shape) == 2 and ".layers." in t.name}
    return schemes.pop() if len(schemes) == 1 else f"mixed, {len(schemes)} schemes"


def _target_lines(summary: Summary) -> list[str]:
    """The Pareto front and the measurements of a choice of bits; empty if no bits were chosen."""
    from edgeq.quant.presets import LADDER

    target = summary.target
    if target is None:
        return []
    front, chosen = target["front"], target["chosen"]
    step = -(-len(front) // FRONT_SHOWN)
    points = sorted([chosen, *(point for point in front[::-step] if point != chosen)])
    rows = [
        [render.human_bytes(nbytes), f"{bpw:.2f}", f"{loss:.4g}",
         "chosen" if [nbytes, bpw, loss] == chosen else ""]
        for nbytes, bpw, loss in points
    ]  # fmt: skip
    lines = render.aligned(["tensors", "bits per weight", "estimated KL", ""], rows).split("\n")
    if "not_tried" in target:
        return [*lines, f"not compared with a uniform recipe: {target['not_tried']}"]
    lines.append("measured on the calibration text, KL in nats per token:")
    lines += [
        f"  {nats:.4g}  {label}" + ("  (written)" if label == target["kept"] else "")
        for label, nats in target["tried"].items()
    ]
    if target["kept"] != "mixed":
        kind = "preset" if target["kept"] in LADDER else "uniform recipe"
        lines.append(f"mixed bits were not better than the {kind}, so the {kind} was written")
    elif len(target["tried"]) == 1:
        lines.append("no uniform recipe fits the target, so there was no comparison")
    return lines


def _card_lines(summary: Summary) -> list[str]:
    """The quality report in two lines, or the reason why there is none."""
    from edgeq.quant.decoder.quality_report import figure

    quality = summary.quality
    scores = quality.evaluation
    if scores is None:
        return [f"quality: not measured: {quality.reason}"]
    against = ""
    if summary.requantized:
        from edgeq.quant.decoder.source import type_counts

        against = f" against the quantized source ({type_counts(summary.requantized)})"
    return [
        f"quality{against}: perplexity {figure(scores.base_ppl, 3)} -> {figure(scores.ppl, 3)}, "
        f"KL {figure(scores.kl_mean, 4)} nats per token, "
        f"same top token {scores.top1_agreement:.1%}",
        f"  measured on {scores.n_tokens} tokens of {quality.text} in {summary.card_seconds:.1f} "
        "s: "
        f"{scores.protocol}",
    ]
