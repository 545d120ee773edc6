"""The prompts of a package's golden tests: plain texts, and conversations for chat models.

They try what tokenizers and templates differ in: spaces at both ends, digits, lines, combining
marks, several scripts, emoji made of several characters, code, special tokens written out, and
turns of a system and an assistant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgeq.core.errors import EdgeqError
from edgeq.runtime.chat_template import render_chat
from edgeq.runtime.tokenizer import Tokenizer

TEXTS = (
    "Once upon a time",
    "The capital of France is",
    " a space before, and two  within",
    "1, 2, 3, 4, 12345.67 and -0.5e-3",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "Line one\nLine two\n\n\tand a tab",
    "Grüße aus Köln, ça va très bien, señor",
    "Привет, как дела? Καλημέρα κόσμε",
    "你好，世界。今日はいい天気ですね。",
    "👩‍👩‍👧 family, 🇩🇪 flag, e\u0301 combined",
)
QUESTIONS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "List three colors.",
    "Translate 'good morning' into German.",
    "What is 12 times 12?",
    "Why is the sky blue? Answer briefly.",
    "Say hello to Zoë 👋",
    "Summarize: the bridge was closed for repairs, and traffic was led around it.",
)
SYSTEM = "You are a helpful assistant. Answer in one sentence."
DATE = "2026-01-01"
"""What templates that write the date are given, so that a rendered text stays the same."""
COUNT = 20
PROMPTS = "golden/prompts.json"
"""Where they lie in a package."""
TOKENIZER = "tokenizer"
"""Folder of a package with the tokenizer's files."""


def conversations() -> list[list[dict[str, str]]]:
    """Ten conversations."""
    talks = [[{"role": "user", "content": question}] for question in QUESTIONS]
    talks.append([{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTIONS[0]}])
    talks.append(
        [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hello! What can I do for you?"},
            {"role": "user", "content": QUESTIONS[2]},
        ]
    )
    return talks


def golden_prompts(files: Mapping[str, bytes], vocab: int, room: int) -> list[dict[str, Any]]:
    """The 20 prompts of a model: texts, or messages and what the template makes of them, and ids.

    Args:
        files: the model's tokenizer files.
        vocab: ids that the model knows.
        room: most tokens of a prompt; a longer one is cut.

    Returns:
        for each prompt "id", "text" or "messages" and "rendered", "cut" (whether it was too long)
        and "ids".

    Raises:
        UnsupportedError, FormatError: there is no tokenizer, or it is damaged.
    """
    tokenizer = Tokenizer(files)
    found: list[dict[str, Any]] = []
    talks = conversations() if tokenizer.has_chat_template else []
    for talk in talks:
        try:
            rendered = rendered_chat(files, talk)
        except EdgeqError:  # templates may refuse a system's turn
            continue
        found.append({"messages": talk, "rendered": rendered})
    texts = (*TEXTS, *QUESTIONS, SYSTEM, "Hello")
    found += [{"text": text} for text in texts[: COUNT - len(found)]]
    for number, prompt in enumerate(found):
        ids = prompt_ids(tokenizer, prompt)
        kept = [i for i in ids if i < vocab][:room]
        prompt |= {"id": f"p{number + 1:02}", "ids": kept, "cut": kept != ids}
    return found


def prompt_ids(tokenizer: Tokenizer, prompt: Mapping[str, Any]) -> list[int]:
    """The token ids of a golden prompt."""
    if "rendered" in prompt:
        return tokenizer.encode(prompt["rendered"], add_bos=False)
    return tokenizer.encode(prompt["text"], add_eos=False)


def around_a_message(files: Mapping[str, bytes]) -> tuple[str, str]:
    """What the chat template writes before and after a single message of the user.

    Args:
        files: the model's tokenizer files.

    Returns:
        two empty texts without a template, or where it changes what a message says.
    """
    mark = "message"
    if not Tokenizer(files).has_chat_template:
        return "", ""
    text = rendered_chat(files, [{"role": "user", "content": mark * 3}])
    before, found, after = text.partition(mark * 3)
    return (before, after) if found and mark * 3 not in after else ("", "")


def rendered_chat(files: Mapping[str, bytes], talk: Sequence[Mapping[str, str]]) -> str:
    """A conversation as the model's template writes it on the day `DATE`."""
    return render_chat(files, talk, strftime_now=lambda form: DATE)
