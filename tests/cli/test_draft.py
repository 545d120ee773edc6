"""``--draft``: the same answers from run, chat and serve, with drafts of a quantized copy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import edgeq
from edgeq.core.errors import UsageError
from tests.chat_models import chat_copy
from tests.cli.test_chat import command
from tests.paths import DEMO


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("draft") / "small.edgeq"
    edgeq.quantize(DEMO, path, fast=True, threads=1)
    return path


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_copy(tmp_path_factory.mktemp("talker") / "model")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with two tokens exchanged."""
    folder = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(DEMO, folder)
    document = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    vocab = document["model"]["vocab"]
    vocab["Ġlittle"], vocab["Ġgirl"] = vocab["Ġgirl"], vocab["Ġlittle"]
    (folder / "tokenizer.json").write_text(json.dumps(document), "utf-8")
    return folder


@pytest.mark.parametrize("options", [("--temp", 0), ("--temp", 0.9, "--seed", 4)])
def test_run(small: Path, options: tuple[Any, ...]) -> None:
    args = ("run", DEMO, "Once upon a time", "-n", 80, "-t", 1, *options)
    alone, drafted = command(*args), command(*args, "--draft", small)
    assert drafted.stdout == alone.stdout
    assert "drafted tokens accepted, " in drafted.stderr
    assert "drafted" not in alone.stderr


def test_chat(small: Path, talker: Path) -> None:
    args = ("chat", talker, "-n", 40, "-t", 1, "--seed", 4)
    said = "Tell me.\nAnd then?\n/stats\n"
    alone = command(*args, stdin=None, input=said)
    drafted = command(*args, "--draft", small, stdin=None, input=said)
    assert drafted.stdout == alone.stdout
    with edgeq.chat(talker, draft=small, threads=1) as talk:
        assert talk.draft is not None
        params = edgeq.SamplingParams(seed=4)
        text = "".join(c.text for c in talk.say("Tell me.", params, max_tokens=40))
    assert alone.stdout.strip().startswith(text.strip())


def test_another_tokenizer_is_refused_by_name(small: Path, other: Path, talker: Path) -> None:
    words = "is 'Ġ.*' in the draft model and 'Ġ.*' in the model; they must have the same tokenizer"
    with pytest.raises(UsageError, match=words):
        edgeq.run(DEMO, "Once", draft=other)
    with pytest.raises(UsageError, match=words):
        edgeq.chat(talker, draft=other)
    done = command("run", DEMO, "Once", "--draft", other)
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        "they must have the same tokenizer: use a smaller model of the same family" in done.stderr
    )
    for package in ("starlette", "uvicorn"):
        pytest.importorskip(package)
    with pytest.raises(UsageError, match=words):
        edgeq.Server(str(DEMO), edgeq.ServerSettings(port=0), draft=other)
    with pytest.raises(UsageError, match="do not work together"):
        edgeq.Server(str(DEMO), edgeq.ServerSettings(port=0, lookup=4), draft=small)
