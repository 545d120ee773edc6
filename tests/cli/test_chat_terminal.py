"""`edgeq chat` and `edgeq run` as a person uses them: in a real terminal."""

from __future__ import annotations

import json
import signal
import stat
from pathlib import Path

import pytest

import edgeq
from edgeq.api.conversation import read_messages
from edgeq.cli import render
from edgeq.cli.chat import _next_line
from edgeq.cli.terminal import CtrlC, LineEditor, _read_history, interruptible
from edgeq.core.errors import FormatError, UsageError
from tests.chat_models import chat_copy, endless_copy
from tests.cli.test_chat import GREEDY, command

pytest.importorskip("pty", reason="there are no pseudoterminals here")

from tests.terminal import Terminal

QUICK = ("-t", 1, "--temp", 0)
PROMPT = r"\n(?:\x1b\[\?2004h)?> "  # with the mark that pasted text is told apart from typed
UP = "\x1b[A"


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_copy(tmp_path_factory.mktemp("talker") / "model")


@pytest.fixture(scope="module")
def endless(talker: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, whose answers never end by themselves."""
    return endless_copy(talker, tmp_path_factory.mktemp("endless") / "model")


def answer(model: Path, *messages: str, n: int = 8) -> str:
    """The last of some greedy answers."""
    with edgeq.chat(model, threads=1) as talk:
        for message in messages:
            said = "".join(c.text for c in talk.say(message, GREEDY, max_tokens=n))
    return said.strip()


def test_ctrl_c_stops_the_answer_and_not_the_session(endless: Path, tmp_path: Path) -> None:
    options = ("--backend", "numpy", "-n", 480, "-t", 1)
    with Terminal("chat", endless, *options, home=tmp_path) as chat:
        chat.until(PROMPT)
        chat.type("Tell me.\n")
        chat.until(r"\d+ tokens, \d+\.\d tok/s")  # the live rate
        chat.type("\x03")
        chat.until(r"\[stopped\]")
        chat.until(PROMPT)
        chat.type("/stats\n")
        chat.until(r"generated \d+ tokens in")
        chat.until(r"context: \d+ of 512 tokens")
        chat.until(PROMPT)
        chat.type("half a line")
        chat.until("half a line")
        chat.interrupt()
        chat.until("/exit or Ctrl-D ends the chat")
        chat.until("> ")
        chat.type("\x04")  # Ctrl-D
        assert chat.end() == 0
    assert "Traceback" not in chat.said
    # the row of the rate is given back
    assert chat.said.count("\x1b[1;23r") == chat.said.count("\x1b[r") == 1


class Pressed(LineEditor):
    """An editor at which somebody presses Ctrl-C before typing a line."""

    def __init__(self, presses: int) -> None:
        super().__init__(None)
        self.presses = presses

    def ask(self, prompt: str) -> str | None:
        while self.presses:
            self.presses -= 1
            signal.raise_signal(signal.SIGINT)
        return "a line"


def test_ctrl_c_again_while_the_first_is_dealt_with(monkeypatch: pytest.MonkeyPatch) -> None:
    said = []

    def slow(text: str) -> None:
        signal.raise_signal(signal.SIGINT)
        said.append(text)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(render, "note", slow)
    with CtrlC() as ctrl_c:
        assert _next_line(Pressed(3), ctrl_c) == "a line"
        signal.raise_signal(signal.SIGINT)  # before the answer begins
        with interruptible() as interrupt:
            signal.raise_signal(signal.SIGINT)
        assert interrupt.asked
        signal.raise_signal(signal.SIGINT)  # after its end
    assert said == ["\n/exit or Ctrl-D ends the chat"] * 3
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_lines_can_be_edited_and_come_back(talker: Path, tmp_path: Path) -> None:
    pytest.importorskip("readline")
    with Terminal("chat", talker, *QUICK, "-n", 8, home=tmp_path) as chat:
        chat.until(PROMPT)
        chat.type("Tell mx\x7fe.\n")  # Backspace
        chat.until(PROMPT)
        chat.type("/save one.json\n".replace("one", str(tmp_path / "one")))
        chat.until("saved: ")
        chat.until(PROMPT)
        chat.type("/exit\n")
        assert chat.end() == 0
    saved = json.loads((tmp_path / "one.json").read_text())
    assert [m["content"] for m in saved["messages"]] == ["Tell me.", answer(talker, "Tell me.")]
    history = tmp_path / ".local" / "state" / "edgeq" / "chat_history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    kept = [json.loads(line) for line in history.read_text().splitlines()]
    assert kept[0] == "Tell me."
    with Terminal("chat", talker, *QUICK, "-n", 8, home=tmp_path) as chat:
        chat.until(PROMPT)
        chat.type(UP * len(kept) + "\n")
        chat.until(PROMPT)
        chat.type("\x1b[200~one\ntwo\x1b[201~\n")  # pasted: one message
        chat.until(PROMPT)
        chat.type(f"/save {tmp_path / 'two.json'}\n")
        chat.until("saved: ")
        chat.type("/exit\n")
        assert chat.end() == 0
    saved = json.loads((tmp_path / "two.json").read_text())
    assert [m["content"] for m in saved["messages"][::2]] == ["Tell me.", "one\ntwo"]


def test_no_history_is_kept_if_none_is_wanted(talker: Path, tmp_path: Path) -> None:
    with Terminal("chat", talker, *QUICK, "-n", 4, "--no-history", home=tmp_path) as chat:
        chat.until(PROMPT)
        chat.type("Tell me.\n")
        chat.until(PROMPT)
        chat.type("/exit\n")
        assert chat.end() == 0
    assert list(tmp_path.iterdir()) == []


def test_errors_do_not_end_the_session(talker: Path, tmp_path: Path) -> None:
    with Terminal("chat", talker, *QUICK, "-n", 4, "-c", 40, home=tmp_path) as chat:
        for line, said in (
            ("/regen", "error: there is no message to answer again"),
            ("/sytem x", r"no command /sytem; did you mean /system\?"),
            ("/load " + str(tmp_path / "none"), r"(?s)error: .*cannot\s+be\s+read:\s+No\s+such"),
            ("/save", "/save needs the name of a file"),
            ("many words " * 20, "error: the prompt has .* tokens"),
            ("/help", "/regen +answer the last message again"),
            ("Tell me.", "there was a"),
            ("/stats", "context: "),
            ("/system Be kind.", "new conversation, with the system prompt: Be kind"),
            ("/stats", "there is no answer yet"),
            ("/reset", "new conversation, with the system prompt: Be kind"),
            ("/system", "new conversation, no system prompt"),
        ):
            chat.until("> ")
            chat.type(line + "\n")
            chat.until(said)
        chat.type("/exit\n")
        assert chat.end() == 0
    assert "Traceback" not in chat.said


def test_run_shows_its_rate_and_leaves_the_terminal_as_it_was(
    endless: Path, tmp_path: Path
) -> None:
    options = ("--backend", "numpy", "-n", 480, "-t", 1)
    with Terminal("run", endless, "Once upon a time", *options, home=tmp_path) as run:
        assert run.end() == 0
    assert "tok/s" in run.said
    assert run.said.count("\x1b[1;23r") == run.said.count("\x1b[r") == 1
    with Terminal("run", endless, "Once upon a time", *options, home=tmp_path) as run:
        run.until("tokens, ")
        run.type("\x03")
        assert run.end() == 130
    assert run.said.count("\x1b[1;23r") == run.said.count("\x1b[r") == 1
    assert "Traceback" not in run.said


# Without a terminal


def lines(talker: Path, text: str, *options: object) -> list[str]:
    done = command("chat", talker, *QUICK, "-n", 8, *options, stdin=None, input=text)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    return done.stdout.splitlines()


def test_switches_of_thought_go_to_the_model(talker: Path, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    text = f"Tell me. /no_think\n/think And?\n /reset is a word\n/save {file}\n"
    assert len(lines(talker, text)) == 3
    messages = json.loads(file.read_text())["messages"]
    assert [m["content"] for m in messages[::2]] == [
        "Tell me. /no_think", "/think And?", "/reset is a word",
    ]  # fmt: skip


def test_save_load_and_regenerate(talker: Path, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    first, again, second = lines(talker, f"Tell me.\n/regen\nAnd then?\n/save {file}\n")
    assert first == again  # greedy
    assert second == answer(talker, "Tell me.", "And then?")
    (third,) = lines(talker, "And?\n", "--load", file)
    assert third == answer(talker, "Tell me.", "And then?", "And?")
    assert lines(talker, f"/load {file}\n/regen\n") == [second]
    other = command("chat", talker, "-t", 1, "-n", 8, "--seed", 1, "--temp", 2, stdin=None,
                    input="Tell me.\n/regen\n")  # fmt: skip
    one, two = other.stdout.splitlines()
    assert one != two


def test_what_is_no_conversation_is_neither_read_nor_replaced(talker: Path, tmp_path: Path) -> None:
    notes = tmp_path / "notes.json"
    with edgeq.chat(talker, threads=1) as talk:
        with pytest.raises(UsageError, match="there are no messages to save"):
            talk.save(notes)
        list(talk.say("Tell me.", GREEDY, max_tokens=4))
        talk.save(notes)
        talk.save(notes)  # its own file
        good = json.loads(notes.read_text())
        before = [*talk.messages]
        for wrong in (
            "x", "[]", "{}", json.dumps({**good, "version": 2}),
            json.dumps({**good, "messages": []}),
            json.dumps({**good, "messages": [{"role": "king", "content": "x"}]}),
            json.dumps({**good, "messages": [{"role": "user", "content": 7}]}),
        ):  # fmt: skip
            notes.write_text(wrong)
            with pytest.raises(FormatError):
                talk.load(notes)
            with pytest.raises(UsageError, match="is not a saved conversation"):
                talk.save(notes)
            assert notes.read_text() == wrong
            assert talk.messages == before
        waiting = {**good, "messages": good["messages"][:1]}
        notes.write_text(json.dumps(waiting))
        talk.load(notes)
        list(talk.regenerate(GREEDY, max_tokens=4))
        assert talk.messages == before


def test_a_damaged_history_is_named(talker: Path, tmp_path: Path) -> None:
    (tmp_path / "h").write_text("not ours\n")
    with Terminal("chat", talker, "--history", tmp_path / "h", home=tmp_path) as chat:
        assert chat.end() == 1
    said = chat.said.replace("\r\n", " ")
    assert "h is not a history file of edgeq; give another file with --history" in said


def test_a_history_may_hold_any_characters(tmp_path: Path) -> None:
    pytest.importorskip("readline")
    file = tmp_path / "h"
    messages = ["one\u2028two\x85three", "a\0b\x1b[2J", "lone \ud800"]
    for message in messages:
        LineEditor(file)._keep(message)
    with file.open("a") as cut:
        cut.write('"cut off')
    LineEditor(file)._keep("later")
    kept = _read_history(file)
    assert kept[:2] == messages[:2]
    assert len(kept) == 3  # the line that was cut, and what was written on it, are left out
    LineEditor(file)
    file.write_text("[" * 100_000)
    with pytest.raises(UsageError, match="is not a history file of edgeq"):
        LineEditor(file)
    with file.open("wb") as huge:
        huge.truncate(1 << 30)
    with pytest.raises(UsageError, match="is larger than 64 MiB"):
        LineEditor(file)


def test_a_device_or_a_pipe_is_no_conversation(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe")
    for path in (Path("/dev/zero"), tmp_path / "pipe", tmp_path):
        with pytest.raises(FormatError, match="it is not a regular file"):
            read_messages(path)


def test_a_terminal_does_not_obey_what_a_model_or_a_file_says(talker: Path, tmp_path: Path) -> None:
    talk = {"format": "edgeq conversation", "version": 1, "messages": [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "\x1b]0;title\x07 \x9b2J"},
    ]}  # fmt: skip
    (tmp_path / "talk").write_text(json.dumps(talk))
    with Terminal("chat", talker, *QUICK, "--load", tmp_path / "talk", home=tmp_path) as chat:
        chat.until("assistant: \u241b]0;title\u2407 \ufffd2J")
        chat.until(PROMPT)
        chat.type("/exit\n")
        assert chat.end() == 0
    assert render.visible("a\r\n\tb\x1b[2J\x7f\u0085é") == "a\u240d\n\tb\u241b[2J\u2421\ufffdé"
