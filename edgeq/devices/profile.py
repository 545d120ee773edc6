"""Device profiles: what a machine is and can do, with a source for every number.

Profiles are tables of TOML files beside this module. A key holds the field of that name; sizes
are texts such as "8 GiB". ``like = "name"`` takes over what another profile says. ``sources``
names, field by field, where a number comes from: a publication, or ``estimate: how``. A number
that cannot be had is left out and is None.

Two numbers are reckoned where they are not given: ``read_gb_s`` from ``memory``, ``int8_gops``
from the cores. Their sources say so.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from edgeq.core.documents import read_document
from edgeq.core.errors import DeviceError, FormatError, unknown
from edgeq.devices.cores import common_isa, peak_int8_gops

KINDS = ("sbc", "phone", "laptop", "server", "generic")
NUMBERS = ("clusters", "ram_bytes", "usable_bytes", "read_gb_s", "int8_gops", "idle_watts",
           "load_watts", "memory")  # fmt: skip
"""Fields that need a source."""
READ_SHARE = 0.7
"""Of the memory's peak rate, what reading by all cores reaches where nobody measured it. Source:
STREAM reaches 69 to 78 % on TI's AM64x, ti.com SPRACV1B; decoding 60 % on a Raspberry Pi 5."""

_FOLDER = Path(__file__).parent / "profiles"
_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_CITED = re.compile(r"[\w-]+\.[a-z]{2,}|^estimate: |[\w.-]+#\d+|^detected: |^measured: ")


@dataclass(frozen=True)
class Cluster:
    """Cores of one type.

    Args:
        core: the type, as `edgeq.devices.cores` names it.
        count: how many.
        ghz: their highest clock, None if unknown.
    """

    core: str
    count: int
    ghz: float | None = None


