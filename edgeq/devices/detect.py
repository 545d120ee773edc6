"""What this machine is, and where each fact was read.

`detect` reads /proc and /sys (or copies of them below another root) and asks the few commands
that know more (``vcgencmd``, ``getprop``, ``sysctl``); `detect_text` reads a dump or log that
somebody sent. A fact that cannot be had is None or empty. The machine is matched with a profile:
its own, that of another device with the same chip, or a generic tier, and which of these it is
is always said.
"""

from __future__ import annotations

import contextlib
import platform
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from edgeq.core.cpu import available_cores, this_cpu
from edgeq.core.errors import DeviceError
from edgeq.core.memory import group_limits
from edgeq.devices.cores import peak_int8_gops
from edgeq.devices.cpuinfo import CpuInfo, parse_cpuinfo, rank
from edgeq.devices.dumps import is_log, parse_log
from edgeq.devices.match import best_profile
from edgeq.devices.profile import Cluster, DeviceProfile, find
from edgeq.devices.socs import named
from edgeq.devices.throttling import BITS, FIRMWARE_FLAGS, GET_THROTTLED, parse_throttled

Ask = Callable[[Sequence[str]], str | None]
"""Runs a command and returns what it wrote, None if it is not there or failed."""

_PATIENCE_S = 3.0


@dataclass(frozen=True)
class Cache:
    """One cache of the first processor."""

    level: int
    kind: str
    nbytes: int
    shared_by: int


@dataclass(frozen=True)
class Throttle:
    """What slows the machine down, or has since it was started."""

    now: tuple[str, ...]
    since_boot: tuple[str, ...]


