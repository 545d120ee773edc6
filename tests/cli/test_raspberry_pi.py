"""The page on the Raspberry Pi: its unit is one that systemd can read, its commands are known."""

from __future__ import annotations

import configparser
import re
import shlex

import click
import pytest

from edgeq.cli.app import cli
from tests.paths import ROOT

PAGE = (ROOT / "docs" / "raspberry-pi.md").read_text("utf-8")
COMMANDS = sorted(set(re.findall(r"^(?:\$ |ExecStart(?:Pre)?=)(\S*edgeq [a-z].*)$", PAGE, re.M)))


def unit() -> configparser.ConfigParser:
    text = re.search(r"^```ini\n(.*?)^```", PAGE, re.M | re.S)
    assert text
    read = configparser.ConfigParser(interpolation=None)
    read.optionxform = str  # type: ignore[assignment,method-assign]
    read.read_string(text[1])
    return read


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_are_known(line: str) -> None:
    program, verb, *arguments = shlex.split(line)
    assert program.rpartition("/")[2] == "edgeq"
    command = cli.get_command(click.Context(cli), verb)
    assert command is not None
    with command.make_context(verb, arguments):
        pass  # an unknown option or a wrong value is a click.UsageError


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 6


def test_the_unit_lets_answers_end() -> None:
    service = unit()["Service"]
    drain = re.search(r"--drain (\d+)", service["ExecStart"])
    assert drain
    assert int(service["TimeoutStopSec"]) > int(drain[1])
    assert re.fullmatch(r"\d+[MG]", service["MemoryMax"])
    assert "MemoryDenyWriteExecute" not in service
