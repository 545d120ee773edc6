"""Options of the commands that generate text: JSON schemas, prompt lookup, drafts."""

from __future__ import annotations

from pathlib import Path

import click

from edgeq.cli.options import Function


def schema_option(function: Function) -> Function:
    """The option ``--json-schema FILE``, whose value is the text of the file."""

    def text_of(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            return Path(value).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as err:
            raise click.UsageError(
                f"{value} cannot be read as a JSON schema: {err}; give a UTF-8 text file"
            ) from err

    return click.option(
        "--json-schema", type=click.Path(exists=True, dir_okay=False), default=None,
        metavar="FILE", callback=text_of,
        help="Answer with JSON that this schema allows. Needs pip install 'edgeq[structured]'.",
    )(function)  # fmt: skip


def lookup_option(function: Function) -> Function:
    """The option ``--lookup N``."""
    return click.option(
        "--lookup", type=click.IntRange(0, 64), default=0,
        help="Propose up to this many tokens from earlier text (prompt lookup decoding) and "
        "verify them in one pass; the output stays the same.",
    )(function)  # fmt: skip


def draft_option(function: Function) -> Function:
    """The option ``--draft MODEL``."""
    return click.option(
        "-md", "--draft", "--model-draft", "draft", metavar="MODEL", default=None,
        help="A small model with the same tokenizer that drafts tokens, which MODEL checks in one "
        "pass; the output stays the same. It pauses when it does not make answers faster.",
    )(function)  # fmt: skip


def mtp_option(function: Function) -> Function:
    """The option ``--no-mtp``."""
    return click.option(
        "--mtp/--no-mtp", default=True,
        help="Draft tokens with MODEL's own multi-token-prediction head, if it has one; the output "
        "stays the same. It pauses when it does not make answers faster.",
    )(function)  # fmt: skip
