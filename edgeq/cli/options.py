"""Options that several commands share, and the types of their values."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from edgeq.cli import render
from edgeq.core.errors import UsageError
from edgeq.core.files import check_target, write_whole
from edgeq.model.kv_bits import KV_BITS, KvBits, checked_kv_bits

Function = Callable[..., Any]
Decorator = Callable[[Function], Function]

CONTEXT_SETTINGS: dict[str, Any] = {
    "help_option_names": ["-h", "--help"],
    "show_default": True,
    "max_content_width": 100,
}


class _Option(click.Option):
    """An option whose variable for a command (EDGEQ_RUN_THREADS) overrides the general one."""

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        if ctx.auto_envvar_prefix is not None and self.name is not None:
            own = os.environ.get(f"{ctx.auto_envvar_prefix}_{self.name.upper()}")
            if own:
                return own
        return super().resolve_envvar_value(ctx)


def shared_option(*names: str, env: str, **settings: Any) -> Decorator:
    """An option that the environment variable ``EDGEQ_<env>`` sets for every command with it."""
    return click.option(*names, cls=_Option, envvar=f"EDGEQ_{env}", **settings)


def _remember_debug(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        DebugFlag.on = True


class DebugFlag:
    """Whether ``--debug`` was given. Errors are shown after click's context has ended."""

    on = False


def debugging() -> bool:
    """Whether ``--debug`` was given, which shows tracebacks."""
    return DebugFlag.on


def debug_option() -> click.Option:
    """The option ``--debug`` of the group and of every command."""
    return click.Option(
        ["--debug"], is_flag=True, expose_value=False, is_eager=True, show_default=False,
        callback=_remember_debug, help="Show the traceback of an error.",
    )  # fmt: skip


_PROMPT = "question"
"""Name of the parameter that gets the first argument if the model is given as an option."""


class _Command(click.Command):
    """A command that writes its result to the file of ``--output`` (`result_options`), if given."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments. The first argument is the prompt if ``--model`` gives the model.

        Raises:
            click.UsageError: the model is given twice.
        """
        rest = super().parse_args(ctx, args)
        if (prompt := ctx.meta.get(_PROMPT)) is not None:
            if ctx.params.get(_PROMPT) is not None:
                raise click.UsageError(
                    f"the model is given twice, as the argument {prompt} and as --model "
                    f"{ctx.params['model']}; give it once", ctx,
                )  # fmt: skip
            ctx.params[_PROMPT] = prompt
        return rest

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command.

        Raises:
            UsageError: the output file exists and ``--force`` is not given.
        """
        output = ctx.meta.get(_OUTPUT)
        if output is None:
            return super().invoke(ctx)
        path = Path(output)
        check_output(path, bool(ctx.meta.get(_FORCE) or ctx.params.get("force")))
        written = io.StringIO()
        with contextlib.redirect_stdout(written):
            code = super().invoke(ctx)
        write_whole(path, [written.getvalue().encode()], "the result")
        return code


def command(name: str, short: str) -> Callable[[Function], click.Command]:
    """A decorator that makes a command of the group, with the option ``--debug``.

    Args:
        name: name of the command.
        short: line of the command in the list of commands.
    """

    def decorate(function: Function) -> click.Command:
        command = click.command(
            name, cls=_Command, short_help=short, context_settings=CONTEXT_SETTINGS
        )(function)
        command.params.append(debug_option())
        return command

    return decorate


class ByteSize(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.3
    """A number of bytes: ``512M``, ``1G``, ``1.5GiB`` (powers of 1024) or a plain number."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse the text of the value."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", value, re.IGNORECASE)
        if not match:
            self.fail(
                f"{value!r} is not a size; write a number of bytes, or a size such as 512M or 1G",
                param,
                ctx,
            )
        power = "KMGT".find(match[2].upper()) + 1 if match[2] else 0
        size = int(float(match[1]) * 1024**power)
        if not size:
            self.fail(f"{value!r} is zero bytes; give a size above zero", param, ctx)
        return size


