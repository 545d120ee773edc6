"""Profiles of devices, what this machine is, and which models fit on a device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeq.core.cpu import available_cores
from edgeq.core.errors import FormatError, UsageError
from edgeq.core.memory import available_bytes
from edgeq.core.progress import Progress
from edgeq.devices.model_header import ModelFacts, facts, facts_of, scheme_facts
from edgeq.devices.planner import Plan, needed_bytes
from edgeq.devices.planner import plan as plan_on
from edgeq.devices.profile import DeviceProfile, find, names
from edgeq.formats.schemes import FloatScheme
from edgeq.model.kv_bits import KvBits
from edgeq.model.model import Model
from edgeq.model.rotary import default_context

if TYPE_CHECKING:
    from edgeq.devices.detect import Detected

THIS = "this"
"""The device that is this machine."""


def device_names() -> tuple[str, ...]:
    """The names of all device profiles, for `device` and `plan`.

    Example:
        >>> "rpi5" in edgeq.device_names()
        True
    """
    return tuple(names())


def device(name: str | Path) -> DeviceProfile:
    """The profile of a device: memory, cores, bandwidth, power, and the sources of the figures.

    Args:
        name: a profile's name, or a TOML file with a profile.

    Raises:
        UsageError: an unknown name.
        FormatError: the file cannot be read.

    Example:
        >>> edgeq.device("rpi5").title
        'Raspberry Pi 5 (8 GB)'
    """
    return find(str(name))


def detect(source: str | Path | None = None) -> Detected:
    """Detect this machine from /proc and /sys, and the profile that matches it.

    Args:
        source: another machine: a copy of its /proc/cpuinfo, an sbc-bench log, or a folder with
            copies of its /proc and /sys.

    Raises:
        FormatError: the file cannot be read.

    Example:
        >>> edgeq.detect().cores >= 1
        True
    """
    from edgeq.devices import detect as detection

    if source is None:
        return detection.detect()
    place = Path(source)
    if place.is_dir():
        return detection.detect(source)
    try:
        text = place.read_text("utf-8", "replace")
    except OSError as err:
        raise FormatError(f"{place} cannot be read: {err.strerror or err}") from err
    return detection.detect_text(text, str(source))


def measure_machine(
    cores: int | None = None, *, progress: Progress | None = None
) -> tuple[dict[int, float], float]:
    """Measure this machine's read bandwidth and integer throughput, some seconds.

    Args:
        cores: of the machine; those this process may use if None.
        progress: called before every measurement.

    Returns:
        GB/s by number of threads, and billions of INT8 operations per second of all cores.
    """
    from edgeq.profiling import read_bandwidth  # measuring alone needs it
    from edgeq.runtime.kernels import int8_throughput

    cores = min(cores or 1, available_cores())
    counts = sorted({1, cores, *(n for n in (2, 4, 8, 16, 32) if n < cores)})
    rates = {}
    for done, threads in enumerate(counts):
        if progress:
            progress(f"read bandwidth, {threads} threads", done, len(counts) + 1)
        rates[threads] = round(read_bandwidth(threads), 1)
    if progress:
        progress("integer throughput", len(counts), len(counts) + 1)
    return rates, round(int8_throughput(cores), 1)


def this_profile(
    threads: int | None = None, *, measured: bool = True, progress: Progress | None = None
) -> DeviceProfile:
    """The profile of this machine.

    Args:
        threads: that will run; all cores if None.
        measured: measure read bandwidth and integer throughput too, some seconds.
        progress: called before every measurement.
    """
    # `run` and `chat` need it only where memory is short
    from edgeq.devices import detect as detection

    detected = detection.detect()
    if not measured:
        return detected.as_profile()
    from edgeq.profiling import read_bandwidth  # measuring alone needs it
    from edgeq.runtime.kernels import int8_throughput

    whole = detected.cores or available_cores()
    cores = min(whole, available_cores())
    reads: dict[int, float] = {}
    counts = sorted({1, min(threads or cores, cores), cores})
    for done, count in enumerate(counts):
        if progress:
            progress(f"read bandwidth, {count} threads", done, len(counts) + 1)
        # decoding takes fewer of its threads where they read no faster
        reads[count] = max(read_bandwidth(count), *reads.values(), 0.0)
    if progress:
        progress("integer throughput", len(counts), len(counts) + 1)
    # a profile describes all cores, of which this process may have fewer
    return detected.as_profile(reads, int8_throughput(cores) * whole / cores)


def plan(
    model: Model | ModelFacts | str | Path | None = None,
    device: DeviceProfile | str | Path = THIS,
    *,
    shape: str | None = None,
    context: int | None = None,
    bits: int | None = None,
    kv_bits: KvBits = 8,
    threads: int | None = None,
    parallel: int = 1,
    progress: Progress | None = None,
) -> Plan:
    """Estimate whether a model fits on a device, and how fast it runs there.

    Only the headers of the model's files are read.

    Args:
        model: a model or the path of one.
        device: a profile, a profile's name, a TOML file with a profile, or "this": this machine,
            whose speed is measured.
        shape: instead of a model: a known model in 16 bits, as published.
        context: context length in tokens; the model's own, at most 4096, if None.
        bits: plan for the model quantized to so many bits per weight.
        kv_bits: of the KV cache.
        threads: of the engine; the device's cores if None.
        parallel: answers at a time, as `serve` gives them, each with a KV cache of its own.
        progress: called before every measurement of this machine.

    Raises:
        FormatError: the model cannot be opened.
        UsageError: neither or both of model and shape, an unknown device, or a number out of
            range.

    Example:
        >>> plan = edgeq.plan("model.edgeq", "rpi5", context=256)
        >>> plan.fits, plan.scheme
        (True, 'w4-g32')
    """
    if (model is None) == (shape is None):
        raise UsageError("give either a model or shape, the name of a known model")
    known = model_facts(model) if model is not None else shape_facts(str(shape))
    if isinstance(device, DeviceProfile):
        profile = device
    elif str(device) == THIS:
        threads = threads or available_cores()
        profile = this_profile(threads, progress=progress)
    else:
        profile = find(str(device))
    return plan_on(
        known,
        profile,
        context=context or default_context(known.config),
        kv_bits=kv_bits,
        threads=threads,
        bits=bits,
        parallel=parallel,
    )


def model_facts(model: Model | ModelFacts | str | Path) -> ModelFacts:
    """A model's config, and the shapes, schemes and sizes of its tensors."""
    if isinstance(model, ModelFacts):
        return model
    return facts_of(model, "the model") if isinstance(model, Model) else facts(model)


