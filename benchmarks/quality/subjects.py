"""The models that are measured, and which text each learns from and is measured on.

Training and held-out text never share a story. Windows are 256 tokens with BOS at the head;
calibration and training take so many of the training text's, evenly spaced.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeq.evaluation.text import Evaluation, LogitsFn, perplexity
from edgeq.importers import load
from edgeq.model.model import Model
from edgeq.model.reference import Reference
from edgeq.quant.decoder.calibrate import CalibrationText, cut_windows
from edgeq.runtime.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
CONTEXT = 256
CALIBRATION = 160
"""Windows that post-training methods see."""
TRAINING = 800
"""Windows that training sees."""
HELD_OUT = 16_000
"""Tokens measured on, at most."""
TRAINING_PART, HELD_OUT_PART = 0.90, 0.95
"""The text is learned from up to the first, and measured on past the second."""
STORIES = "data/text_tinystories_train/tinystories_train_2MB.txt"
END = "<|endoftext|>"


@dataclass(frozen=True)
class Subject:
    """A float model and its texts.

    Args:
        name: of the model.
        path: of its checkpoint.
        model: the model.
        text: which text, in words.
        calibration: windows for post-training methods.
        training: windows for training.
        held_out: tokens int64 [T] measured on, without BOS.
        bos: the head of every window.
        base: the float model's logits.
    """

    name: str
    path: Path
    model: Model
    text: str
    calibration: CalibrationText
    training: CalibrationText
    held_out: NDArray[np.int64]
    bos: int | None
    base: LogitsFn

    def score(self, logits: LogitsFn) -> Evaluation:
        """Quality on the held-out text, against the float model."""
        return perplexity(logits, self.held_out, context=CONTEXT, bos=self.bos, base=self.base)


def remembered(logits: LogitsFn) -> LogitsFn:
    """The same function, which computes the logits of a window only once."""
    known: dict[bytes, NDArray[np.floating]] = {}

    def again(window: NDArray[np.int64]) -> NDArray[np.floating]:
        key = window.tobytes()
        if key not in known:
            known[key] = logits(window)
        return known[key]

    return again


def _parts(data: Path) -> tuple[str, str, str]:
    """Training and held-out text of the published TinyStories models."""
    whole = (data / STORIES).read_text("utf-8", errors="replace")
    stories = [story.strip() for story in whole.split(END)][:-1]  # the last one is cut short
    a, b = (round(share * len(stories)) for share in (TRAINING_PART, HELD_OUT_PART))
    words = (
        f"{Path(STORIES).name}, without {END}: its first {TRAINING_PART:.0%} of stories to learn "
        f"from, those past {HELD_OUT_PART:.0%} to measure on"
    )
    return "\n".join(stories[:a]), "\n".join(stories[b:]), words


def _demo_parts(data: Path) -> tuple[str, str, str]:
    """Training text for the demo model: cased stories that share nothing with its held-out ones."""
    sys.path.insert(0, str(ROOT / "examples" / "train_demo"))
    from stories import clean, shingles, without_overlap

    held_out = (ROOT / "edgeq" / "demo_model" / "heldout.txt").read_text("utf-8")
    whole = (data / STORIES).read_text("utf-8", errors="replace")
    cased = [clean(story) for story in whole.split(END)][:-1]
    apart = without_overlap([s for s in cased if s.isascii()], shingles(held_out))
    words = (
        f"{Path(STORIES).name}: the stories that share less than a tenth of their ten-word runs "
        "with the model's heldout.txt to learn from, heldout.txt to measure on"
    )
    return "\n\n".join(apart), held_out, words


def subjects(data: Path) -> dict[str, Callable[[], Subject]]:
    """Name -> a function that loads it."""
    known: dict[str, tuple[Path, Callable[[Path], tuple[str, str, str]]]] = {
        "stories260K": (data / "models" / "stories260K", _parts),
        "babyllama105": (data / "data" / "babyllama105" / "model5000.bin", _parts),
        "demo": (ROOT / "edgeq" / "demo_model", _demo_parts),
    }
    return {
        name: lambda name=name, path=path, parts=parts: _load(name, path, *parts(data))  # type: ignore[misc]
        for name, (path, parts) in known.items()
    }


def _load(name: str, path: Path, learned: str, held_out: str, words: str) -> Subject:
    model = load(path)
    tokenizer = Tokenizer(model.files)
    tokens: Sequence[int] = tokenizer.encode(learned, add_bos=False)
    bos = tokenizer.bos

    def cut(n: int) -> CalibrationText:
        return cut_windows(tokens, context=CONTEXT, n_windows=n, bos=bos)

    return Subject(
        name,
        path,
        model,
        words,
        cut(CALIBRATION),
        cut(TRAINING),
        np.asarray(tokenizer.encode(held_out, add_bos=False)[:HELD_OUT], np.int64),
        bos,
        remembered(Reference(model, keep=True).forward),
    )
