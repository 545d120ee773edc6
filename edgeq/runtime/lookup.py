"""Guessing the next tokens from what the text has said before (prompt lookup).

Texts repeat themselves: names, code, quotations of the prompt. Where the last few tokens have
stood before, what followed them then is a guess of what follows now. The model checks all of a
guess in one pass, which costs little more than one token, so a right guess is several tokens for
the price of one and a wrong one costs little.

Source: Saxena 2023, "Prompt Lookup Decoding"; Leviathan et al. 2023 (arXiv 2211.17192).
"""

from __future__ import annotations

from collections.abc import Iterable

from edgeq.model.memory_layout import MAX_DRAFT as MAX_DRAFT

_LONGEST_PAUSE = 16
_LENGTHS = (4, 3, 2)
"""How many last tokens must have stood before; the longest match first."""


class Pacing:
    """How much to guess: more where guesses are right, less and less often where they are not.

    Args:
        most: tokens to guess at once, at the start too.
    """

    def __init__(self, most: int) -> None:
        self._most = self._width = most
        self._pause = self._left = 0

    def width(self) -> int:
        """Tokens to guess in this step; 0 while it pauses."""
        if self._left:
            self._left -= 1
            return 0
        return self._width

    def judge(self, guessed: int, right: int) -> None:
        """Learn how many of the tokens guessed were right."""
        if not guessed:
            return
        self._width = min(2 * self._width, self._most) if right == guessed else right + 1
        self._pause = 0 if right else min(2 * self._pause + 1, _LONGEST_PAUSE)
        self._left = self._pause


class Lookup:
    """Finds where the last tokens of a growing text stood before.

    Args:
        tokens: the text so far.
    """

    def __init__(self, tokens: Iterable[int]) -> None:
        self._tokens: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}
        self.extend(tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Go on with the text."""
        for token in tokens:
            end = len(self._tokens)
            # noted only now that something follows, so that the end never matches itself
            for length in _LENGTHS:
                if length <= end:
                    self._next[tuple(self._tokens[end - length :])] = end
            self._tokens.append(token)

    def draft(self, n: int) -> list[int]:
        """At most ``n`` tokens that may follow; none if the end of the text is new.

        They are what followed the last place where the end stood, and where that runs into the
        end itself, the guess goes on with its own beginning: a loop goes round.
        """
        end = len(self._tokens)
        for length in _LENGTHS:
            place = self._next.get(tuple(self._tokens[end - length :])) if length <= end else None
            if place is not None:
                return [self._tokens[place + i % (end - place)] for i in range(n)]
        return []
