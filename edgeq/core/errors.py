"""Every error edgeq raises on purpose.

    EdgeqError
    ├── FormatError              a file is damaged, truncated or not what it claims to be
    ├── SchemeError              a scheme or recipe cannot be, or cannot hold this tensor
    ├── UnsupportedError         a family, type, operator or target edgeq does not know
    ├── UsageError               an argument or option outside what is allowed
    ├── MissingDependencyError   an optional package is absent; names the extra that brings it
    ├── DeviceError              a device, sensor or transport failed
    └── DoesNotFitError          the work needs more memory than there is; carries its plan

A message says what happened, what was found, what is allowed, and how to fix it.
"""

from __future__ import annotations

import difflib
import importlib.util
import numbers
from collections.abc import Iterable
from typing import Any


class EdgeqError(Exception):
    """Base of all errors that edgeq raises on purpose; the CLI turns it into exit code 1."""


class FormatError(EdgeqError):
    """A file is damaged, truncated, or is not in the format it claims."""


class SchemeError(EdgeqError):
    """A quantization scheme or recipe is impossible, or cannot hold the tensor it is given."""


class UnsupportedError(EdgeqError):
    """A model family, tensor type, operator or target that edgeq does not know."""


class UsageError(EdgeqError):
    """An argument outside what is allowed."""


class MissingDependencyError(EdgeqError):
    """An optional package is not installed.

    Args:
        package: the import name that is missing.
        extra: the edgeq extra that installs it.
        purpose: what it is needed for, as in "to read GGUF files".
        others: further packages that are missing and that the extra installs.
    """

    def __init__(self, package: str, extra: str, purpose: str, others: Iterable[str] = ()) -> None:
        names = [repr(name) for name in (package, *others)]
        listed = ", ".join(names[:-1]) + " and " + names[-1] if names[1:] else names[0]
        what = (
            f"the packages {listed}, which are" if names[1:] else f"the package {listed}, which is"
        )
        verb = "are" if names[1:] else "is"
        super().__init__(
            f"{what} needed {purpose}, {verb} not installed; run: pip install 'edgeq[{extra}]'"
        )
        self.package = package
        self.extra = extra


def require(extra: str, packages: Iterable[str], purpose: str) -> None:
    """Refuse work whose optional packages are not installed, before it begins; imports none.

    Args:
        extra: the edgeq extra that installs them.
        packages: their import names.
        purpose: what they are needed for, as in "to convert to genai".

    Raises:
        MissingDependencyError: names all that are missing, and the extra.
    """
    missing = [name for name in packages if not _importable(name)]
    if missing:
        raise MissingDependencyError(missing[0], extra, purpose, missing[1:])


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # of a module that was blocked or half imported
        return False


class DeviceError(EdgeqError):
    """A device, sensor or transport failed."""


class DoesNotFitError(EdgeqError):
    """The work needs more memory than is allowed or present.

    Args:
        message: what was needed, what there is, and what would fit.
        plan: the plan or estimate that says so, if one was made.
    """

    def __init__(self, message: str, plan: Any = None) -> None:
        super().__init__(message)
        self.plan = plan


def unknown(kind: str, got: str, known: Iterable[str]) -> str:
    """A message for an unknown name: lists the known ones and the nearest match."""
    names = sorted(known)
    near = difflib.get_close_matches(got, names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {got!r}{hint} (known: {', '.join(names)})"


def check_type(name: str, value: object, *kinds: type | None) -> None:
    """Refuse an argument of another type; None among the kinds allows None.

    Raises:
        TypeError: says what was given and what is allowed.
    """
    known: dict[type | None, type] = {None: type(None), int: numbers.Integral}
    allowed = tuple(known.get(kind, kind) or type(None) for kind in kinds)
    # a bool is an int to Python, and hardly meant as a number
    if isinstance(value, allowed) and not (isinstance(value, bool) and bool not in allowed):
        return
    names = [kind.__name__ if kind else "None" for kind in kinds]
    listed = ", ".join(names[:-1]) + (" or " if names[:-1] else "") + names[-1]
    raise TypeError(f"{name} must be {listed}, not {type(value).__name__}")
