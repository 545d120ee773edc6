"""How far plans are off: against published decoding speeds, and against this machine.

    python benchmarks/plan/run.py           against what others published; keeps this machine's part
    python benchmarks/plan/run.py --here    this machine too: four shapes, two contexts; minutes

Writes docs/plan.json and docs/plan.md. `--here` wants a machine that does nothing else; it runs
`edgeq bench --against-plan`, which measures the machine's rates right beside the model's speed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tomllib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gguf_types import gguf_facts

from edgeq.core.cpu import this_cpu
from edgeq.devices.profile import find
from edgeq.devices.roofline import DECODE_SHARE, Speed, sustained
from edgeq.importers.shapes import SHAPES
from edgeq.model.config import ModelConfig

HERE = Path(__file__).resolve().parent
DOCS = HERE.parents[1] / "docs"
NEAR = 25.0
"""Percent that a plan may be off for a published row to count as met."""
SHAPES_HERE = ("smollm2-135m", "gemma3-270m", "qwen2.5-0.5b", "llama-3.2-1b")
DEPTHS = "0,2048"


def published() -> list[dict[str, Any]]:
    """The published rows, each with the planned speed and its error."""
    data = tomllib.loads((HERE / "published.toml").read_text("utf-8"))
    shapes = dict(SHAPES)
    for name, fields in data["shapes"].items():
        shapes[name] = ModelConfig.from_dict({"family": "llama", "tied": False, **fields})
    return [_row(row, shapes[row["model"]]) for row in data["rows"]]


def _row(row: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    facts = gguf_facts(row["model"], config, row["quant"], row.get("output"))
    profile = find(row["device"])
    # llama.cpp keeps 16 bits in its cache unless told otherwise, and runs on all cores
    speed = Speed(facts, sustained(profile, profile.cores), 16)
    seconds = speed.decode_seconds(row["cached"])
    assert seconds is not None
    return row | {
        "behind": row.get("behind", False),
        "planned_gb": facts.weights_bytes / 1e9,
        "planned_tokens_per_s": 1 / seconds,
        "joules_per_token": row["watts"] / row["tokens_per_s"] if "watts" in row else None,
        "planned_joules_per_token": profile.load_watts * seconds if profile.load_watts else None,
        "error_percent": 100 * (1 / seconds / row["tokens_per_s"] - 1),
    }


def measured(threads: str, repeats: int) -> dict[str, Any]:
    """`edgeq bench --against-plan` of each shape, in a process of its own."""
    rows = []
    for shape in SHAPES_HERE:
        args = ["bench", "--shape", shape, "-p", "0", "-n", "128", "-d", DEPTHS, "-t", threads,
                "-r", str(repeats), "--against-plan", "--format", "json"]  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", "edgeq", *args], check=True, stdout=subprocess.PIPE, text=True
        )
        rows += [{"shape": shape, **row} for row in json.loads(done.stdout)]
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return {"cpu": this_cpu().name, "cores": this_cpu().cores, "when": when, "rows": rows}


def markdown(result: dict[str, Any]) -> str:
    """The page."""
    rows = result["published"]
    counted = [row for row in rows if not row["behind"]]
    met = sum(abs(row["error_percent"]) <= NEAR for row in counted)
    lines = [
        "# How far plans are off",
        "",
        "Written by `python benchmarks/plan/run.py`. `edgeq plan` reckons decoding as the bytes a "
        f"token reads over {DECODE_SHARE:.0%} of the device's read bandwidth, plus attention.",
        "",
        "## Against published speeds",
        "",
        "Other runtimes, planned with the same roofline and the bytes of their own files (modeled "
        "from the shape and the quantizer's rules; the published size is beside). J per token is "
        "the highest power of the whole board over its speed, beside the profile's load over the "
        "planned one. Marked * are "
        "rows that the device's profile takes its bandwidth from: they are not counted. "
        f"{met} of {len(counted)} are within {NEAR:.0f} %.",
        "",
        "| device | model | file, GB | published | decode, tok/s | planned | error | J per token "
        "| planned | runtime | source |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- | --- |",
        *(
            f"| {r['device']}{' *' * r['behind']} | {r['model']} {r['quant']} "
            f"| {r['planned_gb']:.2f} | {r['file_gb']:.2f} | {r['tokens_per_s']:g} "
            f"| {r['planned_tokens_per_s']:.2f} | {r['error_percent']:+.0f} % "
            f"| {_joules(r['joules_per_token'])} | {_joules(r['planned_joules_per_token'])} "
            f"| {r['runtime']} | {r['source']} |"
            for r in rows
        ),
        "",
        "## Against this runtime, measured",
        "",
    ]
    here = result["here"]
    if here is None:
        lines.append("Not measured yet: `python benchmarks/plan/run.py --here`.")
        return "\n".join(lines) + "\n"
    lines += [
        f"{here['cpu']}, {here['cores']} cores, {here['when']}; `edgeq bench --against-plan`, "
        "random weights in w4-g32.",
        "",
        "| shape | threads | test | decode, tok/s | planned | error | peak memory, MiB | planned "
        "| error |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in here["rows"]:
        speed, memory = r["plan_ts_error_percent"], r["plan_rss_error_percent"]
        lines.append(
            f"| {r['shape']} | {r['n_threads']} | {r['test']} | {r['avg_ts']:.1f} "
            f"| {r['plan_ts']:.1f} | {speed:+.0f} % | {r['peak_rss_bytes'] / 2**20:.0f} "
            f"| {r['plan_rss_bytes'] / 2**20:.0f} | {memory:+.0f} % |"
        )
    return "\n".join(lines) + "\n"


def _joules(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--here", action="store_true", help="measure this machine too")
    parser.add_argument("--threads", default="1", help="numbers of threads, as 1,2")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    kept = DOCS / "plan.json"
    before = json.loads(kept.read_text("utf-8"))["here"] if kept.exists() else None
    here = measured(args.threads, args.repeats) if args.here else before
    result = {"published": published(), "here": here}
    kept.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    (DOCS / "plan.md").write_text(markdown(result), "utf-8")
    print(markdown(result))


if __name__ == "__main__":
    main()