def shape_facts(name: str) -> ModelFacts:
    """The same of a known model in 16 bits."""
    from edgeq.importers.shapes import shape as known_shape  # it reads every family's file

    config, scheme = known_shape(name), FloatScheme("bfloat16")
    tensors = (*config.linears(), *config.floats())
    return ModelFacts(name, config, {name: scheme_facts(scheme, size) for name, size in tensors})


def check_fits(
    model: Model, name: str, settings: dict[str, Any], draft: Model | None = None
) -> None:
    """Refuse a model that this machine's memory cannot hold, before it is loaded.

    Args:
        model: opened, not loaded.
        name: how to call it.
        settings: arguments of the engine: context, kv_bits and threads.
        draft: a small model that drafts tokens for it, opened too.

    Raises:
        DoesNotFitError: names what would fit.
    """
    tokens = min(settings["context"] or default_context(model.config), model.config.context)
    known = facts_of(model, name)
    engine: dict[str, Any] = {
        "context": tokens,
        "kv_bits": settings["kv_bits"],
        "threads": settings["threads"] or available_cores(),
        "draft": None if draft is None else facts_of(draft, "the draft model"),
    }
    # never more than this machine's profile calls usable, and read without naming the machine
    free = available_bytes()
    if free is not None and needed_bytes(known, **engine) <= free:
        return
    profile = this_profile(measured=False)
    if profile.usable_bytes is not None:
        plan_on(known, profile, **engine).require()