@dataclass(frozen=True)
class Detected:
    """A machine's facts.

    Args:
        title: the board, phone or machine; None unknown, as all of these.
        soc: its chip; several names joined by "or" if they cannot be distinguished.
        arch: as `platform.machine` says it.
        clusters: cores by type, fastest first.
        threads: logical processors that are awake.
        isa: instruction sets, in `edgeq.core.cpu`'s words.
        caches: of the first processor.
        ram_bytes: memory that the kernel sees.
        available_bytes: what programs can take without swapping.
        swap_bytes: 0 without swap.
        cgroup_bytes: limit of this process's control group; None without a limit.
        governors: cpufreq policy -> governor.
        temperatures_c: sensor -> degrees Celsius.
        throttle: None where nothing tells.
        profile: the profile that fits best.
        match: "device" if it is this one's own, "chip" if it is of another device with this
            chip, "tier" if it is a generic one.
        sources: field -> where it was read.
    """

    title: str | None = None
    soc: str | None = None
    arch: str | None = None
    clusters: tuple[Cluster, ...] = ()
    threads: int | None = None
    isa: tuple[str, ...] = ()
    caches: tuple[Cache, ...] = ()
    ram_bytes: int | None = None
    available_bytes: int | None = None
    swap_bytes: int | None = None
    cgroup_bytes: int | None = None
    governors: Mapping[str, str] = field(default_factory=dict)
    temperatures_c: Mapping[str, float] = field(default_factory=dict)
    throttle: Throttle | None = None
    profile: str | None = None
    match: str | None = None
    sources: Mapping[str, str] = field(default_factory=dict)

    @property
    def cores(self) -> int | None:
        """Cores of all types, None if unknown."""
        return sum(cluster.count for cluster in self.clusters) or None

    def to_dict(self) -> dict[str, Any]:
        """A form for JSON: every field, None where unknown."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        plain["clusters"] = [vars(cluster) for cluster in self.clusters]
        plain["caches"] = [vars(cache) for cache in self.caches]
        plain["throttle"] = (
            None if self.throttle is None else {k: list(v) for k, v in vars(self.throttle).items()}
        )
        return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}

    def as_profile(
        self, read_gb_s: Mapping[int, float] | None = None, int8_gops: float | None = None
    ) -> DeviceProfile:
        """The profile of this very machine: what was detected, on top of the one that matches.

        Args:
            read_gb_s: measured, threads -> 1e9 bytes per second.
            int8_gops: measured, 1e9 operations per second.
        """
        base = find(self.profile) if self.profile else None
        sources = dict(base.sources) if base else {}
        if base and self.match == "tier":
            sources = {key: f"estimate: as {base.name}: {text}" for key, text in sources.items()}
        facts: dict[str, Any] = {"isa": self.isa} if self.isa else {}
        kinds = [(c.core, c.count) for c in self.clusters]
        same = base is not None and kinds == [(c.core, c.count) for c in base.clusters]
        # a dump without clocks knows less of its own device than the profile does
        if kinds and not (same and None in [c.ghz for c in self.clusters]):
            facts["clusters"] = self.clusters
            peak = peak_int8_gops((c.core, c.count, c.ghz) for c in self.clusters)
            if peak or self.match == "tier":
                facts["int8_gops"], sources["int8_gops"] = peak or (None, "")
        if self.ram_bytes:
            facts |= {"ram_bytes": self.ram_bytes}
            facts["usable_bytes"], sources["usable_bytes"] = self._usable(base)
        sources |= {name: f"detected: {self.sources.get(name, 'this machine')}" for name in facts
                    if name in ("clusters", "ram_bytes", "isa")}  # fmt: skip
        for name, value in (("read_gb_s", read_gb_s), ("int8_gops", int8_gops)):
            if value is not None:
                facts[name], sources[name] = value, "measured: on this machine by edgeq"
        start = base or DeviceProfile("here", "this machine", "generic")
        if base and self.match == "tier":  # its memory is typical, not this machine's
            start = replace(base, memory=None)
            if base.read_gb_s and self.cores and read_gb_s is None:
                facts["read_gb_s"] = {self.cores: max(base.read_gb_s.values())}
        kept = {key: text for key, text in sources.items() if text}
        return replace(start, name="here", title=self.title or self.soc or "this machine",
                       soc=self.soc or start.soc, sources=kept, **facts)  # fmt: skip

    def _usable(self, base: DeviceProfile | None) -> tuple[int, str]:
        """What a process may hold of `ram_bytes`, and how that is known."""
        ram = self.ram_bytes or 0
        room = [n for n in (self.available_bytes, self.cgroup_bytes) if n]
        if room:
            source = "detected: the least of memory, free memory and cgroup limit"
            return min(*room, ram), source
        # a dump tells how much memory there is, not how much of it is free
        if base and base.usable_bytes and base.ram_bytes:
            share = base.usable_bytes / base.ram_bytes
            return int(ram * share), f"estimate: the share of the memory that {base.name} has free"
        return int(ram * 0.8), "estimate: 0.8 of the memory; a dump does not tell what is free"


def detect(root: Path | str = "/", ask: Ask | None = None) -> Detected:
    """The facts of this machine, or of one whose /proc and /sys were copied below ``root``.

    Args:
        root: the folder that holds ``proc`` and ``sys``.
        ask: runs commands; by default really, and none at all for a root that is not "/".
    """
    root = Path(root)
    here = root == Path("/")
    ask = ask or (_run if here else lambda command: None)
    if here and sys.platform == "darwin":
        return _matched(_darwin(ask), [])
    files = _Files(root)
    info = parse_cpuinfo(files.text("proc/cpuinfo") or "")
    detected = _from_cpuinfo(info, "/proc/cpuinfo")
    facts: dict[str, Any] = {}
    sources = dict(detected.sources)
    ids = _identify(files, ask, detected, facts, sources)
    clusters = _clock(files, info, _hybrid(files, info, detected.clusters, sources), sources)
    if here:
        facts["threads"], sources["threads"] = available_cores(), "sched_getaffinity"
        if not detected.arch:
            facts["arch"] = platform.machine()
    facts |= _memory(files, sources) | _state(files, ask, sources)
    return _matched(replace(detected, clusters=clusters, sources=sources, **facts), ids)


def detect_text(text: str, name: str = "the text") -> Detected:
    """The facts in a dump of /proc/cpuinfo or in an sbc-bench log.

    Args:
        text: all of it.
        name: what to call it in ``sources`` and errors.

    Raises:
        DeviceError: it is not text.
    """
    if "\0" in text[:4096]:
        raise DeviceError(
            f"{name} is not text; give a copy of /proc/cpuinfo, an sbc-bench log, or a folder that "
            "holds copies of proc and sys"
        )
    text = re.sub(r"\r\n?", "\n", text)
    if not is_log(text):
        return _matched(_from_cpuinfo(parse_cpuinfo(text), name), [])
    log = parse_log(text)
    known = {key: name for key, value in vars(log).items() if value}
    known["title"] = known.pop("board", "")
    detected = Detected(
        title=log.board, soc=log.soc, arch=log.arch, clusters=log.clusters,
        threads=sum(c.count for c in log.clusters) or None, isa=log.isa, ram_bytes=log.ram_bytes,
        sources={key: value for key, value in known.items() if value},
    )  # fmt: skip
    return _matched(detected, [])


class _Files:
    """Reads below a root; what cannot be read is None."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def text(self, path: str) -> str | None:
        try:
            raw = (self.root / path).read_bytes()
        except OSError:
            return None
        return raw.decode("utf-8", "replace").rstrip("\0\n ")

    def number(self, path: str) -> int | None:
        text = self.text(path) or ""
        return int(text) if re.fullmatch(r"-?\d+", text) else None

    def folders(self, path: str, pattern: str) -> list[str]:
        """Folders of a folder by a pattern that ends in a number, in the order of the number."""
        try:
            names = [entry.name for entry in (self.root / path).glob(pattern)]
        except OSError:
            return []
        return [f"{path}/{name}" for name in
                sorted(names, key=lambda n: (int(re.sub(r"\D", "", n) or 0), n))]  # fmt: skip


