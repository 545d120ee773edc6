"""Names that a package exports and loads when they are first used."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazy_exports(package: str, homes: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a package whose names stand in its modules (PEP 562).

    A name is looked up once: then the package has it.

    Args:
        package: its name.
        homes: module -> the names that it defines.

    Returns:
        A function from a name to its value. It raises `AttributeError` for a name without a home.
    """
    home = {name: module for module, names in homes.items() for name in names}

    def value(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        found = getattr(importlib.import_module(home[name]), name)
        setattr(importlib.import_module(package), name, found)
        return found

    return value
