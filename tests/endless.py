"""A model whose answers do not end by themselves, for tests that stop them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path


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