def _run(command: Sequence[str]) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    import subprocess  # most machines have none of the commands

    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_PATIENCE_S, check=True
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip()


def _from_cpuinfo(info: CpuInfo, path: str) -> Detected:
    sources = {}
    for name, value in (("arch", info.arch), ("clusters", info.cores), ("isa", info.isa),
                        ("threads", info.threads), ("title", info.board),
                        ("ram_bytes", info.ram_bytes)):  # fmt: skip
        if value:
            sources[name] = path
    if info.soc:
        reason = "names it" if info.soc_by == "name" else "has its cores"
        sources["soc"] = f"{path} {reason}"
    clusters = tuple(Cluster(core, count) for core, count in info.cores)
    return Detected(title=info.board, soc=info.soc, arch=info.arch, clusters=clusters,
                    threads=info.threads or None, isa=info.isa, ram_bytes=info.ram_bytes,
                    sources=sources)  # fmt: skip


def _identify(
    files: _Files, ask: Ask, detected: Detected, facts: dict[str, Any], sources: dict[str, str]
) -> list[str]:
    """Names of the machine and its chip from elsewhere; returns all ids to match profiles by."""
    ids: list[str] = []
    tree = next(
        (path for path in ("proc/device-tree", "sys/firmware/devicetree/base")
         if files.text(f"{path}/model")), None,
    )  # fmt: skip
    titles = [("title", f"{tree}/model", files.text(f"{tree}/model"))] if tree else []
    compatible = (files.text(f"{tree}/compatible") or "").split("\0") if tree else []
    ids += [name for name in compatible if name]
    properties = _android(files, ask)
    model = properties.get("ro.product.model")
    if model:
        maker = properties.get("ro.product.manufacturer", "")
        ids.append(model)
        titles.append(("title", "Android's properties", f"{maker.capitalize()} {model}".strip()))
    for path in ("sys/devices/virtual/dmi/id", "sys/class/dmi/id"):
        vendor, product = files.text(f"{path}/sys_vendor"), files.text(f"{path}/product_name")
        if product and not detected.title:
            ids.append(product)
            titles.append(("title", f"{path}/product_name", f"{vendor or ''} {product}".strip()))
            break
    for name, path, value in titles:
        if value:
            facts[name], sources[name] = value, _absolute(path)
    chips = [
        ("Android's properties", properties.get("ro.soc.model")),
        ("Android's properties", properties.get("ro.board.platform")),
        (f"{tree}/compatible", " ".join(compatible)),
        ("sys/devices/soc0/machine", files.text("sys/devices/soc0/machine")),
        ("sys/devices/soc0/soc_id", files.text("sys/devices/soc0/soc_id")),
        (f"{tree}/model", files.text(f"{tree}/model") if tree else None),
    ]
    for path, value in chips:
        soc = named(value) if value else None
        if soc and ("soc" not in facts):
            facts["soc"], sources["soc"] = soc, _absolute(path)
    return ids


