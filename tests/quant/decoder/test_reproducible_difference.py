"""`edgeq quantize --verify-reproducible`: an artifact made again is compared byte by byte."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgeq import quantize
from edgeq.formats.safetensors_file import SafetensorsFile
from edgeq.quant.decoder.reproducible import difference
from tests.families import random_model, tiny_config


def test_the_first_tensor_that_differs_is_named(tmp_path: Path) -> None:
    model = random_model(tiny_config("llama"))
    one, other = tmp_path / "one.edgeq", tmp_path / "other.edgeq"
    for out in (one, other):
        quantize(model, out, "w4-g32")
    assert difference(one, other) is None
    opened = SafetensorsFile(other)
    name = "model.layers.1.self_attn.q_proj.weight.scales"
    place = other.read_bytes().find(opened.array(name).tobytes())
    opened.close()
    content = np.frombuffer(other.read_bytes(), np.uint8).copy()
    content[place] ^= 1
    other.write_bytes(content.tobytes())
    found = difference(one, other)
    assert found == f"the tensor {name} differs"
