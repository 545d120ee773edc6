"""How good a model is at predicting a text, and how far it is from another one.

Everything here works on a ``logits_fn``: tokens int [T] -> logits float32 [T, V], each call in a
fresh context. The reference, every engine and every converted model is one.

    perplexity   exp of the mean negative log-likelihood of the scored tokens
    bits/byte    the same likelihood over the bytes of the scored text: comparable across tokenizers
    KL           sum_v p(v) ln(p(v) / q(v)), nats a token, p of the base and q of the model
    top-1        how often both find the same token most likely
    flips        how often they do not: of so many, how many the base had right, and the model

Perplexities compare only at the same tokenizer, context and protocol; the result says which:

    all    disjoint windows of C tokens: BOS, if the tokenizer puts it there, and text. Every token
           after a window's first is scored; the last window may be shorter.
    half   llama.cpp's: BOS and the text in disjoint windows of C tokens, the first of each
           replaced by BOS; those past the middle are scored, so that each has seen at least C/2
           tokens; a shorter last window is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import FormatError, UsageError, unknown
from edgeq.core.progress import Progress
from edgeq.formats.tensor import row_blocks

LogitsFn = Callable[[NDArray[np.int64]], NDArray[np.floating]]
Score = Literal["all", "half"]

BLOCK_ELEMENTS = 1 << 22
"""Logits turned to float64 at once (32 MiB)."""


@dataclass(frozen=True)
class Evaluation:
    """What was measured; None is "not measured".

    Args:
        protocol: windows and scoring, in words.
        n_tokens: tokens scored.
        nll_per_token: mean negative log-likelihood, nats.
        ppl: exp of it.
        bits_per_byte: of the scored text.
        kl_mean, kl_p99, kl_max: divergence of the model from the base, nats a token.
        top1_agreement: fraction of positions where both prefer the same token.
        base_nll_per_token, base_ppl: of the base.
        flips: positions where they prefer different ones.
        flips_base_right, flips_right: how many of those the base had right, and the model.
    """

    protocol: str
    n_tokens: int
    nll_per_token: float
    ppl: float
    bits_per_byte: float | None = None
    kl_mean: float | None = None
    kl_p99: float | None = None
    kl_max: float | None = None
    top1_agreement: float | None = None
    base_nll_per_token: float | None = None
    base_ppl: float | None = None
    flips: int | None = None
    flips_base_right: int | None = None
    flips_right: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary with these names as keys."""
        return asdict(self)


