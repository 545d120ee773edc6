"""The prompts of a package's golden tests: plain texts, and conversations for chat models.

They cover what tokenizers and chat templates differ in: leading and trailing spaces, digits, line
breaks, combining marks, several scripts, emoji made of several code points, code, and messages of
the roles system and assistant.
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
"""The date that chat templates get, so that rendered texts do not depend on the day."""
COUNT = 20
PROMPTS = "golden/prompts.json"
"""Path of the golden prompts in a package."""
TOKENIZER = "tokenizer"
"""Folder of the tokenizer's files in a package."""


def conversations() -> list[list[dict[str, str]]]:
    """Ten conversations: lists of messages with a role and a content."""
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
    """The 20 golden prompts of a model, with their token ids.

    Args:
        files: the model's tokenizer files.
        vocab: size of the model's vocabulary; larger ids are left out.
        room: most tokens of a prompt; longer prompts are truncated.

    Returns:
        for each prompt "id", "text" (or "messages", "rendered", the text that the chat template
        makes of them, and "dated", whether that text depends on the day), "ids", and "cut" (whether
        ids were left out).

    Raises:
        UnsupportedError, FormatError: there is no tokenizer, or the tokenizer is damaged.
    """
    tokenizer = Tokenizer(files)
    found: list[dict[str, Any]] = []
    talks = conversations() if tokenizer.has_chat_template else []
    for talk in talks:
        try:
            rendered = rendered_chat(files, talk)
        except EdgeqError:  # some templates refuse system messages
            continue
        dated = rendered != rendered_chat(files, talk, date="")
        found.append({"messages": talk, "rendered": rendered, "dated": dated})
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


def start_ids(files: Mapping[str, bytes]) -> list[int]:
    """The token ids that a model's tokenizer puts before a text."""
    return Tokenizer(files).encode("", add_eos=False)


def around_a_message(files: Mapping[str, bytes]) -> tuple[str, str]:
    """The text that the chat template writes before and after a single user message.

    Args:
        files: the model's tokenizer files.

    Returns:
        the text before and the text after the message. Both are empty if the model has no chat
        template, or if the template changes or repeats the message.
    """
    mark = "message"
    if not Tokenizer(files).has_chat_template:
        return "", ""
    text = rendered_chat(files, [{"role": "user", "content": mark * 3}])
    before, found, after = text.partition(mark * 3)
    return (before, after) if found and mark * 3 not in after else ("", "")


def rendered_chat(
    files: Mapping[str, bytes], talk: Sequence[Mapping[str, str]], date: str = DATE
) -> str:
    """A conversation as text, as the model's chat template renders it on the day ``date``."""
    return render_chat(files, talk, strftime_now=lambda form: date)
