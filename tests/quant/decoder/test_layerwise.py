"""Models whose layers read more than the residual stream: rounded without a text, else refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeq
from edgeq.core.errors import UnsupportedError
from edgeq.formats.tensor import QuantTensor
from edgeq.model import artifact
from edgeq.model.block import LAYER_TABLE
from edgeq.quant.decoder.calibrate import cut_windows
from edgeq.quant.decoder.layerwise import beside_stream, check_layerwise
from edgeq.quant.decoder.quality_report import HeldOut
from edgeq.quant.decoder.replay import Replay
from edgeq.quant.decoder.sampling import sample_texts
from edgeq.quant.decoder.transforms import TRANSFORMS
from edgeq.runtime.engine import Engine
from tests.families import CALIBRATED, SHARING, random_model, tiny_config

WORDS = "its layers have inputs of their own, and 3 read the keys and values of other layers"
TEXT = cut_windows(np.arange(3, 99), context=32, bos=1)


def test_families_that_are_calibrated() -> None:
    assert all(beside_stream(tiny_config(family)) is None for family in CALIBRATED)
    assert {beside_stream(tiny_config(family)) for family in SHARING} == {WORDS}


def test_a_file_without_a_calibration_text(tmp_path: Path) -> None:
    """The table gets the scheme of the layers, the embedding that of the head, and the report says
    why it has no numbers."""
    source = random_model(tiny_config("gemma4"))
    out = tmp_path / "model.edgeq"
    made = edgeq.quantize(source, out, "w4-g32-mse", card=HeldOut("the text", TEXT), threads=1)
    assert isinstance(made, edgeq.Summary)
    assert WORDS in str(made.quality.reason)
    model = artifact.load(out)
    table, embedding = model.tensors[LAYER_TABLE], model.tensors["model.embed_tokens.weight"]
    assert isinstance(table, QuantTensor)
    assert isinstance(embedding, QuantTensor)
    assert (table.scheme.bits, embedding.scheme.bits) == (4, 8)
    with Engine(model, threads=1) as engine:
        assert np.isfinite(engine.forward([3, 4, 5])).all()


@pytest.mark.parametrize("recipe", ["w4-g32-gptq", "w4-g32-imatrix"])
def test_methods_that_read_a_text_are_refused_before_any_work(recipe: str, tmp_path: Path) -> None:
    source = random_model(tiny_config("gemma4"))
    with pytest.raises(UnsupportedError, match=f"{WORDS}.*--fast"):
        edgeq.quantize(source, tmp_path / "model.edgeq", recipe, calibration=TEXT)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["rotate", "rotate-values"])
def test_rotations_are_refused(name: str) -> None:
    schemes: dict[str, Any] = {}
    with pytest.raises(UnsupportedError, match=WORDS):
        TRANSFORMS[name](random_model(tiny_config("gemma4")), TEXT, schemes, None)


def test_what_runs_layers_one_by_one_is_refused() -> None:
    model = random_model(tiny_config("gemma4"))
    with pytest.raises(UnsupportedError, match=WORDS):
        Replay(model, TEXT.windows)
    with pytest.raises(UnsupportedError, match=WORDS):
        sample_texts(model, [[1]], 8)
    with pytest.raises(UnsupportedError, match="adaround runs a gemma4 model"):
        check_layerwise(model.config, "adaround")
