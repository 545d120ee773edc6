"""Certificates in a package: the results of validation, independent of time and machine.

A conversion's certificate (`edgeq.converters.certificate`) also names the machine and the seconds
that validation took. Both are left out here, so that building a package again gives the same
bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeq._version import __version__
from edgeq.converters.certificate import VERSION
from edgeq.converters.validate.bisect import is_small
from edgeq.converters.validate.logits import Decoding, continue_prompt
from edgeq.converters.validate.prompts import prompts
from edgeq.core.errors import EdgeqError
from edgeq.core.hashing import file_sha256
from edgeq.formats.spill import Spill
from edgeq.model.model import Model
from edgeq.packaging.runners import ENGINE, EngineRunner

MOST_KL = 0.1
"""Largest mean KL divergence, in nats, that the engine's rounding of activations and KV cache may
cause in a correct artifact."""
_MACHINE = ("machine", "seconds")
_STEPS = 8


def settled(certificate: Mapping[str, Any], place: str) -> dict[str, Any]:
    """A conversion's certificate in the form that a package stores.

    Args:
        certificate: the certificate that `edgeq.convert` made.
        place: path in the package of the folder with the converted files; "" for the root of the
            package.
    """
    prefix = f"{place}/" if place else ""
    files = {f"{prefix}{name}": about for name, about in certificate["files"].items()}
    kept = {key: value for key, value in certificate.items() if key not in _MACHINE}
    found: dict[str, Any] = _rounded(kept)
    return found | {"files": files}


def certify_engine(model: Model, path: Path, name: str, context: int) -> dict[str, Any]:
    """Compare edgeq's engine, running an artifact, with the NumPy reference.

    Args:
        model: the opened artifact.
        path: path of the artifact on disk.
        name: path of the artifact in the package.
        context: length of the engine's KV cache, in tokens.

    Returns:
        the certificate: differences of logits, KL divergence in nats, and equal greedy tokens.

    Raises:
        EdgeqError: the outputs of the engine differ too much from the reference.
    """
    room = min(context, model.config.context)
    runner = EngineRunner(model, room)
    try:
        with Spill(what="the engine's logits") as spill:
            continued = [
                continue_prompt(runner, prompt, _STEPS, spill, lambda _: None)
                for prompt in prompts(model, room - _STEPS)
            ]
            runner.close()
            decoding = Decoding(model, keep=is_small(model))
            for each in continued:
                decoding.compare(each)
    finally:
        runner.close()
    mean = sum(decoding.kl) / len(decoding.kl)
    if not mean <= MOST_KL:
        raise EdgeqError(
            "the outputs of edgeq's engine differ from the NumPy reference: the mean KL divergence "
            f"is {mean:.3g} nats (allowed {MOST_KL:g}); please report this together with the model"
        )
    found: dict[str, Any] = _rounded(
        {
            "logits": {"max": decoding.max, "rms": decoding.rms, "range": decoding.range},
            "kl": {"mean": mean, "max": max(decoding.kl), "positions": len(decoding.kl)},
        }
    )
    return {
        "certificate": VERSION,
        "passed": True,
        "target": ENGINE,
        "runtime": runner.runtime,
        "precision": runner.precision,
        "edgeq": __version__,
        "source": {"integers": model.integers()},
        "files": {name: {"nbytes": path.stat().st_size, "sha256": file_sha256(path)}},
        "greedy_tokens": {"compared": decoding.count, "equal": decoding.equal},
        **found,
    }


def write(certificate: Mapping[str, Any], path: Path) -> None:
    """Write a certificate as JSON."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes((json.dumps(certificate, indent=1, sort_keys=True) + "\n").encode())


def _rounded(value: Any) -> Any:
    """Round floats to three digits: further digits depend on the machine, not on the model."""
    if isinstance(value, float):
        return float(f"{value:.3g}")
    if isinstance(value, Mapping):
        kept = {key: one for key, one in value.items() if key not in _MACHINE}
        return {key: _rounded(one) for key, one in kept.items()}
    return [_rounded(one) for one in value] if isinstance(value, list | tuple) else value
