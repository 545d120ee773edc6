from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeq.core.errors import EdgeqError, FormatError, SchemeError, UsageError
from edgeq.formats.schemes import FloatScheme, QuantScheme, parse_scheme
from edgeq.formats.tensor import FloatTensor, QuantTensor, Tensor
from edgeq.model.artifact import ArtifactWriter, load, save
from edgeq.model.artifact_layout import TensorLayout, file_order
from edgeq.model.config import ModelConfig
from edgeq.model.model import Model
from tests.families import FAMILIES, blocks, quantized, random_model, rounded, tiny_config

CONFIG = ModelConfig(
    "llama", hidden=36, ffn=40, heads=2, kv_heads=1, head_dim=18, vocab=19, context=8,
    blocks=blocks(18, layers=1),
)  # fmt: skip
FILES = {"tokenizer.json": b'{"model": 1}', "chat_template.jinja": b"{{ x }}", "empty": b""}

GOLDEN_SHA256 = "444599ae285548c3cdf6562807c4bb68542072a362362e3169063de60c4fcf26"
GOLDEN_HEAD = "00254a6f34597ea3688db2d7"


def plain(scheme: QuantScheme, n: int, k: int) -> QuantTensor:
    """A tensor of ramps, made without any rounding of weights."""
    codes = (np.arange(n * k) * 37 % scheme.n_codes).astype(np.uint8).reshape(n, k)
    groups = np.arange(n * scheme.n_groups(k)).reshape(n, -1)
    zeros = None if scheme.symmetric else (groups % scheme.n_codes).astype(np.uint8)
    palette = np.arange(scheme.n_codes, dtype=np.int8) * 3 if scheme.codebook else None
    return QuantTensor.from_codes(scheme, codes, (groups % 61 + 1) / 64, zeros, palette)


def small_model() -> Model:
    """Every kind of tensor, of plain numbers only."""
    schemes = iter(("w8-channel", "w4-g32", "w2-g16", "w3-g32", "w4-tensor", "w4-g32-palette",
                    "w8-g32-asym", "bf16"))  # fmt: skip
    tensors: dict[str, Tensor] = {}
    for name, (n, k) in CONFIG.linears():
        scheme = parse_scheme(next(schemes))
        if isinstance(scheme, QuantScheme):
            tensors[name] = plain(scheme, n, k)
        else:
            tensors[name] = FloatTensor("bfloat16", np.arange(n * k, dtype=np.uint16).reshape(n, k))
    for (name, shape), kind in zip(CONFIG.norms(), ("float32", "float16", "float32"), strict=True):
        ones = np.ones(shape, np.float16 if kind == "float16" else np.float32)
        tensors[name] = FloatTensor(kind, ones)
    return Model(CONFIG, tensors, FILES, {"source": "numbers", "sqnr_db": {"x": 1.5}})


def equal(got: Tensor, want: Tensor) -> bool:
    if isinstance(got, QuantTensor) and isinstance(want, QuantTensor):
        parts = ("packed", "scales", "zero_points", "palette")
        return (got.scheme, got.shape) == (want.scheme, want.shape) and all(
            np.array_equal(getattr(got, p), getattr(want, p)) for p in parts
            if getattr(want, p) is not None
        )  # fmt: skip
    if isinstance(got, FloatTensor) and isinstance(want, FloatTensor):
        return got.dtype == want.dtype and np.array_equal(got.data, want.data)
    return False


