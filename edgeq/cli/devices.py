"""``edgeq devices``: list the profiles of devices, and detect this machine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import click

from edgeq.cli import render
from edgeq.cli.busy import watched
from edgeq.cli.options import CONTEXT_SETTINGS, command, debug_option, result_options

if TYPE_CHECKING:
    from edgeq.devices.detect import Detected
    from edgeq.devices.profile import Cluster, DeviceProfile

_MATCHES = {
    "device": "the profile of this device",
    "chip": "the profile of another device with the same chip",
    "tier": "a generic profile, whose figures are estimates; --measure measures this machine",
    None: "no profile matches",
}


@click.group(
    "devices",
    context_settings=CONTEXT_SETTINGS,
    short_help="List device profiles, or detect this machine.",
)
def devices() -> None:
    """List the devices that edgeq has profiles of, or detect this machine."""


devices.params.append(debug_option())


@command("list", "List the device profiles.")
@result_options("text", "json")
def list_(form: str) -> None:
    """List the device profiles; `edgeq plan --device NAME` plans for a device."""
    from edgeq.devices.profile import find, names

    profiles = [find(name) for name in names()]
    if form == "json":
        render.write(json.dumps([profile.to_dict() for profile in profiles], indent=2) + "\n")
        return
    rows = [
        [
            profile.name,
            profile.title,
            _bytes(profile.ram_bytes),
            _bytes(profile.usable_bytes),
            _rate(profile.read_gb_s),
            "" if profile.int8_gops is None else f"{profile.int8_gops:.0f}",
            "" if profile.load_watts is None else f"{profile.load_watts:g}",
        ]
        for profile in profiles
    ]
    head = ["name", "device", "memory", "per app", "read GB/s", "int8 GOPS", "load W"]
    render.write(render.aligned(head, rows, "llrrrrr") + "\n")


@command("show", "Show the figures of a device and their sources.")
@click.argument("name")
@result_options("text", "json", "toml")
def show(name: str, form: str) -> None:
    """Show the profile NAME, or the profile in a TOML file."""
    from edgeq.devices.profile import find

    profile = find(name)
    if form == "json":
        render.write(json.dumps(profile.to_dict(), indent=2) + "\n")
    elif form == "toml":
        render.write(profile.to_toml())
    else:
        render.write(_profile_text(profile))


@command("detect", "Detect this machine and the profile that matches it.")
@click.option("--measure", is_flag=True, show_default=False,
              help="Also measure read bandwidth and integer throughput.")  # fmt: skip
@click.option("--from", "source", type=click.Path(exists=True), default=None, metavar="PATH",
              help="Another machine: a copy of its /proc/cpuinfo, an sbc-bench log, or a folder "
                   "with copies of its /proc and /sys.")  # fmt: skip
@result_options("text", "json", "toml")
def detect(measure: bool, source: str | None, form: str) -> None:
    """Detect this machine from /proc and /sys, and the profile that matches it.

    `--format toml -o FILE.toml` writes a profile of this machine for
    `edgeq plan --device FILE.toml`.
    """
    from edgeq.api import devices as api

    if measure and source is not None:
        raise click.UsageError(
            "--measure measures this machine and cannot be used with --from; leave one out"
        )
    detected = api.detect(source)
    rates, gops = _measured(detected) if measure else (None, None)
    if form == "toml":
        render.write(detected.as_profile(rates, gops).to_toml())
    elif form == "json":
        facts = detected.to_dict() | {"read_gb_s": rates, "int8_gops": gops}
        render.write(json.dumps(facts, indent=2) + "\n")
    else:
        render.write(_detected_text(detected, rates, gops))


for _command in (list_, show, detect):
    devices.add_command(_command)


def _measured(detected: Detected) -> tuple[dict[int, float], float]:
    """Measured read bandwidth in GB/s by number of threads, and integer throughput in GOPS."""
    from edgeq.api.devices import measure_machine

    with watched(), render.progress("Measuring this machine", still=True) as bar:
        return measure_machine(detected.cores, progress=bar)


def _profile_text(profile: DeviceProfile) -> str:
    facts = [
        ("device", profile.title, ""),
        ("kind", profile.kind, ""),
        ("chip", profile.soc, "soc"),
        ("cores", _clusters(profile.clusters), "clusters"),
        ("instructions", " ".join(profile.isa), "isa"),
        ("memory", _bytes(profile.ram_bytes), "ram_bytes"),
        ("per app", _bytes(profile.usable_bytes), "usable_bytes"),
        ("memory type", f"{profile.memory} bit" if profile.memory else "", "memory"),
        ("read speed", _rates(profile.read_gb_s), "read_gb_s"),
        ("int8 peak", _gops(profile.int8_gops), "int8_gops"),
        ("idle power", _watts(profile.idle_watts), "idle_watts"),
        ("load power", _watts(profile.load_watts), "load_watts"),
        ("accelerators", ", ".join(profile.accelerators), "accelerators"),
    ]
    lines = []
    for label, value, key in facts:
        lines.append(f"{label:14}{value or 'unknown'}")
        if value and key in profile.sources:
            lines.append(f"{'':14}  {profile.sources[key]}")
    return "\n".join(lines) + "\n"


def _detected_text(
    detected: Detected, rates: Mapping[int, float] | None, gops: float | None
) -> str:
    warmest = max(detected.temperatures_c.items(), key=lambda item: item[1], default=None)
    throttle = detected.throttle and ", ".join(
        [*detected.throttle.now, *(f"{what} since boot" for what in detected.throttle.since_boot)]
    )
    caches = ", ".join(
        f"L{cache.level} {cache.kind} {render.human_bytes(cache.nbytes)}"
        + (f" for {cache.shared_by}" if cache.shared_by > 1 else "")
        for cache in detected.caches
    )
    facts = [
        ("machine", detected.title, "title"),
        ("chip", detected.soc, "soc"),
        ("architecture", detected.arch, "arch"),
        ("cores", _clusters(detected.clusters), "clusters"),
        ("threads", detected.threads and str(detected.threads), "threads"),
        ("instructions", " ".join(detected.isa), "isa"),
        ("caches", caches, "caches"),
        ("memory", _bytes(detected.ram_bytes), "ram_bytes"),
        ("free memory", _bytes(detected.available_bytes), "available_bytes"),
        ("swap", _bytes(detected.swap_bytes), "swap_bytes"),
        ("memory limit", _bytes(detected.cgroup_bytes), "cgroup_bytes"),
        ("governor", ", ".join(sorted(set(detected.governors.values()))), "governors"),
        ("temperature", warmest and f"{warmest[1]:.1f} °C ({warmest[0]})", "temperatures_c"),
        ("throttled", throttle if detected.throttle is None else throttle or "no", "throttle"),
        ("read speed", _rates(rates), ""),
        ("int8", _gops(gops), ""),
    ]
    rows = [
        [label, value, "measured" if not key else detected.sources.get(key, "")]
        for label, value, key in facts
        if value
    ]
    table = render.aligned(["property", "value", "source"], rows)
    name = f"{detected.profile}: " if detected.profile else ""
    from edgeq.devices.cpuinfo import unsupported

    note = unsupported(detected.arch)
    warning = f"\nnote: {note}\n" if note else ""
    return f"{table}\n\nprofile {name}{_MATCHES[detected.match]}\n{warning}"


def _clusters(clusters: Sequence[Cluster]) -> str:
    return " + ".join(
        f"{c.count} {c.core}" + (f" at {c.ghz:g} GHz" if c.ghz else "") for c in clusters
    )


def _bytes(count: int | None) -> str:
    return "" if count is None else render.human_bytes(count)


def _rate(rates: Mapping[int, float] | None) -> str:
    """The rate with the largest number of threads."""
    return f"{rates[max(rates)]:.1f}" if rates else ""


def _rates(rates: Mapping[int, float] | None) -> str:
    return ", ".join(
        f"{rate:g} GB/s with {threads} thread{'s' * (threads > 1)}"
        for threads, rate in (rates or {}).items()
    )


def _gops(gops: float | None) -> str:
    return "" if gops is None else f"{gops:g} G operations/s"


def _watts(watts: float | None) -> str:
    return "" if watts is None else f"{watts:g} W"
