"""``edgeq demo``: quantize a small model, generate a story, and compare it with the float model."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeq.cli import render
from edgeq.cli.options import command

if TYPE_CHECKING:
    from edgeq.evaluation.text import Evaluation
    from edgeq.model.model import Model
    from edgeq.profiling import Measurement
    from edgeq.runtime.tokenizer import Tokenizer

MODEL = Path(__file__).resolve().parent.parent / "demo_model"
HELD_OUT_TOKENS = 2048
SPEED_TOKENS = 64


@command("demo", "Quantize a small model and let it tell a story.")
@click.option("-p", "--prompt", default="Once upon a time", help="Beginning of the story.")
@click.option("-n", "--n-predict", "--predict", "--max-tokens", type=click.IntRange(min=1),
              default=256, help="Maximum length of the story in tokens.")  # fmt: skip
@click.option("-s", "--seed", type=click.IntRange(min=0), default=1,
              help="Random seed; each seed gives another story.")  # fmt: skip
@click.option("--temp", "--temperature", type=click.FloatRange(min=0), default=0.5,
              help="Sampling temperature; 0 always picks the most likely token.")  # fmt: skip
@click.option("-t", "--threads", type=click.IntRange(min=1), default=1,
              help="Number of threads; one is fastest for so small a model.")  # fmt: skip
def demo(prompt: str, n_predict: int, seed: int, temp: float, threads: int) -> None:
    """Quantize a small model to INT4, let it tell a story, and compare it with the float model."""
    from edgeq.api.quantize import quantize
    from edgeq.importers import load
    from edgeq.runtime.tokenizer import Tokenizer

    page = render.Page(sys.stdout)
    source = load(MODEL)
    packed_file = _cache_file()
    page.heading("1. Quantize a checkpoint to one file")
    with render.progress("Quantizing") as bar:
        quantize(source, packed_file, fast=True, threads=threads, progress=bar)
    packed = load(packed_file)
    page.fact(
        f"{render.human_count(_n_params(source))} weights: "
        f"{render.human_bytes(source.nbytes)} floating point -> "
        f"{render.human_bytes(packed.nbytes)} in INT4"
    )
    page.fact(f"{packed_file}")
    _compile(page)
    tokenizer = Tokenizer(packed.files)
    page.heading("2. Generate a story with the quantized model")
    _tell(page, packed, tokenizer, prompt, n_predict, seed, temp, threads)
    page.heading("3. Compare it with the float model")
    before = _measure(source, tokenizer, None, threads)
    after = _measure(packed, tokenizer, source, threads)
    page.table(["", "float", "INT4"], _rows(source, packed, before, after), "lrr")
    for cost in (before, after):
        warning = cost.speed.contention and cost.speed.contention.warning(threads)
        if warning:
            page.fact(f"Warning: {warning}")
            break
    page.fact(
        "bits per byte and KL are measured on held-out stories; KL is against the float model"
    )
    me = sys.argv[0]
    if shutil.which("edgeq"):
        me = "edgeq"
    elif Path(me).name == "__main__.py":
        me = "python -m edgeq"
    page.fact(f"next: {me} run {packed_file} -p 'The little fox'")


def _n_params(model: Model) -> int:
    from edgeq.importers.shapes import parameters

    return parameters(model.config)


def _cache_file() -> Path:
    """Path of the quantized model: in the user's cache folder, or in a temporary folder."""
    from edgeq.core.cache import cache_home

    folder = cache_home()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # the home folder may be read-only
        folder = Path(tempfile.mkdtemp(prefix="edgeq-"))
    if not os.access(folder, os.W_OK):
        folder = Path(tempfile.mkdtemp(prefix="edgeq-"))
    return folder / "demo.edgeq"


def _compile(page: render.Page) -> None:
    from edgeq.runtime import kernels

    with render.progress("Compiling kernels for this CPU (first run only)") as bar:
        seconds = sum(kernels.warmup(bar).values())
    if seconds > 1:
        page.fact(f"compiled the kernels for this CPU in {seconds:.0f} s (first run only)")


def _tell(
    page: render.Page,
    model: Model,
    tokenizer: Tokenizer,
    prompt: str,
    n_predict: int,
    seed: int,
    temp: float,
    threads: int,
) -> None:
    from edgeq.runtime.engine import Engine
    from edgeq.runtime.generate import generate
    from edgeq.runtime.sampling import SamplingParams

    params = SamplingParams(temperature=temp, seed=seed)
    with Engine(model, threads=threads) as engine:
        chunks = generate(engine, tokenizer, prompt, params, max_tokens=n_predict)
        with page.story(prompt) as say:
            for chunk in chunks:
                say(chunk.text)
    rate = chunk.decode_tokens_per_s
    page.fact(f"{chunk.n_generated} tokens" + (f" at {rate:.0f} tokens per second" if rate else ""))


@dataclass(frozen=True)
class _Cost:
    speed: Measurement
    quality: Evaluation


def _measure(model: Model, tokenizer: Tokenizer, base: Model | None, threads: int) -> _Cost:
    """Measure the speed of generation and the quality on held-out text, both with the engine."""
    from edgeq.evaluation.text import perplexity
    from edgeq.model.reference import Reference
    from edgeq.profiling import Workload, measure
    from edgeq.runtime.engine import Engine

    ids = tokenizer.encode((MODEL / "heldout.txt").read_text("utf-8"), add_bos=False)
    with Engine(model, threads=threads) as engine:
        speed = measure(engine, Workload(0, SPEED_TOKENS, repeats=3))

        def logits(tokens: Any) -> Any:
            engine.reset()
            return engine.forward(tokens, all_logits=True)

        # no progress bar before this, because drawing it would slow the timed generation
        with render.progress("Measuring quality on held-out stories") as bar:
            quality = perplexity(
                logits,
                ids,
                context=min(256, model.config.context),
                bos=tokenizer.text_bos,
                base=None if base is None else Reference(base).forward,
                decode=tokenizer.decode,
                max_tokens=HELD_OUT_TOKENS,
                progress=bar,
            )
    return _Cost(speed, quality)


def _rows(source: Model, packed: Model, before: _Cost, after: _Cost) -> list[list[str]]:
    def both(name: str, show: Any, a: Any, b: Any) -> list[str]:
        return [name, *("-" if value is None else show(value) for value in (a, b))]

    weights = _n_params(source)
    return [
        both("weights", render.human_bytes, source.nbytes, packed.nbytes),
        both("bits per weight", "{:.2f}".format,
             8 * source.nbytes / weights, 8 * packed.nbytes / weights),
        both("tokens per second", "{:.0f}".format, before.speed.avg_ts, after.speed.avg_ts),
        both("GB/s read", "{:.1f}".format, before.speed.gb_per_s, after.speed.gb_per_s),
        both("peak memory (RSS)", render.human_bytes,
             before.speed.peak_rss_bytes, after.speed.peak_rss_bytes),
        both("bits per byte", "{:.4f}".format,
             before.quality.bits_per_byte, after.quality.bits_per_byte),
        both("KL, nats per token", "{:.4f}".format, None, after.quality.kl_mean),
        both("same top token", "{:.1%}".format, None, after.quality.top1_agreement),
    ]  # fmt: skip
