"""Constraints on what is generated: JSON of a schema, or any context-free grammar.

The masks are llguidance's: it parses what was generated so far and says which tokens may follow.
A grammar is compiled once and started anew for each answer.

Source: https://github.com/guidance-ai/llguidance (Earley's algorithm on derivatives of regular
expressions; grammars in a variant of Lark's syntax)
"""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import UsageError, check_type, require
from edgeq.model.model import Model
from edgeq.runtime.tokenizer import Tokenizer

_SPECIAL = b"\xff"
"""What llguidance writes before the name of a special token: no byte of UTF-8."""
_JSON = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""No free white space: small models would go on writing it."""


class Grammar:
    """A compiled grammar, which `start` makes a constraint of.

    Args:
        vocabulary: of the model.
        matcher: at the beginning of a text.
    """

    def __init__(self, vocabulary: GrammarVocabulary, matcher: Any) -> None:
        self._vocabulary, self._matcher = vocabulary, matcher

    def start(self) -> TokenConstraint:
        """A constraint for one text."""
        return copy.deepcopy(TokenConstraint(self._matcher, self._vocabulary.size))


class TokenConstraint:
    """The constraint on one text; see `edgeq.runtime.generate.Constraint`. Made by `Grammar.start`.

    Args:
        matcher: llguidance's.
        size: tokens of the model.
    """

    def __init__(self, matcher: Any, size: int) -> None:
        self._matcher, self._size = matcher, size

    def __deepcopy__(self, memo: dict[int, Any]) -> TokenConstraint:
        return TokenConstraint(self._matcher.deep_copy(), self._size)

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens may come next, bool [V].

        Raises:
            UsageError: the grammar has become too large to follow.
        """
        words = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        mask = np.unpackbits(words, bitorder="little", count=self._size).view(np.bool_)
        if self._matcher.is_error() or not mask.any():
            raise UsageError(
                f"the grammar cannot be followed: {_short(self._matcher.get_error())}; use a "
                "simpler one"
            )
        return mask

    def accept(self, token: int) -> None:
        """Go on after this token.

        Raises:
            UsageError: it was not allowed, or the grammar has become too large to follow.
        """
        if not self._matcher.consume_token(token):
            raise UsageError(
                f"the grammar cannot be followed after token {token}: "
                f"{_short(self._matcher.get_error())}; use a simpler one, or only tokens that it "
                "allows"
            )


class GrammarVocabulary:
    """A model's tokens as grammars need them. Making one takes about a second.

    Args:
        tokenizer: of the model.
        size: tokens that the model has logits for.
        end_ids: tokens that end a text, at least one.

    Raises:
        MissingDependencyError: the extra "structured" is not installed.
        UsageError: there is no token that ends a text.

    Example:
        >>> model = edgeq.load("model.edgeq")
        >>> tokenizer = edgeq.Tokenizer(model)
        >>> vocabulary = edgeq.GrammarVocabulary.of(model, tokenizer)
        >>> digits = vocabulary.lark('start: /[0-9]{3}/')
        >>> with edgeq.Engine(model) as engine:
        ...     chunks = edgeq.generate(engine, tokenizer, "One", constraint=digits.start())
        ...     text = "".join(chunk.text for chunk in chunks)
        >>> text.isdigit() and len(text) == 3
        True
    """

    def __init__(self, tokenizer: Tokenizer, size: int, end_ids: Collection[int]) -> None:
        check_type("tokenizer", tokenizer, Tokenizer)
        require("structured", ("llguidance",), "to constrain what is generated")
        import llguidance

        if not end_ids:
            raise UsageError(
                "the model names no token that ends a text, so a grammar could not end; it can "
                "only be used without a constraint"
            )
        self.size = size
        special = tokenizer.special_ids
        tokens = [
            _SPECIAL + tokenizer.token_name(i).encode()
            if i in special
            else tokenizer.token_bytes(i)
            for i in range(size)
        ]
        self._library = llguidance
        ends = sorted(end_ids)
        self._tokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Tokens(tokenizer, tokens, ends, sorted(special))),
            n_vocab=size,
            eos_token=ends,
        )

    @classmethod
    def of(cls, model: Model, tokenizer: Tokenizer) -> GrammarVocabulary:
        """The vocabulary of a model, with every token that ends an answer."""
        ends = {*tokenizer.eos_ids, *model.config.eos, *tokenizer.turn_end_ids}
        return cls(tokenizer, model.config.vocab, ends)

    def json_schema(self, schema: Mapping[str, Any] | str) -> Grammar:
        """The grammar of the JSON values that a schema allows.

        Args:
            schema: a JSON schema, as an object or a text.

        Raises:
            UsageError: it is none, or uses what llguidance does not support.
        """
        matcher = self._library.LLMatcher
        try:
            text = schema if isinstance(schema, str) else json.dumps(schema)
            if not isinstance(json.loads(text), dict):
                raise UsageError("the JSON schema is no JSON object; give an object")
            grammar = matcher.grammar_from_json_schema(text, overrides=_JSON)
        except (ValueError, TypeError, RecursionError) as err:
            raise UsageError(f"the JSON schema cannot be read: {_short(str(err))}") from err
        return self._compiled(grammar, "the JSON schema")

    def json_object(self) -> Grammar:
        """The grammar of JSON objects."""
        return self.json_schema({"type": "object"})

    def lark(self, text: str) -> Grammar:
        """A grammar in llguidance's variant of Lark's syntax, whose rule ``start`` is the text.

        Raises:
            UsageError: it cannot be read.
        """
        return self._compiled(self._library.LLMatcher.grammar_from_lark(text), "the grammar")

    def _compiled(self, grammar: str, what: str) -> Grammar:
        matcher = self._library.LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise UsageError(f"{what} cannot be used: {_short(matcher.get_error())}")
        grammar_made = Grammar(self, matcher)
        grammar_made.start().allowed()  # some grammars are refused only where a text begins
        return grammar_made


class _Tokens:
    """A tokenizer with the attributes that llguidance reads.

    Args:
        tokenizer: of the model.
        tokens: bytes of each.
        ends: tokens that end a text.
        special: special tokens.
    """

    def __init__(
        self, tokenizer: Tokenizer, tokens: list[bytes], ends: list[int], special: list[int]
    ) -> None:
        self._tokenizer = tokenizer
        self.tokens, self.special_token_ids = tokens, special
        self.eos_token_id, self.bos_token_id = ends[0], tokenizer.bos
        left_out = set(special)
        self._ids = {raw: i for i, raw in enumerate(tokens) if raw and i not in left_out}
        self._longest = max(map(len, self._ids), default=0)

    def __call__(self, raw: bytes) -> list[int]:
        """Tokens whose bytes are these: the tokenizer's own, unless it would change the text."""
        try:
            ids = self._tokenizer.encode(raw.decode(), add_bos=False)
        except UnicodeDecodeError:
            return self._greedy(raw)
        # SentencePiece puts a space before a text
        return ids if b"".join(self.tokens[i] for i in ids) == raw else self._greedy(raw)

    def _greedy(self, raw: bytes) -> list[int]:
        """The longest token at each place."""
        tokens, place = [], 0
        while place < len(raw):
            for stop in range(min(len(raw), place + self._longest), place, -1):
                if (token := self._ids.get(raw[place:stop])) is not None:
                    tokens.append(token)
                    place = stop
                    break
            else:
                break  # a byte without a token: what follows is left to the masks
        return tokens


def _short(message: str) -> str:
    """The first line of a library's message."""
    line = next(iter(message.strip().splitlines()), "no reason was given")
    return line if len(line) <= 300 else line[:297] + "..."
