"""The command line without a model: help, options, exit codes, and what the terminal shows."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path

import click
import pytest

from edgeq.cli import main, render
from edgeq.cli.app import cli
from edgeq.cli.options import ByteSize, Counts, kv_bits_of
from edgeq.core.errors import FormatError
from tests.conftest import clear_settings
from tests.paths import TESTS

SNAPSHOTS = TESTS / "snapshots" / "help"
UPDATE = "EDGEQ_UPDATE_SNAPSHOTS"
VERBS = (
    "demo", "quantize", "inspect", "plan", "run", "chat", "serve", "embed", "rerank", "bench",
    "profile", "report", "perplexity", "eval", "calibrate", "sensitivity", "sweep", "convert",
    "validate", "package", "devices", "warmup", "doctor",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    clear_settings(monkeypatch, UPDATE)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr("edgeq.cli.options.DebugFlag.on", False)


@pytest.mark.parametrize("verb", ["edgeq", *VERBS])
def test_help_is_what_was_agreed(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"] if verb == "edgeq" else [verb, "--help"]) == 0
    said = capsys.readouterr().out
    snapshot = SNAPSHOTS / f"{verb}.txt"
    if os.environ.get(UPDATE):
        snapshot.write_text(said, "utf-8")
    assert said == snapshot.read_text("utf-8"), f"{UPDATE}=1 pytest {__file__} accepts the new help"


def test_every_verb_has_a_snapshot() -> None:
    assert list(cli.commands) == list(VERBS)
    assert {p.stem for p in SNAPSHOTS.glob("*.txt")} == {"edgeq", *VERBS}


def test_every_option_says_what_it_does() -> None:
    for verb in cli.commands.values():
        for param in verb.params:
            if isinstance(param, click.Option):
                assert param.help, f"{verb.name} {param.opts}"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    import edgeq

    assert main(["--version"]) == 0
    assert edgeq.__version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["run"], "Missing argument 'MODEL'"),
        (["run", "a", "-m", "b", "-p", "x"], "give one prompt: edgeq run MODEL"),
        (["run", "a"], "give one prompt: edgeq run MODEL"),
        (["run", "a", "-p", "x", "-f", __file__], "give one prompt: edgeq run MODEL"),
        (["run", "a", "-p", "x", "-f", "no-such-file"], "does not exist"),
        (["run", "a", "-p", "x", "-ctk", "q8_0", "-ctv", "f16"], "give -ctk and -ctv the same"),
        (["run", "a", "-p", "x", "-t", "0"], "x>=1"),
        (["run", "a", "-p", "x", "--kv-bits", "6"], "'4', '8', '16'"),
        (["quantize"], "Missing argument 'MODEL'"),
        (["quantize", "a"], "Missing option '-o'"),
        (["quantize", "a", "-o", "b", "--bits", "7"], "'2', '3', '4', '5', '6', '8'"),
        (
            ["quantize", "a", "-o", "b", "--preset", "w4-g32", "--bits", "4"],
            "cannot be used with --bits",
        ),
        (["quantize", "a", "-o", "b", "--group", "few"], "a number, 'channel' or 'tensor'"),
        (["quantize", "a", "-o", "b", "--max-ram", "lots"], "is not a size"),
        (["bench"], "give either MODEL or --shape"),
        (["bench", "a", "--shape", "b"], "give either MODEL or --shape"),
        (["bench", "a", "-p", "0", "-n", "0"], "nothing to time"),
        (["bench", "a", "-t", "one"], "not a list of whole numbers"),
        (["perplexity", "a"], "Missing option '-f'"),
    ],
)
def test_wrong_usage_is_exit_2(
    args: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert words in " ".join(err.split())
    assert "Traceback" not in err
    assert not out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["run", "no-such-model", "-p", "x"], "no-such-model does not exist"),
        (["inspect", str(Path(__file__).parent)], "folder without config.json"),
        (["quantize", "no-such-model", "-o", "out.edgeq"], "no-such-model does not exist"),
        (["quantize", "a", "-o", "b", "--preset", "w4-g33"], "group_size is 33"),
        (["quantize", "a", "-o", "b", "--preset", "w4g32"], "did you mean 'w4-g32'"),
        (["quantize", "a", "-o", "b", "--bits", "8", "--group", "48"], "32, 64, 128"),
        (["quantize", "a", "-o", "b", "--tensor-type", "mlp"], "write REGEX=SCHEME"),
        (["quantize", "a", "-o", "b", "--tensor-type", "(=w4-g32"], "not a regular expression"),
        (["quantize", "a", "-o", __file__], "--force"),
        (["quantize", "a", "-o", "no/such/m.edgeq"], "make it first"),
        (["sensitivity", "a", "--calib", __file__, "-o", "no/such/s.json"], "make it first"),
        (["eval", "a.onnx", "--data", "d.npz", "--confusion", "no/c.csv"], "make it first"),
        (["bench", "--shape", "llama-3.2-2b"], "did you mean 'llama-3.2-3b'"),
    ],
)
def test_an_explained_error_is_exit_1(
    args: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(args) == 1
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert words in " ".join(err.split())
    assert "Traceback" not in err
    assert not out


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (FormatError("the file is damaged"), 1, "error: the file is damaged"),
        (OSError(errno.ENOSPC, "No space left on device", "x.edgeq"), 1, "No space left"),
        (MemoryError(), 1, "not enough memory"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ZeroDivisionError("of a kind nobody thought of"), 1, "please report it"),
    ],
)
def test_every_failure_becomes_words(
    error: BaseException,
    code: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli.commands["warmup"], "callback", fail)
    assert main(["warmup"]) == code
    err = capsys.readouterr().err
    assert words in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "args", [["--debug", "inspect", "nothing"], ["inspect", "nothing", "--debug"]]
)
def test_debug_shows_the_traceback(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 1
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert "error: nothing does not exist" in err


def test_debug_by_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EDGEQ_DEBUG", "1")
    assert main(["inspect", "nothing"]) == 1
    assert "Traceback" in capsys.readouterr().err


def seen(monkeypatch: pytest.MonkeyPatch, verb: str, args: list[str]) -> dict[str, object]:
    """What a command's function is called with."""
    got: dict[str, object] = {}
    monkeypatch.setattr(cli.commands[verb], "callback", lambda **options: got.update(options))
    assert main([verb, *args]) == 0
    return got


