"""/proc/cpuinfo of ARM, x86, RISC-V, LoongArch and MIPS kernels, new and old.

Newer kernels describe each CPU in a block of its own. Older ARM kernels list the CPUs first and
then describe one core for all of them, even where the others are of another type; CPUs that are
asleep are missing altogether. What is said of one core only is completed
from what is known of the chip, if the text names it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from edgeq.core.cpu import X86_FLAGS
from edgeq.devices.cores import core_name
from edgeq.devices.socs import (
    ALL_CORES,
    MAKERS,
    by_cores,
    is_chip,
    named,
    narrowed,
    of_riscv,
)

_ARM_ISA = {"asimd": "neon", "neon": "neon", "asimdhp": "asimdhp", "asimddp": "dotprod",
            "i8mm": "i8mm", "bf16": "bf16", "sve": "sve", "sve2": "sve2", "sme": "sme"}  # fmt: skip
_OTHER_ISA = {"lsx": "lsx", "lasx": "lasx"}
_VAGUE = re.compile(r"^generic|^rockchip|^amlogic|device tree|families|family|^samsung exynos")
"""Hardware lines that name no board."""
_RASPBERRY = {
    0x00: "Model A", 0x01: "Model B", 0x02: "Model A Plus", 0x03: "Model B Plus",
    0x04: "2 Model B", 0x06: "Compute Module", 0x08: "3 Model B", 0x09: "Zero",
    0x0A: "Compute Module 3", 0x0C: "Zero W",
    0x0D: "3 Model B Plus", 0x0E: "3 Model A Plus", 0x10: "Compute Module 3 Plus",
    0x11: "4 Model B", 0x12: "Zero 2 W", 0x13: "400", 0x14: "Compute Module 4",
    0x15: "Compute Module 4S", 0x17: "5 Model B", 0x18: "Compute Module 5", 0x19: "500",
    0x1A: "Compute Module 5 Lite",
}  # fmt: skip
"""Type in a revision code -> model."""

_RUNS_ON = ("x86_64", "amd64", "aarch64", "arm64")
_NARROW = ("armv7l", "armv6l", "i686")


@dataclass(frozen=True)
class CpuInfo:
    """What /proc/cpuinfo says.

    Args:
        arch: "aarch64", "armv7l", "armv6l", "x86_64", "i686", "riscv64", "loongarch64", "mips",
            "mips64"; None if it is no cpuinfo.
        cores: type -> how many; x86 cores, not their threads.
        threads: logical processors seen.
        isa: instruction sets, in `edgeq.core.cpu`'s words, sorted.
        board: what names the machine, None if nothing does.
        soc: what names the chip, None if nothing does.
        soc_by: "name" if the text names it, "cores" if only its cores tell.
        by_cpu: the type of each logical processor whose own block tells it.
        core_of: logical processor -> (package, core), on x86.
        ram_bytes: memory that a Raspberry Pi's revision code tells.
    """

    arch: str | None
    cores: tuple[tuple[str, int], ...]
    threads: int
    isa: tuple[str, ...]
    board: str | None
    soc: str | None
    soc_by: str | None
    by_cpu: Mapping[int, str] = field(default_factory=dict)
    core_of: Mapping[int, tuple[str, str]] = field(default_factory=dict)
    ram_bytes: int | None = None


def parse_cpuinfo(text: str) -> CpuInfo:
    """Read /proc/cpuinfo; whatever is not understood is left out."""
    lines = [(key.strip(), value.strip()) for key, colon, value in
             (line.partition(":") for line in text.splitlines()) if colon]  # fmt: skip
    threads = sum(key == "processor" and value.isdigit() for key, value in lines)
    first = {key.lower(): value for key, value in reversed(lines)}
    if "cpu part" in first:
        return _arm(text, lines, first, threads)
    if "vendor_id" in first and "flags" in first:
        return _x86(lines, first, threads)
    if first.get("isa", "").startswith("rv"):
        return _riscv(text, first, threads or sum(key == "hart" for key, _ in lines))
    if "mips" in first.get("isa", "") or ("system type" in first and "cpu model" in first):
        return _mips(lines, first, threads)
    if "loongson" in first.get("cpu family", "").lower():
        isa = [_OTHER_ISA[w] for w in first.get("features", "").split() if w in _OTHER_ISA]
        name, family = first.get("model name"), first.get("cpu family", "Loongson")
        count = len(set(_cores_of(lines).values())) or 1
        cores = ((family, count),)
        return CpuInfo("loongarch64", cores, threads, tuple(sorted(isa)), None, name, "name")
    return CpuInfo(None, (), threads, (), None, None, None)


def unsupported(arch: str | None) -> str | None:
    """Why edgeq's runtime cannot run on an architecture; None if it can, or if it is not known.

    Args:
        arch: as `platform.machine` says it.
    """
    if arch is None or arch.lower() in _RUNS_ON:
        return None
    bits = " (its 64-bit system, if it has one, can)" if arch in _NARROW else ""
    return (
        f"edgeq's runtime does not run on {arch}{bits}: its kernels are compiled by Numba, for "
        "x86-64 and 64-bit ARM; a GGUF file that edgeq writes runs there with llama.cpp"
    )


# ARM


def arm_isa(features: Iterable[str]) -> tuple[str, ...]:
    """Instruction sets, in `edgeq.core.cpu`'s words, of the kernel's words for them."""
    return tuple(sorted({_ARM_ISA[word] for word in features if word in _ARM_ISA}))


def _arm(text: str, lines: list[tuple[str, str]], first: dict[str, str], threads: int) -> CpuInfo:
    by_cpu, cores, parts, revision = _arm_cores(lines)
    words = first.get("features", "").split()
    isa = arm_isa(words)
    if "asimd" in words:
        arch = "aarch64"
    else:
        arch = "armv6l" if "v6l" in text[:200] else "armv7l"
    board, ram = _raspberry_pi(first)
    board, soc = _arm_names(text, lines, board)
    soc_by = "name" if soc else None
    if soc and len(cores) == 1:  # perhaps of one of them only
        known = next((all_ for chip, all_ in ALL_CORES.items() if chip in soc), cores)
        cores = known if next(iter(cores)) in known else cores
    if soc is None or soc in MAKERS:
        bogus = re.search(r"bogomips\s*:\s*(\d+(?:\.\d+)?)$", text, re.IGNORECASE | re.M)
        # kernels that use the generic timer give twice its frequency
        guess = by_cores(cores, parts, float(bogus[1]) / 2 if bogus else None, revision)
        soc_by = "cores" if soc or guess else None
        soc = narrowed(soc, cores, guess) if soc else guess
    ordered = tuple(sorted(cores.items(), key=lambda item: rank(item[0]), reverse=True))
    return CpuInfo(arch, ordered, threads, isa, board, soc, soc_by, by_cpu, ram_bytes=ram)


def _arm_cores(
    lines: list[tuple[str, str]],
) -> tuple[dict[int, str], dict[str, int], set[tuple[int, int]], str]:
    """Types by processor, cores by type, their part numbers, and the revision of the largest."""
    waiting: list[int] = []  # processors that the next core described stands for
    by_cpu, cores = dict[int, str](), Counter[str]()
    parts: set[tuple[int, int]] = set()
    maker, variant, revisions = 0x41, None, dict[str, str]()
    last = ""
    for key, value in lines:
        number = int(value, 16) if re.fullmatch(r"0x[0-9a-fA-F]+", value) else None
        if key == "processor" and value.isdigit():
            waiting.append(int(value))
        elif key == "CPU implementer" and number is not None:
            maker = number
        elif key == "CPU variant":
            variant = number
        elif key == "CPU part":
            numbers = [int(n, 16) for n in re.findall(r"0x[0-9a-fA-F]+", value)]
            for part in numbers:
                last = core_name(maker, part, variant)
                parts.add((maker, part))
                cores[last] += max(len(waiting) // len(numbers), 1)
            if len(numbers) == 1:
                by_cpu.update(dict.fromkeys(waiting, last))
            waiting = []
        elif key == "CPU revision" and last:
            revisions.setdefault(last, f"r{variant or 0}p{value}")
    if waiting and last:
        cores[last] += len(waiting)
    largest = max(cores, key=rank) if cores else ""
    return by_cpu, dict(cores), parts, revisions.get(largest, "")


def rank(core: str) -> tuple[int, str]:
    """A key that sorts slower types of cores before faster ones, where their names tell."""
    number = re.search(r"Cortex-([AX])(\d+)", core)
    if number:
        small = number[2] in ("5", "7", "32", "34", "35", "53", "55", "510", "520")
        return (3 if number[1] == "X" else 1 if small else 2), core
    return (
        1 if re.search(r"Silver|Nano|efficiency|FTC310|Icestorm|Blizzard|Sawtooth", core) else 2
    ), core


def _raspberry_pi(first: Mapping[str, str]) -> tuple[str | None, int | None]:
    """Model and memory by the revision code.

    Source: raspberrypi.com/documentation/computers/raspberry-pi.html, new-style revision codes.
    """
    code = first.get("revision", "")
    if not first.get("hardware", "BCM").startswith("BCM") or not re.fullmatch(r"\w{6,8}", code):
        return None, None
    try:
        bits = int(code, 16)
    except ValueError:
        return None, None
    model = _RASPBERRY.get(bits >> 4 & 0xFF)
    if not bits >> 23 & 1 or model is None:
        return None, None
    return f"Raspberry Pi {model}", 1 << 28 + (bits >> 20 & 7)


def _arm_names(
    text: str, lines: list[tuple[str, str]], board: str | None
) -> tuple[str | None, str | None]:
    """The board and the chip that the text names."""
    fields = {key: value for key, value in reversed(lines) if value}
    model, hardware = fields.get("Model", board), fields.get("Hardware")
    # a dump's header may end with the device tree's name: "Linux ... GNU/Linux / board"
    header = re.search(r"^Linux .*GNU/Linux / (.+)$", text, re.MULTILINE)
    if header and not model:
        model = header[1].strip()
    soc = None
    chip_words = (fields.get("model name"), fields.get("Processor"))
    for words in (model, fields.get("MSM Hardware"), hardware, *chip_words):
        # every Raspberry Pi's kernel says BCM2835
        if words and soc is None and not (model and words.startswith("BCM2835")):
            soc = named(words)
    if model is None and hardware and not is_chip(hardware) and not _VAGUE.search(hardware.lower()):
        model = hardware
    return model, soc


# others


def _x86(lines: list[tuple[str, str]], first: dict[str, str], threads: int) -> CpuInfo:
    words = set(first["flags"].split())
    isa = tuple(sorted(ours for theirs, ours in X86_FLAGS.items() if theirs in words))
    core_of = _cores_of(lines)
    count = len(set(core_of.values())) or max(threads, 1)
    name = re.sub(r"\s+", " ", first.get("model name", "")) or None
    arch = "x86_64" if "lm" in words else "i686"
    cores, by = (("x86-64", count),), "name" if name else None
    return CpuInfo(arch, cores, threads, isa, None, name, by, core_of=core_of)


def _cores_of(lines: Iterable[tuple[str, str]]) -> dict[int, tuple[str, str]]:
    """(package, core) of each logical processor, by its number where these are not told."""
    cores: dict[int, tuple[str, str]] = {}
    package, core, number = "", "", ""
    for key, value in [*lines, ("processor", "")]:
        if key == "processor":
            if number.isdigit():
                cores[int(number)] = (package, core or f"thread {number}")
            package, core, number = "", "", value
        elif key in ("physical id", "package"):
            package = value
        elif key in ("core id", "core"):
            core = value
    return cores


def _riscv(text: str, first: dict[str, str], threads: int) -> CpuInfo:
    isa = ("rvv",) if re.match(r"rv\d\d[a-z]*v", first["isa"].split("_")[0]) else ()
    model = re.sub(r"\(R\)", "", first.get("model name", ""))
    uarch = first.get("uarch") or model or ("T-Head" if "cpu-vector" in first else "")
    header = re.search(r"^Linux .*GNU/Linux / (.+)$", text, re.MULTILINE)
    board = header[1].strip() if header else None
    soc = named(board) if board else None
    soc_by = "name" if soc else None
    if soc is None and (soc := of_riscv(uarch, threads)):
        soc_by = "cores"
    cores = ((uarch or first["isa"].split("_")[0], max(threads, 1)),)
    return CpuInfo("riscv64", cores, threads, isa, board, soc, soc_by)


def _mips(lines: list[tuple[str, str]], first: dict[str, str], threads: int) -> CpuInfo:
    arch = "mips64" if "mips64" in first.get("isa", "") else "mips"
    count = len(set(_cores_of(lines).values())) or 1
    model = re.sub(r"\s+", " ", first.get("cpu model", "")) or arch
    # a chip's name, or the generic one of a kernel for several: "generic-loongson-machine"
    system = first.get("system type", "")
    soc = first.get("model name") or (None if not system or "generic" in system else system)
    by = "name" if soc else None
    return CpuInfo(arch, ((model, count),), threads, (), first.get("machine"), soc, by)
