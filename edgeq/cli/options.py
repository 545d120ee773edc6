"""Options that several commands share, and the types they are read as."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import click
from click.core import ParameterSource

from edgeq.errors import UsageError
from edgeq.files import check_target

Function = Callable[..., Any]
Decorator = Callable[[Function], Function]

CONTEXT_SETTINGS: dict[str, Any] = {
    "help_option_names": ["-h", "--help"],
    "show_default": True,
    "max_content_width": 100,
}


class _Option(click.Option):
    """An option whose general twin (EDGEQ_THREADS) yields to its own (EDGEQ_RUN_THREADS)."""

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        if ctx.auto_envvar_prefix is not None and self.name is not None:
            own = os.environ.get(f"{ctx.auto_envvar_prefix}_{self.name.upper()}")
            if own:
                return own
        return super().resolve_envvar_value(ctx)


def shared_option(*names: str, env: str, **settings: Any) -> Decorator:
    """An option with a twin ``EDGEQ_<env>`` that holds for every command having the option."""
    return click.option(*names, cls=_Option, envvar=f"EDGEQ_{env}", **settings)


def _remember_debug(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        _Debug.on = True


class _Debug:
    on = False


def debugging() -> bool:
    """Whether ``--debug`` was given: show tracebacks."""
    return _Debug.on


def debug_option() -> click.Option:
    """``--debug``, which the group and every command have."""
    return click.Option(
        ["--debug"], is_flag=True, expose_value=False, is_eager=True, show_default=False,
        callback=_remember_debug, help="Show a traceback when something fails.",
    )  # fmt: skip


def command(name: str, short: str) -> Callable[[Function], click.Command]:
    """A command of the group, with ``--debug``.

    Args:
        name: of the command.
        short: its line in the list of commands.
    """

    def decorate(function: Function) -> click.Command:
        made = click.command(name, short_help=short, context_settings=CONTEXT_SETTINGS)(function)
        made.params.append(debug_option())
        return made

    return decorate


class ByteSize(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.3
    """A number of bytes: ``512M``, ``1G``, ``1.5GiB`` (powers of 1024) or a plain number."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The value from the text given."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", value, re.IGNORECASE)
        if not match:
            self.fail(f"{value!r} is not a size; write 512M, 1G or a number of bytes", param, ctx)
        power = "KMGT".find(match[2].upper()) + 1 if match[2] else 0
        size = int(float(match[1]) * 1024**power)
        if not size:
            self.fail(f"{value!r} must be more than nothing", param, ctx)
        return size


class Counts(click.ParamType):  # type: ignore[type-arg]
    """Whole numbers separated by commas: ``1,2,4``."""

    name = "n,n,..."

    def __init__(self, at_least: int) -> None:
        self.at_least = at_least

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """The value from the text given."""
        if isinstance(value, tuple):
            return value
        try:
            counts = tuple(dict.fromkeys(int(part) for part in str(value).split(",")))
        except ValueError:
            self.fail(f"{value!r} is not a list of whole numbers such as 1,2,4", param, ctx)
        if min(counts) < self.at_least:
            self.fail(f"{min(counts)} is below {self.at_least}", param, ctx)
        return counts


PROMPT = "edgeq.prompt"
"""Where in a context's ``meta`` the prompt is that stands where MODEL would, after ``-m MODEL``."""


def model_argument(function: Function) -> Function:
    """MODEL, or ``-m MODEL`` as llama.cpp users write it, or EDGEQ_MODEL."""
    return _model(function, required=True)


def optional_model_argument(function: Function) -> Function:
    """The same for a command that can do without."""
    return _model(function, required=False)


