"""The JSON schema of ``manifest.json``, which each package contains for programs that read it."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from edgeq.packaging import templates
from edgeq.packaging.manifest import SCHEMA


def schema() -> dict[str, Any]:
    """The schema, in JSON Schema of version 2020-12."""
    text = resources.files(templates).joinpath(SCHEMA).read_text("utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def write(folder: Path) -> None:
    """Write the schema into the folder of a package."""
    text = json.dumps(schema(), indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    templates.write(folder, SCHEMA, text)
