"""Option names, output files, wrapping and progress: what is the same in every command."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

from edgeq.cli import main, render
from edgeq.cli.app import cli
from edgeq.cli.devices import devices
from edgeq.cli.options import command, model_argument
from tests.conftest import clear_settings
from tests.paths import ROOT

DEMO = ROOT / "edgeq" / "demo_model"
COMMANDS = {**cli.commands, **{f"devices {name}": verb for name, verb in devices.commands.items()}}


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    clear_settings(monkeypatch)
    monkeypatch.delenv("COLUMNS", raising=False)


def options(verb: click.Command) -> dict[str, click.Option]:
    return {
        name: param for param in verb.params if isinstance(param, click.Option)
        for name in param.opts
    }  # fmt: skip


def called(monkeypatch: pytest.MonkeyPatch, *args: str) -> dict[str, object]:
    """What a command's function is called with."""
    got: dict[str, object] = {}
    monkeypatch.setattr(cli.commands[args[0]], "callback", lambda **given: got.update(given))
    assert main(args) == 0
    return got


# the names of options


@pytest.mark.parametrize("verb", COMMANDS)
def test_output_is_a_path_and_format_a_format(verb: str) -> None:
    known = options(COMMANDS[verb])
    if "-o" in known:
        assert known["-o"] is known["--output"]
        assert isinstance(known["-o"].type, click.Path)
    if "--format" in known:
        assert isinstance(known["--format"].type, click.Choice)
        assert known["--format"] is not known["-o"]


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_model_argument_is_an_option_too(verb: str) -> None:
    metavars = {param.metavar for param in COMMANDS[verb].params
                if isinstance(param, click.Argument)}  # fmt: skip
    if metavars & {"MODEL", "[MODEL]", "MODEL..."}:
        model = options(COMMANDS[verb])["-m"]
        assert model is options(COMMANDS[verb])["--model"]
        assert "Same as the MODEL argument" in (model.help or "")


