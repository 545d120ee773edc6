"""CPU cores: what /proc/cpuinfo's part numbers mean, and what each core can do in a cycle.

Source of the part numbers: util-linux, sys-utils/lscpu-arm.c, which follows the vendors' manuals.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

_V8 = ("neon",)
_DOT = ("neon", "asimdhp", "dotprod")
_MM = ("neon", "asimdhp", "dotprod", "i8mm", "bf16")


@dataclass(frozen=True)
class Core:
    """What a type of core can do.

    Args:
        isa: instruction sets that the type has, in `edgeq.core.cpu`'s words.
        int8_ops: 8-bit integer operations per cycle at most, a multiplication and an addition
            counting as two; by dot products where it has them (16 products each 128 bits wide),
            else by widening multiplications (8 products each). None where it is not known.
    """

    isa: tuple[str, ...]
    int8_ops: int | None


CORES: dict[str, Core] = {
    # name: vector pipes x 32 operations where there are dot products
    "ARM1176": Core((), None),
    "Cortex-A5": Core(_V8, 8), "Cortex-A7": Core(_V8, 8), "Cortex-A8": Core(_V8, 16),
    "Cortex-A9": Core(_V8, 8), "Cortex-A15": Core(_V8, 16), "Cortex-A17": Core(_V8, 16),
    "Cortex-A32": Core(_V8, 8), "Cortex-A34": Core(_V8, 8), "Cortex-A35": Core(_V8, 8),
    "Cortex-A53": Core(_V8, 16), "Cortex-A57": Core(_V8, 16), "Cortex-A72": Core(_V8, 16),
    "Cortex-A73": Core(_V8, 16),
    "Cortex-A55": Core(_DOT, 32), "Cortex-A65": Core(_DOT, 32), "Cortex-A75": Core(_DOT, 64),
    "Cortex-A76": Core(_DOT, 64), "Cortex-A77": Core(_DOT, 64), "Cortex-A78": Core(_DOT, 64),
    "Cortex-A76AE": Core(_DOT, 64), "Cortex-A78AE": Core(_DOT, 64), "Cortex-A78C": Core(_DOT, 64),
    "Cortex-X1": Core(_DOT, 128), "Cortex-X1C": Core(_DOT, 128),
    "Cortex-A510": Core(_MM, 32), "Cortex-A520": Core(_MM, 32),
    "Cortex-A710": Core(_MM, 64), "Cortex-A715": Core(_MM, 64), "Cortex-A720": Core(_MM, 64),
    "Cortex-A725": Core(_MM, 64), "Cortex-X2": Core(_MM, 128), "Cortex-X3": Core(_MM, 128),
    "Cortex-X4": Core(_MM, 128), "Cortex-X925": Core(_MM, 192),
    "C1-Nano": Core(_MM, 32), "C1-Pro": Core(_MM, 64), "C1-Premium": Core(_MM, None),
    "C1-Ultra": Core(_MM, 192),
    "Neoverse-N1": Core(_DOT, 64), "Neoverse-V1": Core(_MM, 128), "Neoverse-N2": Core(_MM, 64),
    "Neoverse-V2": Core(_MM, 128), "Neoverse-N3": Core(_MM, 64), "Neoverse-V3": Core(_MM, 128),
    "Oryon": Core(_MM, 128),
    "Kryo-4XX-Gold": Core(_DOT, 64), "Kryo-4XX-Silver": Core(_DOT, 32),
    "Firestorm": Core(_DOT, 128), "Icestorm": Core(_DOT, 64),
    "Avalanche": Core(_MM, 128), "Blizzard": Core(_MM, 64),
    "Everest": Core(_MM, 128), "Sawtooth": Core(_MM, 64),
    "Apple performance": Core(_MM, 128), "Apple efficiency": Core(_MM, 64),
}  # fmt: skip
"""What is known of a core by its name; where pipes are not published they are a vendor's
optimization guide's or a reviewer's count, so all numbers here are estimates of a peak."""

PARTS: dict[int, dict[int, str]] = {
    0x00: {0xD02: "TaiShan-v200M"},  # HiSilicon's, which leaves the implementer out
    0x41: {  # ARM
        0x810: "ARM810", 0x920: "ARM920", 0x922: "ARM922", 0x926: "ARM926", 0x940: "ARM940",
        0x946: "ARM946", 0x966: "ARM966", 0xA20: "ARM1020", 0xA22: "ARM1022", 0xA26: "ARM1026",
        0xB02: "ARM11-MPCore", 0xB36: "ARM1136", 0xB56: "ARM1156", 0xB76: "ARM1176",
        0xC05: "Cortex-A5", 0xC07: "Cortex-A7", 0xC08: "Cortex-A8", 0xC09: "Cortex-A9",
        0xC0D: "Cortex-A17", 0xC0E: "Cortex-A17", 0xC0F: "Cortex-A15", 0xC14: "Cortex-R4",
        0xC15: "Cortex-R5", 0xC17: "Cortex-R7", 0xC18: "Cortex-R8",
        0xD01: "Cortex-A32", 0xD02: "Cortex-A34", 0xD03: "Cortex-A53", 0xD04: "Cortex-A35",
        0xD05: "Cortex-A55", 0xD06: "Cortex-A65", 0xD07: "Cortex-A57", 0xD08: "Cortex-A72",
        0xD09: "Cortex-A73", 0xD0A: "Cortex-A75", 0xD0B: "Cortex-A76", 0xD0C: "Neoverse-N1",
        0xD0D: "Cortex-A77", 0xD0E: "Cortex-A76AE", 0xD13: "Cortex-R52", 0xD14: "Cortex-R82AE",
        0xD15: "Cortex-R82", 0xD16: "Cortex-R52+", 0xD40: "Neoverse-V1", 0xD41: "Cortex-A78",
        0xD42: "Cortex-A78AE", 0xD43: "Cortex-A65AE", 0xD44: "Cortex-X1", 0xD46: "Cortex-A510",
        0xD47: "Cortex-A710", 0xD48: "Cortex-X2", 0xD49: "Neoverse-N2", 0xD4A: "Neoverse-E1",
        0xD4B: "Cortex-A78C", 0xD4C: "Cortex-X1C", 0xD4D: "Cortex-A715", 0xD4E: "Cortex-X3",
        0xD4F: "Neoverse-V2", 0xD80: "Cortex-A520", 0xD81: "Cortex-A720", 0xD82: "Cortex-X4",
        0xD83: "Neoverse-V3AE", 0xD84: "Neoverse-V3", 0xD85: "Cortex-X925", 0xD87: "Cortex-A725",
        0xD88: "Cortex-A520AE", 0xD89: "Cortex-A720AE", 0xD8A: "C1-Nano", 0xD8B: "C1-Pro",
        0xD8C: "C1-Ultra", 0xD8E: "Neoverse-N3", 0xD8F: "Cortex-A320", 0xD90: "C1-Premium",
    },
    0x42: {0x00F: "Brahma-B15", 0x100: "Brahma-B53", 0x516: "ThunderX2"},  # Broadcom
    0x43: {  # Cavium
        0x0A0: "ThunderX", 0x0A1: "ThunderX-88XX", 0x0A2: "ThunderX-81XX", 0x0A3: "ThunderX-83XX",
        0x0AF: "ThunderX2", 0x0B0: "OcteonTX2", 0x0B1: "OcteonTX2-98XX", 0x0B2: "OcteonTX2-96XX",
        0x0B3: "OcteonTX2-95XX", 0x0B8: "ThunderX3",
    },
    0x46: {0x001: "A64FX", 0x003: "MONAKA"},  # Fujitsu
    0x48: {  # HiSilicon
        0xD01: "TaiShan-v110", 0xD02: "TaiShan-v120", 0xD40: "Cortex-A76", 0xD41: "Cortex-A77",
    },
    0x4E: {0x000: "Denver", 0x003: "Denver-2", 0x004: "Carmel", 0x010: "Olympus"},  # NVIDIA
    0x50: {0x000: "X-Gene"},  # Applied Micro, later Ampere
    0x51: {  # Qualcomm
        0x001: "Oryon", 0x00F: "Scorpion", 0x02D: "Scorpion", 0x04D: "Krait", 0x06F: "Krait",
        0x201: "Kryo", 0x205: "Kryo", 0x211: "Kryo", 0x800: "Kryo-2XX-Gold",
        0x801: "Kryo-2XX-Silver", 0x802: "Kryo-3XX-Gold", 0x803: "Kryo-3XX-Silver",
        0x804: "Kryo-4XX-Gold", 0x805: "Kryo-4XX-Silver", 0xC00: "Falkor", 0xC01: "Saphira",
    },
    0x53: {0x001: "Exynos-M1", 0x002: "Exynos-M3", 0x003: "Exynos-M4", 0x004: "Exynos-M5"},
    0x56: {0x131: "Feroceon", 0x581: "PJ4", 0x584: "PJ4B-MP"},  # Marvell
    0x61: {  # Apple: a core's name, whatever chip it is in
        0x012: "Lightning", 0x013: "Thunder", 0x020: "Icestorm", 0x021: "Firestorm",
        0x022: "Icestorm", 0x023: "Firestorm", 0x024: "Icestorm", 0x025: "Firestorm",
        0x028: "Icestorm", 0x029: "Firestorm", 0x030: "Blizzard", 0x031: "Avalanche",
        0x032: "Blizzard", 0x033: "Avalanche", 0x034: "Blizzard", 0x035: "Avalanche",
        0x036: "Sawtooth", 0x037: "Everest", 0x038: "Blizzard", 0x039: "Avalanche",
    },
    0x6D: {0xD49: "Neoverse-N2"},  # Microsoft
    0x70: {  # Phytium
        0x303: "FTC310", 0x660: "FTC660", 0x661: "FTC661", 0x662: "FTC662", 0x663: "FTC663",
        0x664: "FTC664", 0x862: "FTC862",
    },
    0xC0: {0xAC3: "Ampere-1", 0xAC4: "Ampere-1A", 0xAC5: "Ampere-1B"},
}  # fmt: skip
"""Implementer -> part -> the core's name."""