def _android(files: _Files, ask: Ask) -> dict[str, str]:
    wanted = ("ro.product.model", "ro.product.manufacturer", "ro.soc.model", "ro.board.platform")
    texts = [files.text(f"{part}/build.prop") or "" for part in ("system", "vendor", "product")]
    properties = dict(re.findall(r"^([\w.]+)=(.+)$", "\n".join(texts), re.MULTILINE))
    if files.text("system/build.prop") is None:
        properties |= {name: value for name in wanted if (value := ask(["getprop", name]))}
    # builds split their properties: ro.product.vendor.model stands for ro.product.model
    for name in wanted:
        part = name.removeprefix("ro.product.")
        properties.setdefault(name, properties.get(f"ro.product.vendor.{part}", ""))
    return {name: properties[name] for name in wanted if properties[name]}


def _absolute(path: str) -> str:
    return f"/{path}" if path.startswith(("proc", "sys")) else path


def _clock(
    files: _Files, info: CpuInfo, clusters: tuple[Cluster, ...], sources: dict[str, str]
) -> tuple[Cluster, ...]:
    """Clusters by core type and highest clock, if cpufreq reports it."""
    folder = "sys/devices/system/cpu/cpufreq"
    clocks: dict[int, float] = {}
    for policy in files.folders(folder, "policy*"):
        khz = files.number(f"{policy}/cpuinfo_max_freq")
        for cpu in (files.text(f"{policy}/related_cpus") or "").split():
            if khz and cpu.isdigit():
                clocks[int(cpu)] = khz / 1e6
    if not clocks or not clusters:
        return clusters
    sources["clusters"] += f" and /{folder}"
    if not info.by_cpu and len(clusters) == 1:  # x86, where several threads are one core
        return (replace(clusters[0], ghz=max(clocks.values())),)
    if not info.by_cpu:
        ghz = {
            c.core: max((clocks.get(n, 0) for n in _hybrid_cpus(files, c.core)), default=0)
            for c in clusters
        }
        return tuple(replace(c, ghz=ghz[c.core] or None) for c in clusters)
    if sum(c.count for c in clusters) != len(info.by_cpu):
        return clusters
    counted = Counter((core, clocks.get(cpu)) for cpu, core in info.by_cpu.items())
    known = [Cluster(core, count, ghz) for (core, ghz), count in counted.items()]
    return tuple(sorted(known, key=lambda c: (rank(c.core), c.ghz or 0), reverse=True))


_HYBRID = {"Intel performance": "cpu_core", "Intel efficiency": "cpu_atom"}
"""Types of cores of hybrid Intel processors -> their performance counters below /sys/devices."""


def _hybrid_cpus(files: _Files, core: str) -> list[int]:
    """The logical processors of a type in `_HYBRID`."""
    return _numbers(files.text(f"sys/devices/{_HYBRID[core]}/cpus") or "")


def _hybrid(
    files: _Files, info: CpuInfo, clusters: tuple[Cluster, ...], sources: dict[str, str]
) -> tuple[Cluster, ...]:
    """Both types of cores of a hybrid Intel processor, which its cpuinfo does not distinguish."""
    counts = {
        core: len({info.core_of[cpu] for cpu in _hybrid_cpus(files, core) if cpu in info.core_of})
        for core in _HYBRID
    }
    if not all(counts.values()) or sum(counts.values()) != sum(c.count for c in clusters):
        return clusters
    sources["clusters"] += " and /sys/devices/cpu_core, cpu_atom"
    return tuple(Cluster(core, count) for core, count in counts.items())


