"""Calibration: windows, statistics against the reference, files, and going on after a kill."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edgeq.cli import main
from edgeq.core.errors import EdgeqError, FormatError, UsageError
from edgeq.formats.tensor import FloatTensor, Tensor
from edgeq.importers import load
from edgeq.model.artifact import load as load_artifact
from edgeq.model.artifact import save as save_artifact
from edgeq.model.formulas import Array, dense
from edgeq.model.model import Model
from edgeq.model.recording import linear_groups
from edgeq.model.reference import Reference
from edgeq.quant.decoder import replayed_experts
from edgeq.quant.decoder.calibrate import (
    CalibrationStats,
    CalibrationText,
    calibrate,
    cut_windows,
    model_sha256,
)
from tests.families import CALIBRATED, random_model, tiny_config
from tests.paths import ROOT

DEMO = ROOT / "edgeq" / "demo_model"
TOKENS = np.random.default_rng(7).integers(3, 101, 200)


def small(layers: int = 3, seed: int = 0) -> Model:
    return random_model(tiny_config("llama", layers=layers), seed)


def cut(**options: Any) -> CalibrationText:
    return cut_windows(TOKENS, **{"context": 32, "bos": 1, "text_sha256": "ab", **options})


# Windows


def test_windows_are_disjoint_and_begin_with_bos() -> None:
    cal = cut()
    assert [w.size for w in cal.windows] == [32] * 6  # 6 x 31 of 200 tokens
    assert all(w[0] == 1 and w.dtype == np.int64 for w in cal.windows)
    np.testing.assert_array_equal(np.concatenate([w[1:] for w in cal.windows]), TOKENS[:186])
    assert (cal.n_tokens, cal.context, cal.bos, cal.text_sha256) == (192, 32, 1, "ab")
    bare = cut(bos=None)
    np.testing.assert_array_equal(np.concatenate(bare.windows), TOKENS[:192])


def test_few_windows_are_spread_over_the_text() -> None:
    every = cut(bos=None, context=10)
    some = cut(bos=None, context=10, n_windows=4)
    where = [
        next(i for i, w in enumerate(every.windows) if np.array_equal(w, window))
        for window in some.windows
    ]
    assert where == [0, 5, 10, 15]
    assert len(cut(n_windows=99).windows) == 6


def test_a_text_shorter_than_a_window_is_one() -> None:
    np.testing.assert_array_equal(cut_windows([5, 6], context=9, bos=1).windows[0], [1, 5, 6])


def test_a_calibration_s_digest_knows_its_cuts() -> None:
    assert cut().sha256 == cut().sha256
    assert len({cut().sha256, cut(bos=None).sha256, cut(bos=None, context=16).sha256}) == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tokens": []}, "no tokens"),
        ({"context": 0, "bos": None}, "at least 1"),
        ({"context": 1}, "at least 2"),
        ({"n_windows": 0}, "at least 1"),
    ],
)
def test_windows_that_cannot_be(options: dict[str, Any], words: str) -> None:
    given = {"tokens": TOKENS, "context": 32, "bos": 1, **options}
    with pytest.raises(UsageError, match=words):
        cut_windows(**given)


# Statistics


@pytest.mark.parametrize("family", CALIBRATED)
def test_statistics_are_those_of_the_reference_s_inputs(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replayed_experts, "LEAST_TOKENS", 1)
    model = random_model(tiny_config(family))
    seen: dict[str, list[Array]] = {}

    def watch(name: str, x: Array, weight: Tensor) -> Array:
        seen.setdefault(name, []).append(x)
        return dense(name, x, weight)

    reference = Reference(model, linear=watch)
    for window in cut().windows:
        reference.forward(window)
    stats = calibrate(model, cut())
    assert (stats.n_tokens, stats.observer, stats.text_sha256) == (192, "minmax", "ab")
    assert stats.model_sha256 == model_sha256(model)
    assert set(stats.inputs) == set(seen)
    for name, pieces in seen.items():
        x, got = np.concatenate(pieces).astype(np.float64), stats.inputs[name]
        assert got.n_tokens == len(x)
        assert ".experts." in name or len(x) == 192
        assert got.mean_abs.dtype == got.mean_square.dtype == np.float32
        np.testing.assert_allclose(got.mean_abs, np.abs(x).mean(axis=0), rtol=1e-4)
        np.testing.assert_allclose(got.mean_square, (x * x).mean(axis=0), rtol=1e-4)
        assert (got.low, got.high) == pytest.approx((x.min(), x.max()), rel=1e-5)


def test_the_observer_chooses_the_range() -> None:
    ranges = {
        observer: calibrate(small(), cut(), observer=observer).inputs
        for observer in ("minmax", "percentile", "mse", "entropy", "moving-average")
    }
    name = "model.layers.1.mlp.down_proj.weight"
    widest = ranges["minmax"][name]
    assert len({inputs[name].high for inputs in ranges.values()}) >= 4
    for inputs in ranges.values():
        assert widest.low <= inputs[name].low <= 0 <= inputs[name].high <= widest.high
    with pytest.raises(UsageError, match="did you mean 'minmax'"):
        calibrate(small(), cut(), observer="min-max")


def test_progress_goes_from_nothing_to_all() -> None:
    told: list[tuple[str, int, int]] = []
    calibrate(small(), cut(), progress=lambda *call: told.append(call))
    assert [done for _, done, _ in told] == list(range(14))
    assert {total for *_, total in told} == {13}


def test_activations_that_overflow_are_located() -> None:
    model = small()
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = {**model.tensors, name: FloatTensor("float32", model.tensors[name].numpy() * 1e38)}
    with (
        np.errstate(all="ignore"),
        pytest.raises(FormatError, match=r"inputs of model\.layers\.1\.mlp\.down_proj.*finite"),
    ):
        calibrate(replace(model, tensors=tensors), cut())


# Files


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    stats = calibrate(small(), cut(), observer="mse")
    path = tmp_path / "a.calib"
    assert stats.save(path) == path.stat().st_size
    again = CalibrationStats.load(path)
    assert again.sha256 == stats.sha256
    assert (again.n_tokens, again.observer, list(again.inputs)) == (
        stats.n_tokens, "mse", list(stats.inputs),
    )  # fmt: skip
    for name, seen in stats.inputs.items():
        np.testing.assert_array_equal(again.inputs[name].mean_square, seen.mean_square)
        assert (again.inputs[name].low, again.inputs[name].high) == (seen.low, seen.high)
    again.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.calib"]
    assert CalibrationStats.load(path).sha256 == stats.sha256
    assert load_file(path)["model.layers.0.mlp.down_proj.weight.range"].shape == (2,)


def test_the_digest_is_of_all_contents() -> None:
    stats = calibrate(small(1), cut())
    name = "model.layers.0.mlp.down_proj.weight"
    seen = stats.inputs[name]
    others = [
        replace(stats, observer="mse"),
        replace(stats, n_tokens=1),
        replace(stats, text_sha256="cd"),
        replace(stats, inputs={**stats.inputs, name: replace(seen, high=seen.high + 1e-6)}),
        replace(stats, inputs={**stats.inputs, name: replace(seen, mean_abs=seen.mean_abs + 1)}),
    ]
    assert len({stats.sha256, *(other.sha256 for other in others)}) == 6
    assert stats.sha256 == calibrate(small(1), cut()).sha256


def rewritten(path: Path, tensors: dict[str, Any], metadata: dict[str, str | None]) -> None:
    """The file with some arrays and metadata replaced, or removed where None."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    held = {k: v for k, v in {**load_file(path), **tensors}.items() if v is not None}
    told = {**header["__metadata__"], **metadata}
    save_file(held, path, {k: v for k, v in told.items() if v is not None})


DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("tensors", "metadata", "words"),
    [
        ({}, {"format": "edgeq"}, "give a file of the format 'edgeq-calibration'"),
        ({}, {"format": None}, "states no format"),
        ({}, {"format_version": "2"}, "version '2'"),
        ({}, {"n_tokens": None}, "no readable n_tokens"),
        ({}, {"n_tokens": '"many"'}, "n_tokens is 'many'"),
        ({}, {"n_tokens": "0"}, "damaged"),
        ({}, {"linears": "[1]"}, "damaged"),
        ({}, {"observer": "{"}, "no readable observer"),
        ({DOWN + ".range": None}, {}, "holds no tensor"),
        ({DOWN + ".range": np.array([1.0, 2.0])}, {}, "statistics of model.layers.0.mlp.down_proj"),
        ({DOWN + ".range": np.array([-1.0, np.nan])}, {}, "damaged"),
        ({DOWN + ".mean_abs": np.zeros(3, np.float32)}, {}, "damaged"),
        ({DOWN + ".mean_abs": -np.ones(76, np.float32)}, {}, "damaged"),
        ({DOWN + ".mean_square": np.zeros(76, np.float64)}, {}, "damaged"),
        ({"stray": np.zeros(3, np.float32)}, {}, "has the array stray"),
    ],
)
def test_damaged_files_are_refused(
    tensors: dict[str, Any], metadata: dict[str, str | None], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.calib"
    calibrate(small(1), cut()).save(path)
    rewritten(path, tensors, metadata)
    with pytest.raises(FormatError, match=words):
        CalibrationStats.load(path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.calib"
    calibrate(small(1), cut()).save(path)
    whole = path.read_bytes()
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(FormatError):
            CalibrationStats.load(path)


def test_statistics_of_another_model_are_refused() -> None:
    model = small(2)
    stats = calibrate(model, cut())
    stats.check(model)
    with pytest.raises(UsageError, match=r"same shape.*calibrate this model"):
        stats.check(small(2, seed=1))
    with pytest.raises(UsageError, match="no such matrix"):
        stats.check(small(1))
    with pytest.raises(UsageError, match=r"on another model: model\.layers\.2"):
        stats.check(small(3))
    with pytest.raises(UsageError, match="K=44, and this model has K=32"):
        stats.check(random_model(tiny_config("llama", hidden=32)))


def test_a_model_is_known_by_its_values(tmp_path: Path) -> None:
    model = small()
    save_artifact(model, tmp_path / "m.edgeq")
    assert model_sha256(load_artifact(tmp_path / "m.edgeq")) == model_sha256(model)
    name = "model.layers.2.self_attn.v_proj.weight"
    w = model.tensors[name].numpy()
    w[-1, -1] += 1e-3
    other = replace(model, tensors={**model.tensors, name: FloatTensor("float32", w)})
    assert model_sha256(other) != model_sha256(model)
    assert model_sha256(replace(model, config=replace(model.config, norm_eps=1e-6))) != (
        model_sha256(model)
    )


def test_nothing_is_left_where_writing_fails(tmp_path: Path) -> None:
    stats = calibrate(small(1), cut())
    with pytest.raises(EdgeqError, match="cannot be written"):
        stats.save(tmp_path / "absent" / "a.calib")
    (tmp_path / "folder").mkdir()
    with pytest.raises(EdgeqError, match="cannot be written"):
        stats.save(tmp_path / "folder")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


# Going on


class Killed(BaseException):
    """Stands for whatever ends a run."""


@pytest.mark.parametrize("site", range(13))
def test_a_run_ended_anywhere_goes_on_to_the_identical_result(site: int, tmp_path: Path) -> None:
    model, state = small(), tmp_path / "state"
    want = calibrate(model, cut(), observer="percentile")

    def die(label: str, done: int, total: int) -> None:
        if done == site:
            raise Killed

    with pytest.raises(Killed):
        calibrate(model, cut(), observer="percentile", resume=state, progress=die)
    assert state.exists() == (site > 4)  # saved when the first site of layer 1 has been reached
    told: list[int] = []
    got = calibrate(
        model, cut(), observer="percentile", resume=state,
        progress=lambda label, done, total: told.append(done),
    )  # fmt: skip
    assert got.sha256 == want.sha256
    assert told[0] == max(0, (site - 1) // 4 * 4)  # no layer is done twice but the one cut short
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_another_run_s_state_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "state"
    calibrate(small(), cut(), resume=state)
    again = calibrate(small(), cut(), resume=state)  # only the head is left to do
    assert again.sha256 == calibrate(small(), cut()).sha256
    with pytest.raises(UsageError, match="another observer"):
        calibrate(small(), cut(), observer="mse", resume=state)
    with pytest.raises(UsageError, match="another model"):
        calibrate(small(seed=1), cut(), resume=state)
    for other in (cut(text_sha256="cd"), cut(context=16), cut(n_windows=3)):
        with pytest.raises(UsageError, match="another text or other windows"):
            calibrate(small(), other, resume=state)
    with pytest.raises(FormatError, match="give a file of the format 'edgeq-calibration'"):
        CalibrationStats.load(state)


@pytest.mark.parametrize(
    ("tensors", "metadata", "words"),
    [
        ({}, {"layer": "2"}, "layers before 2"),
        ({}, {"layer": "9"}, "layers before 9"),
        ({"hidden.000003": None}, {}, "hidden states"),
        ({"hidden.000003": np.zeros((32, 3), np.float32)}, {}, "hidden states"),
        ({"hidden.000003": np.zeros((32, 44), np.float64)}, {}, "hidden states"),
    ],
)
def test_damaged_states_are_refused(
    tensors: dict[str, Any], metadata: dict[str, str | None], words: str, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    calibrate(small(), cut(), resume=state)
    rewritten(state, tensors, metadata)
    with pytest.raises(FormatError, match=words):
        calibrate(small(), cut(), resume=state)


_RUN = """
import os, signal, sys
from pathlib import Path
from edgeq.importers import load
from edgeq.quant.decoder.calibrate import calibrate, cut_windows

def die(label, done, total):
    if done == 9:
        os.kill(os.getpid(), signal.SIGKILL)

tokens = list(range(3, 400))
calibrate(load(sys.argv[1]), cut_windows(tokens, context=64, bos=0), observer="mse",
          resume=Path(sys.argv[2]), progress=die)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_killed_process_is_taken_up_by_another(tmp_path: Path) -> None:
    state = tmp_path / "state"
    done = subprocess.run(
        [sys.executable, "-c", _RUN, str(DEMO), str(state)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    model, cal = load(DEMO), cut_windows(list(range(3, 400)), context=64, bos=0)
    told: list[str] = []
    got = calibrate(
        model, cal, observer="mse", resume=state, progress=lambda label, *_: told.append(label)
    )
    assert told[0] == "layer 2 attn_in"
    assert len(told) == len(linear_groups(model.config)) - 8 + 1
    assert got.sha256 == calibrate(model, cal, observer="mse").sha256


# The command


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("EDGEQ_CALIBRATE")]:
        monkeypatch.delenv(name)


def command(*args: object) -> list[str]:
    text = DEMO / "heldout.txt"
    given = ("calibrate", DEMO, "--calib", text, "--windows", 4, "--context", 64, *args)
    return [str(arg) for arg in given]


def test_the_command_writes_what_the_library_finds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from edgeq.runtime.tokenizer import Tokenizer

    out = tmp_path / "demo.calib"
    assert main(command("-o", out, "--observer", "percentile", "--format", "json")) == 0
    told = json.loads(capsys.readouterr().out)
    model, text = load(DEMO), (DEMO / "heldout.txt").read_bytes()
    tokenizer = Tokenizer(model.files)
    ids = tokenizer.encode(text.decode(), add_bos=False)
    cal = cut_windows(
        ids, context=64, n_windows=4, bos=tokenizer.bos,
        text_sha256=hashlib.sha256(text).hexdigest(),
    )  # fmt: skip
    want = calibrate(model, cal, observer="percentile")
    assert told["sha256"] == want.sha256 == CalibrationStats.load(out).sha256
    assert (told["tokens"], told["windows"], told["context"]) == (256, 4, 64)
    assert told["file_bytes"] == out.stat().st_size
    assert [seen["name"] for seen in told["inputs"]] == list(want.inputs)
    assert main(command("-o", out, "--force")) == 0
    said = capsys.readouterr().out
    assert "36 matrices over 256 tokens (4 windows, ranges by minmax)" in said
    assert "down_proj.weight" in said.splitlines()[1]
    assert [p.name for p in tmp_path.iterdir()] == ["demo.calib"]


def test_the_command_goes_on_where_it_was_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    labels: list[str] = []

    @contextlib.contextmanager
    def bar(title: str) -> Iterator[Any]:
        def told(label: str, done: int, total: int) -> None:
            labels.append(label)
            if done == 10 and len(labels) == 11:  # the first time
                raise KeyboardInterrupt

        yield told

    out, other = tmp_path / "a.calib", tmp_path / "b.calib"
    monkeypatch.setattr("edgeq.cli.render.progress", bar)
    assert main(command("-o", out)) == 130
    assert [p.name for p in tmp_path.iterdir()] == ["a.calib.partial"]
    assert main(command("-o", out, "--resume")) == 0
    assert labels[11] == "layer 2 attn_in"
    assert main(command("-o", other)) == 0
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["a.calib", "b.calib"]
    assert CalibrationStats.load(out).sha256 == CalibrationStats.load(other).sha256
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["-o", "OUT", "--resume"], "leave out --resume"),
        (["-o", "OUT/in/none"], "does not exist; make it first"),
        (["-o", str(Path(__file__))], "--force to overwrite"),
        (["-o", "OUT", "--observer", "mean"], "unknown observer 'mean'"),
    ],
)
def test_the_command_explains_what_it_cannot(
    args: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [arg.replace("OUT", str(tmp_path / "x.calib")) for arg in args]
    assert main(command(*args)) == 1
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