@pytest.mark.parametrize("verb", ["quantize", "calibrate", "sensitivity"])
def test_a_source_by_option(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = () if verb == "quantize" else ("--calib", __file__)
    for name in ("-m", "--model", "--hf-path"):
        got = called(monkeypatch, verb, name, "mine", "-o", "out", *needed)
        assert got["source"] == "mine"
    assert called(monkeypatch, verb, "mine", "-o", "out", *needed)["source"] == "mine"


def test_models_of_a_sweep_by_option(monkeypatch: pytest.MonkeyPatch) -> None:
    got = called(monkeypatch, "sweep", "a", "-m", "b", "--recipe", "w4-g32", "-o", "out")
    assert (got["models"], got["named"]) == (("a",), ("b",))


def test_a_model_given_twice(capsys: pytest.CaptureFixture[str]) -> None:
    for args in (
        ["run", "a", "-m", "b", "once"],
        ["inspect", "a", "-m", "b"],
        ["quantize", "a", "-m", "b"],
    ):
        assert main(args) == 2
        assert "as the argument a and as --model b; give it once" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "name", "value"),
    [
        (["run", "m", "-p", "x", "--max-tokens", "7"], "n_predict", 7),
        (["run", "m", "-p", "x", "--predict", "7"], "n_predict", 7),
        (["run", "m", "-p", "x", "--temperature", "0.3"], "temp", 0.3),
        (["chat", "m", "--max-tokens", "7"], "n_predict", 7),
        (["chat", "m", "--system-prompt", "Be brief."], "system", "Be brief."),
        (["demo", "--max-tokens", "7", "--temperature", "0.3"], "temp", 0.3),
        (["quantize", "m", "-o", "o", "--group-size", "64"], "group", "64"),
        (["quantize", "m", "-o", "o", "--q-group-size", "64"], "group", "64"),
        (["quantize", "m", "-o", "o", "--q-bits", "3"], "bits", "3"),
        (["sensitivity", "m", "--calib", __file__, "--group-size", "64"], "group", "64"),
        (["calibrate", "m", "--calib", __file__, "-o", "o", "--calib-windows", "3"], "windows", 3),
    ],
)
def test_names_that_other_tools_use(
    args: list[str], name: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert called(monkeypatch, *args)[name] == value


def test_bits_and_group_size_make_a_scheme(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "m.edgeq"
    args = ["quantize", str(DEMO), "-o", str(out), "--bits", "4", "--group-size", "64",
            "--no-card", "--format", "json"]  # fmt: skip
    assert main(args) == 0
    assert json.loads(capsys.readouterr().out)["recipe"]["default"] == "w4-g64"


@pytest.mark.parametrize("name", ["-ngl", "--n-gpu-layers", "--gpu-layers"])
@pytest.mark.parametrize(
    "args",
    [["run", "m", "-p", "x"], ["chat", "m"], ["bench", "m"], ["perplexity", "m", "-f", __file__]],
)
def test_gpu_layers_are_ignored_with_a_note(
    args: list[str], name: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    called(monkeypatch, *args, name, "99")
    out, err = capsys.readouterr()
    assert (out, err) == ("", "note: edgeq runs on the CPU; -ngl 99 is ignored\n")
    called(monkeypatch, *args, name, "0")
    called(monkeypatch, *args)
    assert capsys.readouterr().err == ""


# the file of a result


def test_a_result_goes_to_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["plan", "--shape", "qwen2.5-0.5b", "--device", "rpi5"]
    assert main(args) == 0
    shown = capsys.readouterr().out
    out = tmp_path / "plan.txt"
    assert main([*args, "-o", str(out)]) == 0
    assert capsys.readouterr().out == ""
    assert out.read_text("utf-8") == shown
    assert main([*args, "--output", str(out)]) == 1
    assert "already exists" in capsys.readouterr().err
    assert out.read_text("utf-8") == shown
    assert main([*args, "-o", str(out), "--force", "--format", "json"]) == 0
    assert json.loads(out.read_text("utf-8"))["fits"] is True


def test_no_file_after_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "found.json"
    assert main(["inspect", "no-such-model", "-o", str(out)]) == 1
    assert "no-such-model does not exist" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "name"),
    [
        (["bench", "m"], "json"), (["bench", "m"], "md"), (["bench", "m"], "jsonl"),
        (["inspect", "m"], "json"), (["plan", "m"], "text"), (["doctor"], "json"),
        (["devices", "detect"], "toml"), (["perplexity", "m", "-f", __file__], "json"),
    ],
)  # fmt: skip
def test_a_format_given_as_the_output(
    args: list[str], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main([*args, "-o", name]) == 2
    assert f"for the format write --format {name}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_file_may_have_the_name_of_a_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["devices", "show", "rpi5", "-o", "./json"]) == 0
    assert "Raspberry Pi 5" in Path("json").read_text("utf-8")


# inspect


def test_inspect_is_one_screen(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(DEMO)]) == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) < 24
    assert re.search(r"^family +llama$", shown, re.MULTILINE)
    assert re.search(r"^parameters +3\.31 M$", shown, re.MULTILINE)
    assert re.search(r"^context +512 tokens$", shown, re.MULTILINE)
    assert re.search(r"^tokenizer +yes$", shown, re.MULTILINE)
    assert re.search(r"^chat template +no$", shown, re.MULTILINE)
    assert re.search(r"^  \w+ +\d+ tensors, .* bits per weight$", shown, re.MULTILINE)
    assert "model.norm.weight" not in shown
    assert main(["inspect", str(DEMO), "--tensors"]) == 0
    every = capsys.readouterr().out
    assert "model.norm.weight" in every
    assert every.startswith(shown.split("\n\n")[0])