@dataclass(frozen=True)
class DeviceProfile:
    """A device's numbers.

    Args:
        name: what a user calls it, such as "rpi5-4gb".
        title: its full name.
        kind: one of `KINDS`.
        soc: its chip.
        isa: instruction sets that all cores have, in `edgeq.core.cpu`'s words.
        clusters: the cores, fastest first.
        ram_bytes: memory the device is sold with.
        usable_bytes: what one process, or on a phone one app, may hold of it.
        memory: type, transfers per second and width, such as "LPDDR5-6400 x 64"; None unknown.
        read_gb_s: 1e9 bytes per second that so many threads read together; None unknown.
        int8_gops: peak of all cores in 1e9 8-bit operations per second, a multiplication and an
            addition counting as two; None unknown.
        idle_watts: power of the whole device at rest; None unknown.
        load_watts: power of the whole device with all cores busy; None unknown.
        accelerators: what else could compute; edgeq's own runtime uses none of them.
        match: patterns (as of a shell, without regard to case) that the board's, the model's or
            the chip's name matches on this device.
        sources: field -> where its number comes from.
    """

    name: str
    title: str
    kind: str
    soc: str | None = None
    isa: tuple[str, ...] = ()
    clusters: tuple[Cluster, ...] = ()
    ram_bytes: int | None = None
    usable_bytes: int | None = None
    memory: str | None = None
    read_gb_s: Mapping[int, float] | None = None
    int8_gops: float | None = None
    idle_watts: float | None = None
    load_watts: float | None = None
    accelerators: tuple[str, ...] = ()
    match: tuple[str, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise FormatError(f"profile {self.name}: {unknown('kind', self.kind, KINDS)}")
        for cluster in self.clusters:
            if cluster.count < 1 or (cluster.ghz is not None and not 0 < cluster.ghz < 10):
                raise FormatError(
                    f"profile {self.name}: {cluster} has an impossible count or clock; "
                    "clocks are in GHz"
                )
        for name in ("ram_bytes", "usable_bytes", "int8_gops", "idle_watts", "load_watts"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise FormatError(f"profile {self.name}: {name} is {value}; leave out what is 0")
        if self.ram_bytes and self.usable_bytes and self.usable_bytes > self.ram_bytes:
            raise FormatError(
                f"profile {self.name}: usable_bytes {self.usable_bytes} is more than its memory, "
                f"{self.ram_bytes}"
            )
        if self.read_gb_s is not None:
            rates = dict(sorted(self.read_gb_s.items()))
            if not rates or min(rates) < 1 or not min(rates.values()) > 0:
                raise FormatError(
                    f"profile {self.name}: read_gb_s is {rates}; write threads = GB/s, both above 0"
                )
            object.__setattr__(self, "read_gb_s", MappingProxyType(rates))
        object.__setattr__(self, "sources", MappingProxyType(dict(self.sources)))
        for name in NUMBERS:
            text = self.sources.get(name, "")
            if getattr(self, name) not in (None, ()) and not _CITED.search(text):
                raise FormatError(
                    f"profile {self.name}: {name} has the source {text!r}; name a publication "
                    "(with its site or repository#number), or write 'estimate: how'"
                )

    @property
    def cores(self) -> int:
        """Cores of all types; 0 where they are not known."""
        return sum(cluster.count for cluster in self.clusters)

    def to_dict(self) -> dict[str, Any]:
        """A form for JSON: every field, None where unknown."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        plain["clusters"] = [vars(cluster) for cluster in self.clusters]
        plain["sources"] = dict(self.sources)
        if self.read_gb_s is not None:
            plain["read_gb_s"] = {str(threads): rate for threads, rate in self.read_gb_s.items()}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}

    def to_toml(self) -> str:
        """The text of a profile file, which `find` reads."""
        lines = [f"[{self.name}]"]
        for key, value in self.to_dict().items():
            if key in ("name", "sources") or value in (None, []):
                continue
            if key in ("ram_bytes", "usable_bytes"):
                value = f"{value} B"
            lines.append(f"{key} = {_toml(value)}")
        lines.append(f"[{self.name}.sources]")
        lines += [f"{key} = {_toml(text)}" for key, text in self.sources.items()]
        return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, dict):
        pairs = (f"{key} = {_toml(item)}" for key, item in value.items() if item is not None)
        return "{ " + ", ".join(pairs) + " }"
    return json.dumps(value, ensure_ascii=False)


def names() -> list[str]:
    """Every profile's name, in the order of the files."""
    return list(_all())


def find(name: str) -> DeviceProfile:
    """A profile by its name, or the only one of a TOML file of the user's own.

    Args:
        name: such as "rpi5", or a path that ends in ``.toml``.

    Raises:
        DeviceError: there is no profile of that name.
        FormatError: the file is not a profile.
    """
    if name.endswith(".toml"):
        own = read_profiles(Path(name), known=_all())
        if len(own) != 1:
            raise FormatError(f"{name} holds {len(own)} profiles; write exactly one")
        return next(iter(own.values()))
    profiles = _all()
    if name.lower() not in profiles:
        raise DeviceError(
            f"{unknown('device', name, profiles)}; `edgeq devices list` shows them, "
            "`edgeq devices detect` this machine"
        )
    return profiles[name.lower()]


@functools.cache
def _all() -> dict[str, DeviceProfile]:
    profiles: dict[str, DeviceProfile] = {}
    for path in sorted(_FOLDER.glob("*.toml")):
        profiles.update(read_profiles(path, known=profiles))
    return profiles


def read_profiles(path: Path, known: Mapping[str, DeviceProfile]) -> dict[str, DeviceProfile]:
    """The profiles of one file.

    Args:
        path: a TOML file.
        known: profiles of other files, which ``like`` may name.

    Raises:
        FormatError: the file cannot be read, is not TOML, has an unknown key, or a number without
            a source.
    """
    tables = read_document(path)
    raw: dict[str, dict[str, Any]] = {name: _fields_of(profile) for name, profile in known.items()}
    profiles = {}
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise FormatError(
                f"{path}: {name} is outside of a profile; start the profile with [its-name]"
            )
        if name in raw:
            raise FormatError(f"{path}: the profile {name!r} occurs twice")
        raw[name] = _merged(name, table, raw)
        profiles[name] = _profile(name, raw[name])
    return profiles


def _fields_of(profile: DeviceProfile) -> dict[str, Any]:
    table = {f.name: getattr(profile, f.name) for f in fields(profile) if f.name != "name"}
    return {key: value for key, value in table.items() if value not in (None, ())}


def _merged(name: str, table: dict[str, Any], raw: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """A table in the types of `DeviceProfile`, on top of the one it is like."""
    own = dict(table)
    like = own.pop("like", None)
    if like is not None and like not in raw:
        raise FormatError(f"profile {name}: like = {unknown('profile', str(like), raw)}")
    base = dict(raw[like]) if like else {}
    known = {f.name for f in fields(DeviceProfile)} - {"name"}
    for key in own:
        if key not in known:
            raise FormatError(f"profile {name}: {unknown('key', key, known)}")
    sources = own.pop("sources", {})
    own = {key: _value(name, key, value) for key, value in own.items()}
    if stray := set(sources) - {*NUMBERS, "isa", "soc", "accelerators"}:
        raise FormatError(f"profile {name}: sources names {sorted(stray)}, which are not numbers")
    inherited = {k: v for k, v in base.get("sources", {}).items() if k not in own}
    # what was reckoned from other numbers is reckoned anew
    for reckoned, needs in (("int8_gops", "clusters"), ("read_gb_s", "memory")):
        if needs in own and inherited.get(reckoned, "").startswith("estimate: "):
            base.pop(reckoned, None)
            inherited.pop(reckoned)
    return {**base, **own, "sources": {**inherited, **sources}}


def _value(name: str, key: str, value: Any) -> Any:
    """A TOML value as the type of its field."""
    try:
        if key == "clusters":
            return tuple(Cluster(**cluster) for cluster in value)
        if key in ("ram_bytes", "usable_bytes"):
            number, unit = value.split()
            return int(float(number) * _UNITS[unit])
        if key == "read_gb_s":
            return {int(threads): float(rate) for threads, rate in value.items()}
        if key in ("int8_gops", "idle_watts", "load_watts"):
            return float(value)
        if key in ("isa", "accelerators", "match"):
            if isinstance(value, str):
                raise TypeError("expected a list")
            return tuple(map(str, value))
    except (TypeError, ValueError, KeyError, AttributeError) as err:
        raise FormatError(
            f"profile {name}: {key} = {value!r} has the wrong form ({err}); sizes are "
            "written '8 GiB', cores { core = 'Cortex-A76', count = 4, ghz = 2.4 }"
        ) from err
    if not isinstance(value, str):
        raise FormatError(f"profile {name}: {key} = {value!r} must be a string")
    return value


def _profile(name: str, table: dict[str, Any]) -> DeviceProfile:
    """The profile, with what can be reckoned from the rest."""
    for key in ("title", "kind"):
        if key not in table:
            raise FormatError(f"profile {name}: {key} is missing")
    sources = table["sources"] = dict(table["sources"])
    clusters = table.get("clusters", ())
    if "isa" not in table and (isa := common_isa(c.core for c in clusters)):
        table["isa"] = isa
        sources["isa"] = "estimate: what all of its core types have"
    if "int8_gops" not in table:
        peak = peak_int8_gops((c.core, c.count, c.ghz) for c in clusters)
        if peak:
            table["int8_gops"], sources["int8_gops"] = peak
    if "read_gb_s" not in table and "memory" in table and clusters:
        rate = memory_peak_gb_s(table["memory"])
        threads = sum(c.count for c in clusters)
        table["read_gb_s"] = {threads: round(READ_SHARE * rate, 1)}
        sources["read_gb_s"] = (
            f"estimate: {READ_SHARE} of the {rate:.1f} GB/s that {table['memory']} bit carries"
        )
    return DeviceProfile(name=name, **table)


def memory_peak_gb_s(memory: str) -> float:
    """1e9 bytes per second that memory carries at most: "LPDDR5-6400 x 64" is 51.2.

    Raises:
        FormatError: the text does not say it.
    """
    match = re.fullmatch(r"[A-Z0-9]+-(\d+) x (\d+)", memory)
    if not match:
        raise FormatError(
            f"memory is {memory!r}; write type-megatransfers x bits: LPDDR5-6400 x 64"
        )
    return int(match[1]) * int(match[2]) / 8000
