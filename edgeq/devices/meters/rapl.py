"""RAPL: the energy counters of x86 processors, by the kernel's powercap files.

Source: Documentation/power/powercap/powercap.rst of Linux. `energy_uj` counts microjoules and
begins again at 0 after `max_energy_range_uj`. The same counters show up a second time as
`intel-rapl-mmio`; only `intel-rapl:*` is read.
"""

from __future__ import annotations

from pathlib import Path

from edgeq.core.errors import DeviceError
from edgeq.devices.meters.base import Absent, FileMeter, Meter, Run, optional_text, read_number
from edgeq.devices.meters.kind import MeterKind

NAME = "rapl"
POWERCAP = "sys/class/powercap"


def find(root: Path, run: Run | None = None) -> list[Meter | Absent]:
    """A meter with a channel for each zone: "package-0", "package-0/core", "package-0/dram" ...

    Its total is all packages, and the memory where that is counted: memory lies below a package
    among the zones but its energy is not part of the package's. A package that cannot be read
    leaves no total: the others alone are not the machine's processors.
    """
    folder = root / POWERCAP
    zones = sorted(folder.glob("intel-rapl:*"))
    if not zones:
        return [
            Absent(
                NAME,
                f"no {folder}/intel-rapl:*; only x86 processors have it, the kernel needs "
                "CONFIG_INTEL_RAPL, and virtual machines and containers mostly hide it",
                "energy",
            )
        ]
    names: dict[str, str] = {}
    for zone in zones:
        name = optional_text(zone / "name") or zone.name
        # two packages of one name are two packages
        beside = [n for z, n in names.items() if z.count(":") == zone.name.count(":") == 1]
        names[zone.name] = f"{name} {zone.name}" if name in beside else name
    files: dict[str, tuple[Path, ...]] = {}
    wraps: dict[str, float] = {}
    refused: list[str] = []
    unread: set[str] = set()
    for zone in zones:
        parent = zone.name.rpartition(":")[0]
        prefix = f"{names[parent]}/" if parent in names else ""
        channel = prefix + names[zone.name]
        try:
            read_number(zone / "energy_uj")
            wraps[channel] = read_number(zone / "max_energy_range_uj") / 1e6
        except DeviceError as err:
            refused.append(str(err))
            unread.add(channel)
            continue
        files[channel] = (zone / "energy_uj",)
    packages = tuple(c for c in files if _is_package(c))
    memory = tuple(c for c in files if c.endswith("/dram"))
    if any(c.endswith("/dram") for c in unread):
        memory = ()  # some of the memory only would be neither with nor without it
    total = packages + memory
    if not packages or any(_is_package(c) for c in unread):
        mend = ""
        if any("permission denied" in text for text in refused):
            mend = (
                f"; since Linux 5.10 only root may read it: sudo chmod a+r "
                f"{folder}/intel-rapl:*/energy_uj (until the next start), or run as root"
            )
        return [Absent(NAME, "; ".join(refused or ["no package among its zones"]) + mend, "energy")]
    meter = FileMeter(
        name=NAME,
        quantity="energy",
        provenance=f"{folder}/intel-rapl:*/energy_uj ({', '.join(files)})",
        rate_hz=10,
        covers="processor " + " + ".join(total),
        scope="package",
        total=total,
        wraps=wraps,
        files=files,
        scale=1e-6,
    )
    return [meter]


def _is_package(channel: str) -> bool:
    return "/" not in channel and channel.startswith("package")


KIND = MeterKind(name="rapl", find=find)
