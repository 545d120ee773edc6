"""The strict safetensors reader, against files the safetensors package writes and broken ones."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from edgeq.core.errors import EdgeqError, FormatError, UnsupportedError
from edgeq.formats.mapped_file import MappedFile, release
from edgeq.formats.safetensors_file import MAX_HEADER, open_safetensors
from edgeq.formats.tensor import FloatTensor
from edgeq.importers.lazy import GatheredRows, half_split


def forge(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.safetensors"
    rng = np.random.default_rng(0)
    tensors = {
        "f32": rng.standard_normal((5, 7)).astype(np.float32),
        "f16": rng.standard_normal((3, 4)).astype(np.float16),
        "i8": rng.integers(-9, 9, (2, 3)).astype(np.int8),
        "scalar": np.array(3.5, np.float32),
        "none": np.zeros((0, 4), np.float32),
    }
    save_file(tensors, path, {"format": "np", "note": "é"})
    return path


def test_reads_what_safetensors_writes(good: Path) -> None:
    from safetensors.numpy import load_file

    file = open_safetensors(good)
    want = load_file(good)
    assert file.metadata == {"format": "np", "note": "é"}
    assert set(file.tensors) == set(want)
    for name, values in want.items():
        got = file.array(name)
        assert got.dtype == values.dtype
        assert got.shape == values.shape
        np.testing.assert_array_equal(got, values)
        assert not got.flags.writeable
    assert file.tensors["f32"].dtype == "F32"
    assert file.tensors["f32"].stop - file.tensors["f32"].start == 5 * 7 * 4
    np.testing.assert_array_equal(file.tensor("f16").rows(1, 3), want["f16"][1:3])


def test_bfloat16_is_its_bits(tmp_path: Path) -> None:
    bits = np.array([0x3F80, 0xBF80, 0x7F80, 1], "<u2")
    path = forge(tmp_path / "b", {"w": entry("BF16", [4], 0, 8)}, bits.tobytes())
    file = open_safetensors(path)
    assert file.array("w").dtype == np.uint16
    np.testing.assert_array_equal(file.array("w"), bits)
    assert file.tensor("w").numpy()[:3].tolist() == [1.0, -1.0, float("inf")]


def test_views_outlive_release_and_close(good: Path) -> None:
    file = open_safetensors(good)
    tensor = file.tensor("f32")
    before = tensor.numpy()
    file.release()
    release(tensor)
    release(tensor.data[1:])
    release(half_split(FloatTensor("float32", tensor.data[:4]), 2))
    release(np.zeros(3))
    file.close()
    np.testing.assert_array_equal(tensor.numpy(), before)
    with pytest.raises(ValueError, match="is closed"):
        file.array("f16")


def test_release_gives_pages_back(tmp_path: Path) -> None:
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("no /proc/self/statm")
    path = tmp_path / "big.safetensors"
    save_file({"w": np.ones((64, 1 << 18), np.float32)}, path)  # 64 MiB
    tensor = open_safetensors(path).tensor("w")

    def resident() -> int:
        return int(statm.read_text().split()[1]) * 4096

    assert sum(float(tensor.data[i].sum()) for i in range(64)) == 64 << 18
    touched = resident()
    release(tensor)
    assert touched - resident() > 48 << 20


def test_half_split_undoes_interleaving() -> None:
    values = np.arange(2 * 6 * 3, dtype=np.float32).reshape(12, 3)  # 2 heads of 6
    lazy = half_split(FloatTensor("float32", values), 2)
    want = np.concatenate([values[[0, 2, 4, 1, 3, 5]], values[[6, 8, 10, 7, 9, 11]]])
    np.testing.assert_array_equal(lazy.numpy(), want)
    for start in range(12):
        for stop in range(start, 13):
            np.testing.assert_array_equal(lazy.rows(start, stop), want[start:stop])
    assert lazy.shape == (12, 3)
    assert lazy.nbytes == values.nbytes
    assert isinstance(lazy, GatheredRows)


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        ({"w": entry("F32", [2], 0, 8)}, 4, r"tensor w ends at byte \d+ of a file of \d+"),
        ({"w": entry("F32", [2], 0, 12)}, 12, r"F32 \[2\] takes 8 bytes, its offsets give 12"),
        ({"w": entry("F32", [3], 0, 8)}, 8, "takes 12 bytes, its offsets give 8"),
        ({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 2, 6)}, 6, "tensor b.*overlap"),
        ({"a": entry("U8", [4], 0, 4), "b": entry("U8", [2], 6, 8)}, 8,
         "2 bytes before tensor b belong to no tensor"),
        ({"a": entry("U8", [4], 0, 4)}, 9, "5 bytes at the end belong to no tensor"),
        ({"a": entry("U8", [4], 4, 0)}, 4, r"offsets \[4, 0\]"),
        ({"a": entry("U8", [4], -4, 0)}, 4, r"offsets \[-4, 0\]"),
        ({"a": entry("U8", [-4], 0, 4)}, 4, r"the shape \[-4\]"),
        ({"a": entry("U8", [2.0], 0, 2)}, 2, r"the shape \[2\.0\]"),
        ({"a": entry("U8", [1 << 40, 1 << 40], 0, 4)}, 4, "takes 12089258196"),
        ({"a": entry("F33", [1], 0, 4)}, 4, "unknown type 'F33' .*BF16"),
        ({"a": {"dtype": "U8", "shape": [1]}}, 1, "dtype, shape and data_offsets"),
        ({"a": 3}, 0, "dtype, shape and data_offsets"),
        ({"__metadata__": {"a": 1}}, 0, "__metadata__ must map names to strings"),
        (b"[1]", 0, "is a list, no object"),
        (b"{'a': 1}", 0, "header is not JSON"),
        (b"\xff\xfe{}", 0, "header is not JSON"),
        (b"[" * 100_000, 0, "header is not JSON"),
        (b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{}}', 0, "names a twice"),
    ],
)  # fmt: skip
def test_damaged_headers_are_refused(tmp_path: Path, header: Any, data: int, words: str) -> None:
    path = forge(tmp_path / "bad.safetensors", header, bytes(data))
    with pytest.raises(FormatError, match=words) as caught:
        open_safetensors(path)
    assert str(path) in str(caught.value)


def test_lengths_that_lie(tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(b"")
    with pytest.raises(FormatError, match="is empty"):
        open_safetensors(path)
    path.write_bytes(b"1234567")
    with pytest.raises(FormatError, match="7 bytes long, too short"):
        open_safetensors(path)
    with pytest.raises(FormatError, match="truncated: its header takes 50 bytes"):
        open_safetensors(forge(path, {}, length=50))
    with pytest.raises(FormatError, match="claims a header of 18446744073709551615 bytes"):
        open_safetensors(forge(path, {}, length=2**64 - 1))
    with pytest.raises(FormatError, match=f"at most {MAX_HEADER}"):
        open_safetensors(forge(path, {}, length=MAX_HEADER + 1))
    with pytest.raises(FormatError, match="cannot be read: No such file"):
        open_safetensors(tmp_path / "nowhere")


def test_what_a_file_does_not_hold(good: Path) -> None:
    file = open_safetensors(good)
    with pytest.raises(FormatError, match="holds no tensor other"):
        file.tensor("other")
    with pytest.raises(UnsupportedError, match="tensor i8 has type I8; weights must be F32"):
        file.tensor("i8")


def test_types_numpy_lacks_are_refused_when_asked_for(tmp_path: Path) -> None:
    file = open_safetensors(forge(tmp_path / "f8", {"w": entry("F8_E4M3", [4], 0, 4)}, bytes(4)))
    with pytest.raises(UnsupportedError, match="tensor w has type F8_E4M3; readable types are"):
        file.array("w")


def test_truncations_and_flips_never_crash(good: Path, tmp_path: Path) -> None:
    whole = good.read_bytes()
    path = tmp_path / "hurt.safetensors"
    header = 8 + int.from_bytes(whole[:8], "little")
    rng = random.Random(0)
    refused = 0
    for trial in range(600):
        hurt = bytearray(whole)
        if trial % 3 == 0:
            del hurt[rng.randrange(len(hurt)) :]
        else:
            for _ in range(rng.randrange(1, 4)):
                hurt[rng.randrange(header)] = rng.randrange(256)
        path.write_bytes(hurt)
        try:
            file = open_safetensors(path)
            for name in file.tensors:
                file.array(name).tobytes()
        except EdgeqError:
            refused += 1
    assert refused > 200  # every truncation, and most flips


def test_mapping_is_one_for_all_views(good: Path) -> None:
    mapping = MappedFile(good)
    first = mapping.array(np.uint8, (4,), 0)
    assert bytes(first) == mapping.bytes(0, 4) == good.read_bytes()[:4]
