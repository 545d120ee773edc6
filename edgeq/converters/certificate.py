"""The certificate of a conversion: what was made, by what, and what validation found.

    certificate        1                          version of this form
    passed             true
    target, runtime    "gguf", what executed it, with its version
    edgeq, libraries   versions of all that took part
    options            what the conversion was told
    source             name, sha256 and recipe of the artifact
    files              {name: {nbytes, sha256}} of every file of the output
    note               what was not done, as running it where the runtime is not installed
    integers           {tensor: whether the integers read back equal the artifact's}
    constants_equal    how many other constants were compared
    cost               what the rounding of the target's kernels costs, in words; null if nothing
    prompts, greedy    token ids given, and what the target went on with
    logits             largest and root mean square difference, and the range of the right ones
    kl                 mean divergence, its standard error, the largest, nats; positions
    greedy_tokens      compared, equal to the reference's own choice, near ties
    texts              what encoded for the target, texts compared, of equal token ids, and of
                       other ids by a known limit of the runtime; null without a tokenizer
    machine            processor, cores, system, Python

It lies in a folder of several files as ``certificate.json``, and beside a single file or a package
(.mlpackage) as ``NAME.certificate.json``.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeq._version import __version__
from edgeq.converters import Options
from edgeq.converters.validate.certified import certificate_path
from edgeq.converters.validate.decoder import Report
from edgeq.core.cpu import this_cpu
from edgeq.core.hashing import file_sha256
from edgeq.model.model import Model

__all__ = ["certificate_path", "certify", "findings", "machine", "options_dict"]

VERSION = 1


def certify(
    report: Report,
    model: Model,
    options: Options,
    files: Mapping[str, Path],
    libraries: Mapping[str, str],
) -> dict[str, Any]:
    """The certificate, ready for JSON.

    Args:
        report: of the validation.
        model: the source.
        options: of the conversion.
        files: name as users see it -> where it lies now.
        libraries: name -> version.
    """
    source = model.provenance
    return {
        "certificate": VERSION,
        "passed": report.passed,
        "target": report.target,
        "runtime": report.runtime,
        "note": report.note or None,
        "precision": report.precision,
        "edgeq": __version__,
        "libraries": dict(libraries),
        "options": options_dict(options),
        "source": {key: source.get(key) for key in ("source", "source_sha256", "recipe")},
        "files": {
            name: {"nbytes": path.stat().st_size, "sha256": file_sha256(path)}
            for name, path in sorted(files.items())
        },
        "integers_equal": f"{sum(report.integers.values())} of {len(report.integers)}",
        **findings(report),
        "machine": machine(),
    }


def findings(report: Report) -> dict[str, Any]:
    """What validation found, ready for JSON."""
    return {
        "integers": dict(report.integers),
        "constants_equal": report.constants,
        "logits": {
            "max": report.logits_max,
            "rms": report.logits_rms,
            "range": report.logits_range,
        },
        "kl": {
            "mean": report.kl_mean,
            "standard_error": report.kl_error,
            "max": report.kl_max,
            "positions": report.kl_rows,
            "expected_of_rounding": report.kl_expected,
            "allowed": report.kl_allowed,
        },
        "cost": report.cost() or None,
        "greedy_tokens": {
            "compared": report.greedy_compared,
            "equal": report.greedy_equal,
            "near_ties": report.near_ties,
        },
        "prompts": [list(prompt) for prompt in report.prompts],
        "greedy": [list(tokens) for tokens in report.greedy],
        "texts": report.texts.to_dict() if report.texts else None,
        "seconds": round(report.seconds, 3),
    }


def options_dict(options: Options) -> dict[str, Any]:
    """The options as JSON."""
    return {
        "context": options.context,
        "kv": options.kv,
        "compute": options.compute,
        "prefill": list(options.prefill),
        **dict(options.extra),
    }


def machine() -> dict[str, Any]:
    """The machine, as far as it says what it is; None for what it does not."""
    cpu = this_cpu()
    return {
        "processor": cpu.name or None,
        "architecture": cpu.arch,
        "cores": cpu.cores,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }
