"""The certificate of a conversion: what was written, by what, and what validation measured.

    certificate        1                          version of this form
    passed             true
    target, runtime    "gguf", what executed it, with its version
    edgeq, libraries   versions of all that took part
    options            options of the conversion
    source             name, sha256 and recipe of the source
    files              {name: {nbytes, sha256}} of every file of the output
    machine            processor, cores, system, Python

and of a decoder

    note               what was not done, such as running it where the runtime is not installed
    precision          how the runtime computes
    source.integers    kept: {type in the source's format: tensors that have its integers}, the
                       formats, rounded: {scheme: tensors that edgeq rounded by the recipe}
    integers           {tensor: whether the integers read back equal the artifact's}
    constants_equal    number of other constants compared
    cost               what the rounding of the target's kernels costs, in words; null if nothing
    prompts, greedy    token ids given, and those that the target generated
    logits             largest and root mean square difference, and the range of the right ones
    kl                 mean divergence, its standard error, the largest, nats; positions
    greedy_tokens      compared, equal to the reference's own choice, near ties
    texts              what encoded for the target, texts compared, of equal token ids, and of
                       other ids by a known limit of the runtime; null without a tokenizer

or of a graph

    weights            {constant: whether its integers are equal, bits in the file and asked for}
    quants_equal       scales and zero points of activations that are equal, of all in the file
    quants_not_in_file how many the runtime's file has no place for
    arena_bytes        activations at their peak, if buffers are reused
    compared_with, inputs, runs    the runtime of the source, and what both were run on
    error, error_allowed, rounding_price    of each output, relative to its size
    top1_agreement     fraction of the runs with the same largest output
    notes              what else to know

It lies in a folder of several files as ``certificate.json``, and beside a single file or a package
(.mlpackage) as ``NAME.certificate.json``.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeq._version import __version__
from edgeq.converters.targets import TARGETS
from edgeq.converters.validate.integers import TensorFault
from edgeq.converters.validate.report import GraphFindings, ValidationReport
from edgeq.core.cpu import this_cpu
from edgeq.core.errors import FormatError
from edgeq.core.hashing import file_sha256

VERSION = 1
NAME = "certificate.json"


def certificate_path(out: Path, *, folder: bool) -> Path:
    """The path of an output's certificate.

    Args:
        out: the output.
        folder: whether the output is a folder.
    """
    package = any(row.package and out.suffix == row.output for row in TARGETS.values())
    if folder and not package:
        return out / NAME
    return out.with_name(f"{out.name}.{NAME}")


def certify(
    report: ValidationReport,
    source: Mapping[str, Any],
    options: Mapping[str, Any],
    files: Mapping[str, Path],
    libraries: Mapping[str, str],
    *,
    arena_bytes: int | None = None,
) -> dict[str, Any]:
    """A certificate, ready for JSON.

    Args:
        report: report of the validation.
        source: name, sha256 and recipe of the source.
        options: options of the conversion.
        files: name as users see it -> where the file lies now.
        libraries: name -> version.
        arena_bytes: graphs: activations at their peak.
    """
    decoder = report.decoder
    about: dict[str, Any] = {
        "certificate": VERSION,
        "passed": report.passed,
        "target": report.target,
        "runtime": report.runtime,
    }
    if decoder:
        about |= {"note": " ".join(report.notes) or None, "precision": decoder.precision}
    about |= {
        "edgeq": __version__,
        "libraries": dict(libraries),
        "options": dict(options),
        "source": dict(source),
        "files": {
            name: {"nbytes": path.stat().st_size, "sha256": file_sha256(path)}
            for name, path in sorted(files.items())
        },
    }
    if decoder:
        about |= {"integers_equal": _fraction(report.integers), **report.measurements()}
    if report.graph:
        about |= _graph(report, report.graph, arena_bytes)
    return {**about, "machine": machine()}


def _graph(report: ValidationReport, graph: GraphFindings, arena: int | None) -> dict[str, Any]:
    return {
        "weights_equal": _fraction(report.integers),
        "weights": {
            name: {"equal": same, "bits": graph.bits.get(name), "asked": graph.source_bits[name]}
            for name, same in report.integers.items()
        },
        "quants_equal": _fraction(graph.quants),
        "quants_not_in_file": graph.source_quants - len(graph.quants),
        "arena_bytes": arena,
        "compared_with": graph.source_runtime,
        "inputs": graph.inputs,
        "runs": graph.runs,
        "error": dict(graph.error),
        "error_allowed": dict(graph.allowed),
        "rounding_price": dict(graph.rounding_error),
        "notes": list(report.notes),
        "top1_agreement": graph.top1,
    }


def _fraction(compared: Mapping[str, bool]) -> str:
    return f"{sum(compared.values())} of {len(compared)}"


def changed_files(out: Path) -> list[TensorFault]:
    """Files whose checksum is not the one in the certificate that lies beside them.

    Args:
        out: the converted file or folder.

    Returns:
        a fault for each, by the file's name; none where there is no certificate.
    """
    place = certificate_path(out, folder=out.is_dir())
    try:
        wanted = _digests(place)
    except FormatError as err:
        return [TensorFault(place.name, None, None, str(err))]
    faults = []
    for name, sha in wanted.items():
        # names begin with that of the output, which may have been renamed since
        inside = Path(*Path(name).parts[1:])
        file = out / inside if out.is_dir() else out if len(wanted) == 1 else out.parent / name
        if ".." in Path(name).parts or Path(name).is_absolute():
            faults.append(TensorFault(place.name, None, None, f"names the foreign file {name}"))
        elif not file.is_file():
            faults.append(TensorFault(name, None, None, "is named in the certificate and missing"))
        elif (actual := file_sha256(file)) != sha:
            faults.append(
                TensorFault(
                    name, None, None,
                    f"is not the file that {place.name} was made for: its SHA-256 is "
                    f"{actual[:12]}..., the certificate says {sha[:12]}...",
                )
            )  # fmt: skip
    return faults


def check_certificate(out: Path) -> None:
    """Compare a file or package with its certificate, if it has one; companion files may be absent.

    Raises:
        FormatError: a file is not the one that was certified, or the certificate is damaged.
    """
    place = certificate_path(out, folder=out.is_dir())
    changed = [
        name
        for name, sha in _digests(place).items()
        if Path(name).parts[:1] == (out.name,) and ".." not in Path(name).parts
        and (not (out.parent / name).is_file() or file_sha256(out.parent / name) != sha)
    ]  # fmt: skip
    if changed:
        raise FormatError(
            f"{', '.join(changed)} is not the file that {place.name} certifies: it was changed or "
            "damaged after the conversion; convert the source again, or delete the certificate to "
            "validate the file as it is"
        )


def _digests(place: Path) -> dict[str, str]:
    """SHA-256 of each file that a certificate names; empty where there is no certificate.

    Raises:
        FormatError: the certificate is damaged.
    """
    if not place.exists():
        return {}
    try:
        files = dict(json.loads(place.read_text("utf-8"))["files"])
        return {str(name): str(entry["sha256"]) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise FormatError(f"the certificate {place} cannot be read: {err}") from err


def machine() -> dict[str, Any]:
    """The machine, as far as it can be known; None for what cannot."""
    cpu = this_cpu()
    return {
        "processor": cpu.name or None,
        "architecture": cpu.arch,
        "cores": cpu.cores,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }
