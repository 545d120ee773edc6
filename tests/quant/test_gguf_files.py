"""Whole files by llama.cpp's own tool, as the quality benchmark writes and reads them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeq.importers import load
from edgeq.model.model import Model
from tests.paths import DEMO, ROOT

pytest.importorskip("llama_cpp")
pytest.importorskip("gguf")


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "quality")
    return importlib.import_module("gguf_files")


@pytest.fixture
def model() -> Model:
    return load(DEMO)


@pytest.fixture
def source(files: Any, model: Model, tmp_path: Path) -> Path:
    """The demo model in 8 bits, by the benchmark's own writer."""
    llamacpp = importlib.import_module("llamacpp")
    path = tmp_path / "source.gguf"
    llamacpp.write(model, llamacpp.blocks_of(model, "Q8_0", None), path)
    return path


def errors(files: Any, model: Model, path: Path) -> dict[str, float]:
    """Root mean square error of each matrix of the layers, in parts of its own."""
    held, _ = files.held_by(path, model)
    found = {}
    for name, tensor in model.tensors.items():
        if ".layers." in name and len(tensor.shape) == 2:
            exact = tensor.numpy()
            found[name] = float(np.std(held.tensors[name].numpy() - exact) / np.std(exact))
    return found


def test_a_file_holds_the_values_of_its_source(
    files: Any, model: Model, source: Path, tmp_path: Path
) -> None:
    """Float32 keeps them exactly; the rows of q and k come back in the model's own order."""
    path = tmp_path / "float.gguf"
    files.quantize_file(source, path, "F32")
    before, kinds_before = files.held_by(source, model)
    after, kinds = files.held_by(path, model)
    assert set(kinds) == {"F32"}
    assert "Q8_0" in kinds_before
    for name in model.tensors:
        assert np.array_equal(before.tensors[name].numpy(), after.tensors[name].numpy()), name
    assert max(errors(files, model, path).values()) < 0.02


def test_importance_moves_what_it_is_about(
    files: Any, model: Model, source: Path, tmp_path: Path
) -> None:
    """Inputs of high importance get the smaller errors, in the named matrix alone."""
    name = "model.layers.1.mlp.down_proj.weight"
    row = np.ones(model.tensors[name].shape[1], np.float32)
    row[: row.size // 2 : 2] = 1000.0
    plain, weighted = tmp_path / "plain.gguf", tmp_path / "weighted.gguf"
    files.quantize_file(source, plain, "Q4_0")
    files.quantize_file(source, weighted, "Q4_0", {name: row})
    one, two = (files.held_by(path, model)[0].tensors for path in (plain, weighted))
    changed = {n for n in model.tensors if not np.array_equal(one[n].numpy(), two[n].numpy())}
    assert changed == {name}
    exact, heavy = model.tensors[name].numpy(), row > 1
    error = [np.square(t[name].numpy() - exact)[:, heavy].mean() for t in (one, two)]
    assert error[1] < error[0]


def test_a_refusal_is_llama_cpps_own(files: Any, source: Path, tmp_path: Path) -> None:
    """A file of 2-bit types cannot be had without importance."""
    out = tmp_path / "refused.gguf"
    with pytest.raises(files.RefusedError, match="imatrix"):
        files.quantize_file(source, out, "IQ2_M")
    assert not out.exists()
