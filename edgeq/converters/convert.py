"""From a model to a target's file or folder: checked first, whole or not at all, and validated.

All is made in a hidden folder beside the output and moved to its place at the end, when its
integers have been read back and it has been run: an output is never half a file, nor one that
computes something else than its source.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgeq.converters import TARGETS, Conversion, Options, require_target, target_module
from edgeq.converters.atomic_output import check_place, deliver, files, workshop
from edgeq.converters.certificate import certify
from edgeq.converters.size import total_bytes, widened
from edgeq.converters.validate.certified import certificate_path
from edgeq.converters.validate.decoder import Report
from edgeq.converters.validate.decoder import validate as run_validation
from edgeq.core.errors import DoesNotFitError, EdgeqError, UsageError
from edgeq.core.memory import rss_bytes
from edgeq.core.progress import Progress
from edgeq.importers import load
from edgeq.model.model import Model

_ENDINGS = {
    "tflite": ".tflite",
    "litertlm": ".litertlm",
    "coreml": ".mlpackage",
    "gguf": ".gguf",
}
"""Of targets that are one file, or look like one; the others are folders of any name."""


def convert(
    source: Model | str | Path,
    target: str,
    out: str | Path,
    options: Options | None = None,
    *,
    preset: str | None = None,
    force: bool = False,
    validate: bool = True,
    steps: int = 8,
    max_ram: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    announce: Callable[[str], None] | None = None,
) -> Conversion:
    """Convert a model to a target's own format.

    Args:
        source: a model, or the path of one: an artifact, a checkpoint folder, a GGUF file.
        target: a name in `TARGETS`.
        out: the file or folder to make.
        options: what the target is told.
        preset: quantize a float source so first; without it, floats stay floats.
        force: replace what is there.
        validate: run the result and hold it against the source; the certificate says what came
            of it.
        steps: greedy tokens compared after each prompt.
        max_ram: most bytes this process may hold while it writes.
        threads: to quantize and run with; all cores if None.
        progress: called with what is done, how far, and of how much.
        announce: called with a sentence on the size the output will have, on what was chosen where
            nothing was said, and on how long validation takes, each before the work.

    Raises:
        UsageError: an unknown target, an output that exists or has no folder, or an option the
            target does not heed.
        UnsupportedError: the target cannot hold the model; names the tensor and what would do.
        MissingDependencyError: a package is not installed; names the extra.
        DoesNotFitError: max_ram is too little, or the target cannot promise it.
        EdgeqError: the output cannot be written, or computes something else than its source.

    Example:
        >>> conversion = edgeq.convert("model.edgeq", "gguf", "model.gguf", validate=False)
        >>> conversion.path.name
        'model.gguf'
    """
    started = time.perf_counter()
    require_target(target)
    module, options = target_module(target), options or Options()
    path = Path(out)
    _check_name(path, target)
    check_place(path, force)
    with workshop(path) as room:
        model = source if isinstance(source, Model) else load(source)
        if preset is not None:
            from edgeq.quant import Recipe, quantize  # most conversions are of an artifact

            packed, recipe = room / "quantized.edgeq", Recipe.from_options(preset=preset)
            quantize(source, packed, recipe, max_ram=max_ram, threads=threads, progress=progress)
            model = load(packed)
        model.validate()
        module.check(model, options)
        if max_ram is not None:
            _check_memory(module, model, options, target, max_ram)
        if announce:
            for remark in remarks(module, target, model, options):
                announce(remark)
        made = room / "made"
        made.mkdir()
        module.write(model, made / path.name, options, progress)
        nbytes = sum(file.stat().st_size for file in files(made).values())
        certificate = None
        if validate:
            report = run_validation(
                made / path.name, model, target,
                steps=steps, threads=threads, progress=progress, announce=announce,
            )  # fmt: skip
            _check_report(report)
            certificate = certify(report, model, options, files(made), module.versions())
            where = certificate_path(made / path.name, folder=(made / path.name).is_dir())
            where.write_text(json.dumps(certificate, indent=2) + "\n", "utf-8")
        deliver(made, path, room, force)
    return Conversion(target, path, nbytes, time.perf_counter() - started, certificate)


def remarks(module: Any, target: str, model: Model, options: Options) -> list[str]:
    """What a conversion will cost, in sentences: its size and why, and what is chosen for it."""
    sizes = list(module.sizes(model, options))
    said = [
        f"The output will take about {total_bytes(model, sizes) / 2**20:.0f} MiB; the source's "
        f"tensors take {model.nbytes / 2**20:.0f} MiB.",
        *widened(target, sizes),
    ]
    if hasattr(module, "remarks"):
        said += module.remarks(model, options)
    return said


def _check_name(path: Path, target: str) -> None:
    """Refuse a file that its runtime, or who finds it later, would not know by its name."""
    ending = _ENDINGS.get(target)
    if ending and path.name and path.suffix != ending:
        right = path.with_name(path.name + ending)
        kind = TARGETS[target].partition(":")[0]
        raise UsageError(f"{kind} output must end in {ending}, but --output is {path}; use {right}")


def _check_memory(module: Any, model: Model, options: Options, target: str, max_ram: int) -> None:
    """Refuse before the work what would take more memory than is allowed."""
    if not hasattr(module, "memory"):
        raise DoesNotFitError(
            f"--max-ram does not work for {target}: its library decides how much memory it uses; "
            "leave --max-ram out"
        )
    need = module.memory(model, options) + (rss_bytes() or 0)
    if need > max_ram:
        raise DoesNotFitError(
            f"converting to {target} takes {need / 1e6:.0f} MB of memory, "
            f"{max_ram / 1e6:.0f} MB are allowed; allow {need / 1e6:.0f} MB"
        )


def _check_report(report: Report) -> None:
    if not report.passed:
        raise EdgeqError(
            f"the converted model ({report.target}) does not compute what its source does and was "
            f"deleted (--no-validate keeps it):\n{report.explain()}"
        )