# wrapping


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_text_wraps_between_words(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["plan", "--shape", "llama-3.2-1b", "--device", "rpi4", "--bits", "4"]
    assert main(args) == 0
    whole = capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(args) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= columns
    assert sorted(set(shown.replace("-", " ").split())) == sorted(
        set(whole.replace("-", " ").split())
    )


@pytest.mark.parametrize("columns", [80, 90])
def test_tables_fold_to_the_terminal(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["devices", "list"]) == 0
    assert main(["inspect", str(DEMO), "--tensors"]) == 0
    assert main(["quantize", "--list"]) == 0
    shown = capsys.readouterr().out
    assert "raspberry" in shown.lower()
    tables = [line for line in shown.splitlines() if re.match(r"\S+ .*  ", line)]
    assert max(map(len, tables)) <= columns


def test_a_folded_table_keeps_all_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    name, words = "model.layers.11.self_attn.q_proj.weight", "a description of several words"
    rows = [[name, words, "12.5"], ["short", "", "3.0"]]
    monkeypatch.setenv("COLUMNS", "44")
    lines = render.aligned(["tensor", "about", "dB"], rows, "llr").splitlines()
    assert max(map(len, lines)) <= 44
    firsts = [line[: line.index("12.5")] if "12.5" in line else line for line in lines]
    joined = "".join(line.split("  ")[0].strip() for line in firsts)
    assert name in joined
    monkeypatch.delenv("COLUMNS")
    assert name in render.aligned(["tensor", "about", "dB"], rows, "llr")


def test_a_pipe_gets_whole_lines(capsys: pytest.CaptureFixture[str]) -> None:
    text = "word " * 60
    render.lines(text.strip())
    assert capsys.readouterr().out == text.strip() + "\n"


# progress


SCRIPT = """
import time
from edgeq.cli import render
with render.progress("Quantizing") as bar:
    for i in range(12):
        bar("model.layers[0]", i, 12)
        time.sleep(0.15)
print("result")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_progress_says_what_how_far_and_how_long() -> None:
    import pty

    leader, follower = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], stderr=follower, stdout=subprocess.PIPE, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "100"},
    )  # fmt: skip
    os.close(follower)
    drawn = b""
    while chunk := _read(leader):
        drawn += chunk
    os.close(leader)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn.decode())
    assert re.search(
        r"Quantizing.* \d+%, 0:0\d elapsed, about 0:0\d left.*model\.layers\[0\]", text
    )
    assert done.stdout == b"result\n"


def _read(leader: int) -> bytes:
    try:
        return os.read(leader, 65536)
    except OSError:  # Linux says so where the other end is closed
        return b""


def test_progress_is_silent_without_a_terminal() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.replace("0.15", "0.05")], capture_output=True, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.stdout, done.stderr) == (b"result\n", b"")


def test_time_left_follows_the_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    clock = render._ProgressTimes()
    clock.move(0, 10)
    now = 20.0
    clock.move(2, 10)
    assert str(clock) == " 20%, 0:20 elapsed, about 1:20 left"
    clock.move(0, 4)  # another phase counts anew
    assert str(clock) == "  0%, 0:20 elapsed"
    now = 22.0
    clock.move(2, 4)
    assert str(clock) == " 50%, 0:22 elapsed, about 0:02 left"
    now = 4000.0
    clock.move(0, 0)  # a phase of unknown length
    assert str(clock) == "1:06:40 elapsed"


# the model as an option beside a prompt


def test_with_an_option_for_the_model_the_argument_is_the_prompt(
    capsys: pytest.CaptureFixture[str],
) -> None:
    got: dict[str, object] = {}

    @command("ask", "")
    @model_argument
    @click.argument("question", required=False)
    def ask(model: str, question: str | None) -> None:
        got.update(model=model, question=question)

    for args in (["m", "q"], ["-m", "m", "q"], ["q", "--model", "m"]):
        got.clear()
        ask.main(args, standalone_mode=False)
        assert got == {"model": "m", "question": "q"}
    ask.main(["m"], standalone_mode=False)
    assert got == {"model": "m", "question": None}
    with pytest.raises(click.UsageError, match="the model is given twice"):
        ask.main(["m", "q", "-m", "m"], standalone_mode=False)


def test_a_wide_markdown_table_on_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    head = ["model", "backend", "threads", "test", "t/s"]
    rows = [["qwen2 494.03 M w4-g32", "numba", "1", "pp512", "385.97"],
            ["qwen2 494.03 M w4-g32", "numba", "1", "tg128", "75.33"]]  # fmt: skip
    monkeypatch.setenv("COLUMNS", "40")
    piped = render.markdown(head, rows, "llrrr")
    assert piped.startswith("| model")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    shown = render.markdown(head, rows, "llrrr")
    assert shown.splitlines() == [
        "model    qwen2 494.03 M w4-g32",
        "backend  numba",
        "threads  1",
        "",
        " test     t/s",
        "-----  ------",
        "pp512  385.97",
        "tg128   75.33",
    ]
    monkeypatch.setenv("COLUMNS", "120")
    assert render.markdown(head, rows, "llrrr") == piped