class Counts(click.ParamType):  # type: ignore[type-arg]
    """Whole numbers separated by commas: ``1,2,4``."""

    name = "n,n,..."

    def __init__(self, at_least: int) -> None:
        self.at_least = at_least

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Parse the text of the value."""
        if isinstance(value, tuple):
            return value
        try:
            counts = tuple(dict.fromkeys(int(part) for part in str(value).split(",")))
        except ValueError:
            self.fail(f"{value!r} is not a list of whole numbers such as 1,2,4", param, ctx)
        if min(counts) < self.at_least:
            self.fail(f"{min(counts)} is below the minimum, {self.at_least}", param, ctx)
        return counts


def model_argument(function: Function) -> Function:
    """The argument MODEL, also as ``-m MODEL`` as in llama.cpp, or as EDGEQ_MODEL."""
    return _model(function, required=True)


def optional_model_argument(function: Function) -> Function:
    """The argument MODEL as in `model_argument`, but optional."""
    return _model(function, required=False)


def source_argument(function: Function) -> Function:
    """The argument MODEL as the parameter ``source``, also with the ``--hf-path`` of mlx-lm."""
    return _model(function, "--hf-path", name="source", required=True)


def optional_source_argument(function: Function) -> Function:
    """The argument MODEL as in `source_argument`, but optional."""
    return _model(function, "--hf-path", name="source", required=False)


def _model(function: Function, *aliases: str, name: str = "model", required: bool) -> Function:
    parameter = name

    def merge(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
        # the argument is eager and therefore parsed before this; it overrides the environment
        given: str | None = ctx.params.pop("model_file", None)
        named = ctx.get_parameter_source(parameter) == ParameterSource.COMMANDLINE
        if value and given and named and _PROMPT in (p.name for p in ctx.command.params):
            ctx.meta[_PROMPT] = given  # `run -m MODEL PROMPT`: the argument is the prompt
            return value
        if value and given and named:
            raise click.UsageError(
                f"the model is given twice, as the argument {given} and as --model {value}; "
                "give it once", ctx,
            )  # fmt: skip
        if not (value or given) and required and not ctx.resilient_parsing:
            raise click.UsageError("Missing argument 'MODEL'.", ctx)
        return given or value

    function = shared_option(
        "-m", "--model", *aliases, parameter, env="MODEL", callback=merge, metavar="MODEL",
        help="Same as the MODEL argument.",
    )(function)  # fmt: skip
    name = "MODEL" if required else "[MODEL]"
    return click.argument("model_file", metavar=name, required=False, is_eager=True)(function)


def threads_option(function: Function) -> Function:
    """The option ``-t/--threads N``."""
    return shared_option(
        "-t", "--threads", env="THREADS", type=click.IntRange(min=1), default=None,
        help="Number of threads.  [default: the number of cores]",
    )(function)  # fmt: skip


_OUTPUT, _FORCE = "edgeq.output", "edgeq.force"
"""Keys of `click.Context.meta` under which `result_options` keeps its values."""


def result_options(*kinds: str, force: bool = True) -> Decorator:
    """The options ``--format`` and ``-o/--output``: the format and the file of the result.

    Args:
        kinds: the formats; the first is the default.
        force: whether to add ``--force``; False for commands that have their own.
    """

    def keep_output(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
        if value in kinds:  # llama-bench's -o is a format
            raise click.UsageError(
                f"--output is the file to write; for the format write --format {value} (or "
                f"--output ./{value} for a file of this name)", ctx,
            )  # fmt: skip
        if value is not None:
            ctx.meta[_OUTPUT] = value

    def keep_force(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        ctx.meta[_FORCE] = value

    def decorate(function: Function) -> Function:
        if force:
            function = click.option(
                "--force", is_flag=True, show_default=False, expose_value=False,
                callback=keep_force, help="Overwrite an existing output file.",
            )(function)  # fmt: skip
        function = click.option(
            "-o", "--output", type=click.Path(dir_okay=False), default=None, expose_value=False,
            callback=keep_output, show_default="standard output",
            help="The file to write the result to.",
        )(function)  # fmt: skip
        return click.option(
            "--format", "form", type=click.Choice(kinds), default=kinds[0],
            help="Format of the result.",
        )(function)  # fmt: skip

    return decorate


def _note_gpu_layers(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    if value is not None and value != "0":
        render.note(f"note: edgeq runs on the CPU; -ngl {value} is ignored")


def gpu_layers_option(function: Function) -> Function:
    """The option ``-ngl N`` of llama.cpp, which is accepted and ignored with a note."""
    return click.option(
        "-ngl", "--n-gpu-layers", "--gpu-layers", metavar="N", default=None, expose_value=False,
        callback=_note_gpu_layers,
        help="Accepted for compatibility with llama.cpp and ignored: edgeq runs on the CPU.",
    )(function)  # fmt: skip


_CACHE_TYPES: dict[str, KvBits] = {"q4_0": 4, "q8_0": 8, "f16": 16}
"""llama.cpp's names of KV cache types -> bits."""