def _memory(files: _Files, sources: dict[str, str]) -> dict[str, Any]:
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB", files.text("proc/meminfo") or "", re.MULTILINE))
    facts: dict[str, Any] = {}
    for name, key in (("ram_bytes", "MemTotal"), ("available_bytes", "MemAvailable"),
                      ("swap_bytes", "SwapTotal")):  # fmt: skip
        if key in fields:
            facts[name], sources[name] = int(fields[key]) * 1024, f"/proc/meminfo {key}"
    limit = min(group_limits(files.root), key=lambda limit: limit.nbytes, default=None)
    if limit:
        facts["cgroup_bytes"], sources["cgroup_bytes"] = limit.nbytes, limit.path
    caches = []
    for index in files.folders("sys/devices/system/cpu/cpu0/cache", "index*"):
        size = re.fullmatch(r"(\d+)([KM])", files.text(f"{index}/size") or "")
        level, kind = files.number(f"{index}/level"), files.text(f"{index}/type")
        if size and level and kind:
            nbytes = int(size[1]) << (10 if size[2] == "K" else 20)
            shared = len(_numbers(files.text(f"{index}/shared_cpu_list") or ""))
            caches.append(Cache(level, kind.lower(), nbytes, shared))
    if caches:
        facts["caches"] = tuple(caches)
        sources["caches"] = "/sys/devices/system/cpu/cpu0/cache"
    return facts


def _numbers(listed: str) -> list[int]:
    """The processors that a list such as ``0-3,8`` names; 65,536 of a range at most."""
    numbers: list[int] = []
    for part in filter(None, listed.split(",")):
        first, _, last = part.partition("-")
        if first.isdigit() and (last.isdigit() or not last):
            stop = min(int(last or first), int(first) + (1 << 16) - 1)
            numbers += range(int(first), stop + 1)
    return numbers


def _state(files: _Files, ask: Ask, sources: dict[str, str]) -> dict[str, Any]:
    """What changes: governors, temperatures, throttling."""
    facts: dict[str, Any] = {}
    governors = {}
    for policy in files.folders("sys/devices/system/cpu/cpufreq", "policy*"):
        governor = files.text(f"{policy}/scaling_governor")
        if governor:
            governors[policy.rpartition("/")[2]] = governor
    if governors:
        facts["governors"] = governors
        sources["governors"] = "/sys/devices/system/cpu/cpufreq"
    temperatures: dict[str, float] = {}
    for zone in files.folders("sys/class/thermal", "thermal_zone*"):
        milli = files.number(f"{zone}/temp")
        if milli is not None and -40_000 < milli < 200_000:
            label = files.text(f"{zone}/type") or "zone"
            known = label in temperatures
            temperatures[f"{label} {zone.rpartition('/')[2]}" if known else label] = milli / 1000
    if temperatures:
        facts["temperatures_c"], sources["temperatures_c"] = temperatures, "/sys/class/thermal"
    for text, source in (
        (ask(GET_THROTTLED), " ".join(GET_THROTTLED)),
        (files.text(FIRMWARE_FLAGS), f"/{FIRMWARE_FLAGS}"),
    ):
        with contextlib.suppress(DeviceError):  # nothing, or nothing that is a number
            flags = parse_throttled(text or "")
            kinds = BITS.values()
            facts["throttle"] = Throttle(
                tuple(kind for kind in kinds if flags[kind]),
                tuple(kind for kind in kinds if flags[f"{kind} since start"]),
            )
            sources["throttle"] = source
            break
    return facts


def _darwin(ask: Ask) -> Detected:
    """A Mac, by sysctl."""
    soc = ask(["sysctl", "-n", "machdep.cpu.brand_string"]) or None
    counts = [ask(["sysctl", "-n", f"hw.perflevel{level}.physicalcpu"]) or "" for level in (0, 1)]
    kinds = ("Apple performance", "Apple efficiency")
    clusters = tuple(Cluster(k, int(n)) for k, n in zip(kinds, counts, strict=True) if n.isdigit())
    memory = ask(["sysctl", "-n", "hw.memsize"]) or ""
    title = ask(["sysctl", "-n", "hw.model"]) or None
    isa = tuple(sorted({*this_cpu().features, "neon"}))
    sources = dict.fromkeys(("title", "soc", "clusters", "ram_bytes"), "sysctl")
    return Detected(title=title, soc=soc, arch=platform.machine(), clusters=clusters,
                    threads=available_cores(), isa=isa, sources=sources,
                    ram_bytes=int(memory) if memory.isdigit() else None)  # fmt: skip


def _matched(detected: Detected, ids: Sequence[str]) -> Detected:
    """Add the profile that fits best."""
    texts = [text for text in (*ids, detected.title, detected.soc) if text]
    name, how = best_profile(texts, detected.soc, detected.arch, detected.isa, detected.ram_bytes,
                             detected.cores)  # fmt: skip
    return replace(detected, profile=name, match=how)