def test_a_model_comes_back_as_it_was(tmp_path: Path) -> None:
    model, path = small_model(), tmp_path / "m.edgeq"
    assert save(model, path) == path.stat().st_size
    got = load(path)
    assert got.config == model.config
    assert got.files == FILES
    assert got.provenance == model.provenance
    assert set(got.tensors) == set(model.tensors)
    for name, tensor in model.tensors.items():
        assert equal(got.tensors[name], tensor), name
    assert [p.name for p in tmp_path.iterdir()] == ["m.edgeq"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", ["w4-g32", "w2-g16", "w8-tensor-asym"])
def test_every_family(family: str, scheme: str, tmp_path: Path) -> None:
    model = quantized(random_model(tiny_config(family)), scheme)
    save(model, tmp_path / "m.edgeq")
    got = load(tmp_path / "m.edgeq")
    assert got.config == model.config
    assert all(equal(got.tensors[name], tensor) for name, tensor in model.tensors.items())
    assert list(got.tensors) == file_order(model.tensors)


def test_nothing_is_copied_and_all_is_aligned(tmp_path: Path) -> None:
    save(small_model(), tmp_path / "m.edgeq")
    arrays: list[NDArray[Any]] = []
    for tensor in load(tmp_path / "m.edgeq").tensors.values():
        if isinstance(tensor, FloatTensor):
            arrays.append(tensor.data)
        elif isinstance(tensor, QuantTensor):
            parts = (tensor.packed, tensor.scales, tensor.zero_points, tensor.palette)
            arrays += [part for part in parts if part is not None]
    assert len(arrays) > 20
    for array in arrays:
        assert array.ctypes.data % 64 == 0
        assert not array.flags.writeable
        base: Any = array
        while isinstance(base, np.ndarray | memoryview):
            base = base.base if isinstance(base, np.ndarray) else base.obj
        assert isinstance(base, mmap.mmap)


def header(path: Path) -> tuple[int, dict[str, Any]]:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return 8 + length, json.loads(raw[8 : 8 + length])


def test_golden_bytes(tmp_path: Path) -> None:
    """A change here breaks every artifact there is: raise the format version instead."""
    path = tmp_path / "m.edgeq"
    save(small_model(), path)
    start, table = header(path)
    meta = table.pop("__metadata__")
    assert start % 64 == 0
    assert (meta["format"], meta["format_version"]) == ("edgeq", "1")
    assert json.loads(meta["tensors"])["model.layers.0.self_attn.q_proj.weight"] == {
        "scheme": "w4-g32", "shape": [36, 36],
    }  # fmt: skip
    first = [
        (name, entry["dtype"], entry["shape"], *entry["data_offsets"])
        for name, entry in list(table.items())[:9]
    ]
    layer = "model.layers.0."
    assert first == [
        ("model.embed_tokens.weight.packed", "U8", [2, 2, 512], 0, 2048),
        ("model.embed_tokens.weight.scales", "F16", [2, 1, 16], 2048, 2112),
        (layer + "input_layernorm.weight", "F32", [36], 2112, 2256),
        ("pad.0001", "U8", [48], 2256, 2304),
        (layer + "mlp.down_proj.weight", "BF16", [36, 40], 2304, 5184),
        (layer + "mlp.gate_proj.weight.packed", "U8", [3, 2, 256], 5184, 6720),
        (layer + "mlp.gate_proj.weight.scales", "F16", [3, 2, 16], 6720, 6912),
        (layer + "mlp.gate_proj.weight.palette", "I8", [16], 6912, 6928),
        ("pad.0002", "U8", [48], 6928, 6976),
    ]
    data = path.read_bytes()[start:]
    assert hashlib.sha256(data).hexdigest() == GOLDEN_SHA256
    assert data[:12].hex() == GOLDEN_HEAD


def test_the_safetensors_library_opens_it(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    model, path = small_model(), tmp_path / "m.edgeq"
    save(model, path)
    with safetensors.safe_open(path, framework="numpy") as file:
        assert file.metadata()["format"] == "edgeq"
        name = "model.layers.0.self_attn.q_proj.weight"
        tensor = model.tensors[name]
        assert isinstance(tensor, QuantTensor)
        assert np.array_equal(file.get_tensor(name + ".packed"), tensor.packed)
        assert np.array_equal(file.get_tensor(name + ".scales"), tensor.scales)
        assert file.get_tensor("file:tokenizer.json").tobytes() == FILES["tokenizer.json"]
        assert file.get_tensor("model.norm.weight").dtype == np.float32
        for array in file.keys():  # noqa: SIM118  it is no mapping
            assert file.get_slice(array).get_shape() is not None


def test_writing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    save(small_model(), tmp_path / "a.edgeq")
    save(load(tmp_path / "a.edgeq"), tmp_path / "b.edgeq")
    assert (tmp_path / "a.edgeq").read_bytes() == (tmp_path / "b.edgeq").read_bytes()


def test_file_order() -> None:
    names = ["lm_head.weight", "model.norm.weight", "model.layers.10.a", "model.layers.2.b",
             "model.embed_tokens.weight", "model.layers.2.a"]  # fmt: skip
    assert file_order(names) == [names[i] for i in (4, 5, 3, 2, 1, 0)]


def rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """The same file with another header."""
    start, table = header(path)
    change(table)
    text = json.dumps(table).encode()
    text = text.ljust(-(-(8 + len(text)) // 64) * 64 - 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + path.read_bytes()[start:])


def meta_change(key: str, change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    def apply(table: dict[str, Any]) -> None:
        meta = table["__metadata__"]
        value = change(json.loads(meta[key]))
        meta[key] = json.dumps(value)

    return apply


def set_meta(key: str, value: str | None) -> Callable[[dict[str, Any]], None]:
    def apply(table: dict[str, Any]) -> None:
        if value is None:
            del table["__metadata__"][key]
        else:
            table["__metadata__"][key] = value

    return apply


def rename(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    def apply(table: dict[str, Any]) -> None:
        table[new] = table.pop(old)

    return apply


def reshape(name: str, shape: list[int]) -> Callable[[dict[str, Any]], None]:
    def apply(table: dict[str, Any]) -> None:
        table[name]["shape"] = shape

    return apply


def without(name: str) -> Callable[[Any], Any]:
    return lambda table: {key: value for key, value in table.items() if key != name}


Q = "model.layers.0.self_attn.q_proj.weight"
EMBED = "model.embed_tokens.weight"


def test_a_config_with_the_keys_of_before_blocks_is_read(tmp_path: Path) -> None:
    def flat(config: dict[str, Any]) -> dict[str, Any]:
        kept = {key: value for key, value in config.items() if "blocks" not in key}
        return {**kept, "layers": 1, "rope_theta": 10000.0, "rope_theta_local": None,
                "rope_dim": 18, "rope_scaling": None, "window": None, "window_layers": [False],
                "qk_norm": False, "post_norms": False}  # fmt: skip

    model, path = small_model(), tmp_path / "m.edgeq"
    save(model, path)
    rewritten(path, meta_change("config", flat))
    again = load(path)
    assert again.config == model.config
    for name, tensor in model.tensors.items():
        np.testing.assert_array_equal(again.tensors[name].numpy(), tensor.numpy())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_meta("format", "pt"), "that edgeq did not write; give the checkpoint folder"),
        (set_meta("format", None), "that edgeq did not write"),
        (set_meta("format_version", "2"), r"made by a newer edgeq \(format 2; this one reads 1\)"),
        (set_meta("format_version", "17"), "newer edgeq .* pip install -U edgeq"),
        (set_meta("format_version", "0"), "format version '0'; this edgeq reads version 1"),
        (set_meta("format_version", "x"), "format version 'x'"),
        (set_meta("format_version", None), "format version None"),
        (set_meta("config", "{"), "config in its metadata is not JSON"),
        (set_meta("config", "[]"), "config in its metadata is not a JSON object"),
        (set_meta("tensors", None), "no tensors in its metadata"),
        (set_meta("provenance", "7"), "provenance in its metadata is not a JSON object"),
        (meta_change("config", lambda c: {**c, "wings": 2}), "unknown keys: wings"),
        (meta_change("config", without("hidden")), "config is not readable"),
        (meta_change("config", lambda c: {**c, "vocab": 20}), r"shape \[19, 36\]; the config says"),
        (meta_change("config", lambda c: {**c, "layer_blocks": [0, 0]}),
         "model.layers.1.* is missing"),
        (meta_change("tensors", without(Q)), "q_proj.weight.packed, which belongs to none"),
        (meta_change("tensors", lambda t: {**t, Q: {"scheme": "w4-g64", "shape": [36, 36]}}),
         r"q_proj.weight.packed is U8 \[3, 2, 256\]|q_proj.weight.scales is F16"),
        (meta_change("tensors", lambda t: {**t, Q: {"scheme": "w4-g32", "shape": [64, 36]}}),
         r"q_proj.weight.packed is U8 \[3, 2, 256\]; its scheme asks for U8 \[4, 2, 256\]"),
        (meta_change("tensors", lambda t: {**t, Q: {"scheme": "w4-g32-asym", "shape": [36, 36]}}),
         "lacks model.layers.0.self_attn.q_proj.weight.zero_points"),
        (meta_change("tensors", lambda t: {**t, Q: {"scheme": "w7-g32", "shape": [36, 36]}}),
         "q_proj.weight is described wrongly: bits is 7"),
        (meta_change("tensors", lambda t: {**t, Q: {"scheme": "w4-g32", "shape": [36, -36]}}),
         "described wrongly: shape"),
        (meta_change("tensors", lambda t: {**t, Q: {"scheme": "w4-g32", "shape": [36]}}),
         "described wrongly"),
        (meta_change("tensors", lambda t: {**t, Q: ["w4-g32"]}), "described wrongly"),
        (meta_change("tensors", lambda t: {**t, Q: {"scheme": 4, "shape": [36, 36]}}),
         "described wrongly"),
        (rename(EMBED + ".scales", EMBED + ".stales"), "lacks .*scales"),
        (reshape(EMBED + ".packed", [2, 4, 256]), r"is U8 \[2, 4, 256\]; its scheme asks for"),
        (rename("pad.0001", "extra"), "holds extra, which belongs to none of its tensors"),
    ],
)  # fmt: skip
def test_damaged_headers_are_refused(
    change: Callable[[dict[str, Any]], None], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "m.edgeq"
    save(small_model(), path)
    rewritten(path, lambda table: None)
    load(path)
    rewritten(path, change)
    with pytest.raises(FormatError, match=words) as caught:
        load(path)
    assert "m.edgeq" in str(caught.value)


def test_misaligned_arrays_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.edgeq"
    save(small_model(), path)
    start, table = header(path)
    text = json.dumps(table).encode()
    text = text.ljust(-(-(8 + len(text)) // 64) * 64 + 8 - 8)  # eight bytes too far
    path.write_bytes(len(text).to_bytes(8, "little") + text + path.read_bytes()[start:])
    with pytest.raises(FormatError, match="no multiple of 64: another tool has rewritten"):
        load(path)


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.edgeq"
    save(small_model(), path)
    whole = path.read_bytes()
    for keep in (0, 3, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:keep])
        with pytest.raises(FormatError):
            load(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(FormatError, match="belong to no tensor"):
        load(path)


def test_an_incomplete_model_is_not_written(tmp_path: Path) -> None:
    model = small_model()
    tensors = {name: t for name, t in model.tensors.items() if "norm" not in name}
    with pytest.raises(FormatError, match="missing from the model"):
        save(replace(model, tensors=tensors), tmp_path / "m.edgeq")
    assert not list(tmp_path.iterdir())


def writer(path: Path) -> ArtifactWriter:
    held = {
        "a": TensorLayout(QuantScheme(4), (40, 32)),
        "b": TensorLayout(FloatScheme("float32"), (3,)),
    }
    return ArtifactWriter(path, CONFIG, held, {}, {"source": "x" * 10})


def test_pieces_may_come_in_any_order(tmp_path: Path) -> None:
    a = rounded(np.random.default_rng(0).standard_normal((40, 32)).astype(np.float32), "w4-g32")
    with writer(tmp_path / "m") as out:
        for start, stop in ((32, 40), (0, 16), (16, 32)):
            rows = rounded(a.rows(start, stop), "w4-g32")
            part = QuantTensor(rows.scheme, rows.shape, a.packed[start // 16 : -(-stop // 16)],
                               a.scales[start // 16 : -(-stop // 16)])  # fmt: skip
            out.write("a", part, start)
        out.write("b", FloatTensor("float32", np.arange(3, dtype=np.float32)))
        out.commit({"source": "short"})
    start, table = header(tmp_path / "m")
    begin, end = table["a.packed"]["data_offsets"]
    assert (tmp_path / "m").read_bytes()[start + begin : start + end] == a.packed.tobytes()
    assert json.loads(table["__metadata__"]["provenance"]) == {"source": "short"}


def declared(model: Model) -> dict[str, TensorLayout]:
    found = {}
    for name, tensor in model.tensors.items():
        assert isinstance(tensor, QuantTensor | FloatTensor)
        if isinstance(tensor, QuantTensor):
            found[name] = TensorLayout(tensor.scheme, tensor.shape)
        else:
            found[name] = TensorLayout(FloatScheme(tensor.dtype.lower()), tensor.shape)  # type: ignore[arg-type]
    return found


def test_what_was_written_can_be_read_before_it_is_committed(tmp_path: Path) -> None:
    model, path = small_model(), tmp_path / "m.edgeq"
    with ArtifactWriter(path, model.config, declared(model), model.files, {}) as out:
        for name, tensor in model.tensors.items():
            assert isinstance(tensor, QuantTensor | FloatTensor)
            out.write(name, tensor)
            assert equal(out.tensor(name), tensor)
        tried = out.written()
        assert (tried.config, tried.files) == (model.config, model.files)
        assert all(equal(tried.tensors[name], t) for name, t in model.tensors.items())
        assert not path.exists()
        out.commit({})
    # what was looked at stays, and is the file's
    assert all(equal(tried.tensors[name], t) for name, t in load(path).tensors.items())


def test_a_tensor_written_anew_takes_the_place_of_the_first(tmp_path: Path) -> None:
    model, path = small_model(), tmp_path / "m.edgeq"
    name = next(n for n, t in model.tensors.items() if str(getattr(t, "scheme", "")) == "w4-g32")
    old = model.tensors[name]
    assert isinstance(old, QuantTensor)
    new = replace(old, packed=old.packed ^ np.uint8(0x55))
    with ArtifactWriter(path, model.config, declared(model), model.files, {}) as out:
        out.write(name, old)
        out.rewrite(name, new)
        with pytest.raises(ValueError, match="never written"):
            out.commit({})
        for other, tensor in model.tensors.items():
            if other != name:
                out.write(other, tensor)  # type: ignore[arg-type]
        out.commit({})
    assert equal(load(path).tensors[name], new)


def test_what_was_not_declared_is_refused(tmp_path: Path) -> None:
    values = np.ones((40, 32), np.float32)
    with writer(tmp_path / "m") as out:
        with pytest.raises(SchemeError, match=r"rows of a are w8-g32 .*declared was w4-g32"):
            out.write("a", rounded(values, "w8-g32"))
        with pytest.raises(SchemeError, match="not whole tiles of 16"):
            out.write("a", rounded(values[:8], "w4-g32"), 0)
        with pytest.raises(SchemeError, match="not whole tiles of 16"):
            out.write("a", rounded(values[:16], "w4-g32"), 32)
        with pytest.raises(ValueError, match="never written"):
            out.commit({})
        out.write("a", rounded(values, "w4-g32"))
        out.write("b", FloatTensor("float32", np.ones(3, np.float32)))
        with pytest.raises(ValueError, match="bytes, declared were"):
            out.commit({"source": "x" * 1000})
    assert not list(tmp_path.iterdir())
    with pytest.raises(SchemeError, match="are taken"):
        ArtifactWriter(
            tmp_path / "m", CONFIG, {"pad.1": TensorLayout(QuantScheme(4), (1, 1))}, {}, {}
        )


def test_targets_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder; give the name of a file"):
        save(small_model(), tmp_path)
    with pytest.raises(UsageError, match="does not exist; make it first"):
        save(small_model(), tmp_path / "no" / "m.edgeq")
    os.mkfifo(tmp_path / "pipe")
    for special in (tmp_path / "pipe", Path("/dev/no-such-device.edgeq")):
        with pytest.raises(UsageError, match="is a device or a pipe"):
            save(small_model(), special)
    assert [p.name for p in tmp_path.iterdir()] == ["pipe"]
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
        with pytest.raises(EdgeqError, match="cannot be written: Permission denied"):
            save(small_model(), tmp_path / "m.edgeq")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "m.edgeq"
    save(small_model(), path)
    before = path.read_bytes()

    def interrupted() -> None:
        with writer(path) as out:
            out.write("a", rounded(np.ones((40, 32), np.float32), "w4-g32"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [p.name for p in tmp_path.iterdir()] == ["m.edgeq"]
    assert path.read_bytes() == before


def test_the_mode_follows_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        save(small_model(), tmp_path / "m.edgeq")
    finally:
        os.umask(old)
    assert (tmp_path / "m.edgeq").stat().st_mode & 0o777 == 0o640


def test_an_open_model_outlives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "m.edgeq"
    save(small_model(), path)
    model = load(path)
    want = {name: tensor.numpy() for name, tensor in model.tensors.items()}
    save(model, path)
    path.unlink()
    assert all(np.array_equal(model.tensors[name].numpy(), w) for name, w in want.items())


@pytest.mark.parametrize("name", ["../out.txt", "/tmp/out.txt", "a/../../out.txt"])
def test_tokenizer_files_that_lead_out_of_a_folder_are_refused(name: str, tmp_path: Path) -> None:
    model = random_model(tiny_config("llama"))
    save(replace(model, files={**model.files, name: b"x"}), tmp_path / "tale.edgeq")
    with pytest.raises(FormatError, match="leads out of any folder"):
        load(tmp_path / "tale.edgeq")