def kv_options(function: Function) -> Function:
    """The option ``--kv-bits``, and llama.cpp's options for the same: ``-ctk`` and ``-ctv``."""
    kinds = click.Choice(list(_CACHE_TYPES))
    for option in (
        click.option("-ctv", "--cache-type-v", type=kinds, default=None,
                     help="Must equal -ctk: keys and values have the same type."),
        click.option("-ctk", "--cache-type-k", type=kinds, default=None,
                     help="Same as --kv-bits, with llama.cpp's names: q4_0 is 4 bits, q8_0 is 8 "
                     "and f16 is 16."),
        shared_option("--kv-bits", env="KV_BITS", default="8",
                      type=click.Choice([str(bits) for bits in KV_BITS]),
                      help="Bits of each value in the KV cache; 4 takes half the memory of 8, and "
                      "answers differ more."),
    ):  # fmt: skip
        function = option(function)
    return function


def backend_option(function: Function) -> Function:
    """The option ``--backend``, and llama.cpp's ``-ngl``."""
    return shared_option(
        "--backend", env="BACKEND", type=click.Choice(["numba", "numpy"]), default="numba",
        help="numba runs compiled kernels; numpy is slow and needs no compilation.",
    )(gpu_layers_option(function))  # fmt: skip


def engine_options(function: Function) -> Function:
    """The options of commands that run a model: context, threads, KV cache, backend, memory."""
    context = shared_option(
        "-c", "--ctx-size", env="CTX_SIZE", type=click.IntRange(min=0), default=0,
        help="Context length in tokens; 0 takes the model's own, at most 4096.",
    )  # fmt: skip
    mapped = shared_option(
        "--mmap/--no-mmap", env="MMAP", default=None,
        help="Memory-map the weights, or copy them to huge pages, which generates faster. "
        "[default: copy if that takes at most half of the free memory]",
        show_default=False,
    )  # fmt: skip
    return context(threads_option(kv_options(backend_option(mapped(function)))))


def kv_bits_of(kv_bits: str, cache_type_k: str | None, cache_type_v: str | None) -> KvBits:
    """The bits of the KV cache from the options of `kv_options`.

    Raises:
        click.UsageError: the options give keys and values different types.
    """
    kinds = {kind for kind in (cache_type_k, cache_type_v) if kind}
    if len(kinds) > 1:
        raise click.UsageError(
            f"-ctk is {cache_type_k} and -ctv is {cache_type_v}, but keys and values must have the "
            "same type; give -ctk and -ctv the same type"
        )
    return _CACHE_TYPES[kinds.pop()] if kinds else checked_kv_bits(int(kv_bits))


def sampling_options(function: Function) -> Function:
    """The options of `choice_options`, and ``--stop``."""
    return choice_options(
        click.option(
            "--stop", multiple=True, metavar="TEXT", show_default=False,
            help="Stop generating before this text. May be given several times.",
        )(function)
    )  # fmt: skip


