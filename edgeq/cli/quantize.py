"""``edgeq quantize``: a checkpoint becomes one packed file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeq.cli import render
from edgeq.cli.options import ByteSize, command, force_option, threads_option

if TYPE_CHECKING:
    from edgeq.quant import Recipe, Summary


@command("quantize", "Make one packed .edgeq file from a checkpoint.")
@click.argument("source", metavar="SRC", required=False)
@click.option("-o", "--output", type=click.Path(dir_okay=False), default=None,
              help="The file to write, such as model.edgeq.")  # fmt: skip
@click.option("--preset", metavar="SCHEME", default=None, show_default="w4-g32",
              help="The weights' scheme: a preset (--list) or written out, "
                   "such as w4-g64-asym.")  # fmt: skip
@click.option("--bits", type=click.Choice(["2", "3", "4", "8"]), default=None,
              help="Instead of --preset: bits per weight.")  # fmt: skip
@click.option("--group", metavar="N|channel|tensor", default=None,
              help="Instead of --preset: which weights share a scale: "
                   "16 to 256 along K, a row, or all.")  # fmt: skip
@click.option("--asym", is_flag=True, help="Instead of --preset: with zero points.")
@click.option("--method", default="rtn", help="How scales are chosen (--list).")
@click.option("--tensor-type", "tensor_types", multiple=True, metavar="REGEX=SCHEME",
              help="A scheme for the tensors whose name matches; the first match wins. "
                   "May be given several times.")  # fmt: skip
@click.option("--max-ram", type=ByteSize(), default=None,
              help="Most memory to use, such as 1G.")  # fmt: skip
@threads_option
@force_option
@click.option("--list", "listing", is_flag=True, help="List presets and methods and leave.")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text",
              help="How to write the summary.")  # fmt: skip
def quantize(
    source: str | None,
    output: str | None,
    preset: str | None,
    bits: str | None,
    group: str | None,
    asym: bool,
    method: str,
    tensor_types: tuple[str, ...],
    max_ram: int | None,
    threads: int | None,
    force: bool,
    listing: bool,
    form: str,
) -> None:
    """Quantize SRC (a Hugging Face folder, a GGUF file or a llama2.c .bin) to one .edgeq file.

    Embedding and head get 8 bits and norms stay float, unless --tensor-type says otherwise.
    """
    if listing:
        render.write(_listing() + "\n")
        return
    if source is None:
        raise click.UsageError("Missing argument 'SRC'.")
    if output is None:
        raise click.UsageError("Missing option '-o' / '--output'.")
    from edgeq.errors import UsageError
    from edgeq.quant import Recipe
    from edgeq.quant import quantize as run

    recipe = Recipe.from_options(
        preset=_scheme(preset, bits, group, asym), tensor_types=tensor_types, method=method
    )
    out = Path(output)
    if out.exists() and not force:
        raise UsageError(f"{out} exists; give another --output, or --force to overwrite it")
    with render.progress("quantizing") as bar:
        summary = run(source, out, recipe, max_ram=max_ram, threads=threads, progress=bar)
    _report(summary, out, recipe, form)


def _scheme(preset: str | None, bits: str | None, group: str | None, asym: bool) -> str | None:
    """The scheme's text from the options that can say so; None if none does.

    Raises:
        click.UsageError: both kinds of options are given, or a group that is none.
    """
    if preset is not None:
        if bits or group or asym:
            raise click.UsageError(
                f"--preset {preset} says it all; leave out --bits, --group and --asym, "
                "or write the scheme out, such as --preset w4-g64-asym"
            )
        return preset
    if not (bits or group or asym):
        return None
    from edgeq.schemes import PRESETS

    # the first preset of so many bits says what is left unsaid
    base = next(scheme for scheme in PRESETS.values() if scheme.bits == int(bits or 4))
    if group in ("channel", "tensor"):
        middle = group
    elif group is None:
        middle = str(base).split("-")[1]
    elif group.isdecimal():
        middle = f"g{group}"
    else:
        raise click.UsageError(f"--group is {group!r}; give a number, 'channel' or 'tensor'")
    zero_points = asym or not base.symmetric
    return f"w{base.bits}-{middle}" + ("-asym" if zero_points else "")


def _listing() -> str:
    from edgeq.quant import METHODS
    from edgeq.schemes import PRESETS

    presets = [
        [
            name,
            str(scheme.bits),
            f"{scheme.group_size} along K" if scheme.group_size else scheme.granularity,
            "no" if scheme.symmetric else "yes",
        ]
        for name, scheme in PRESETS.items()
    ]
    methods = [
        [name, (sys.modules[fit.__module__].__doc__ or "").splitlines()[0]]
        for name, fit in METHODS.items()
    ]
    return "\n\n".join(
        [
            render.aligned(["preset", "bits", "a scale for", "zero points"], presets),
            render.aligned(["method", "what it does"], methods),
            "Any scheme can be written out: w<2|3|4|8>-<g16|g32|g64|g128|g256|channel|tensor>"
            "[-asym],\nor f32, f16, bf16 for tensors that stay floating point.",
        ]
    )


def _report(summary: Summary, out: Path, recipe: Recipe, form: str) -> None:
    if form == "json":
        found = {
            "path": str(out),
            "recipe": recipe.to_dict(),
            "source_sha256": summary.source_sha256,
            "source_bytes": summary.source_bytes,
            "file_bytes": summary.file_bytes,
            "bpw": summary.bpw,
            "seconds": summary.seconds,
            "cpu_seconds": summary.cpu_seconds,
            "threads": summary.threads,
            "peak_rss_bytes": summary.peak_rss_bytes,
            "tensors": [
                {
                    "name": t.name,
                    "scheme": str(t.scheme),
                    "shape": list(t.shape),
                    "nbytes": t.nbytes,
                    "sqnr_db": t.sqnr_db,
                }
                for t in summary.tensors
            ],
        }
        render.write(json.dumps(found, indent=2) + "\n")
        return
    peak = summary.peak_rss_bytes
    render.write(
        f"{out}: {render.human_bytes(summary.file_bytes)}, {summary.bpw:.2f} bits per weight "
        f"({recipe.default}, {recipe.method}), "
        f"from {render.human_bytes(summary.source_bytes)} in {summary.seconds:.1f} s"
        + (f", peak memory {render.human_bytes(peak)}" if peak else "")
        + "\n"
    )
    worst = sorted(
        (t for t in summary.tensors if t.sqnr_db is not None), key=lambda t: t.sqnr_db or 0.0
    )[:3]
    if worst:
        lost = ", ".join(f"{t.name} {t.sqnr_db:.1f} dB" for t in worst)
        render.write(f"lost most: {lost}\n")
