"""``edgeq plan``: will it fit, and how fast would it be."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from edgeq.cli import render
from edgeq.cli.busy import watched
from edgeq.cli.options import (
    Function,
    command,
    kv_bits_of,
    kv_options,
    optional_model_argument,
    result_options,
    shared_option,
)

if TYPE_CHECKING:
    from edgeq.devices.model_header import ModelFacts
    from edgeq.devices.planner import Plan
    from edgeq.devices.profile import DeviceProfile
    from edgeq.model.model import Model

THIS = "this"
"""The device that is this machine."""
_DEFAULT_CONTEXT = 4096


@command("plan", "Estimate whether a model fits on a device, and how fast it runs there.")
@optional_model_argument
@click.option("--shape", default=None, metavar="NAME",
              help="Instead of MODEL: a known model in 16 bits, as published (see `edgeq bench "
                   "--list`).")  # fmt: skip
@click.option("--device", default=THIS, metavar="NAME",
              help="A device (see `edgeq devices list`), a TOML file with a profile, or 'this': "
                   "this machine, whose speed is measured.")  # fmt: skip
@shared_option("-c", "--ctx-size", env="CTX_SIZE", type=click.IntRange(min=0), default=0,
               help="Context length in tokens; 0 takes the model's own, at most "
                    f"{_DEFAULT_CONTEXT}.")  # fmt: skip
@click.option("--bits", type=click.Choice(["2", "3", "4", "8"]), default=None,
              help="Plan for the model quantized with `edgeq quantize --bits`.")  # fmt: skip
@kv_options
@shared_option("-t", "--threads", env="THREADS", type=click.IntRange(min=1), default=None,
               help="Number of threads.  [default: the number of the device's cores]")  # fmt: skip
@result_options("text", "json")
def plan(
    model: str | None,
    shape: str | None,
    device: str,
    ctx_size: int,
    bits: str | None,
    kv_bits: str,
    cache_type_k: str | None,
    cache_type_v: str | None,
    threads: int | None,
    form: str,
) -> None:
    """Plan MODEL (a Hugging Face folder, a GGUF file, an .edgeq file) for a device.

    Only the headers of the model's files are read. Speed is estimated with a roofline model: for
    generation, the bytes read per token and the memory bandwidth; for prompts, the number of
    multiplications and the integer throughput. The assumptions are listed with the result.
    """
    from edgeq.core.cpu import available_cores
    from edgeq.devices.model_header import facts
    from edgeq.devices.planner import plan as planned

    if (model is None) == (shape is None):
        raise click.UsageError("give either MODEL or --shape NAME (see `edgeq bench --list`)")
    known = facts(model) if model is not None else _shape(str(shape))
    if device == THIS:
        threads = threads or available_cores()
    made = planned(
        known,
        profile_named(device, threads, measured=True),
        context=context_of(ctx_size, known.config.context),
        kv_bits=kv_bits_of(kv_bits, cache_type_k, cache_type_v),
        threads=threads,
        bits=int(bits) if bits else None,
    )
    if form == "json":
        render.write(json.dumps(made.to_dict(), indent=2) + "\n")
    else:
        render.write(_text(made, known) + "\n")


def context_of(ctx_size: int | None, limit: int) -> int:
    """The context that the engine would choose."""
    return ctx_size or min(limit, _DEFAULT_CONTEXT)


def profile_named(name: str, threads: int | None = None, *, measured: bool) -> DeviceProfile:
    """A device's profile; for "this" what this machine is found to be.

    Args:
        name: a profile's name, a TOML file, or "this".
        threads, measured: as `this_profile` takes them.
    """
    from edgeq.devices.profile import find

    return this_profile(threads, measured=measured) if name == THIS else find(name)


def this_profile(threads: int | None, *, measured: bool) -> DeviceProfile:
    """The profile of this machine.

    Args:
        threads: that will run; all cores if None.
        measured: measure read bandwidth and integer throughput too, some seconds.
    """
    from edgeq.devices.detect import detect

    found = detect()
    if not measured:
        return found.as_profile()
    from edgeq.core.cpu import available_cores
    from edgeq.profiling import read_bandwidth
    from edgeq.runtime.kernels import int8_throughput

    whole = found.cores or available_cores()
    cores = min(whole, available_cores())
    reads: dict[int, float] = {}
    with watched(threads), render.progress("Measuring this machine", still=True) as bar:
        counts = sorted({1, min(threads or cores, cores), cores})
        for done, count in enumerate(counts):
            bar(f"read bandwidth, {count} threads", done, len(counts) + 1)
            # decoding takes fewer of its threads where they read no faster
            reads[count] = max(read_bandwidth(count), *reads.values(), 0.0)
        bar("integer throughput", len(counts), len(counts) + 1)
        # a profile speaks of all cores, of which this process may have fewer
        return found.as_profile(reads, int8_throughput(cores) * whole / cores)


def fit_option(function: Function) -> Function:
    """``--force``: run what does not fit."""
    return click.option(
        "--force", is_flag=True, show_default=False,
        help="Run even if the model does not fit in this machine's memory.",
    )(function)  # fmt: skip


def refuse_what_cannot_fit(model: Model, name: str, settings: dict[str, Any]) -> None:
    """Stop before a model is loaded that this machine's memory cannot hold.

    Args:
        model: opened, not loaded.
        name: what to call it.
        settings: arguments of the engine.

    Raises:
        DoesNotFitError: says what would fit.
    """
    from edgeq.core.cpu import available_cores
    from edgeq.core.errors import DoesNotFitError
    from edgeq.devices.model_header import facts_of
    from edgeq.devices.planner import plan as planned

    profile = this_profile(None, measured=False)
    if profile.usable_bytes is None:
        return
    limit = model.config.context
    made = planned(
        facts_of(model, name),
        profile,
        context=min(context_of(settings["context"], limit), limit),
        kv_bits=settings["kv_bits"],
        threads=settings["threads"] or available_cores(),
    )
    try:
        made.require()
    except DoesNotFitError as err:
        raise DoesNotFitError(f"{err}; --force runs it anyway", plan=made) from err


def _shape(name: str) -> ModelFacts:
    from edgeq.devices.model_header import ModelFacts, scheme_facts
    from edgeq.formats.schemes import FloatScheme
    from edgeq.model.shapes import shape

    config, held = shape(name), FloatScheme("bf16")
    tensors = (*config.linears(), *config.norms())
    return ModelFacts(name, config, {name: scheme_facts(held, size) for name, size in tensors})


def _text(made: Plan, known: ModelFacts) -> str:
    size = render.human_bytes
    cache = f"{made.context} tokens of context, {made.kv_bits} bits"
    rows = [
        ["weights", size(made.weights_bytes), made.scheme],
        ["KV cache", size(made.kv_bytes), cache],
        ["scratch", size(made.scratch_bytes), f"{made.threads} threads"],
        ["process", size(made.process_bytes), "Python, libraries, compiled kernels, tokenizer"],
        ["total", size(made.total_bytes), f"of {size(made.usable_bytes)} usable"],
    ]
    most = f"{made.largest_context} tokens of context" if made.largest_context else "no context"
    bits = f"{made.highest_bits} bits per weight" if made.highest_bits else "no number of bits"
    reach = f"at most: {most} with these weights; {bits} with {made.context} tokens of context"
    verdict = (
        f"fits, with {size(made.headroom_bytes)} to spare"
        if made.fits
        else f"does not fit: {size(-made.headroom_bytes)} too large"
    )
    facts = [
        ("model", f"{made.model}, {render.human_count(known.n_params)} parameters"),
        ("device", made.device),
        ("", verdict),
        ("", reach),
    ]
    speed = [
        ("prompt", _rate(made.prefill_tokens_per_s)),
        ("decode", f"{_rate(made.decode_tokens_per_s)}, "
                   f"{_rate(made.decode_full_tokens_per_s)} with {made.context} tokens in the "
                   "KV cache"),
        ("limit", made.bound or "unknown"),
        ("energy", "unknown: the device's power is not known" if made.joules_per_token is None
                   else f"{made.joules_per_token:.3g} J per token"),
    ]  # fmt: skip
    assumptions = "\n".join(
        render.wrapped(f"- {text}", render.prose_width(), "  ") for text in made.assumptions
    )
    return "\n\n".join(
        [
            render.facts(facts, 8),
            render.aligned(["memory", "size", "details"], rows, "lrl"),
            render.facts(speed, 8),
            "Assumptions:\n" + assumptions,
        ]
    )


def _rate(tokens_per_s: float | None) -> str:
    return "unknown" if tokens_per_s is None else f"{tokens_per_s:.1f} tok/s"
