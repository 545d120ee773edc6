"""Logs that people pass around: sbc-bench's, and lscpu's output in them."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from edgeq.devices.cores import common_isa
from edgeq.devices.cpuinfo import arm_isa, rank
from edgeq.devices.profile import Cluster
from edgeq.devices.socs import named

_BANNER = re.compile(r"^sbc-bench v[\d.]+ (.+?)(?: \(\w{3}, .*)?$", re.MULTILINE)
_REVIEW = re.compile(r"\A# (.+)\n\s*Tested with sbc-bench")
_TOPOLOGY = re.compile(r"^\s+\d+\s+[\d-]+\s+[\d-]+\s+\d+\s+(\d+)\s+([\w .,+-]+?) / r\d+p\d+", re.M)
_FREE = re.compile(r"^Mem:\s+([\d.]+)([KMG])i", re.MULTILINE)
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class Log:
    """What a log says of its machine; None or empty where it does not."""

    board: str | None
    soc: str | None
    arch: str | None
    clusters: tuple[Cluster, ...]
    isa: tuple[str, ...]
    ram_bytes: int | None


def is_log(text: str) -> bool:
    """Whether the text is a log this module reads."""
    return bool(_BANNER.search(text[:400]) or _REVIEW.search(text[:400]))


def parse_log(text: str) -> Log:
    """Read an sbc-bench log or review."""
    title = _BANNER.search(text[:400]) or _REVIEW.search(text[:400])
    board = title[1].strip() if title else None
    fields = dict(re.findall(r"^([A-Z][\w ()]+?):\s+(\S.*)$", text, re.MULTILINE))
    compatible = re.search(r"^DT compat: (.+(?:\n {11}\S.+)*)", text, re.MULTILINE)
    guess = re.search(r"^SoC guess: (.+)$", text, re.MULTILINE)
    names = (compatible and compatible[1], guess and guess[1], board)
    soc = next((model for words in names if words and (model := named(words))), None)
    clusters = _clusters(text, fields)
    isa = arm_isa(fields.get("Flags", "").split())
    if not isa:
        isa = common_isa(cluster.core for cluster in clusters) or ()
    arch = fields.get("Architecture")
    if arch is None and (kernel := re.search(r"Kernel: (\w+), Userland", text)):
        arch = kernel[1]
    free = _FREE.search(text)
    ram = int(float(free[1]) * _UNITS[free[2]]) if free else None
    return Log(board, soc, arch, clusters, isa, ram)


def _clusters(text: str, texts: dict[str, str]) -> tuple[Cluster, ...]:
    # a log may show its table twice; a processor counts once
    cpus = {row[0].split()[0]: (row[2], int(row[1])) for row in _TOPOLOGY.finditer(text)}
    if cpus:
        counted = Counter(cpus.values())
        clusters = [Cluster(core, count, mhz / 1000) for (core, mhz), count in counted.items()]
        return tuple(sorted(clusters, key=lambda c: (rank(c.core), c.ghz or 0), reverse=True))
    core, count = texts.get("Model name"), texts.get("CPU(s)", "")
    if core is None or not count.isdigit():
        return ()
    mhz = texts.get("CPU max MHz", "")
    ghz = float(mhz) / 1000 if re.fullmatch(r"[\d.]+", mhz) else None
    return (Cluster(core, int(count), ghz),)
