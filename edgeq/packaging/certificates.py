"""Certificates within a package: what was measured, without what depends on time and machine.

A conversion's certificate (`edgeq.converters.certificate`) also names the machine and the seconds
that validation took. Both are left out here, so that a package that is built again has the same
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
"""Nats by which the engine's rounding of activations and cache may change a right artifact."""
_MACHINE = ("machine", "seconds")
_STEPS = 8


def settled(certificate: Mapping[str, Any], place: str) -> dict[str, Any]:
    """A conversion's certificate as a package holds it.

    Args:
        certificate: of `edgeq.convert`.
        place: path of the folder in the package that the converted files lie in; "" for the
            package itself.
    """
    prefix = f"{place}/" if place else ""
    files = {f"{prefix}{name}": about for name, about in certificate["files"].items()}
    kept = {key: value for key, value in certificate.items() if key not in _MACHINE}
    found: dict[str, Any] = _rounded(kept)
    return found | {"files": files}


def certify_engine(model: Model, path: Path, name: str, context: int) -> dict[str, Any]:
    """Compare an artifact in edgeq's engine with the NumPy reference, and say how they compare.

    Args:
        model: the artifact, open.
        path: where it lies now.
        name: its path in the package.
        context: tokens of the engine's cache.

    Raises:
        EdgeqError: the engine does not compute what the artifact holds.
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
            f"edgeq's engine does not compute what the artifact holds: KL is {mean:.3g} nats "
            f"(allowed {MOST_KL:g}); please report it with the model"
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
    """Write a certificate."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes((json.dumps(certificate, indent=1, sort_keys=True) + "\n").encode())


def _rounded(value: Any) -> Any:
    """Floats with three digits: the others are of the machine, not of the model."""
    if isinstance(value, float):
        return float(f"{value:.3g}")
    if isinstance(value, Mapping):
        kept = {key: one for key, one in value.items() if key not in _MACHINE}
        return {key: _rounded(one) for key, one in kept.items()}
    return [_rounded(one) for one in value] if isinstance(value, list | tuple) else value
