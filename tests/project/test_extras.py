"""Optional packages that are missing are named before any work, with the extra that brings them."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from edgeq import quantize
from edgeq.cli import main
from edgeq.core.errors import MissingDependencyError, require
from edgeq.quant import Recipe
from edgeq.quant.decoder.calibrate import CalibrationText
from edgeq.quant.graph.images import Preprocess
from tests.paths import DEMO


def test_all_missing_packages_are_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    require("ort", ("json", "sys"), "to read")
    for name in ("onnx", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError) as caught:
        require("ort", ("onnx", "json", "onnxruntime"), "to run graphs")
    assert str(caught.value) == (
        "the packages 'onnx' and 'onnxruntime', which are needed to run graphs, are not installed; "
        "run: pip install 'edgeq[ort]'"
    )
    assert caught.value.extra == "ort"


def test_training_says_so_before_the_source_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    text = CalibrationText((np.arange(8),), "", 8, None)
    recipe = Recipe.from_options(preset="w4-g32-distill")
    with pytest.raises(MissingDependencyError, match=r"edgeq\[train\]"):
        quantize(tmp_path / "nothing", tmp_path / "out.edgeq", recipe, calibration=text)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("package", "extra", "recipe"),
    [("dask", "sweep", "w4-g32"), ("torch", "train", "w4-g32-distill")],
)
def test_a_sweep_says_so_before_its_first_task(
    package: str,
    extra: str,
    recipe: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    calib = tmp_path / "text.txt"
    calib.write_text("Once upon a time there was a lamp. " * 40)
    args = ["sweep", str(DEMO), "--recipe", recipe, "--calib", str(calib)]
    assert main([*args, "-o", str(tmp_path / "out")]) == 1
    errors = capsys.readouterr().err
    assert f"pip install 'edgeq[{extra}]'" in errors, errors
    assert not (tmp_path / "out").exists()


def test_pictures_say_so_before_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingDependencyError, match=r"edgeq\[vision\]"):
        Preprocess().for_pictures("x", (1, 3, 8, 8))
