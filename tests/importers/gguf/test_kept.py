"""GGUF files whose tensors have many quantized types: computed with their own integers."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeq.formats.kept import KeptTensor, packed, packed_nbytes
from edgeq.importers import load
from edgeq.importers.gguf.blocks import TYPES
from edgeq.model.model import Model
from edgeq.model.reference import Reference
from edgeq.quant.decoder.source import quantized_types
from edgeq.runtime.engine import Engine
from tests.families import random_model, tiny_config
from tests.importers.gguf.test_importer import random_blocks, write

gguf = pytest.importorskip("gguf")

SMALL = [kind for kind, form in TYPES.items() if not form.scheme.two_level]
LARGE = [kind for kind, form in TYPES.items() if form.scheme.two_level]
PROMPT = [1, 5, 9, 2, 40, 7, 3, 11, 60, 8, 33, 21]


def written(path: Path, family: str, kinds: list[str], **settings: Any) -> Model:
    """A small model with hidden size 256 whose matrices have the given types in turn."""
    settings = {"context": 128, "hidden": 256, "ffn": 512, "layers": 3, **settings}
    config = tiny_config(family, rope_scaling=None, **settings)
    model = random_model(config)
    turn = itertools.cycle(kinds)

    class Quantized(gguf.GGUFWriter):
        def add_tensor(self, key: str, tensor: Any, **rest: Any) -> None:
            if tensor.ndim != 2 or tensor.shape[1] % 256:
                super().add_tensor(key, tensor, **rest)
                return
            kind = next(turn)
            number = gguf.GGMLQuantizationType[kind]
            try:
                data = gguf.quants.quantize(tensor.astype(np.float32), number)
            except NotImplementedError:
                data = random_blocks(kind, *tensor.shape, spread=1e-3)
            super().add_tensor(key, data, raw_dtype=number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFWriter", Quantized)
        write(path, model)
    return load(path)


def kl(right: Any, other: Any) -> float:
    logs = [x - np.logaddexp.reduce(x.astype(np.float64)) for x in (right, other)]
    return float((np.exp(logs[0]) * (logs[0] - logs[1])).sum())


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
@pytest.mark.parametrize("kinds", [SMALL, LARGE], ids=["small blocks", "large blocks"])
def test_models_of_mixed_types(tmp_path: Path, family: str, kinds: list[str]) -> None:
    model = written(tmp_path / "m.gguf", family, kinds)
    assert set(quantized_types(model)) == set(kinds)
    want = Reference(model).forward(np.array(PROMPT))[-1]
    outputs = []
    for settings in ({"threads": 1}, {"threads": 2}, {"threads": 1, "mmap": True}):
        with Engine(model, context=64, kv_bits=16, **settings) as engine:
            outputs.append(np.array(engine.forward(PROMPT)).reshape(-1))
    with Engine(model.packed(), context=64, kv_bits=16, threads=1) as engine:
        outputs.append([np.array(engine.forward([token])) for token in PROMPT][-1].reshape(-1))
    for other in outputs[1:]:
        np.testing.assert_array_equal(outputs[0], other)
    assert kl(want, outputs[0]) < 2e-3


@pytest.mark.parametrize("kind", TYPES)
def test_packing_keeps_values_and_size(tmp_path: Path, kind: str) -> None:
    model = written(tmp_path / "m.gguf", "llama", [kind])
    name = "model.layers.1.self_attn.k_proj.weight"  # its rows are put in another order
    tensor = model.tensors[name]
    assert isinstance(tensor, KeptTensor)
    whole = packed(tensor)
    assert whole.nbytes == packed_nbytes(tensor)
    np.testing.assert_array_equal(whole.numpy(), tensor.numpy())
    np.testing.assert_array_equal(whole.rows(3, 20), tensor.rows(3, 20))
    assert model.packed().tensors[name].shape == tensor.shape
