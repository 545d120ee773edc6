"""The command group, and the handler that maps every error to a message and an exit code."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
import traceback
from collections import UserDict
from collections.abc import Sequence
from importlib import import_module

import click

from edgeq._version import __version__
from edgeq.cli import render
from edgeq.cli.options import CONTEXT_SETTINGS, debug_option, debugging
from edgeq.cli.signals import Terminated, ending_signals
from edgeq.core.errors import EdgeqError

EXIT_ERROR, EXIT_INTERRUPTED = 1, 130


class Commands(UserDict[str, "click.Command | str"]):
    """The commands by name. The module of one is imported when it is asked for, so that a command
    starts without the others; each is given as MODULE, in which it has that name too, or as
    MODULE:FUNCTION."""

    def __getitem__(self, name: str) -> click.Command:
        found = self.data[name]
        if isinstance(found, str):
            module, _, function = found.partition(":")
            found = getattr(import_module(f"edgeq.cli.{module}"), function or module)
            self.data[name] = found
        assert isinstance(found, click.Command)
        return found


class OrderedGroup(click.Group):
    """A group that lists its commands in the order in which they were added."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the commands, in the order in which a new user needs them."""
        return list(self.commands)


@click.group(
    cls=OrderedGroup,
    commands=Commands(
        demo="demo",
        quantize="quantize",
        inspect="inspect",
        plan="plan",
        run="run",
        chat="chat",
        serve="serve",
        embed="embed",
        rerank="rerank",
        bench="bench",
        profile="profile",
        report="report",
        perplexity="perplexity",
        eval="evaluation",
        calibrate="calibrate",
        sensitivity="sensitivity",
        sweep="sweep",
        convert="convert",
        validate="validate",
        package="package",
        devices="devices",
        warmup="warmup",
        doctor="doctor",
    ),
    context_settings=CONTEXT_SETTINGS,
    epilog="Every option can also be set by an environment variable: EDGEQ_RUN_THREADS=2 is "
    "`edgeq run --threads 2`. EDGEQ_MODEL, EDGEQ_THREADS, EDGEQ_CTX_SIZE, EDGEQ_KV_BITS and "
    "EDGEQ_BACKEND apply to every command that has the option.",
)
@click.version_option(__version__, "-V", "--version", prog_name="edgeq")
def cli() -> None:
    """Quantize models to INT4 and INT8, run them on this machine, and convert them for devices."""


cli.params.append(debug_option())


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        args: the arguments; None takes those of the process.

    Returns:
        The exit code: 0 success, 1 an error with an explanation, 2 wrong usage, 130 interrupted,
        143 terminated, 129 the terminal was closed.
    """
    for stream in (sys.stdout, sys.stderr):
        # a character that the terminal cannot show must not end the command with an error
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        with ending_signals():
            code = cli.main(
                args, prog_name="edgeq", standalone_mode=False, auto_envvar_prefix="EDGEQ"
            )
            sys.stdout.flush()
    except Terminated as terminated:
        with contextlib.suppress(OSError):  # the terminal may be gone
            click.echo("terminated", err=True)
        return 128 + terminated.signum
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return EXIT_INTERRUPTED
    except click.ClickException as err:
        shown = io.StringIO()
        err.show(file=shown)
        render.note(shown.getvalue().rstrip())
        return err.exit_code
    except EdgeqError as err:
        return _explain(str(err))
    except MemoryError:
        return _explain("not enough memory; use a smaller model or a shorter context (--ctx-size)")
    except BrokenPipeError:
        return _reader_left()
    except OSError as err:
        if err.errno == errno.EPIPE:
            return _reader_left()
        return _explain(f"{err.strerror or err}" + (f": {err.filename}" if err.filename else ""))
    except Exception as err:  # noqa: BLE001
        return _explain(
            f"{type(err).__name__}: {err}\n"
            "this is an error in edgeq; please report it with the traceback that --debug shows"
        )
    return code if isinstance(code, int) else 0


def _explain(message: str) -> int:
    if debugging():
        traceback.print_exc()
    render.note(f"error: {message}")
    return EXIT_ERROR


def _reader_left() -> int:
    """End without a message, because the reader of standard output has closed it (``| head``)."""
    with open(os.devnull, "w", encoding="utf-8") as sink:  # noqa: PTH123
        os.dup2(sink.fileno(), sys.stdout.fileno())
    return EXIT_ERROR
