"""docs/real-models.json and docs/real-models.md from measured rows."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgeq._version import __version__

_HEAD = """# Published models

Each model was fetched from the package index, read as it is, quantized by `{preset}` on real
inputs, and converted to every target, in float and in 8 bits, by
`python benchmarks/real_models/run.py`. Inputs are told in `benchmarks/real_models/inputs.py`;
nothing is measured on what a model was calibrated on. edgeq {version}, {machine}.

*error* is the root mean square difference from the float model's outputs in onnxruntime, over
their root mean square. *same* is how often what users take from the outputs is the same: the
largest class, a pixel that is text, a box or a note that is found (of what either finds, the part
that both find); of an embedding it is the cosine. *CPU s* is the processor time of the conversion
with its validation, of all its threads together, which other programs on the machine hardly change.
Core ML programs are executed by NumPy.
"""


def write(out: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write both files.

    Args:
        out: the .json file; the .md file lies beside it.
        rows: as `run.py` makes them.
    """
    out.write_text(json.dumps({"edgeq": __version__, "rows": list(rows)}, indent=1) + "\n")
    presets = {row["preset"] for row in rows if "quantized" in row} or {"w8a8-static"}
    machine = f"{platform.machine()}, Python {platform.python_version()}"
    parts = [_HEAD.format(preset=", ".join(sorted(presets)), version=__version__, machine=machine)]
    graphs = [row for row in rows if "float" in row]
    if graphs:
        parts += [_quantized(graphs), _float(graphs)]
    parts += [_package(row) for row in rows if "commands" in row]
    parts += [_language(row) for row in rows if "targets" in row]
    if lost := [row for row in rows if row.get("taken") is False]:
        parts.append("## Not taken\n\n" + "\n".join(f"- {r['name']}: {r['why']}" for r in lost))
    if refused := _refused(graphs):
        parts.append("## Refused\n\n" + "\n".join(refused))
    out.with_suffix(".md").write_text("\n\n".join(part.strip() for part in parts) + "\n")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _cell(found: dict[str, Any]) -> str:
    if not found["passed"]:
        return "refused, see below"
    cell = f"{found['error']:.2g}, {found['same']:.1%}, {found['cpu_seconds']:.1f} CPU s"
    named = ", ".join(f"`--set {key}={value}`" for key, value in found["options"].items())
    return f"{cell}, with {named}, as the refusal without it says" if named else cell


def _quantized(rows: Sequence[dict[str, Any]]) -> str:
    cells = []
    for row in rows:
        if "quantized" not in row:
            cells.append([row["about"], row.get("why", ""), "", "", "", "", ""])
            continue
        size = f"{row['bytes']['float'] / 2**20:.2f} to {row['bytes']['packed'] / 2**20:.2f}"
        record = f"{row['record']['error']:.2g}, {row['record']['same']:.1%}"
        cells.append(
            [row["about"], size, f"{row['cpu_seconds']:.1f}", record]
            + [_cell(row["quantized"][target]) for target in ("ort", "tflite", "coreml")]
        )
    head = ["model", "constants, MiB", "CPU s to quantize", "record: error, same",
            "onnxruntime", "LiteRT", "Core ML"]  # fmt: skip
    return "## Quantized to 8 bits\n\n" + _table(head, cells)


def _float(rows: Sequence[dict[str, Any]]) -> str:
    cells = [
        [row["about"], *(_cell(row["float"][target]) for target in ("ort", "tflite", "coreml"))]
        for row in rows
    ]
    head = ["model", "onnxruntime", "LiteRT", "Core ML (float16)"]
    return "## Converted in float\n\n" + _table(head, cells)


def _package(row: dict[str, Any]) -> str:
    cells = [
        [f"`edgeq {name}`", str(found["code"]), found["says"]]
        for name, found in row["commands"].items()
    ]
    return f"## {row['about']}\n\n" + _table(["command", "exit code", "it says"], cells)


def _language(row: dict[str, Any]) -> str:
    cells = [_language_cells(target, found) for target, found in row["targets"].items()]
    head = ["target", "MiB", "KL, nats per token", "greedy tokens equal", "CPU s", "peak RSS, MiB",
            "of running it alone", "refused"]  # fmt: skip
    made = row["quantize"]
    return (
        f"## {row['about']}\n\nQuantized by `{row['preset']} --requantize` in "
        f"{made['cpu_seconds']:.0f} CPU s with at most {made['peak_bytes'] / 2**20:.0f} MiB, then "
        "converted by `edgeq convert --to TARGET` with no other option, which validates what it "
        "wrote. The peak is of that command; beside it stands the peak of a process that only "
        "opens the file in its runtime and runs 18 tokens. llama.cpp ran the GGUF file.\n\n"
        + _table(head, cells)
    )


def _language_cells(target: str, found: dict[str, Any]) -> list[str]:
    kl = f"{found['kl']:.2g}" if found.get("kl") is not None else ""
    greedy = found.get("greedy") or {}
    same = f"{greedy.get('equal')} of {greedy.get('compared')}" if greedy else ""
    size = f"{found['nbytes'] / 2**20:.0f}" if found.get("nbytes") else ""
    costs = [f"{found['cpu_seconds']:.0f}", f"{found['peak_bytes'] / 2**20:.0f}"]
    costs.append(f"{alone / 2**20:.0f}" if (alone := found.get("alone_bytes")) else "")
    return [target, size, kl, same, *costs, "" if found["passed"] else found["why"]]


def _refused(rows: Sequence[dict[str, Any]]) -> list[str]:
    found = []
    for row in rows:
        for kind in ("float", "quantized"):
            for target, entry in row.get(kind, {}).items():
                if not entry["passed"]:
                    why = " ".join(entry["why"].split())
                    found.append(f"- {row['name']}, {kind}, to {target}: {why}")
    return found