def choice_options(function: Function) -> Function:
    """The options of sampling; the defaults are those of llama.cpp."""
    for option in (
        click.option("--repeat-last-n", type=click.IntRange(min=-1), default=64,
                     help="Number of recent tokens that --repeat-penalty applies to; -1 is all."),
        click.option("--repeat-penalty", type=click.FloatRange(min=0, min_open=True), default=1.0,
                     help="Penalty on tokens that occurred recently; 1 is off."),
        click.option("--min-p", type=click.FloatRange(0, 1), default=0.05,
                     help="Discard tokens less likely than this fraction of the most likely one; 0 "
                          "is off."),
        click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=0.95,
                     help="Sample from the most likely tokens whose probabilities add up to this; "
                          "1 is off."),
        click.option("--top-k", type=click.IntRange(min=0), default=40,
                     help="Sample from the K most likely tokens; 0 is off."),
        click.option("--temp", "--temperature", type=click.FloatRange(min=0), default=0.8,
                     help="Sampling temperature; 0 always picks the most likely token."),
        click.option("-s", "--seed", type=click.IntRange(min=-1), default=-1,
                     help="Random seed; -1 uses a new one each time."),
    ):  # fmt: skip
        function = option(function)
    return function


def check_output(path: Path, force: bool, option: str = "--output") -> None:
    """Refuse an output file that could not be written, before work starts.

    Args:
        path: the file to write.
        force: whether an existing file may be replaced.
        option: name of the option, for the message.

    Raises:
        UsageError: the file exists and ``force`` is not given, or it cannot be written.
    """
    if path.exists() and not force:
        raise UsageError(
            f"{path} already exists; give another {option}, or --force to overwrite it"
        )
    check_target(path)


def force_option(function: Function) -> Function:
    """The option ``--force``, which overwrites an existing file."""
    return click.option(
        "--force", is_flag=True, show_default=False, help="Overwrite an existing output file."
    )(function)


_LAYOUT = click.option(
    "--layout", type=click.Choice(["auto", "nchw", "nhwc"]), default="auto",
    help="Graphs: the order of the axes of arrays and of image inputs.",
)  # fmt: skip


def sample_options(function: Function, *, layout: bool = True) -> Function:
    """The options for graphs that say how images, arrays and sentences become inputs.

    Args:
        function: the function of the command.
        layout: whether to add ``--layout``; False for commands that have their own.
    """
    options = (
        click.option("--tokenizer", type=click.Path(exists=True), default=None,
                     help="Graphs: the tokenizer.json for sentences, or the folder that contains "
                          "it."),
        click.option("--resize", type=click.Choice(["stretch", "crop", "pad"]), default="stretch",
                     help="Graphs: how images are brought to the input size."),
        *([_LAYOUT] if layout else []),
        click.option("--scale", metavar="X", default="1/255",
                     help="Graphs: factor that pixel values, 0 to 255, are multiplied by."),
        click.option("--std", metavar="X[,X...]", default="1",
                     help="Graphs: standard deviation to divide scaled pixels by, one for all "
                          "channels or one for each."),
        click.option("--mean", metavar="X[,X...]", default="0",
                     help="Graphs: mean to subtract from scaled pixels, one for all channels or "
                          "one for each."),
        click.option("--image-size", metavar="N|HxW", default=None,
                     show_default="the size of the model's input",
                     help="Graphs: the size that images are resized to."),
    )  # fmt: skip
    for option in options:
        function = option(function)
    return function


SAMPLE_OPTIONS = ("image_size", "mean", "std", "scale", "layout", "resize", "tokenizer")
"""Names of the parameters that `sample_options` adds."""


def refuse_given(names: Iterable[str], why: str) -> None:
    """Refuse options that were given but do not apply.

    Args:
        names: names of parameters of the running command.
        why: what these options are for, for the message.

    Raises:
        click.UsageError: an option was given; the message names the first.
    """
    ctx = click.get_current_context()
    for param in ctx.command.params:
        if param.name in names and ctx.get_parameter_source(param.name) not in (
            None, ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP,
        ):  # fmt: skip
            raise click.UsageError(f"{_long(param)} is for {why}; leave it out")


def _long(param: click.Parameter) -> str:
    """The first long name of an option."""
    return next((name for name in param.opts if name.startswith("--")), param.opts[0])
