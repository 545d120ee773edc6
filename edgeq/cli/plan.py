"""``edgeq plan``: estimate whether a model fits on a device, and how fast it runs there."""

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
from edgeq.core.cpu import available_cores

if TYPE_CHECKING:
    from edgeq.devices.model_header import ModelFacts
    from edgeq.devices.planner import Plan
    from edgeq.devices.profile import DeviceProfile
    from edgeq.model.model import Model

THIS = "this"
"""Name of the device that stands for this machine."""
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
@click.option("-np", "--parallel", type=click.IntRange(1, 64), default=1,
              help="Answers at a time, as `edgeq serve --parallel` gives them. Each has its own KV "
                   "cache.")  # fmt: skip
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
    parallel: int,
    form: str,
) -> None:
    """Plan MODEL (a Hugging Face folder, a GGUF file, an .edgeq file) for a device.

    Only the headers of the model's files are read. Speed is estimated with a roofline model: for
    generation, the bytes read per token and the memory bandwidth; for prompts, the number of
    multiplications and the integer throughput. The assumptions are listed with the result.
    """
    from edgeq.api import devices as api

    if (model is None) == (shape is None):
        raise click.UsageError("give either MODEL or --shape NAME (see `edgeq bench --list`)")
    known = api.model_facts(model) if model is not None else api.shape_facts(str(shape))
    if device == THIS:
        threads = threads or available_cores()
    answer = api.plan(
        known,
        this_profile(threads, measured=True) if device == THIS else device,
        context=ctx_size or None,
        kv_bits=kv_bits_of(kv_bits, cache_type_k, cache_type_v),
        threads=threads,
        bits=int(bits) if bits else None,
        parallel=parallel,
    )
    if form == "json":
        render.write(json.dumps(answer.to_dict(), indent=2) + "\n")
    else:
        render.write(_text(answer, known) + "\n")


def profile_named(name: str) -> DeviceProfile:
    """The profile of a device without measuring; "this" detects this machine."""
    from edgeq.devices.profile import find

    return this_profile(None, measured=False) if name == THIS else find(name)


def this_profile(threads: int | None, *, measured: bool) -> DeviceProfile:
    """The profile of this machine, with a progress bar while it is measured.

    Args:
        threads: number of threads that the model will use; all cores if None.
        measured: whether to measure read bandwidth and integer throughput, which takes seconds.
    """
    from edgeq.api import devices as api

    if not measured:
        return api.this_profile(measured=False)
    with watched(threads), render.progress("Measuring this machine", still=True) as bar:
        return api.this_profile(threads, progress=bar)


def fit_option(function: Function) -> Function:
    """The option ``--force``, which runs a model that does not fit."""
    return click.option(
        "--force", is_flag=True, show_default=False,
        help="Run even if the model does not fit in this machine's memory.",
    )(function)  # fmt: skip


def refuse_what_cannot_fit(
    model: Model, name: str, settings: dict[str, Any], draft: Model | None
) -> None:
    """Refuse a model that does not fit in this machine's memory, before it is loaded.

    Args:
        model: the opened model.
        name: name of the model, for the message.
        settings: arguments of the engine.
        draft: the model that drafts tokens for it, opened too.

    Raises:
        DoesNotFitError: the model does not fit; the message says what would fit.
    """
    from edgeq.api.devices import check_fits
    from edgeq.core.errors import DoesNotFitError

    try:
        check_fits(model, name, settings, draft)
    except DoesNotFitError as err:
        raise DoesNotFitError(f"{err}; --force runs it anyway", plan=err.plan) from err


def _text(made: Plan, known: ModelFacts) -> str:
    size = render.human_bytes
    cache = f"{made.context} tokens of context, {made.kv_bits} bits"
    if made.parallel > 1:
        cache = f"{made.parallel} answers at a time, {cache} each"
    rows = [
        ["weights", size(made.weights_bytes), made.scheme],
        ["KV cache", size(made.kv_bytes), cache],
        ["scratch", size(made.scratch_bytes), f"{made.threads} threads"],
        ["process", size(made.process_bytes), "Python, libraries, compiled kernels, tokenizer"],
        ["total", size(made.total_bytes), f"of {size(made.usable_bytes)} usable"],
    ]
    if made.table_bytes:
        rows.append(["in the file", size(made.table_bytes), "a table of which rows are read"])
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