def windows(n: int, context: int, bos: bool, score: Score) -> Iterator[tuple[slice, slice]]:
    """Cut a text of ``n`` tokens; for "half" its own BOS is one of them.

    Yields:
        For each window: the tokens of the text it holds (for "all", one fewer than ``context``
        if BOS is put before them), and those of them that are scored.
    """
    if score == "half":
        for a in range(0, n - context + 1, context):
            yield slice(a, a + context), slice(a + context // 2 + 1, a + context)
        return
    step = context - 1 if bos else context
    for a in range(0, n, step):
        b = min(a + step, n)
        first = a if bos else a + 1
        if first < b:
            yield slice(a, b), slice(first, b)


def perplexity(
    logits_fn: LogitsFn,
    tokens: Sequence[int] | NDArray[np.integer],
    *,
    context: int,
    bos: int | None = None,
    score: Score = "all",
    base: LogitsFn | None = None,
    decode: Callable[[list[int]], str] | None = None,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Score a text window by window, and compare with a base model if there is one.

    Args:
        logits_fn: the model.
        tokens: the text's tokens, without BOS.
        context: tokens of a window, BOS included.
        bos: put at the head of every window; None if the tokenizer puts none there.
        score: "all" or "half", as described at the top of the module.
        base: what KL and agreement are measured against; of the same vocabulary.
        decode: tokens -> text, for bits per byte (which "all" alone gives).
        max_tokens: use only this many of the text's first tokens.
        progress: called with ("windows", done, total).

    Raises:
        UsageError: an option out of range, a text too short for one window, or models of
            different vocabularies.
        FormatError: logits that are NaN or infinite.
    """
    ids = np.asarray(tokens, np.int64)
    _check(ids, context, bos, score, max_tokens)
    ids = ids[:max_tokens]
    if score == "half" and bos is not None:
        ids = np.concatenate([[bos], ids])  # llama.cpp cuts the text with its BOS
    cuts = list(windows(ids.size, context, bos is not None, score))
    if not cuts:
        wanted = context if score == "half" else (1 if bos is not None else 2)
        raise UsageError(
            f"the text has {ids.size} tokens and scoring {score!r} needs at least {wanted}; "
            "give a longer text" + (" or a smaller context" if score == "half" else "")
        )
    tally = Tally()
    for done, (held, scored) in enumerate(cuts):
        window = ids[held]
        if bos is not None:
            window = np.concatenate([[bos], window[1:] if score == "half" else window])
        targets = ids[scored]
        # the logits that predict the targets end one before the window's last
        rows = slice(window.size - 1 - targets.size, window.size - 1)
        logits = _rows(logits_fn, window, rows, "the model")
        against = None if base is None else _rows(base, window, rows, "the base model")
        tally.add(targets, logits, against)
        if progress:
            progress("windows", done + 1, len(cuts))
    n_bytes = None
    if decode is not None and score == "all":
        n_bytes = _scored_bytes(ids, [scored for _, scored in cuts], decode)
    return tally.result(protocol_words(context, bos is not None, score, max_tokens), n_bytes)


class Tally:
    """What is counted while the positions of a text are scored, some at a time."""

    def __init__(self) -> None:
        self._tokens = 0
        self._nll = self._base_nll = 0.0
        self._divergences: list[NDArray[np.float64]] = []
        self._flips = self._base_right = self._right = 0

    def add(
        self,
        targets: NDArray[np.int64],
        logits: NDArray[np.floating],
        base: NDArray[np.floating] | None = None,
    ) -> None:
        """Score some positions; a base, once given, is given every time.

        Args:
            targets: int64 [T], the tokens that do follow.
            logits: of the model, [T, V].
            base: of the base model, [T, V].

        Raises:
            UsageError: the two have different vocabularies.
            FormatError: logits that are NaN or infinite.
        """
        _check_finite(logits, "the model")
        if base is not None:
            _check_finite(base, "the base model")
        for part in _blocks(logits, base):
            wanted = targets[part]
            each = np.arange(wanted.size)
            q = log_softmax(logits[part])
            self._nll -= float(q[each, wanted].sum())
            self._tokens += wanted.size
            if base is None:
                continue
            p = log_softmax(base[part])
            self._base_nll -= float(p[each, wanted].sum())
            self._divergences.append(kl_divergence(p, q))
            top, base_top = logits[part].argmax(axis=1), base[part].argmax(axis=1)
            flipped = top != base_top
            self._flips += int(flipped.sum())
            self._right += int((flipped & (top == wanted)).sum())
            self._base_right += int((flipped & (base_top == wanted)).sum())

    def result(self, protocol: str, n_bytes: int | None = None) -> Evaluation:
        """The evaluation of all windows so far.

        Args:
            protocol: windows and scoring, in words.
            n_bytes: of the scored text, for bits per byte.
        """
        n, mean = self._tokens, self._nll / self._tokens
        evaluation = Evaluation(
            protocol=protocol,
            n_tokens=n,
            nll_per_token=mean,
            ppl=_exp(mean),
            bits_per_byte=self._nll / math.log(2) / n_bytes if n_bytes else None,
        )
        if not self._divergences:
            return evaluation
        kl = np.concatenate(self._divergences)
        return replace(
            evaluation,
            kl_mean=float(kl.mean()),
            kl_p99=float(np.percentile(kl, 99)),
            kl_max=float(kl.max()),
            top1_agreement=(n - self._flips) / n,
            base_nll_per_token=self._base_nll / n,
            base_ppl=_exp(self._base_nll / n),
            flips=self._flips,
            flips_base_right=self._base_right,
            flips_right=self._right,
        )


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf


def log_softmax(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """Natural log of the probabilities, float64 [T, V]."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def kl_divergence(p: NDArray[np.float64], q: NDArray[np.float64]) -> NDArray[np.float64]:
    """KL(p || q) in nats of log-probabilities [T, V]: float64 [T], never negative."""
    return cast("NDArray[np.float64]", np.maximum((np.exp(p) * (p - q)).sum(axis=1), 0.0))


def _check(
    ids: NDArray[np.int64], context: int, bos: int | None, score: str, max_tokens: int | None
) -> None:
    if score not in ("all", "half"):
        raise UsageError(unknown("score", score, ("all", "half")))
    least = 4 if score == "half" else 2
    if context < least:
        raise UsageError(f"context is {context} tokens; scoring {score!r} needs {least} or more")
    if max_tokens is not None and max_tokens < 1:
        raise UsageError(f"max_tokens is {max_tokens}; use at least 1, or none for the whole text")
    if ids.ndim != 1 or not ids.size:
        raise UsageError("the text has no tokens; give a text that is not empty")
    if bos is not None and ids[0] == bos:
        raise UsageError(
            f"the tokens of the text start with BOS ({bos}), which edgeq adds to every window; "
            "tokenize the text without BOS"
        )


def _rows(
    logits_fn: LogitsFn, window: NDArray[np.int64], rows: slice, who: str
) -> NDArray[np.floating]:
    logits = logits_fn(window)
    if logits.ndim != 2 or logits.shape[0] != window.size:
        raise UsageError(
            f"{who} gave logits {list(logits.shape)} for {window.size} tokens; "
            f"expected [{window.size}, vocabulary]"
        )
    return logits[rows]


def _check_finite(logits: NDArray[np.floating], who: str) -> None:
    if not np.isfinite(logits).all():
        raise FormatError(
            f"{who} gives logits that are not finite; its file is damaged or holds NaN or Inf"
        )


def _blocks(logits: NDArray[np.floating], base: NDArray[np.floating] | None) -> Iterator[slice]:
    t, v = logits.shape
    if base is not None and base.shape != logits.shape:
        raise UsageError(
            f"the model has {v} tokens in its vocabulary and the base model {base.shape[1]}; "
            "KL divergence needs two models with the same vocabulary"
        )
    yield from row_blocks((t, v), BLOCK_ELEMENTS)


def _scored_bytes(
    ids: NDArray[np.int64], scored: list[slice], decode: Callable[[list[int]], str]
) -> int:
    """UTF-8 bytes of the scored tokens: those of the whole text without the skipped tokens.

    A token's bytes are what it adds after the few before it, as a decoder may treat the first
    token of a text differently.
    """

    def size(a: int, b: int) -> int:
        return len(decode(ids[a:b].tolist()).encode())

    total, stop = size(0, scored[-1].stop), 0
    for part in scored:
        for skipped in range(stop, part.start):
            back = max(0, skipped - 8)
            total -= size(back, skipped + 1) - (size(back, skipped) if skipped else 0)
        stop = part.stop
    return total


def protocol_words(context: int, bos: bool, score: Score, max_tokens: int | None) -> str:
    """Windows and scoring in words: perplexities compare only where these are the same."""
    if score == "half":
        head = ", the first replaced by BOS" if bos else ""
        scored = "the tokens past the middle of each scored (as llama.cpp)"
    else:
        head = ", each starting with BOS" if bos else ", no BOS"
        scored = "every token after the first of each scored"
    limit = f", first {max_tokens} tokens of the text" if max_tokens is not None else ""
    return f"disjoint windows of {context} tokens{head}, {scored}{limit}"
