"""Calibration: measure the inputs of a model's matrices on a text, and save the statistics.

A file of `CalibrationStats` is a safetensors container:

    __metadata__    "format": "edgeq-calibration", "format_version": "1", and as JSON texts
                    "n_tokens", "text_sha256", "model_sha256", "observer", "linears" (their names)
    NAME.mean_abs      F32 [K]   mean absolute value of each input of the matrix, over all tokens
    NAME.mean_square   F32 [K]   mean square of each input
    NAME.range         F64 [2]   low <= 0 <= high, as the observer chose it

An unfinished calibration is saved after every layer in the same way, with the format
"edgeq-calibration-state". Its metadata also has the next "layer" and a digest of the "windows", and
its arrays also

    hidden.INDEX       F32 [T, hidden]   that layer's input for each window

Both files are written to a temporary file, which is then renamed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import FormatError, UsageError
from edgeq.core.progress import Progress
from edgeq.formats.mapped_file import release
from edgeq.formats.safetensors_file import (
    SafetensorsFile,
    open_safetensors,
    write_arrays,
)
from edgeq.formats.tensor import row_blocks
from edgeq.model.config import ModelConfig
from edgeq.model.model import Model
from edgeq.model.recording import linear_groups
from edgeq.quant.decoder.replay import Replay, ReplayState, ReplayStep
from edgeq.quant.kernels.products import column_squares, column_sums
from edgeq.quant.observers import observer_named

FORMAT = "edgeq-calibration"
STATE_FORMAT = "edgeq-calibration-state"
VERSION = "1"
_REMAKE = "make it again with edgeq calibrate"


@dataclass(frozen=True)
class CalibrationText:
    """A text that is cut into windows of tokens.

    Args:
        windows: token ids, int64 [T] each, including BOS.
        text_sha256: SHA-256 of the text's UTF-8 bytes; "" if there was no text.
        context: most tokens of a window.
        bos: the BOS token that every window begins with; None without one.
        sampled: number of tokens, in the last windows, that were sampled from the model itself.
    """

    windows: tuple[NDArray[np.int64], ...]
    text_sha256: str
    context: int
    bos: int | None
    sampled: int = 0

    @property
    def n_tokens(self) -> int:
        """Number of tokens in all windows."""
        return sum(window.size for window in self.windows)

    @property
    def sha256(self) -> str:
        """SHA-256 of the tokens and of the lengths of the windows, in hexadecimal."""
        digest = hashlib.sha256()
        for window in self.windows:
            digest.update(len(window).to_bytes(8, "little") + window.astype("<i8").tobytes())
        return digest.hexdigest()


def cut_windows(
    tokens: Sequence[int] | NDArray[np.integer],
    *,
    context: int = 256,
    n_windows: int | None = None,
    bos: int | None = None,
    text_sha256: str = "",
) -> CalibrationText:
    """Cut a text into disjoint windows of equal length.

    Args:
        tokens: token ids of the text, without BOS.
        context: tokens per window, including BOS.
        n_windows: number of windows, evenly spaced over the text; all if None.
        bos: token that every window begins with; None if the tokenizer has no BOS.
        text_sha256: SHA-256 of the text.

    Returns:
        windows of ``context`` tokens. Tokens at the end that do not fill a window are left out,
        unless the whole text is shorter than a window.

    Raises:
        UsageError: there are no tokens, or a number is out of range.
    """
    ids = np.asarray(tokens, np.int64)
    least = 1 if bos is None else 2
    if context < least:
        raise UsageError(f"context is {context} tokens; use at least {least}")
    if n_windows is not None and n_windows < 1:
        raise UsageError(f"n_windows is {n_windows}; use at least 1, or None for the whole text")
    if ids.ndim != 1 or not ids.size:
        raise UsageError("the calibration text has no tokens; give a text that is not empty")
    step = context - (bos is not None)
    starts = np.arange(0, max(ids.size - step, 0) + 1, step)
    if n_windows is not None and n_windows < starts.size:
        starts = starts[np.arange(n_windows) * starts.size // n_windows]
    head = [] if bos is None else [bos]
    cuts = (np.concatenate([head, ids[start : start + step]]) for start in starts)
    windows = tuple(window.astype(np.int64) for window in cuts)
    return CalibrationText(windows, text_sha256, context, bos)


@dataclass(frozen=True, eq=False)
class InputStats:
    """Statistics of the inputs of one matrix [N, K] over a text.

    Args:
        n_tokens: number of input vectors.
        mean_abs, mean_square: mean absolute value and mean square of each input, float32 [K].
        low, high: the range that the observer chose over all K; low <= 0 <= high.
    """

    n_tokens: int
    mean_abs: NDArray[np.float32]
    mean_square: NDArray[np.float32]
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class CalibrationStats:
    """Statistics of the inputs of every matrix of a model over a text.

    Args:
        n_tokens: number of tokens of the text, including the BOS of the windows.
        text_sha256: SHA-256 of the text.
        model_sha256: `model_sha256` of the model.
        observer: name of the observer that chose the ranges.
        inputs: name of a matrix -> statistics of its inputs.
    """

    n_tokens: int
    text_sha256: str
    model_sha256: str
    observer: str
    inputs: Mapping[str, InputStats]

    @property
    def sha256(self) -> str:
        """SHA-256 of the contents in hexadecimal; the same for measured and loaded statistics."""
        digest = hashlib.sha256(json.dumps(self._facts(), sort_keys=True).encode())
        for name, array in sorted(_arrays(self.inputs).items()):
            digest.update(f"|{name}|{list(array.shape)}|".encode() + array.tobytes())
        return digest.hexdigest()

    def save(self, path: str | Path) -> int:
        """Write the file and return its size in bytes.

        Raises:
            EdgeqError: the file cannot be written.
        """
        return _write(Path(path), FORMAT, self._facts(), _arrays(self.inputs))

    @classmethod
    def load(cls, path: str | Path) -> CalibrationStats:
        """Read and check a file.

        Raises:
            FormatError: the file is damaged, is of another kind, or was written by a newer edgeq.
        """
        file = open_safetensors(path)
        stats, rest = _read(file, FORMAT)
        if rest:
            raise FormatError(
                f"{file.path} has the array {rest[0]}, which belongs to no matrix; {_REMAKE}"
            )
        return stats

    def check(self, model: Model) -> None:
        """Refuse a model on which these statistics were not measured.

        Raises:
            UsageError: matrices are missing or have another shape, or the weights differ.
        """
        _check_shapes(self.inputs, model.config, complete=True)
        digest = model_sha256(model)
        if digest != self.model_sha256:
            raise UsageError(
                "the statistics were measured on another model with the same shape "
                f"(its weights' sha256 is {self.model_sha256[:12]}..., this model's "
                f"{digest[:12]}...); calibrate this model with edgeq calibrate"
            )

    def _facts(self) -> dict[str, Any]:
        return {
            "n_tokens": self.n_tokens,
            "text_sha256": self.text_sha256,
            "model_sha256": self.model_sha256,
            "observer": self.observer,
            "linears": list(self.inputs),
        }


def model_sha256(model: Model) -> str:
    """SHA-256 of a model's hyperparameters and of the float32 value of every weight.

    It is the same for a model that is stored in different files or float types. All weights are
    read, in pieces.
    """
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    for name, tensor in sorted(model.tensors.items()):
        if model.config.tied and name == "lm_head.weight":
            continue
        digest.update(f"|{name}|{list(tensor.shape)}|".encode())
        for part in row_blocks(tensor.shape):
            rows = tensor.rows(part.start, part.stop)
            digest.update(rows.astype("<f4", copy=False).data)
        release(tensor)
    return digest.hexdigest()


def calibrate(
    model: Model,
    calibration: CalibrationText,
    *,
    observer: str = "minmax",
    resume: Path | None = None,
    progress: Progress | None = None,
) -> CalibrationStats:
    """Run a model on a text and measure the inputs of each matrix.

    The memory is that of a `Replay`: the weights of a group of matrices, and its inputs.

    Args:
        model: a float or quantized model.
        calibration: the windows.
        observer: name in `edgeq.quant.observers.OBSERVERS` of the observer that chooses ranges.
        resume: file to which the state is saved after each layer. If the file exists, calibration
            continues from it, with an identical result. The caller removes the file once the
            result is saved.
        progress: called with the group of matrices, groups done, and number of groups.

    Raises:
        FormatError: an activation is not finite, or the file to resume from is damaged.
        UsageError: the observer is unknown, the model cannot run the windows, or the file to
            resume from belongs to another calibration.
    """
    observer_named(observer)
    facts: dict[str, Any] = {
        "n_tokens": calibration.n_tokens,
        "text_sha256": calibration.text_sha256,
        "model_sha256": model_sha256(model),
        "observer": observer,
    }
    windows = calibration.sha256
    inputs: dict[str, InputStats] = {}
    state = None
    if resume is not None and resume.exists():
        state = _resumed(resume, facts | {"windows": windows}, inputs, model.config)
    saved = state.layer if state else 0
    replay = Replay(model, calibration.windows, state=state, progress=progress)
    for step in replay:
        if resume is not None and step.group.layer > saved:
            _save_state(resume, facts | {"windows": windows}, inputs, replay.state())
            saved = step.group.layer
        inputs.update(dict.fromkeys(step.group.linears, _observed(step, observer)))
    return CalibrationStats(**facts, inputs=inputs)


def _observed(step: ReplayStep, observer: str) -> InputStats:
    """Statistics of the inputs of one group of matrices."""
    ranging = observer_named(observer)
    n, sum_abs, sum_square = 0, np.zeros(1), np.zeros(1)
    for x in step.inputs():
        try:
            ranging.add(x)
        except FormatError as err:
            raise FormatError(f"the inputs of {step.group.linears[0]}: {err}") from err
        n += x.shape[0]
        sum_abs = sum_abs + column_sums(np.abs(x))
        sum_square = sum_square + column_squares(x)
    low, high = ranging.range()
    mean_abs, mean_square = (np.asarray(total / n, np.float32) for total in (sum_abs, sum_square))
    return InputStats(n, mean_abs, mean_square, low, high)


# --- files ------------------------------------------------------------------------------------


def _arrays(inputs: Mapping[str, InputStats]) -> dict[str, NDArray[Any]]:
    arrays: dict[str, NDArray[Any]] = {}
    for name, stats in inputs.items():
        arrays[name + ".mean_abs"] = stats.mean_abs
        arrays[name + ".mean_square"] = stats.mean_square
        arrays[name + ".range"] = np.array([stats.low, stats.high])
    return arrays


def _write(
    path: Path, form: str, facts: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]
) -> int:
    metadata = {"format": form, "format_version": VERSION}
    metadata |= {key: json.dumps(value) for key, value in facts.items()}
    return write_arrays(path, metadata, arrays, "the calibration")


def _save_state(
    path: Path, facts: Mapping[str, Any], inputs: Mapping[str, InputStats], state: ReplayState
) -> None:
    hidden = {f"hidden.{i:06}": x for i, x in enumerate(state.hidden)}
    facts = {**facts, "linears": list(inputs), "layer": state.layer}
    _write(path, STATE_FORMAT, facts, _arrays(inputs) | hidden)


def _resumed(
    path: Path, run: Mapping[str, Any], inputs: dict[str, InputStats], config: ModelConfig
) -> ReplayState:
    """Read a state file, and add its statistics to ``inputs``."""
    file = open_safetensors(path)
    stats, rest = _read(file, STATE_FORMAT)
    for key, wanted in run.items():
        if _fact(file, key, type(wanted)) != wanted:
            what = {"model_sha256": "another model", "observer": "another observer"}
            raise UsageError(
                f"{path} is the state of a calibration with "
                f"{what.get(key, 'another text or other windows')}; use the same again, or start "
                "again without this file"
            )
    layer = _fact(file, "layer", int)
    done = [
        name for group in linear_groups(config) if group.layer < layer for name in group.linears
    ]
    if not 0 < layer <= config.layers or sorted(stats.inputs) != sorted(done):
        raise FormatError(
            f"{path} does not have exactly the layers before {layer}; start again without this file"
        )
    _check_shapes(stats.inputs, config, complete=False)
    hidden = [np.array(file.array(name)) for name in sorted(rest)]
    if any(x.dtype != np.float32 or x.shape[1:] != (config.hidden,) for x in hidden) or (
        sum(len(x) for x in hidden) != stats.n_tokens
    ):
        raise FormatError(
            f"{path} does not have the hidden states of its windows; start again without this file"
        )
    inputs.update(stats.inputs)
    return ReplayState(layer, tuple(hidden))


def _read(file: SafetensorsFile, form: str) -> tuple[CalibrationStats, list[str]]:
    """Read the statistics of a file; also returns the names of its other arrays."""
    stored = file.metadata.get("format")
    if stored != form:
        what = f"has the format {stored!r}" if stored else "states no format"
        raise FormatError(
            f"{file.path} {what}; give a file of the format {form!r}, which edgeq calibrate writes"
        )
    version = file.metadata.get("format_version")
    if version != VERSION:
        raise FormatError(
            f"{file.path} has version {version!r} of its format, and this edgeq reads {VERSION}; "
            f"upgrade with pip install -U edgeq, or {_REMAKE}"
        )
    n_tokens = _fact(file, "n_tokens", int)
    linears = _fact(file, "linears", list)
    if n_tokens < 1 or not all(isinstance(name, str) for name in linears):
        raise FormatError(f"{file.path}: n_tokens or linears is damaged; {_REMAKE}")
    inputs = {name: _input_stats(file, name, n_tokens) for name in linears}
    rest = sorted(set(file.tensors) - set(_arrays(inputs)))
    text, model, observer = (
        _fact(file, key, str) for key in ("text_sha256", "model_sha256", "observer")
    )
    return CalibrationStats(n_tokens, text, model, observer, inputs), rest


def _fact(file: SafetensorsFile, key: str, kind: type) -> Any:
    try:
        value = json.loads(file.metadata[key])
    except (KeyError, json.JSONDecodeError) as err:
        raise FormatError(f"{file.path} has no readable {key} in its metadata; {_REMAKE}") from err
    if type(value) is not kind:
        raise FormatError(f"{file.path}: {key} is {value!r} and not a {kind.__name__}; {_REMAKE}")
    return value


def _input_stats(file: SafetensorsFile, name: str, n_tokens: int) -> InputStats:
    mean_abs, mean_square, ends = (
        np.array(file.array(f"{name}.{part}")) for part in ("mean_abs", "mean_square", "range")
    )
    whole = (
        mean_abs.dtype == mean_square.dtype == np.float32
        and mean_abs.ndim == 1
        and mean_abs.shape == mean_square.shape
        and ends.dtype == np.float64
        and ends.shape == (2,)
        and all(np.isfinite(array).all() for array in (mean_abs, mean_square, ends))
        and mean_abs.min(initial=0) >= 0
        and mean_square.min(initial=0) >= 0
        and ends[0] <= 0 <= ends[1]
    )
    if not whole:
        raise FormatError(f"{file.path}: the statistics of {name} are damaged; {_REMAKE}")
    return InputStats(n_tokens, mean_abs, mean_square, float(ends[0]), float(ends[1]))


def _check_shapes(inputs: Mapping[str, InputStats], config: ModelConfig, complete: bool) -> None:
    """Refuse statistics that do not fit the shapes of a model's matrices."""
    widths = {name: k for name, (_, k) in config.linears()}
    wanted = {name: widths[name] for group in linear_groups(config) for name in group.linears}
    for name, stats in inputs.items():
        if wanted.get(name) != stats.mean_abs.size:
            has = f"K={wanted[name]}" if name in wanted else "no such matrix"
            raise UsageError(
                f"the statistics were measured on another model: it has {name} with "
                f"K={stats.mean_abs.size}, and this model has {has}; calibrate this model"
            )
    missing = [name for name in wanted if name not in inputs]
    if complete and missing:
        raise UsageError(
            f"the statistics were measured on another model: {missing[0]} is missing; calibrate "
            "this model"
        )