def _model(function: Function, *, required: bool) -> Function:
    def merge(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
        # the argument is eager and so was read before: it stands before the environment
        given: str | None = ctx.params.pop("model_file", None)
        if value and given and ctx.get_parameter_source("model") == ParameterSource.COMMANDLINE:
            if any(param.name == "question" for param in ctx.command.params):
                ctx.meta[PROMPT] = given  # of ``run -m MODEL PROMPT``, the only argument
                return value
            raise click.UsageError("give the model once: as MODEL or as --model", ctx)
        if not (value or given) and required and not ctx.resilient_parsing:
            raise click.UsageError("Missing argument 'MODEL'.", ctx)
        return given or value

    function = shared_option(
        "-m", "--model", "model", env="MODEL", callback=merge, metavar="MODEL",
        help="The model, for those who like to name it.",
    )(function)  # fmt: skip
    name = "MODEL" if required else "[MODEL]"
    return click.argument("model_file", metavar=name, required=False, is_eager=True)(function)


def threads_option(function: Function) -> Function:
    """``-t/--threads N``."""
    return shared_option(
        "-t", "--threads", env="THREADS", type=click.IntRange(min=1), default=None,
        help="Threads to compute with.  [default: the machine's cores]",
    )(function)  # fmt: skip


def format_option(*kinds: str) -> Decorator:
    """``-o/--format``: how the result is written to stdout."""
    return click.option(
        "-o", "--format", "--output", "form", type=click.Choice(kinds), default=kinds[0],
        help="How to write the result.",
    )  # fmt: skip


def kv_options(function: Function) -> Function:
    """``--kv-bits``, and the same as llama.cpp writes it: ``-ctk`` and ``-ctv``."""
    kinds = click.Choice(["q8_0", "f16"])
    for option in (
        click.option("-ctv", "--cache-type-v", type=kinds, default=None,
                     help="The same; values are cached like keys."),
        click.option("-ctk", "--cache-type-k", type=kinds, default=None,
                     help="The KV cache as llama.cpp names it: q8_0 is 8 bits, f16 is 16."),
        shared_option("--kv-bits", env="KV_BITS", type=click.Choice(["8", "16"]), default="8",
                      help="Bits of a KV cache entry."),
    ):  # fmt: skip
        function = option(function)
    return function


def backend_option(function: Function) -> Function:
    """``--backend``."""
    return shared_option(
        "--backend", env="BACKEND", type=click.Choice(["numba", "numpy"]), default="numba",
        help="Compiled kernels, or plain NumPy.",
    )(function)  # fmt: skip


def engine_options(function: Function) -> Function:
    """Options of everything that runs a model: context, threads, KV cache, backend, memory."""
    context = shared_option(
        "-c", "--ctx-size", env="CTX_SIZE", type=click.IntRange(min=0), default=0,
        help="Tokens of context to make room for; 0 is the model's own, at most 4096.",
    )  # fmt: skip
    mapped = shared_option(
        "--mmap/--no-mmap", env="MMAP", default=None,
        help="Use weights in their mapped file, or copy them to memory of huge pages, which "
        "decodes faster; by default copied if that takes at most half of the free memory.",
    )  # fmt: skip
    return context(threads_option(kv_options(backend_option(mapped(function)))))


def lookup_option(function: Function) -> Function:
    """``--lookup N``."""
    return click.option(
        "--lookup", type=click.IntRange(0, 64), default=0,
        help="With --temp 0: guess up to this many tokens from what the text has said before "
        "and check them at once; the text stays the same.",
    )(function)  # fmt: skip


def kv_bits_of(kv_bits: str, cache_type_k: str | None, cache_type_v: str | None) -> Literal[8, 16]:
    """The KV cache's bits from the options that can say so.

    Raises:
        click.UsageError: keys and values are asked to differ.
    """
    kinds = {kind for kind in (cache_type_k, cache_type_v) if kind}
    if len(kinds) > 1:
        raise click.UsageError(
            f"keys ({cache_type_k}) and values ({cache_type_v}) are cached alike; "
            "give -ctk and -ctv the same type"
        )
    return 8 if (kinds.pop() if kinds else kv_bits) in ("q8_0", "8") else 16


def sampling_options(function: Function) -> Function:
    """Options that choose the next token; the defaults are llama.cpp's."""
    for option in (
        click.option("--stop", multiple=True, metavar="TEXT", show_default=False,
                     help="Stop before this text; may be given several times."),
        click.option("--repeat-last-n", type=click.IntRange(min=-1), default=64,
                     help="How many tokens are recent; -1 is all."),
        click.option("--repeat-penalty", type=click.FloatRange(min=0, min_open=True), default=1.0,
                     help="Divide the chance of recent tokens by this; 1 is off."),
        click.option("--min-p", type=click.FloatRange(0, 1), default=0.05,
                     help="Drop tokens less likely than this share of the likeliest; 0 is off."),
        click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=0.95,
                     help="Keep the likeliest tokens that together have this chance; 1 is off."),
        click.option("--top-k", type=click.IntRange(min=0), default=40,
                     help="Keep the K likeliest tokens; 0 is off."),
        click.option("--temp", type=click.FloatRange(min=0), default=0.8,
                     help="Temperature; 0 always takes the likeliest token."),
        click.option("-s", "--seed", type=click.IntRange(min=-1), default=-1,
                     help="Seed of the sampler; -1 takes a new one each time."),
    ):  # fmt: skip
        function = option(function)
    return function


