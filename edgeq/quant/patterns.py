"""Rules that go by names: what both kinds of recipes choose schemes with."""

from __future__ import annotations

import re
from dataclasses import dataclass

from edgeq.core.errors import SchemeError, check_type


@dataclass(frozen=True)
class Pattern:
    """Names that a rule is for.

    Args:
        pattern: a regular expression, searched for anywhere in the name.

    Raises:
        SchemeError: the pattern is no regular expression.
    """

    pattern: str

    def __post_init__(self) -> None:
        check_type("pattern", self.pattern, str)
        try:
            re.compile(self.pattern)
        except re.error as err:
            raise SchemeError(f"{self.pattern!r} is not a regular expression: {err}") from err

    def matches(self, name: str) -> bool:
        """Whether the pattern is found in the name."""
        return re.search(self.pattern, name) is not None


def split_rule(text: str, what: str, example: str) -> tuple[str, str]:
    """The sides of ``REGEX=SCHEME``.

    Args:
        text: the rule.
        what: kind of rule, for the message.
        example: of one.

    Raises:
        SchemeError: there is no "=", or nothing before it.
    """
    check_type(f"a {what}", text, str)
    pattern, equals, scheme = text.rpartition("=")
    if not equals or not pattern:
        raise SchemeError(f"{text!r} is not a {what}; write REGEX=SCHEME, as in '{example}'")
    return pattern, scheme
