"""``edgeq package``: make a folder for Xcode, Android Studio or a Raspberry Pi, or verify one."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from edgeq.cli import graphs, render
from edgeq.cli.options import (
    ByteSize,
    command,
    force_option,
    optional_model_argument,
    refuse_given,
    shared_option,
    threads_option,
)
from edgeq.core.markdown import printable
from edgeq.importers import source_kind

if TYPE_CHECKING:
    from edgeq.packaging.build import Package
    from edgeq.packaging.verify import PackageReport

PLATFORMS = ("ios", "android", "rpi", "ort-mobile")
_BUILD = ("platform", "name", "forms", "preset", "variants", "ctx_size", "data", "shapes",
          "dequantize", "labels", "license_", "base_model", "sign", "max_ram",
          "threads")  # fmt: skip
"""Options for making a package."""
_GRAPHS = ("data", "shapes", "dequantize", "labels")
"""Options for graphs only."""
_OUTPUT = ("output", "force")


@command("package", "Make a folder for Xcode, Android Studio or a Pi, or verify one.")
@optional_model_argument
@click.option("--for", "platform", type=click.Choice(PLATFORMS), default=None,
              help="The platform that the package is for.")  # fmt: skip
@click.option("-o", "--output", type=click.Path(), default=None,
              help="The folder to write; with --delta, the file.")  # fmt: skip
@click.option("--name", metavar="NAME", default=None, show_default="the name of MODEL",
              help="The package's name: lower-case letters, digits and hyphens.")  # fmt: skip
@click.option("--form", "forms", multiple=True, metavar="FORM", show_default=False,
              help="Make only this form of the model, of those that the platform has. May be "
                   "given several times.")  # fmt: skip
@click.option("--preset", metavar="SCHEME", default=None,
              show_default="integers are kept; floats: 4.75bpw, graphs w8a8-static or w8-channel",
              help="Quantize the weights by this recipe first, such as w4-g32.")  # fmt: skip
@click.option("--variant", "variants", multiple=True, metavar="SCHEME", show_default=False,
              help="Language models: add the model with weights quantized by this recipe, such as "
                   "w8-g32. The package runs the largest for which a device has free memory. May "
                   "be given several times.")  # fmt: skip
@shared_option("-c", "--ctx-size", env="CTX_SIZE", type=click.IntRange(min=0), default=0,
               help="Context length in tokens; 0 takes 2048 (LiteRT-LM: 1280), or what the model "
                    "supports.")  # fmt: skip
@click.option("--data", metavar="SAMPLES", default=None,
              help="Graphs: real inputs for calibration and for the golden tests: a folder, an "
                   ".npz file or script.py:function.")  # fmt: skip
@click.option("--shape", "shapes", multiple=True, metavar="NAME=N,N,...", show_default=False,
              help="Graphs: the shape of an input with dynamic dimensions. May be given several "
                   "times.")  # fmt: skip
@click.option("--dequantize", is_flag=True, show_default=False,
              help="Graphs: convert the integer weights of a .tflite file back to float "
                   "first.")  # fmt: skip
@click.option("--labels", metavar="FILE", type=click.Path(), default=None,
              show_default="what the file's metadata says",
              help="Graphs: a text file with the names of the model's classes, one per line, in "
                   "the order of their numbers.")  # fmt: skip
@click.option("--license", "license_", metavar="NAME", default=None,
              show_default="what the model's files say",
              help="The license of the model, such as apache-2.0.")  # fmt: skip
@click.option("--base-model", metavar="NAME", default=None,
              show_default="what the model's files say",
              help="The model that MODEL was derived from.")  # fmt: skip
@click.option("--sign", metavar="KEY", type=click.Path(), default=None,
              help="Sign the manifest with this Ed25519 private key (PEM).")  # fmt: skip
@click.option("--max-ram", type=ByteSize(), default=None,
              help="Language models: refuse a conversion that takes more memory than "
                   "this.")  # fmt: skip
@click.option("--verify", metavar="DIR", type=click.Path(), default=None,
              help="Check the package DIR instead of making one.")  # fmt: skip
@click.option("--verify-key", metavar="KEY", type=click.Path(), default=None,
              help="With --verify: the Ed25519 public key (PEM) that must have signed "
                   "it.")  # fmt: skip
@click.option("--golden/--no-golden", default=True, help="With --verify: run the golden tests.")
@click.option("--delta", metavar="OLD", type=click.Path(), default=None,
              help="MODEL is a package: write the changes since the package OLD to "
                   "--output.")  # fmt: skip
@click.option("--apply", metavar="FILE", type=click.Path(), default=None,
              help="MODEL is a package: apply the delta FILE to it, and write the new version to "
                   "--output.")  # fmt: skip
@force_option
@threads_option
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text",
              help="Format of the result.")  # fmt: skip
def package(model: str | None, form: str, **given: Any) -> int:
    """Make a package of MODEL: a folder with the model in the formats that a platform can run, its
    tokenizer, golden tests, checksums, and code that uses it.

    \b
    edgeq package MODEL --for rpi -o DIR               make a package
    edgeq package --verify DIR                         check a package, and name the first fault
    edgeq package NEW --delta OLD -o FILE              write the changes between two versions
    edgeq package OLD --apply FILE -o NEW              make the new version from the old one

    MODEL is a language model (an artifact, a checkpoint folder, a GGUF file) or a graph (an .onnx
    or .tflite file). The same source always gives the same bytes.
    """
    if given["verify"] is not None:
        source = click.get_current_context().get_parameter_source("model")
        if model is not None and source != ParameterSource.ENVIRONMENT:
            raise click.UsageError("give either MODEL or --verify DIR")
        refuse_given((*_BUILD, *_OUTPUT, "delta", "apply"), "making a package, and --verify checks")
        return _verify(given, form)
    refuse_given(("verify_key", "golden"), "--verify")
    if model is None:
        raise click.UsageError("Missing argument 'MODEL' (or --verify DIR).")
    if given["output"] is None:
        raise click.UsageError("Missing option '--output'.")
    if given["delta"] is not None or given["apply"] is not None:
        refuse_given(_BUILD, "making a package of a model")
        return _delta(model, given, form)
    if given["platform"] is None:
        raise click.UsageError(f"Missing option '--for', one of {', '.join(PLATFORMS)}.")
    return _build(model, given, form)


def _build(model: str, given: dict[str, Any], form: str) -> int:
    from edgeq.packaging.build import package as make

    graph = source_kind(model) == "graph"
    if graph:
        refuse_given(("ctx_size", "max_ram", "variants"), "language models, and MODEL is a graph")
    else:
        graphs.refuse_made(model)
        refuse_given(_GRAPHS, "graphs, and MODEL is a language model")
    with render.progress(f"Packaging for {given['platform']}") as bar:
        made = make(
            model, given["platform"], given["output"],
            name=given["name"], forms=given["forms"] or None, preset=given["preset"],
            variants=given["variants"], context=given["ctx_size"] or None, data=given["data"],
            shapes=graphs.named_shapes(given["shapes"]) if graph else None,
            dequantize=given["dequantize"], labels=given["labels"], license=given["license_"],
            base_model=given["base_model"], sign=given["sign"],
            force=given["force"], threads=given["threads"], max_ram=given["max_ram"],
            progress=bar, announce=render.note,
        )  # fmt: skip
    if form == "json":
        render.write(json.dumps(made.to_dict(), indent=2) + "\n")
    else:
        render.lines(_built(made))
    return 0


def _built(made: Package) -> str:
    lines = [f"{made.path}: {render.human_bytes(made.nbytes)} in {made.seconds:.1f} s"]
    lines += [
        f"  {variant['id']}: {variant['entry']}, {render.human_bytes(variant['nbytes'])}, "
        f"{variant['scheme']} for {variant['title']}"
        for variant in made.to_dict()["variants"]
    ]
    licensed = made.manifest.model["license"]
    lines.append(f"license of the model: {licensed or 'unknown (set it with --license)'}")
    if made.signed_by:
        lines.append(f"signed with {made.signed_by}")
    lines.append(
        f"read {made.path / 'README.md'}; check it with edgeq package --verify "
        + shlex.quote(str(made.path))
    )
    return "\n".join(lines)


def _verify(given: dict[str, Any], form: str) -> int:
    from edgeq.packaging.verify import verify_package

    with render.progress("Verifying") as bar:
        report = verify_package(
            given["verify"], verify_key=given["verify_key"], run=given["golden"], progress=bar
        )
    if form == "json":
        render.write(json.dumps(report.to_dict(), indent=2) + "\n")
    else:
        render.lines(_verified(report))
    return 0 if report.passed else 1


def _verified(report: PackageReport) -> str:
    rows = [*report.checks, *((f"not run: {form}", why) for form, why in report.not_run)]
    result = f"FAILED: {report.fault}" if report.fault else "passed"
    return render.facts([(name, printable(text)) for name, text in [*rows, ("result", result)]])


def _delta(model: str, given: dict[str, Any], form: str) -> int:
    from edgeq.packaging.delta import apply_delta, package_delta

    if given["delta"] is not None and given["apply"] is not None:
        raise click.UsageError("give either --delta OLD or --apply FILE")
    out, force = Path(given["output"]), given["force"]
    with render.progress("Comparing" if given["delta"] else "Applying") as bar:
        if given["delta"] is not None:
            made = package_delta(given["delta"], model, out, force=force, progress=bar)
        else:
            made = apply_delta(model, given["apply"], out, force=force, progress=bar)
    if form == "json":
        render.write(json.dumps(made.to_dict(), indent=2) + "\n")
    else:
        blocks, of = made.blocks
        render.lines(
            f"{made.path}: {blocks} of {of} blocks are new, {render.human_bytes(made.nbytes)} for "
            f"a version of {render.human_bytes(made.whole)}"
        )
    return 0
