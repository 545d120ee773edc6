"""The demo model said to be a chat model, and one whose answers do not end by themselves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.paths import DEMO

TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<|eos|>{% endif %} "
    "{% endfor %}{% if add_generation_prompt %}Once upon a time{% endif %}"
)
"""A story goes on after the messages."""


def chat_copy(folder: Path, template: str = TEMPLATE) -> Path:
    """The demo model in another folder, with a chat template.

    Args:
        folder: to be made.
        template: for the messages.
    """
    shutil.copytree(DEMO, folder)
    (folder / "chat_template.jinja").write_text(template)
    return folder


def endless_copy(source: Path, folder: Path) -> Path:
    """The demo model in another folder, with an end token that it never says: BOS.

    Args:
        source: the demo model, or a copy with a chat template.
        folder: to be made.
    """
    shutil.copytree(source, folder)
    for name, key, value in (
        ("config.json", "eos_token_id", 0),
        ("generation_config.json", "eos_token_id", 0),
        ("tokenizer_config.json", "eos_token", "<|bos|>"),
    ):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | {key: value}))
    return folder
