"""The Raspberry Pi part of a package: installation, server, systemd service and health check."""

from __future__ import annotations

from pathlib import Path

from edgeq.core.hashing import file_sha256
from edgeq.packaging import estimates, templates
from edgeq.packaging.manifest import Manifest, ModelVariant
from edgeq.packaging.source import GraphSource, ModelSource
from edgeq.packaging.wheel import write_wheel

HIGH, MOST = 1.25, 1.5
"""Multiples of the planned memory above which systemd throttles the service, and kills it."""
_WHEELS = "wheels"
_SCRIPTS = ("install.sh", "run.sh", "healthcheck.sh")


def write(folder: Path, made: Manifest, source: ModelSource | GraphSource) -> None:
    """Write the scripts and the service; see `edgeq.packaging.glue.write_glue`."""
    variant = made.variants[0]
    if made.kind == "graph":
        _write_graph(folder, made, variant)
    else:
        _write_model(folder, made, variant)


def _write_model(folder: Path, made: Manifest, variant: ModelVariant) -> None:
    (folder / _WHEELS).mkdir()
    wheel = write_wheel(folder / _WHEELS)
    text = templates.filled("rpi/requirements-model.txt")
    text += f"# edgeq, as it was when this package was made\n./{_WHEELS}/{wheel.name} \\\n"
    text += f"    --hash=sha256:{file_sha256(wheel)}\n"
    templates.write(folder, "requirements.txt", text)
    tiers = made.tiers_of(variant.form)
    total = tiers[0].needed_bytes
    holes = {
        "name": made.name,
        "entry": variant.entry,
        "context": tiers[0].context,
        "threads": tiers[0].threads,
        "tiers": "\n".join(f"{_mib(t.needed_bytes)} {t.context} {t.entry}" for t in tiers),
        "prefix_mib": estimates.PREFIX_BYTES >> 20,
        "total_mib": total >> 20,
        "high_mib": int(HIGH * total) >> 20,
        "max_mib": int(MOST * total) >> 20,
    }
    for name in _SCRIPTS:
        text = templates.filled(f"rpi/{name}", **holes)
        templates.write(folder, name, text, executable=True)
    scripts = " ".join(sorted((*_SCRIPTS, "image/pi-gen.sh")))
    image = templates.filled("rpi/user-data", name=made.name, scripts=scripts)
    templates.write(folder, "image/user-data", image)
    image = templates.filled("rpi/pi-gen.sh", name=made.name)
    templates.write(folder, "image/pi-gen.sh", image, executable=True)
    service = templates.filled("rpi/model.service", **holes)
    templates.write(folder, f"{made.name}.service", service)


def _mib(nbytes: int) -> int:
    """Bytes in MiB, rounded up."""
    return -(-nbytes // (1 << 20))


def _write_graph(folder: Path, made: Manifest, variant: ModelVariant) -> None:
    holes = {
        "name": made.name,
        "entry": variant.entry,
        "variant": variant.id,
    }
    templates.write(folder, "requirements.txt", templates.filled("rpi/requirements-graph.txt"))
    templates.write(folder, "run.py", templates.filled("rpi/graph_run.py.txt", **holes))
    install = templates.filled("rpi/graph_install.sh", **holes)
    templates.write(folder, "install.sh", install, executable=True)