_VARIANTS = {(0x53, 0x001, 4): "Exynos-M2", (0x50, 0x000, 3): "eMAG"}
"""Parts that only the variant tells apart."""


def core_name(implementer: int, part: int, variant: int | None = None) -> str:
    """The name of a core, or its numbers where it is in no table: ``0x41/0xfff``."""
    if variant is not None and (implementer, part, variant) in _VARIANTS:
        return _VARIANTS[implementer, part, variant]
    known = PARTS.get(implementer, {}).get(part)
    return known or f"{implementer:#04x}/{part:#05x}"


def common_isa(names: Iterable[str]) -> tuple[str, ...] | None:
    """What all of these cores have, sorted; None if one of them is not known."""
    cores = [CORES.get(name) for name in names]
    if not cores or None in cores:
        return None
    shared = set.intersection(*(set(core.isa) for core in cores if core))
    return tuple(sorted(shared))


def peak_int8_gops(clusters: Iterable[tuple[str, int, float | None]]) -> tuple[float, str] | None:
    """Peak of all cores in 1e9 operations a second, and how it was reckoned.

    Args:
        clusters: core name, how many, GHz.

    Returns:
        The number and its derivation, or None where a core or a clock is not known.
    """
    total, terms = 0.0, []
    for name, count, ghz in clusters:
        core = CORES.get(name)
        if core is None or core.int8_ops is None or ghz is None:
            return None
        total += count * ghz * core.int8_ops
        terms.append(f"{count} x {ghz:g} GHz x {core.int8_ops} operations a cycle ({name})")
    if not terms:
        return None
    return round(total, 1), "estimate: " + " + ".join(terms)
