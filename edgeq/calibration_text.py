"""Calibration and evaluation texts as windows of a model's tokens."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from edgeq.core.errors import FormatError, UsageError

if TYPE_CHECKING:
    from edgeq.model.model import Model
    from edgeq.quant.decoder.calibrate import CalibrationText
    from edgeq.quant.decoder.quality_report import HeldOut


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
    from edgeq.quant.decoder.calibrate import cut_windows
    from edgeq.runtime.tokenizer import Tokenizer

    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as err:
        raise UsageError(f"{name} is not UTF-8 text: {err}") from err
    tokenizer = Tokenizer(model.files)
    tokens = tokenizer.encode(text, add_bos=False)
    if not tokens:
        raise UsageError(f"{name} is empty; give a text with words")
    return cut_windows(
        tokens,
        context=min(context, model.config.context),
        n_windows=n_windows,
        bos=tokenizer.text_bos,
        text_sha256=hashlib.sha256(raw).hexdigest(),
    )
