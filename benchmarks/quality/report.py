"""The tables of docs/quality.md, from docs/quality.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from published import section

FOUR_BIT = ("Q4_0", "Q4_1", "Q4_K", "IQ4_NL", "IQ4_XS")
NAIVE = "rtn"
DAMPING_SINCE = "2026-11-30"
"""Since this day the compensation of errors in the inputs is damped in proportion to inputs per
token; before, by a tenth of the mean of the Hessian's diagonal."""


def closed(row: dict[str, Any], rows: dict[str, Any], bits: str, exact: float) -> str:
    """Share of the NLL gap between naive rounding with as many bits and float that is closed."""
    naive = rows.get(f"{bits} {NAIVE}")
    if naive is None:
        return ""
    return f"{(naive['nll'] - row['nll']) / (naive['nll'] - exact):.1%}"


def line(label: str, row: dict[str, Any], *more: str) -> str:
    """One row of Markdown."""
    cells = [
        label, f"{row['linear_bpw']:.2f}", f"{row['bytes']:,}", f"{row['nll']:.4f}",
        f"{row['kl_mean']:.4f}", f"{row['kl_p99']:.3f}", f"{row['top1']:.2%}", *more,
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def is_earlier(row: dict[str, Any]) -> bool:
    """Whether a row compensates errors of the inputs with the damping before `DAMPING_SINCE`."""
    recipe = row["recipe"]
    compensates = recipe.get("options", {}).get("crossed", False)
    return compensates and row.get("measured", "") < DAMPING_SINCE


def table(about: dict[str, Any]) -> list[str]:
    """Methods by bits, then llama.cpp's types."""
    exact, rows = about["float"], about["rows"]
    out = [
        "| method | bits per weight | bytes | NLL | KL | KL, 99 % | same top token | gap closed |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        line("float", exact, ""),
    ]
    for bits in sorted({key.split(" ", 1)[0] for key in rows}, reverse=True):
        for key, row in rows.items():
            own, label = key.split(" ", 1)
            if own == bits:
                gap = closed(row, rows, bits, exact["nll"])
                mark = " \\*" if is_earlier(row) else ""
                out.append(line(f"{bits} bits: {label}{mark}", row, gap))
    for label, row in about["llamacpp"].items():
        kinds = "" if row["types"] == [label.split(",")[0]] else f" ({', '.join(row['types'])})"
        out.append(line(f"llama.cpp {label}{kinds}", row, ""))
    return out


def checked(about: dict[str, Any]) -> str:
    """How far llama.cpp's own logits are from those of its dequantized weights."""
    pairs = [
        f"{label} {row['by_llamacpp']['kl_mean']:.4f} / {row['kl_mean']:.4f}"
        for label, row in about["llamacpp"].items()
        if label in ("Q4_0", "IQ4_NL", "Q4_K")
    ]
    return (
        "KL by llama.cpp itself, which rounds activations to INT8, and as in the table: "
        + ", ".join(pairs)
        + "."
    )


def peers(about: dict[str, Any]) -> list[str]:
    """Our best at no more bytes than llama.cpp's, and the ratio of the divergences."""
    theirs = about["llamacpp"]
    true = {
        label: row
        for label, row in theirs.items()
        if label.split(",")[0] in FOUR_BIT and set(row["types"]) <= {*FOUR_BIT, "F16"}
    }
    larger = {label: theirs[label] for label in theirs if label not in true}
    out = []
    for words, group in (("Q4_0", {"Q4_0": theirs["Q4_0"]}), ("its best 4-bit type", true),
                         ("the best of all measured", larger)):  # fmt: skip
        if not group:
            continue
        label, peer = min(group.items(), key=lambda item: item[1]["kl_mean"])
        ours = {k: r for k, r in about["rows"].items() if r["bytes"] <= peer["bytes"]}
        if not ours:
            continue
        key, best = min(ours.items(), key=lambda item: item[1]["kl_mean"])
        found = label if label == words else f"{words}, {label}"
        out.append(
            f"- {found}: {best['kl_mean']:.4f} ({key.replace(' ', ' bits, ', 1)}; "
            f"{best['bytes']:,} bytes) / {peer['kl_mean']:.4f} ({peer['bytes']:,} bytes) = "
            f"**{best['kl_mean'] / peer['kl_mean']:.2f}x**"
        )
    return out


MIXED = Path(__file__).with_name("smollm2.md")
"""A section on a published model that is measured by hand, by the commands that it names."""
TWO_LEVEL = Path(__file__).with_name("two_level.md")
"""A section on an experiment."""


def write(results: dict[str, Any], path: Path) -> None:
    """Write the page."""
    protocol = results["protocol"]
    out = [
        "# Quality",
        "",
        "Written by `python benchmarks/quality/run.py`; all figures are in `quality.json`.",
        "",
        f"Held-out text in disjoint windows of {protocol['context']} tokens, BOS at the head of "
        "each, every token after it scored; float32 arithmetic on the weights as they are stored. "
        "NLL, and KL from the float model, are nats per token. Bits per weight are those of the "
        "layers' matrices, bytes those of all tensors, both with scales and padding; the "
        "embedding, which is the head too, has 8 bits, fewer where bits are mixed. "
        "The gap is that in NLL between naive rounding with as many bits and float. "
        "Post-training methods and adaround "
        f"see {protocol['calibration_windows']} windows of the training text, qat and distill "
        f"{protocol['training_windows']}. Lean rows have groups of 64 in `{protocol['lean']}`. "
        "Where a palette's training begins was settled with a look at this held-out text.",
        "",
        f"Rows marked \\* were measured before {DAMPING_SINCE}, when crossed GPTQ, which also "
        "compensates the errors of the inputs, was damped by 0.1 for this, and not yet by 10 K / n "
        "with rows of K weights and n tokens (docs/quantize.md). With the tokens here, 10 K / n is "
        "0.016 to 0.13.",
        "",
    ]
    for name, about in results["models"].items():
        out += [
            f"## {name}",
            "",
            f"{about['text']}. {about['held_out_tokens']:,} tokens measured; "
            f"{about['training_tokens']:,} to learn from, {about['training_steps']} steps of "
            f"{about['batch']} windows.",
            "",
            *table(about),
            "",
        ]
        if about["llamacpp"] and about["rows"]:
            out += [
                "Mean KL at no more bytes than llama.cpp's:",
                "",
                *peers(about),
                "",
                checked(about),
                "",
            ]
    for name, about in results.get("published", {}).items():
        out += section(name, about)
    out += [MIXED.read_text("utf-8"), TWO_LEVEL.read_text("utf-8")]
    path.write_text("\n".join(out))
