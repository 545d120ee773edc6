"""The section of docs/quality.md on a published model: presets beside whole files of llama.cpp."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from edgeq.quant.presets import LADDER

GOALS = {
    "Q4_K_M, imatrix": 0.7,
    "Q3_K_M, imatrix": 0.6,
    "IQ3_S, imatrix": 0.6,
    "Q2_K, imatrix": 0.6,
    "IQ2_M, imatrix": 0.6,
}
"""llama.cpp's files, and the part of their KL that edgeq is to have in no more bytes."""
STEEPEST = 2.5
"""A preset's KL is to be below the next larger one's times this."""
Row = Mapping[str, Any]


def section(name: str, about: Mapping[str, Any]) -> list[str]:
    """The lines of a model.

    Args:
        name: of the model's file.
        about: what beside_llamacpp.py measured.
    """
    rows = {label: row for label, row in about["rows"].items() if "refused" not in row}
    tokens, days = about["tokens"], sorted({row["measured"] for row in rows.values()})
    seen = {row["imatrix_tokens"] for row in rows.values() if row.get("imatrix_tokens")}
    texts = ", ".join(f"{count:,} of {text}" for text, count in tokens.items())
    importance = (
        f"Importance is the mean square of each input on {_listed(seen)} tokens of the text that "
        "edgeq calibrates with by default. "
    )
    out = [
        f"## {name}: presets beside llama.cpp's files",
        "",
        "Written by `python benchmarks/quality/beside_llamacpp.py`. The values of the published "
        "file count as the float model. llama.cpp wrote its files from these values in float32 "
        "and chose the types of the tensors. Bytes are those of the whole file, with the "
        f"tokenizer. {sum(tokens.values()):,} tokens were measured ({texts}), in windows of 256, "
        "with float32 arithmetic on the weights that each file holds. "
        + (importance if seen else "")
        + f"{about['machine']}, {' and '.join(days)}.",
        "",
        "| file | bytes | NLL | KL | KL, 99 % | same top token | "
        + " | ".join(f"KL, {text}" for text in tokens)
        + " | matrices by type |",
        "| --- |" + " ---: |" * (5 + len(tokens)) + " --- |",
    ]
    for label, row in sorted(rows.items(), key=lambda item: -item[1]["bytes"]):
        by_text = " | ".join(f"{row['kl_by_text'][text]:.4f}" for text in tokens)
        types = ", ".join(f"{kind} x {count}" for kind, count in row.get("types", {}).items())
        out.append(
            f"| {label} | {row['bytes']:,} | {row['nll']:.4f} | {row['kl_mean']:.4f} | "
            f"{row['kl_p99']:.3f} | {row['top1']:.1%} | {by_text} | {types} |"
        )
    for label, row in about["rows"].items():
        if "refused" in row:
            out += ["", f"{label} was not written: {row['refused']}."]
    return [*out, "", *_goals(rows), *_steps(rows)]


def _listed(numbers: set[int]) -> str:
    return " or ".join(f"{number:,}" for number in sorted(numbers))


def _own(rows: Mapping[str, Row]) -> dict[str, Row]:
    return {k.removeprefix("edgeq "): r for k, r in rows.items() if k.startswith("edgeq ")}


def _goals(rows: Mapping[str, Row]) -> list[str]:
    """The best of edgeq at no more bytes than each of llama.cpp's files that is a goal."""
    out = []
    for label, goal in GOALS.items():
        peer = rows.get(f"llama.cpp {label}")
        fits = {k: r for k, r in _own(rows).items() if peer and r["bytes"] <= peer["bytes"]}
        if peer is None or not fits:
            continue
        key, best = min(fits.items(), key=lambda item: item[1]["kl_mean"])
        ratio = best["kl_mean"] / peer["kl_mean"]
        out.append(
            f"- {label}: {best['kl_mean']:.4f} ({key}, {best['bytes']:,} bytes) / "
            f"{peer['kl_mean']:.4f} ({peer['bytes']:,} bytes) = **{ratio:.2f}x**; the goal, "
            f"{goal:.1f}x, is {'met' if ratio <= goal else 'missed'}"
        )
    return ["Mean KL of edgeq at no more bytes than llama.cpp's:", "", *out, ""] if out else []


def _steps(rows: Mapping[str, Row]) -> list[str]:
    """How much KL grows from each measured preset to the next smaller one."""
    own, names = _own(rows), list(reversed(LADDER))
    steps = {
        f"{large} to {small}": own[small]["kl_mean"] / own[large]["kl_mean"]
        for large, small in pairwise(names)
        if large in own and small in own
    }
    if not steps:
        return []
    listed = ", ".join(f"{names} {times:.1f}" for names, times in steps.items())
    steep = [names for names, times in steps.items() if times > STEEPEST]
    words = f"more than {STEEPEST} for {', '.join(steep)}" if steep else f"none above {STEEPEST}"
    return [
        f"KL grows from a preset to the next smaller one by a factor of: {listed}; {words}.",
        "",
    ]