def test_a_command_s_own_variable_stands_before_the_general_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("EDGEQ_THREADS", "3")
    monkeypatch.setenv("EDGEQ_MODEL", "general")
    assert seen(monkeypatch, "run", ["-p", "x"])["threads"] == 3
    assert seen(monkeypatch, "bench", [])["threads"] == (3,)
    monkeypatch.setenv("EDGEQ_RUN_THREADS", "5")
    got = seen(monkeypatch, "run", ["-p", "x"])
    assert (got["threads"], got["model"]) == (5, "general")
    got = seen(monkeypatch, "run", ["mine", "-p", "x", "-t", "7"])
    assert (got["threads"], got["model"]) == (7, "mine")


def test_every_option_has_an_environment_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEQ_RUN_PROMPT", "once")
    monkeypatch.setenv("EDGEQ_RUN_TOP_K", "7")
    monkeypatch.setenv("EDGEQ_RUN_STREAM", "0")
    monkeypatch.setenv("EDGEQ_RUN_STOP", "a b")
    got = seen(monkeypatch, "run", ["model"])
    assert (got["prompt"], got["top_k"], got["stream"]) == ("once", 7, False)
    assert got["stop"] == ("a", "b")


def test_flags_of_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    args = "-m x -p y -n 9 -c 64 -t 2 -s 3 --temp 0 --top-k 5 --top-p .5 --min-p .1 -ctk f16"
    got = seen(monkeypatch, "run", args.split())
    assert got["model"] == "x"
    assert (got["n_predict"], got["ctx_size"], got["threads"], got["seed"]) == (9, 64, 2, 3)
    assert (got["temp"], got["top_k"], got["top_p"], got["min_p"]) == (0, 5, 0.5, 0.1)
    assert got["cache_type_k"] == "f16"


@pytest.mark.parametrize(
    ("text", "size"),
    [("512M", 512 << 20), ("1G", 1 << 30), ("1.5GiB", 3 << 29), ("2kb", 2048), ("77", 77)],
)
def test_sizes(text: str, size: int) -> None:
    assert ByteSize().convert(text, None, None) == size


@pytest.mark.parametrize("text", ["", "G", "-1G", "0", "1X", "1 2"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(click.BadParameter):
        ByteSize().convert(text, None, None)


def test_counts() -> None:
    assert Counts(1).convert("4,1,2,1", None, None) == (4, 1, 2)
    with pytest.raises(click.BadParameter, match="0 is below the minimum, 1"):
        Counts(1).convert("1,0", None, None)


def test_kv_bits() -> None:
    assert kv_bits_of("8", None, None) == 8
    assert kv_bits_of("16", None, None) == 16
    assert kv_bits_of("8", "f16", None) == 16
    assert kv_bits_of("16", "q8_0", "q8_0") == 8


def test_the_quantize_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", "--list"]) == 0
    out = capsys.readouterr().out
    for word in ("w4-g32", "w8-channel", "w2-g16", "rtn", "mse", "-asym"):
        assert word in out


def test_the_list_of_shapes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--list"]) == 0
    assert "llama-3.2-1b" in capsys.readouterr().out


def test_numbers_for_people() -> None:
    assert render.human_bytes(0) == "0 B"
    assert render.human_bytes(1023) == "1023 B"
    assert render.human_bytes(636.18 * 2**20) == "636.18 MiB"
    assert render.human_count(999) == "999"
    assert render.human_count(260032) == "260.03 K"
    assert render.human_count(1_235_814_400) == "1.24 B"


def test_tables() -> None:
    head, rows = ["name", "n"], [["a", "1"], ["longer", "22"]]
    assert render.aligned(head, rows, "lr").splitlines() == [
        "name     n",
        "------  --",
        "a        1",
        "longer  22",
    ]
    assert render.markdown(head, rows, "lr").splitlines() == [
        "| name   |  n |",
        "|--------|---:|",
        "| a      |  1 |",
        "| longer | 22 |",
    ]


def test_a_story_breaks_between_words() -> None:
    sink = io.StringIO()
    text = "Once upon a time, there was a little fox. " * 8 + "\nThe end."
    with render.Page(sink).story("") as say:
        for start in range(0, len(text), 3):
            say(text[start : start + 3])
    lines = sink.getvalue().splitlines()
    assert all(line.startswith("  ") for line in lines if line)
    assert all(line == line.rstrip() for line in lines)
    assert max(map(len, lines)) <= 88
    assert min(len(line) for line in lines[:3]) > 70
    assert " ".join(sink.getvalue().split()) == " ".join(text.split())


def test_progress_is_silent_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    with render.progress("working") as bar:
        bar("part", 1, 2)
    assert capsys.readouterr() == ("", "")