def check_output(path: Path, force: bool, option: str = "--output") -> None:
    """Refuse before work starts what could not be written after it.

    Args:
        path: the file to make.
        force: whether it may replace another.
        option: that names it, for the message.

    Raises:
        UsageError: it exists and ``force`` is not given, or no file can be put there.
    """
    if path.exists() and not force:
        raise UsageError(f"{path} exists; give another {option}, or --force to overwrite it")
    check_target(path)


def force_option(function: Function) -> Function:
    """``--force``: overwrite what is there."""
    return click.option(
        "--force", is_flag=True, show_default=False, help="Overwrite an existing output file."
    )(function)


_LAYOUT = click.option(
    "--layout", type=click.Choice(["auto", "nchw", "nhwc"]), default="auto",
    help="Graphs: where channels are, in arrays and in the input of pictures.",
)  # fmt: skip


def sample_options(function: Function, *, layout: bool = True) -> Function:
    """How pictures, arrays and sentences become a graph's inputs: for graphs alone.

    Args:
        function: the command's.
        layout: whether to add ``--layout``; a command that has one of its own adds it itself.
    """
    options = (
        click.option("--tokenizer", type=click.Path(exists=True), default=None,
                     help="Graphs: the tokenizer.json, or its folder, that makes sentences "
                          "tokens."),
        click.option("--resize", type=click.Choice(["stretch", "crop", "pad"]), default="stretch",
                     help="Graphs: how a picture of another size is fitted."),
        *([_LAYOUT] if layout else []),
        click.option("--scale", metavar="X", default="1/255",
                     help="Graphs: what a pixel of 0 to 255 is multiplied with first."),
        click.option("--std", metavar="X[,X...]", default="1",
                     help="Graphs: what it is divided by then, for all channels or for each."),
        click.option("--mean", metavar="X[,X...]", default="0",
                     help="Graphs: what is subtracted from it then, for all channels or for "
                          "each."),
        click.option("--image-size", metavar="N|HxW", default=None,
                     show_default="the model's input",
                     help="Graphs: the size of pictures."),
    )  # fmt: skip
    for option in options:
        function = option(function)
    return function


SAMPLE_OPTIONS = ("image_size", "mean", "std", "scale", "layout", "resize", "tokenizer")
"""Names of what `sample_options` adds."""


def refuse_given(names: Iterable[str], why: str) -> None:
    """Refuse options that were said and have no meaning here.

    Args:
        names: of the running command's parameters.
        why: what they are for instead.

    Raises:
        click.UsageError: names the first such option.
    """
    ctx = click.get_current_context()
    for param in ctx.command.params:
        if param.name in names and ctx.get_parameter_source(param.name) not in (
            None, ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP,
        ):  # fmt: skip
            raise click.UsageError(f"{param.opts[-1]} is for {why}; leave it out")
