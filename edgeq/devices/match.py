"""Choose the profile of a machine: its own, one of a device with the same chip, or a tier."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence

from edgeq.devices.profile import DeviceProfile, find, names


def best_profile(
    ids: Iterable[str],
    soc: str | None,
    arch: str | None,
    isa: Iterable[str],
    ram: int | None,
    cores: int | None = None,
) -> tuple[str | None, str | None]:
    """The profile that fits best, and how it was found.

    Args:
        ids: what names the machine, its chip included.
        soc: its chip.
        arch: as `platform.machine` says.
        isa: instruction sets.
        ram: bytes of memory, which tells variants of a device apart.
        cores: how many there are. A chip is sold with several numbers of cores, and memory of
            several widths belongs to them, so a device with another number says nothing.

    Returns:
        A name, and "device" if it is this device's own profile, "chip" if it is of another
        device with this chip, "tier" if it is a generic one; None, None if nothing is near.
    """
    profiles = [find(name) for name in names()]
    texts = [text.lower() for text in ids]
    own = [
        p for p in profiles if any(fnmatch.filter(texts, pattern.lower()) for pattern in p.match)
    ]
    if own:
        return _nearest(own, ram), "device"
    same = [p for p in profiles if p.soc and soc and p.soc.lower() in _spellings(soc)
            and (cores is None or cores == p.cores)]  # fmt: skip
    if same:
        return _nearest(same, ram), "chip"
    have = set(isa)
    if arch in ("aarch64", "arm64"):
        tier = "phone-high" if "i8mm" in have else "phone-mid" if "dotprod" in have else "phone-low"
        return tier, "tier"
    if arch == "x86_64" and "avx2" in have:
        return "pc", "tier"
    return None, None


def _spellings(chip: str) -> set[str]:
    """A chip's name, and the marketing name in it: ``qualcomm sm8450 (snapdragon 8 gen 1)``."""
    low = chip.lower()
    marketed = re.search(r"\((snapdragon .+)\)", low)
    return {low, f"qualcomm {marketed[1]}"} if marketed else {low}


def _nearest(profiles: Sequence[DeviceProfile], ram: int | None) -> str:
    """The profile whose memory is nearest to the machine's."""
    if ram is None:
        return profiles[0].name
    return min(profiles, key=lambda p: (abs((p.ram_bytes or 0) - ram), -len(p.name))).name
