"""GGUF to GGUF: the integers of a file come out as they went in, or are refused by name."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgeq.converters import Options
from edgeq.converters.convert import convert
from edgeq.converters.gguf.decoder import GgufDecoderTarget
from edgeq.converters.validate import validate
from edgeq.converters.validate.integers import compare_integers
from edgeq.core.errors import UnsupportedError
from edgeq.formats.schemes import QuantScheme, parse_scheme
from edgeq.formats.tensor import QuantTensor, Tensor
from edgeq.importers import load
from edgeq.importers.gguf.blocks import TYPES
from edgeq.importers.gguf.file import GgufFile, open_gguf
from edgeq.model.model import Model
from edgeq.quant.decoder.repack import repack
from tests.families import random_model, tiny_config
from tests.importers.gguf.test_kept import written


def contents(file: GgufFile) -> dict[str, tuple[str, bytes]]:
    """Type and bytes of every quantized tensor."""
    found = {}
    for name, entry in file.tensors.items():
        stop = entry.start + entry.row_bytes * math.prod(entry.shape[:-1])
        if entry.type not in ("F32", "F16"):
            found[name] = entry.type, file.mapping.bytes(entry.start, stop)
    return found


SAME = [kind for kind in TYPES if kind != "TQ1_0"]
"""Types that are written as they were read."""


@pytest.mark.parametrize("kind", SAME)
def test_bytes_come_out_as_they_went_in(tmp_path: Path, kind: str) -> None:
    written(tmp_path / "in.gguf", "llama", [kind])
    convert(tmp_path / "in.gguf", "gguf", tmp_path / "out.gguf", validate=False)
    before, after = (contents(open_gguf(tmp_path / f"{end}.gguf")) for end in ("in", "out"))
    assert {kind for kind, _ in before.values()} == {kind}
    assert before == after


def test_ternary_digits_come_out_as_two_bits(tmp_path: Path) -> None:
    written(tmp_path / "in.gguf", "llama", ["TQ1_0"])
    convert(tmp_path / "in.gguf", "gguf", tmp_path / "out.gguf", validate=False)
    before, after = (load(tmp_path / f"{end}.gguf") for end in ("in", "out"))
    kinds = {kind for kind, _ in contents(open_gguf(tmp_path / "out.gguf")).values()}
    assert kinds == {"TQ2_0"}
    for name, tensor in before.tensors.items():
        np.testing.assert_array_equal(after.tensors[name].numpy(), tensor.numpy())
        if "proj" in name and tensor.shape[1] % 256 == 0:
            blocks = tensor.numpy().reshape(-1, 256)
            assert all(len(np.unique(np.abs(block))) <= 2 for block in blocks)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_mixed_types_by_way_of_an_artifact(tmp_path: Path, family: str) -> None:
    """GGUF to .edgeq to GGUF; phi3 has several of our matrices in one tensor."""
    settings = {"heads": 4, "kv_heads": 2, "head_dim": 64} if family == "phi3" else {}
    written(tmp_path / "in.gguf", family, SAME, **settings)
    repack(tmp_path / "in.gguf", tmp_path / "m.edgeq")
    convert(tmp_path / "m.edgeq", "gguf", tmp_path / "out.gguf", validate=False)
    before, after = (contents(open_gguf(tmp_path / f"{end}.gguf")) for end in ("in", "out"))
    assert before == after
    assert len({kind for kind, _ in after.values()}) > 5
    report = validate(tmp_path / "out.gguf", load(tmp_path / "m.edgeq"), "gguf", threads=1, steps=2)
    assert report.passed, report.explain()
    assert all(report.integers.values())


@pytest.mark.parametrize("scheme", ["w4-g128-min", "w5-g64-min", "w2-g32-min"])
def test_longer_groups_with_a_minimum(tmp_path: Path, scheme: str) -> None:
    """Scales and minimums are repeated for each block of 32: the same values."""
    model = with_minimums(scheme)
    out = tmp_path / "m.gguf"
    GgufDecoderTarget().write(model, out, Options())
    again = load(out)
    for name, tensor in model.tensors.items():
        np.testing.assert_array_equal(tensor.numpy(), again.tensors[name].numpy())


def test_a_changed_minimum_is_found(tmp_path: Path) -> None:
    model = with_minimums("w4-g32-min")
    out = tmp_path / "m.gguf"
    target = GgufDecoderTarget()
    target.write(model, out, Options())
    assert not compare_integers(model, lambda: target.read_weights(out))[1]
    entry = open_gguf(out).tensors["blk.0.ffn_down.weight"]
    data = np.memmap(out, np.uint8, "r+")
    data[entry.start + 3] ^= 1  # the second byte of the first block's minimum
    faults = compare_integers(model, lambda: target.read_weights(out))[1]
    assert [f.name for f in faults] == ["model.layers.0.mlp.down_proj.weight"]
    assert "1 of" in str(faults[0])
    assert "minimums differ" in str(faults[0])


def with_minimums(text: str) -> Model:
    """A model whose matrices have a scheme with a minimum."""
    scheme = parse_scheme(text)
    assert isinstance(scheme, QuantScheme)
    sizes = {"hidden": 256, "ffn": 512, "heads": 4, "kv_heads": 2, "head_dim": 64}
    model = random_model(tiny_config("llama", rope_scaling=None, **sizes))
    rng = np.random.default_rng(0)
    tensors: dict[str, Tensor] = dict(model.tensors)
    for name, (n, k) in model.config.linears():
        groups = scheme.n_groups(k)
        tensors[name] = QuantTensor.from_codes(
            scheme, rng.integers(0, scheme.n_codes, (n, k)).astype(np.uint8),
            rng.uniform(1e-3, 2e-3, (n, groups)).astype(np.float16),
            minimums=rng.uniform(-2e-2, 0, (n, groups)).astype(np.float16),
        )  # fmt: skip
    return replace(model, tensors=tensors)


def test_what_llama_cpp_cannot_hold_is_named(tmp_path: Path) -> None:
    model = with_minimums("w8-g32-min")
    with pytest.raises(UnsupportedError, match=r"cannot hold model.*w8-g32-min; quantize it as"):
        GgufDecoderTarget().check(model, Options())


def test_what_a_target_cannot_hold_is_named(tmp_path: Path) -> None:
    written(tmp_path / "in.gguf", "llama", ["Q4_1"])
    with pytest.raises(UnsupportedError, match=r"cannot hold model\..* as w4-g32-min"):
        convert(tmp_path / "in.gguf", "ort", tmp_path / "out", validate=False)
    assert not (tmp_path / "out").exists()
