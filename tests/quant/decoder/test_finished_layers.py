"""Layers that are kept until the artifact is whole, and runs that continue with them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import edgeq
from edgeq.formats.tensor import QuantTensor
from edgeq.model.model import Model
from edgeq.quant.decoder.calibrate import cut_windows
from edgeq.quant.decoder.finished_layers import FinishedLayers, Wanted, run_key, unfinished_folder
from edgeq.quant.decoder.quantize import Summary
from edgeq.quant.rounders.rounding import quantize_tensor
from tests.families import random_model, scheme_of, tiny_config
from tests.paths import DEMO

KEY = run_key({"recipe": "w4-g32-gptq"}, [np.arange(5)])
TEXT = DEMO / "heldout.txt"
LAYERS = 5
"""Of the demo model."""


def matrices(seed: int = 0) -> dict[str, QuantTensor]:
    rng = np.random.default_rng(seed)
    return {
        name: quantize_tensor(rng.standard_normal((24, 64), np.float32), scheme_of(text), "rtn")
        for name, text in (("a", "w4-g32"), ("b", "w3-g64-palette"), ("c", "w5-g32-asym"))
    }


def wanted(tensors: dict[str, QuantTensor]) -> Wanted:
    return {name: (tensor.scheme, tensor.shape) for name, tensor in tensors.items()}


def interrupted(out: Path, key: str | None = KEY) -> dict[str, QuantTensor]:
    """Keep a layer, and end with an error; returns the layer's matrices."""
    tensors = matrices()
    with contextlib.suppress(KeyboardInterrupt), FinishedLayers(out, key) as finished:
        assert finished.tensors(3, wanted(tensors)) == {}
        finished.keep(3, tensors)
        raise KeyboardInterrupt
    return tensors


def test_a_kept_layer_is_given_back(tmp_path: Path) -> None:
    out = tmp_path / "m.edgeq"
    tensors = interrupted(out)
    assert unfinished_folder(out).is_dir()
    with FinishedLayers(out, KEY) as finished:
        assert finished.tensors(2, wanted(tensors)) == {}
        again = finished.tensors(3, wanted(tensors))
        assert finished.taken == 1
    assert list(again) == list(tensors)
    for name, tensor in tensors.items():
        assert again[name].scheme == tensor.scheme
        assert np.array_equal(again[name].numpy(), tensor.numpy())
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_finished_layers_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), FinishedLayers(tmp_path / "m.edgeq", KEY):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", [run_key({"recipe": "w4-g32-gptq"}, [np.arange(6)]), None])
def test_layers_of_another_run_are_removed(key: str | None, tmp_path: Path) -> None:
    out = tmp_path / "m.edgeq"
    tensors = interrupted(out)
    (unfinished_folder(out) / ".m.edgeq.1-ab.tmp").write_bytes(b"of a process that was killed")
    with FinishedLayers(out, key) as finished:
        assert finished.folder is not None
        assert [path.name for path in finished.folder.iterdir()] == ["lock"]
        assert finished.tensors(3, wanted(tensors)) == {}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["flipped", "truncated", "another matrix"])
def test_a_damaged_layer_is_rounded_again(damage: str, tmp_path: Path) -> None:
    out = tmp_path / "m.edgeq"
    tensors = interrupted(out)
    path = unfinished_folder(out) / "layer-000003"
    raw = bytearray(path.read_bytes())
    if damage == "flipped":
        raw[-1] ^= 1
    path.write_bytes(raw[:-8] if damage == "truncated" else raw)
    asked = wanted(tensors)
    if damage == "another matrix":
        asked = {**asked, "a": (scheme_of("w4-g32"), (40, 64))}
    with FinishedLayers(out, KEY) as finished:
        assert finished.tensors(3, asked) == {}
        assert finished.taken == 0


def test_only_one_process_keeps_layers(tmp_path: Path) -> None:
    out = tmp_path / "m.edgeq"
    tensors = matrices()
    with FinishedLayers(out, KEY) as first:
        first.keep(0, tensors)
        with FinishedLayers(out, KEY) as second:
            assert second.folder is None
            assert second.tensors(0, wanted(tensors)) == {}
            second.keep(1, tensors)
        assert first.tensors(0, wanted(tensors)).keys() == tensors.keys()
        assert first.tensors(1, wanted(tensors)) == {}


def test_where_the_folder_cannot_be_made_nothing_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "m.edgeq"
    unfinished_folder(out).write_text("a file of somebody else")
    with FinishedLayers(out, KEY) as finished:
        finished.keep(0, matrices())
        assert finished.folder is None
    assert unfinished_folder(out).read_text() == "a file of somebody else"


