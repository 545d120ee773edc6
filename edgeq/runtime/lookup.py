"""Prompt lookup: drafts of the next tokens from earlier places of the text.

Texts repeat names, code and quotations of the prompt. Where the last few tokens occurred before,
the tokens that followed them there are a draft of the tokens that follow now. The model verifies a
whole draft in one pass, which costs little more than one token: an accepted draft gives several
tokens for the cost of one, and a rejected one costs little.

Source: Saxena 2023, "Prompt Lookup Decoding"; Leviathan et al. 2023 (arXiv 2211.17192).
"""

from __future__ import annotations

from collections.abc import Iterable

from edgeq.model.memory_layout import MAX_DRAFT as MAX_DRAFT

_LONGEST_PAUSE = 16
"""Most steps without a draft after drafts that were rejected."""
_LENGTHS = (4, 3, 2)
"""How many last tokens must have occurred before; the longest match is tried first."""


class DraftLength:
    """Chooses how many tokens to draft: more after accepted drafts, fewer after rejected ones.

    Args:
        most: tokens to draft at once, and the length of the first draft.
    """

    def __init__(self, most: int) -> None:
        self._most = self._length = most
        self._pause = self._left = 0

    def next(self) -> int:
        """Tokens to draft in this step; 0 during a pause after rejected drafts."""
        if self._left:
            self._left -= 1
            return 0
        return self._length

    def record(self, drafted: int, accepted: int) -> None:
        """Adapt to how many of the drafted tokens were accepted."""
        if not drafted:
            return
        self._length = min(2 * self._length, self._most) if accepted == drafted else accepted + 1
        self._pause = 0 if accepted else min(2 * self._pause + 1, _LONGEST_PAUSE)
        self._left = self._pause


class Lookup:
    """Finds earlier places of the last tokens in a growing text.

    Args:
        tokens: the text so far.
    """

    def __init__(self, tokens: Iterable[int]) -> None:
        self._tokens: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}
        self.extend(tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Append to the text."""
        for token in tokens:
            end = len(self._tokens)
            # recorded only once a token follows, so that the end never matches itself
            for length in _LENGTHS:
                if length <= end:
                    self._next[tuple(self._tokens[end - length :])] = end
            self._tokens.append(token)

    def draft(self, n: int) -> list[int]:
        """At most ``n`` tokens that may follow; none if the end of the text is new.

        They are the tokens after the last earlier place of the end. If that place is so close that
        they run into the end itself, they are repeated.

        Example:
            >>> Lookup([5, 6, 7, 5, 6]).draft(4)
            [7, 5, 6, 7]
        """
        end = len(self._tokens)
        for length in _LENGTHS:
            place = self._next.get(tuple(self._tokens[end - length :])) if length <= end else None
            if place is not None:
                return [self._tokens[place + i % (end - place)] for i in range(n)]
        return []
