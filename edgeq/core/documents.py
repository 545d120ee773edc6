"""Text files, JSON and TOML documents that users give or that edgeq wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgeq.core.errors import FormatError


def read_text(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        FormatError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text("utf-8")
    except OSError as err:
        raise FormatError(f"{path} cannot be read: {err.strerror or err}") from err
    except UnicodeDecodeError as err:
        raise FormatError(f"{path} is not UTF-8 text: {err}") from err


def read_document(path: Path, hint: str = "") -> Any:
    """The content of a document: TOML if its name ends in .toml, otherwise JSON.

    Args:
        path: of the file.
        hint: how to get a correct file, for the message of an error.

    Raises:
        FormatError: it cannot be read, or is neither.
    """
    toml = path.suffix == ".toml"
    try:
        text = path.read_text("utf-8")
        if not toml:
            return json.loads(text)
        import tomllib

        return tomllib.loads(text)
    except OSError as err:
        raise FormatError(f"{path} cannot be read: {err.strerror or err}") from err
    except (ValueError, RecursionError) as err:  # UTF-8, JSON or TOML
        kind = "TOML" if toml else "JSON"
        raise FormatError(f"{path} is not {kind}: {err}{f'; {hint}' if hint else ''}") from err