def test_where_a_layer_cannot_be_kept_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    out = tmp_path / "m.edgeq"
    tensors = matrices()
    with FinishedLayers(out, KEY) as finished:
        assert finished.folder is not None
        finished.keep(0, tensors)
        monkeypatch.setattr(os, "fsync", full)
        finished.keep(1, tensors)
        monkeypatch.undo()
        finished.keep(2, tensors)  # without the layers before, it would be of no use
        assert [path.name for path in finished.folder.iterdir()] == ["lock"]


@pytest.fixture
def model(tmp_path: Path) -> Model:
    """Five layers, as if they had been opened from a file."""
    source = tmp_path / "source"
    source.write_bytes(b"what the key is made from")
    return random_model(tiny_config("llama", layers=LAYERS)).opened_from(source)


def quantized(model: Model, out: Path, recipe: str, stop: int | None = None) -> Summary:
    """Quantize a model; interrupted where a matrix of the layer ``stop`` begins."""
    tokens = np.random.default_rng(1).integers(3, model.config.vocab, 300)

    def progress(label: str, done: int, total: int) -> None:
        if stop is not None and label.startswith(f"model.layers.{stop}.self_attn"):
            raise KeyboardInterrupt

    summary = edgeq.quantize(
        model, out, recipe, calibration=cut_windows(tokens, context=40), progress=progress
    )
    assert isinstance(summary, Summary)
    return summary


@pytest.mark.parametrize("recipe", ["4.75bpw", "w4-g32-imatrix"])
def test_an_interrupted_run_continues_with_the_same_bytes(
    recipe: str, model: Model, tmp_path: Path
) -> None:
    folder = tmp_path / "outputs"
    folder.mkdir()
    whole, out, other = (folder / f"{name}.edgeq" for name in ("whole", "out", "other"))
    assert quantized(model, whole, recipe).continued_layers == 0
    for stop in (2, 4):
        with pytest.raises(KeyboardInterrupt):
            quantized(model, out, recipe, stop)
        kept = sorted(path.name for path in unfinished_folder(out).glob("layer-*"))
        assert kept == [f"layer-{layer:06}" for layer in range(stop)]
    shutil.copytree(unfinished_folder(out), unfinished_folder(other))
    assert quantized(model, out, recipe).continued_layers == 4
    assert out.read_bytes() == whole.read_bytes()
    # another recipe for the same output begins anew
    assert quantized(model, other, "w4-g32-gptq").continued_layers == 0
    assert {path.name for path in folder.iterdir()} == {
        "whole.edgeq", "out.edgeq", "other.edgeq",
    }  # fmt: skip


def test_a_changed_source_is_rounded_anew(model: Model, tmp_path: Path) -> None:
    out = tmp_path / "out.edgeq"
    with pytest.raises(KeyboardInterrupt):
        quantized(model, out, "w4-g32-gptq", 3)
    assert model.origin is not None
    model.origin.path.write_bytes(b"another file")
    again = replace(model).opened_from(model.origin.path)
    assert quantized(again, out, "w4-g32-gptq").continued_layers == 0


def test_a_model_in_memory_keeps_no_layers(model: Model, tmp_path: Path) -> None:
    out = tmp_path / "out.edgeq"
    with pytest.raises(KeyboardInterrupt):
        quantized(replace(model), out, "w4-g32-gptq", 3)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


@pytest.mark.slow
def test_a_killed_process_is_continued_by_the_next(tmp_path: Path) -> None:
    def command(out: Path) -> list[str]:
        return [
            sys.executable, "-m", "edgeq", "quantize", str(DEMO), "-o", str(out), "--preset",
            "w3-g32-gptq", "--calib", str(TEXT), "--calib-windows", "8", "--no-card",
            "--format", "json",
        ]  # fmt: skip

    whole, out = tmp_path / "whole.edgeq", tmp_path / "out.edgeq"
    subprocess.run(command(whole), check=True, capture_output=True)
    first = unfinished_folder(out) / "layer-000001"
    process = subprocess.Popen(command(out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not first.exists():
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    left = {path.name for path in unfinished_folder(out).iterdir()}
    assert any(name.endswith(".tmp") for name in left)  # the artifact of the killed process
    again = subprocess.run(command(out), check=True, capture_output=True, text=True)
    continued = json.loads(again.stdout)["continued_layers"]
    assert 2 <= continued < LAYERS
    assert f"had rounded the first {continued} layers" in " ".join(again.stderr.split())
    assert out.read_bytes() == whole.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"whole.edgeq", "out.edgeq"}
