"""The result of a comparison as text: a line while it runs, tables in Markdown at the end."""

from __future__ import annotations

import statistics
from typing import Any

SECTIONS = {
    "decode": (
        "Decode",
        "Tokens generated one by one from an empty cache, greedily.",
        ("shape",),
    ),
    "prefill": (
        "Prefill",
        "A prompt read at once, logits of its last token.",
        ("shape", "prompt"),
    ),
    "depth": (
        "Decode with a long context",
        "edgeq with its INT8 cache; llama.cpp with the cache and attention named.",
        ("shape", "depth"),
    ),
    "busy": (
        "Decode with a busy neighbor",
        "edgeq with 2 threads while another process keeps one core busy all the time.",
        ("shape",),
    ),
    "matmul": (
        "Single matmuls",
        "float32 in and out, INT4 weights in groups of 32 (N x K), activations quantized on the "
        "way; onnxruntime's MatMulNBits with accuracy_level 4. Weights come from the last cache "
        "or, with too many for it, from memory: with one row, what the kernel could do, and what "
        "the memory lets it do.",
        ("N x K", "rows", "weights in"),
    ),
}


NOISE = 0.1
"""Cores that others may take before a measurement is no longer one of a quiet machine."""


def _speed(row: dict[str, Any], side: str) -> str:
    figures = row[side]
    if "tokens_per_s" in figures:
        return f"{figures['tokens_per_s']:.1f}"
    return f"{figures['median_seconds'] * 1e6:.1f}"


def line(row: dict[str, Any]) -> str:
    """One row as a line for the terminal, with its goal."""
    unit = "tok/s" if row["tokens"] else "us"
    text = (
        f"{row['section']} {' '.join(row['keys'])} t{row['threads']}: "
        f"edgeq {_speed(row, 'edgeq')}, {row['peer']} {_speed(row, 'theirs')} {unit}, "
        f"{row['ratio']:.2f}x ({row['lowest']:.2f}-{row['highest']:.2f})"
    )
    if "bandwidth_percent" in row["edgeq"]:
        text += f", {row['edgeq']['bandwidth_percent']:.0f} % of read bandwidth"
    if (row["others_cores"] or 0) > NOISE:
        text += f"; NOISY, others took {row['others_cores']:.2f} cores"
    if row["goal"]:
        text += f"; goal {row['goal']}: {'met' if row['ratio'] >= row['goal'] else 'MISSED'}"
    return text


def _table(head: list[str], left: int, rows: list[list[str]]) -> list[str]:
    rule = [":---" if i < left else "---:" for i in range(len(head))]
    return ["| " + " | ".join(cells) + " |" for cells in (head, rule, *rows)]


def _gb(figures: dict[str, Any]) -> list[str]:
    if "gb_per_s" not in figures:
        return ["", ""]
    return [f"{figures['gb_per_s']:.1f}", f"{figures['bandwidth_percent']:.0f} %"]


def _most(row: dict[str, Any]) -> str:
    """The ratio with edgeq at the full read bandwidth; nothing where the cache gives more."""
    share = row["edgeq"].get("bandwidth_percent")
    return f"{100 * row['ratio'] / share:.2f}" if share and share < 100 else ""


def _section(name: str, rows: list[dict[str, Any]]) -> list[str]:
    title, said, keys = SECTIONS[name]
    unit = "tok/s" if rows[0]["tokens"] else "µs"
    reads = any("gb_per_s" in row["edgeq"] for row in rows)
    head = [*keys, "against", "threads", f"edgeq, {unit}", f"peer, {unit}", "ratio", "all pairs"]
    if reads:
        head += ["edgeq, GB/s", "of peak", "peer, GB/s", "of peak", "at most"]
    cells = []
    for row in rows:
        cells.append(
            [
                *row["keys"],
                row["peer"],
                str(row["threads"]),
                _speed(row, "edgeq"),
                _speed(row, "theirs"),
                f"**{row['ratio']:.2f}**" + (" ~" if (row["others_cores"] or 0) > NOISE else ""),
                f"{row['lowest']:.2f} - {row['highest']:.2f}",
            ]
        )
        if reads:
            cells[-1] += _gb(row["edgeq"]) + _gb(row["theirs"]) + [_most(row)]
    return [f"## {title}", "", said, "", *_table(head, len(keys) + 1, cells), ""]


def _bandwidth(readings: list[dict[str, Any]]) -> str:
    parts = []
    for threads in sorted({r["threads"] for r in readings}):
        found = [r["gb_per_s"] for r in readings if r["threads"] == threads]
        parts.append(
            f"{statistics.median(found):.1f} GB/s with {threads} "
            f"thread{'s' if threads > 1 else ''} ({min(found):.1f} - {max(found):.1f}, "
            f"{len(found)} readings)"
        )
    return "; ".join(parts)


def markdown(result: dict[str, Any]) -> str:
    """All tables, and what was measured on what."""
    m = result["machine"]
    gib = f"{m['memory_bytes'] / 2**30:.0f} GiB" if m["memory_bytes"] else "?"
    runs = sorted({len(row["edgeq"]["seconds"]) for row in result["rows"]})
    repeats = " to ".join(str(n) for n in dict.fromkeys((runs[0], runs[-1])))
    lines = [
        "# edgeq and its peers, side by side",
        "",
        "Written by `make bench-peers`. A ratio is how many times as fast edgeq is: the medians' "
        f"ratio of {repeats} alternating runs, in which both sides work on the same "
        'integers (w4-g32 is Q4_0) with the same threads; "all pairs" are the lowest and '
        "highest ratio of two runs next to each other. GB/s counts the bytes each token has to "
        'read; "of peak" is their share of the read bandwidth measured just before, between '
        "and after these runs. What fits the last cache can exceed it. "
        '"At most" is the ratio that reading the same bytes at the full bandwidth would give.',
        "",
        f"- Machine: {m['cpu']}{', virtual' if m['virtual'] else ''}, {m['cores']} cores, "
        f"{m['last_cache_bytes'] >> 20} MiB last cache, {gib} memory; {m['system']}; "
        f"load {m['load_at_start']:.1f} at the start",
    ]
    if result["bandwidth"]:
        lines.append(f"- Read bandwidth: {_bandwidth(result['bandwidth'])}")
    lines += [f"- {name}: {version}" for name, version in result["versions"].items()]
    if result["agreement"]:
        same = ", ".join(f"{name} {cosine:.4f}" for name, cosine in result["agreement"].items())
        lines.append(f"- Cosine of both sides' logits after 32 tokens: {same}")
    shares = [row["others_cores"] for row in result["rows"] if row["others_cores"] is not None]
    if shares:
        noisy = sum(share > NOISE for share in shares)
        lines.append(
            f"- Other processes and virtual machines took {statistics.median(shares):.2f} cores "
            f"at the median; {noisy} of {len(shares)} rows had more than {NOISE} (marked ~)"
        )
    times = sorted({row["when"] for row in result["rows"]})
    lines += [f"- When: {' to '.join(dict.fromkeys((times[0], times[-1])))}", ""]
    for name in SECTIONS:
        rows = [row for row in result["rows"] if row["section"] == name]
        if rows:
            lines += _section(name, rows)
    return "\n".join(lines)
