"""Calibration and evaluation texts as windows of a model's tokens.

Where no text is given for calibration, there are two: one that edgeq includes, without the
paragraphs that the model's tokenizer has no words for, and one sampled from the model itself, which
knows best what it will be asked to compute. Its beginnings are BOS, where the model begins texts
with it, the first words of the included text, and questions in the model's chat template.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgeq.core.errors import DoesNotFitError, FormatError, UnsupportedError, UsageError
from edgeq.core.progress import Progress

if TYPE_CHECKING:
    from edgeq.model.model import Model
    from edgeq.quant.decoder.calibrate import CalibrationText
    from edgeq.quant.decoder.quality_report import HeldOut
    from edgeq.runtime.tokenizer import Tokenizer

TEXT = "calibration_text.txt"
"""The included text, beside the modules of `edgeq.quant.decoder`."""
CONTEXT, WINDOWS = 256, 24
"""Tokens of a window, and most windows of the included text."""
SAMPLED_LENGTH = 128
"""Tokens of each text that is sampled."""
SAMPLED_TEXTS = (8, 32)
"""Texts sampled: so many at least, and of a small model, which takes less time, at most."""
SAMPLING_WORK = 1 << 37
"""Weights times tokens, above which the fewest texts are sampled."""
SAMPLED_WEIGHTS = 400_000_000
"""Weights of the largest model that is sampled from, since it is held in float32."""
SEED = 1
"""Of the random numbers."""
FIRST_WORDS = 4
"""Tokens of a paragraph that a sampled text begins with."""
TOKENS_PER_BYTE, LONGEST = 0.7, 1.25
"""A tokenizer has words for what takes at most so many tokens a byte, or times as many as the text
that it has the best words for."""
QUESTIONS = (
    "Tell me a short story about a lighthouse.",
    "What is the capital of Australia, and how many people live there?",
    "Write a Python function that reverses a list.",
    "Explain in simple words how rain forms.",
    "Was ist der Unterschied zwischen Wetter und Klima?",
    "Give me three tips for sleeping better.",
    "¿Cómo funciona un motor eléctrico?",
    "What is 17 times 24? Show your steps.",
    "Explique-moi la photosynthèse en quelques phrases.",
    "Write a short email to my landlord about a broken heater.",
    "请用几句话介绍一下长城。",
    "Who wrote Hamlet, and what is it about?",
    "Расскажи, почему небо голубое.",
    "Why does my code print None after every line?",
    "日本の四季について教えてください。",
    "List five animals that live in the sea.",
)
"""What a model with a chat template is asked, where its tokenizer has words for it."""


def calibration(
    model: Model, path: str | Path, n_windows: int | None, context: int
) -> CalibrationText:
    """A file's text in windows for calibration.

    Args:
        model: gives the tokenizer and the longest window.
        path: of the text, UTF-8.
        n_windows: take so many, spread evenly; all if None.
        context: tokens of a window, at most.

    Raises:
        UnsupportedError: the model has no tokenizer.
        UsageError: the text is empty, or not UTF-8.
        FormatError: the file cannot be read.
    """
    return _windows(model, _content(Path(path)), str(path), n_windows, context)


def own_calibration(
    model: Model, max_ram: int | None = None, progress: Progress | None = None
) -> CalibrationText:
    """The text for calibration where none is given; the same on every machine.

    Args:
        model: gives the tokenizer, and the text that is sampled. Without a tokenizer, all of the
            text is sampled.
        max_ram: most bytes that sampling may hold.
        progress: called with ("sampling text", tokens done, of how many).

    Raises:
        DoesNotFitError: max_ram is too little.
        FormatError: the model's logits are not finite.
        UsageError: the model has no tokenizer, and is too large to be sampled from.
    """
    from edgeq.core.memory import rss_bytes
    from edgeq.quant.decoder import sampling
    from edgeq.quant.decoder.calibrate import CalibrationText
    from edgeq.runtime.tokenizer import Tokenizer

    try:
        tokenizer = Tokenizer(model.files)
    except UnsupportedError:
        tokenizer = None
    cut = CalibrationText((), "", min(CONTEXT, model.config.context), None)
    paragraphs: list[str] = []
    if tokenizer is not None:
        raw = (Path(sampling.__file__).parent / TEXT).read_bytes()
        paragraphs = _covered(tokenizer, raw.decode().split("\n\n"))
        cut = _cut(tokenizer, "\n\n".join(paragraphs), raw, cut.context, WINDOWS)
    length, count = _to_sample(model, cut.context)
    if not count:
        if tokenizer is None:
            raise UsageError(
                "the model has no tokenizer for a calibration text; give one whose folder holds "
                "its tokenizer, or use --fast"
            )
        return cut
    need = sampling.sampling_bytes(model.config, count, length) + (rss_bytes() or 0)
    if max_ram is not None and need > max_ram:
        raise DoesNotFitError(
            f"sampling a calibration text would take {need / 1e6:.0f} MB of memory, and "
            f"{max_ram / 1e6:.0f} MB were allowed (--max-ram); give a text with --calib, or use "
            "--fast"
        )
    if tokenizer is None:
        beginnings = [[row * model.config.vocab // count] for row in range(count)]
    else:
        beginnings = _beginnings(tokenizer, paragraphs, count, length)
    rows = sampling.sample_texts(model, beginnings, length, seed=SEED, progress=progress)
    return replace(cut, windows=(*cut.windows, *rows), sampled=rows.size)


def _to_sample(model: Model, context: int) -> tuple[int, int]:
    """Tokens of each text to be sampled, and how many texts: none of a large model, nor of one that
    cannot generate."""
    from edgeq.importers.shapes import parameters

    length, weights = min(SAMPLED_LENGTH, context), parameters(model.config)
    least, most = SAMPLED_TEXTS
    count = min(max(SAMPLING_WORK // weights // length, least), most)
    sampled = weights <= SAMPLED_WEIGHTS and model.config.causal
    return length, count if sampled else 0


def _covered(tokenizer: Tokenizer, paragraphs: Sequence[str]) -> list[str]:
    """The paragraphs that a tokenizer has words for; all of them if it has for none.

    Where it has not, it writes them letter by letter, or loses letters.
    """
    shares = []
    for paragraph in paragraphs:
        ids = tokenizer.encode(paragraph, add_bos=False)
        whole = tokenizer.decode(ids).strip() == paragraph.strip()
        shares.append(len(ids) / len(paragraph.encode()) if whole else math.inf)
    most = max(TOKENS_PER_BYTE, LONGEST * min(shares))
    kept = [text for text, share in zip(paragraphs, shares, strict=True) if share <= most]
    return kept if math.isfinite(min(shares)) else list(paragraphs)


def _beginnings(
    tokenizer: Tokenizer, paragraphs: Sequence[str], count: int, length: int
) -> list[list[int]]:
    """First tokens of sampled texts: questions, BOS alone and first words alternate."""
    bos = [] if tokenizer.text_bos is None else [tokenizer.text_bos]
    kinds: list[list[list[int]]] = [
        [bos + tokenizer.encode(text, add_bos=False)[:FIRST_WORDS] for text in paragraphs]
    ]
    if tokenizer.has_chat_template:
        chats = (
            tokenizer.encode_chat([{"role": "user", "content": question}])
            for question in _covered(tokenizer, QUESTIONS)
        )
        if short := [chat for chat in chats if len(chat) < length]:
            kinds.append(short)
    if bos:
        kinds.append([bos])
    turns, chosen = [0] * len(kinds), []
    for number in range(count):
        kind = number % len(kinds)
        # spread over all there are, however few are wanted
        wanted = -(-count // len(kinds))
        choices = kinds[kind]
        chosen.append(choices[turns[kind] * len(choices) // wanted % len(choices)])
        turns[kind] += 1
    return chosen


def held_out(model: Model, path: str | Path | None) -> HeldOut | str:
    """The text that quality is measured on, or the reason why there is none.

    Args:
        model: the float source.
        path: of the text; edgeq's own if None.
    """
    from edgeq.core.errors import UnsupportedError
    from edgeq.importers.shapes import parameters
    from edgeq.quant.decoder import quality_report as quality

    if path is None:
        raw, name = (
            (Path(quality.__file__).parent / quality.TEXT).read_bytes(),
            "edgeq's built-in text",
        )
    else:
        raw, name = _content(Path(path)), Path(path).name
    wanted = quality.card_tokens(parameters(model.config)) // quality.CONTEXT
    try:
        cut = _windows(model, raw, name, wanted, quality.CONTEXT)
    except UnsupportedError as err:
        return str(err)
    return quality.HeldOut(name, cut)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as err:
        raise FormatError(f"{path} cannot be read: {err.strerror or err}") from err


def _windows(
    model: Model, raw: bytes, name: str, n_windows: int | None, context: int
) -> CalibrationText:
    from edgeq.runtime.tokenizer import Tokenizer

    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as err:
        raise UsageError(f"{name} is not UTF-8 text: {err}") from err
    if not text:
        raise UsageError(f"{name} is empty; give a text with words")
    return _cut(Tokenizer(model.files), text, raw, min(context, model.config.context), n_windows)


def _cut(
    tokenizer: Tokenizer, text: str, raw: bytes, context: int, n_windows: int | None
) -> CalibrationText:
    import hashlib  # the command line has this module's defaults and needs no digest

    from edgeq.quant.decoder.calibrate import cut_windows

    return cut_windows(
        tokenizer.encode(text, add_bos=False),
        context=context,
        n_windows=n_windows,
        bos=tokenizer.text_bos,
        text_sha256=hashlib.sha256(raw).hexdigest(),
    )
