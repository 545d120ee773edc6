"""Artifacts that hold another program's integers, and what is recorded of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import edgeq
from edgeq.cli import main
from edgeq.core.errors import EdgeqError, UsageError
from edgeq.core.hashing import file_sha256
from edgeq.importers import load
from edgeq.importers.gguf.blocks import TYPES
from edgeq.model import artifact
from edgeq.quant import Recipe
from tests.families import random_model, tiny_config
from tests.importers.gguf.test_kept import written
from tests.paths import DEMO


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A GGUF file of many types."""
    pytest.importorskip("gguf")
    written(tmp_path / "in.gguf", "llama", list(TYPES))
    return tmp_path / "in.gguf"


def test_values_are_the_source_s(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.edgeq"
    summary = edgeq.repack(source, out)
    before, after = load(source), load(out)
    for name, tensor in after.tensors.items():
        np.testing.assert_array_equal(tensor.numpy(), before.tensors[name].numpy())
    assert sum(summary.kept.values()) + summary.floats == len(after.tensors)
    assert set(summary.kept) == set(TYPES)
    assert summary.file_bytes == out.stat().st_size
    assert summary.bpw == pytest.approx(edgeq.inspect(out)["bpw"])


def test_what_was_kept_is_recorded(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.edgeq"
    summary = edgeq.repack(source, out)
    record = edgeq.inspect(out)
    assert record["integers"] == {
        "kept": dict(summary.kept), "formats": ["GGUF"], "rounded": {},
    }  # fmt: skip
    provenance = record["provenance"]
    assert provenance["source"] == "in.gguf"
    assert provenance["source_sha256"] == summary.source_sha256 == file_sha256(source)
    kept = provenance["kept"]["tensors"]
    assert set(kept.values()) == set(TYPES)
    matrices = {t["name"] for t in record["tensors"] if t["scheme"].startswith("w")}
    assert set(kept) == matrices
    # the source itself and another copy of the artifact say the same
    assert edgeq.inspect(source)["integers"]["kept"] == dict(summary.kept)
    artifact.save(load(out), tmp_path / "copy.edgeq")
    assert edgeq.inspect(tmp_path / "copy.edgeq")["integers"] == record["integers"]


def test_what_edgeq_rounded_is_told_from_what_it_kept(source: Path, tmp_path: Path) -> None:
    edgeq.quantize(source, tmp_path / "m.edgeq", "w4-g32", requantize=True)
    found = edgeq.inspect(tmp_path / "m.edgeq")["integers"]
    assert found["kept"] == {}
    assert set(found["rounded"]) == {"w4-g32", "w8-channel"}
    assert edgeq.inspect(DEMO)["integers"] is None


def test_a_certificate_says_where_the_integers_came_from(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    written(tmp_path / "in.gguf", "llama", ["Q4_0", "Q8_0"])
    summary = edgeq.repack(tmp_path / "in.gguf", tmp_path / "m.edgeq")
    for name in ("in.gguf", "m.edgeq"):
        made = edgeq.convert(
            tmp_path / name, "gguf", tmp_path / "out.gguf", force=True, steps=2, threads=1
        )
        assert made.certificate is not None
        told = made.certificate["source"]
        assert told["integers"]["kept"] == dict(summary.kept)
        assert told["integers"]["rounded"] == {}
        assert told["source"] == "in.gguf"
        assert told["source_sha256"] == file_sha256(tmp_path / "in.gguf")


def test_what_has_no_integers_of_others_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not quantized, so there are no integers to keep"):
        edgeq.repack(DEMO, tmp_path / "m.edgeq")
    edgeq.quantize(DEMO, tmp_path / "q.edgeq", "w4-g32")
    with pytest.raises(UsageError, match="is an artifact of edgeq already; copy the file"):
        edgeq.repack(tmp_path / "q.edgeq", tmp_path / "m.edgeq")
    assert not (tmp_path / "m.edgeq").exists()


def test_repack_on_the_command_line(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "m.edgeq"
    assert main(["quantize", str(source), "-o", str(out)]) == 1
    assert "pass --repack to edgeq quantize" in capsys.readouterr().err
    command = ["quantize", str(source), "-o", str(out), "--repack"]
    assert main([*command, "--preset", "w4-g32"]) == 2
    assert "--preset is for rounding, and --repack rounds nothing" in capsys.readouterr().err
    assert main([*command, "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["kept"]["Q4_K"] >= 1
    assert main(["inspect", str(out)]) == 0
    assert "kept from GGUF (" in " ".join(capsys.readouterr().out.split())


def test_reproducible_is_verified_in_python(tmp_path: Path) -> None:
    model, out = random_model(tiny_config("llama")), tmp_path / "m.edgeq"
    summary = edgeq.quantize(model, out, "w4-g32")
    before = out.read_bytes()
    assert edgeq.verify_reproducible(model, out, "w4-g32").file_bytes == summary.file_bytes
    with pytest.raises(EdgeqError, match=r"is not what these options give with edgeq .*: "):
        edgeq.verify_reproducible(model, out, Recipe.from_options("w8-g32"))
    assert out.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["m.edgeq"]
    with pytest.raises(UsageError, match=r"none\.edgeq does not exist"):
        edgeq.verify_reproducible(model, tmp_path / "none.edgeq")
