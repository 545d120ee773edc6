"""ONNX files of ours in the real onnxruntime, held against the reference."""

from __future__ import annotations

import json
import sys
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeq import quantize
from edgeq.converters import Options, StoredWeight
from edgeq.converters.encoding import folded, levels, spread
from edgeq.converters.ort.decoder import OrtDecoderTarget
from edgeq.converters.ort.file import pack_rows, unpack_rows
from edgeq.converters.ort.session import exact_form
from edgeq.converters.validate import validate
from edgeq.core.errors import (
    EdgeqError,
    FormatError,
    MissingDependencyError,
    UnsupportedError,
    UsageError,
)
from edgeq.evaluation.text import kl_divergence, log_softmax
from edgeq.formats.tensor import FloatTensor, QuantTensor, float32_to_bf16
from edgeq.importers import load
from edgeq.importers.shapes import random_model as random_shape
from edgeq.importers.shapes import shape
from edgeq.model.artifact import load as load_artifact
from edgeq.model.artifact import save
from edgeq.model.block import BlockSpec
from edgeq.model.model import Model
from edgeq.model.reference import Reference
from edgeq.model.trace import TracedReference
from edgeq.quant import Recipe
from tests.conftest import need
from tests.families import ATTENTION_FAMILIES, quantized, random_model, tiny_config
from tests.greedy import assert_reference_choices
from tests.paths import DEMO

ort = OrtDecoderTarget()

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

PROMPT = [1, 5, 9, 77, 30, 2, 8, 50, 51, 52]
HELD = (*ATTENTION_FAMILIES, "lfm2")


def tiny(family: str = "llama", scheme: str = "w4-g32", embed: str = "w8-channel") -> Model:
    return quantized(random_model(tiny_config(family, context=128)), scheme, embed)


def made(model: Model, out: Path, **options: Any) -> Path:
    chosen = Options(**{"compute": "float", **options})
    ort.check(model, chosen)
    ort.write(model, out, chosen)
    return out


def greedy(path: Path, prompt: Sequence[int], n: int) -> list[int]:
    runner = ort.open_runner(path, threads=1)
    tokens, logits = [], runner.forward(prompt)[-1]
    for _ in range(n):
        tokens.append(int(logits.argmax()))
        logits = runner.forward(tokens[-1:])[-1]
    runner.close()
    return tokens


def oracle(model: Model, prompt: Sequence[int], n: int) -> list[int]:
    reference = Reference(model, keep=True)
    cache = reference.new_cache()
    tokens, logits = [], reference.forward(prompt, cache, all_logits=False)
    for _ in range(n):
        tokens.append(int(logits.argmax()))
        logits = reference.forward(tokens[-1:], cache, all_logits=False)
    return tokens


def whole(pieces: list[StoredWeight]) -> StoredWeight:
    zeros = [p.zero_points for p in pieces if p.zero_points is not None]
    return StoredWeight(
        pieces[0].name,
        np.concatenate([p.levels for p in pieces]),
        np.concatenate([p.scales for p in pieces]),
        np.concatenate(zeros) if zeros else None,
    )


def assert_same_integers(model: Model, path: Path) -> None:
    found: dict[str, list[StoredWeight]] = {}
    for piece in ort.read_weights(path):
        assert piece.first == sum(len(p.levels) for p in found.get(piece.name, ()))
        found.setdefault(piece.name, []).append(piece)
    wanted = {name for name, t in model.tensors.items() if isinstance(t, QuantTensor)}
    assert set(found) == wanted
    for name, pieces in found.items():
        tensor, got = model.tensors[name], whole(pieces)
        assert isinstance(tensor, QuantTensor)
        codes, scales, zeros = levels(tensor)
        k, have = tensor.shape[1], tensor.scheme.group_size
        np.testing.assert_array_equal(got.levels, codes, name)
        np.testing.assert_array_equal(got.scales, spread(scales, k, have, have), name)
        assert (got.zero_points is None) == (zeros is None)
        # where one a row is repeated for its blocks, the shapes differ
        np.testing.assert_array_equal(
            folded(got.levels, got.zero_points), folded(codes, zeros), name
        )


# --- what it computes -------------------------------------------------------------------------


@pytest.mark.parametrize("family", HELD)
def test_greedy_tokens_are_the_references(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    out = made(model, tmp_path / "out")
    assert_reference_choices(model, PROMPT, greedy(out, PROMPT, 64))


@pytest.mark.parametrize("name", ["stories260K", "demo"])
@pytest.mark.parametrize("recipe", ["w4-g32", "w8-channel"])
def test_greedy_tokens_of_real_weights(name: str, recipe: str, tmp_path: Path) -> None:
    source = DEMO if name == "demo" else need(f"models/{name}")
    quantize(source, tmp_path / "m.edgeq", Recipe.from_options(recipe), method="rtn", threads=1)
    model = load_artifact(tmp_path / "m.edgeq")
    out = made(model, tmp_path / "out")
    assert_same_integers(model, out)
    prompt = [1, 403, 407, 261]
    assert_reference_choices(model, prompt, greedy(out, prompt, 64))


@pytest.mark.parametrize(
    ("scheme", "embed"),
    [
        ("w2-g16", "w4-g32"),
        ("w2-g32-sym", "w2-g16"),
        ("w3-g32", "w3-g64-asym"),
        ("w4-g16", "w4-g16-asym"),
        ("w4-g256", "w4-g256"),
        ("w4-g32-asym", "w8-g32-asym"),
        ("w4-channel", "w4-channel-asym"),
        ("w4-tensor", "w8-tensor"),
        ("w4-g32-palette", "w2-g64-palette"),
        ("w8-g64", "w8-g128-asym"),
        ("w8-channel-asym", "w3-channel"),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_every_scheme_is_held_exactly(scheme: str, embed: str, tied: bool, tmp_path: Path) -> None:
    config = tiny_config("llama", context=64, tied=tied)
    model = quantized(random_model(config), scheme, embed)
    out = made(model, tmp_path / "out")
    assert_same_integers(model, out)
    got = ort.open_runner(out, threads=1).forward(PROMPT)
    np.testing.assert_allclose(got, Reference(model).forward(PROMPT), atol=2e-5)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_float_matrices_are_held_as_they_are(dtype: Any, tied: bool, tmp_path: Path) -> None:
    model = random_model(tiny_config("qwen2", context=64, tied=tied))

    def narrowed(values: NDArray[np.float32]) -> FloatTensor:
        if dtype == "bfloat16":
            return FloatTensor(dtype, float32_to_bf16(values))
        return FloatTensor(dtype, values.astype(np.float16 if dtype == "float16" else np.float32))

    names = {name for name, _ in model.config.linears()}
    tensors = {
        name: narrowed(t.numpy()) if name in names else t for name, t in model.tensors.items()
    }
    model = replace(model, tensors=tensors)
    out = made(model, tmp_path / "out")
    got = ort.open_runner(out, threads=1).forward(PROMPT)
    np.testing.assert_allclose(got, Reference(model).forward(PROMPT), atol=2e-5)
    held = (out / "model.onnx.data").stat().st_size
    assert held < sum(t.nbytes for t in tensors.values()) + 64 * 4 * len(tensors) + 8192
    assert not list(ort.read_weights(out))


@pytest.mark.parametrize("family", ["gemma3", "phi3"])
def test_a_prompt_in_pieces_is_the_prompt(family: str, tmp_path: Path) -> None:
    runner = ort.open_runner(made(tiny(family), tmp_path / "out"), threads=1)
    at_once = runner.forward(PROMPT)
    runner.reset()
    pieces = [runner.forward(PROMPT[:3]), runner.forward(PROMPT[3:4]), runner.forward(PROMPT[4:])]
    np.testing.assert_allclose(np.concatenate(pieces), at_once, atol=1e-5)


@pytest.mark.parametrize("kv", ["float32", "int8"])
def test_the_cache_grows(kv: str, tmp_path: Path) -> None:
    model = quantized(random_model(tiny_config("gemma3", context=700)), "w4-g32")
    runner = ort.open_runner(made(model, tmp_path / "out", kv=kv, context=600), threads=1)
    tokens = np.random.default_rng(0).integers(0, 101, 600)
    pieces = [runner.forward(part) for part in np.split(tokens, [200, 255, 256, 257, 400, 599])]
    want = Reference(model, keep=True).forward(tokens)
    got = np.concatenate(pieces)
    assert np.abs(got - want).max() < (1e-4 if kv == "float32" else 0.3)
    with pytest.raises(UsageError, match="601 tokens are more than the 600"):
        runner.forward([1])


def test_only_the_last_logits_on_request(tmp_path: Path) -> None:
    model = tiny()
    out = made(model, tmp_path / "out", extra={"logits": "last"})
    got = ort.open_runner(out, threads=1).forward(PROMPT)
    assert got.shape == (1, model.config.vocab)
    np.testing.assert_allclose(got, Reference(model).forward(PROMPT)[-1:], atol=2e-5)


@pytest.mark.parametrize(
    ("kv", "compute", "most"),
    [("float16", "float", 1e-5), ("float32", "int8", 2e-3), ("int8", "int8", 6e-3)],
)
@pytest.mark.parametrize("name", ["stories260K", "demo"])
def test_what_rounding_costs(name: str, kv: str, compute: str, most: float, tmp_path: Path) -> None:
    source = DEMO if name == "demo" else need(f"models/{name}")
    quantize(source, tmp_path / "m.edgeq", Recipe.from_options("w4-g32"), method="rtn", threads=1)
    model = load_artifact(tmp_path / "m.edgeq")
    tokens = oracle(model, [model.config.bos or 0], 250)
    want = log_softmax(Reference(model, keep=True).forward(tokens))
    runner = ort.open_runner(made(model, tmp_path / "out", kv=kv, compute=compute), threads=1)
    parts = [runner.forward(part) for part in np.split(np.array(tokens), [200, 240, 249])]
    kl = kl_divergence(want, log_softmax(np.concatenate(parts)))
    assert 0 < kl.mean() <= most
    assert runner.precision == ("float16" if kv == "float16" else "int8")


def test_scales_of_an_int8_cache_from_a_given_text(tmp_path: Path) -> None:
    model = tiny("qwen3")
    text = np.random.default_rng(1).integers(0, 101, 100)
    out = made(model, tmp_path / "out", kv="int8", extra={"calibration": text})
    got = ort.open_runner(out, threads=1).forward(text[:50])
    want = Reference(model).forward(text[:50])
    assert kl_divergence(log_softmax(want), log_softmax(got)).mean() < 1e-3


@pytest.mark.parametrize("taps", [1, 2, 7])
@pytest.mark.parametrize("kv", ["float32", "float16", "int8"])
def test_columns_of_short_convolutions_are_kept(taps: int, kv: Any, tmp_path: Path) -> None:
    """Between passes of any length, also shorter ones than the convolution, until a reset."""
    config = tiny_config("lfm2", context=128)
    convolution = BlockSpec(mixer="short_conv", rope=None, window=taps)
    blocks = (convolution, config.blocks[1], convolution)
    model = quantized(random_model(replace(config, blocks=blocks)), "w8-g32")
    out = made(model, tmp_path / "out", kv=kv)
    report = validate(out, model, "ort", threads=1)
    assert report.passed, report.explain()
    runner = ort.open_runner(out, threads=1)
    whole = runner.forward(PROMPT)
    want = Reference(model).forward(PROMPT)
    atol = {"float32": 3e-5, "float16": 2e-2, "int8": 0.4}[kv]
    np.testing.assert_allclose(whole, want, atol=atol)
    for lengths in ((1, 2, 3, 4), (5, 1, 1, 3)):
        runner.reset()
        ends = np.cumsum(lengths)
        pieces = [runner.forward(PROMPT[a - n : a]) for a, n in zip(ends, lengths, strict=True)]
        close = 2e-3 if kv == "float16" else 1e-4
        np.testing.assert_allclose(np.concatenate(pieces), whole, atol=close)
    runner.close()


@pytest.mark.parametrize("family", HELD)
def test_trace_names_every_step(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    out = made(model, tmp_path / "out")
    builder = TracedReference(model)
    builder.trace(PROMPT[:6])
    want = builder.trace(PROMPT[6:])
    got = ort.trace(out, PROMPT[6:], PROMPT[:6])
    assert list(got) == list(want)
    for name, value in want.items():
        assert got[name].shape == value.shape
        np.testing.assert_allclose(got[name], value, atol=3e-5, err_msg=name)


# --- what the file holds ----------------------------------------------------------------------


def test_packing_and_its_inverse() -> None:
    rng = np.random.default_rng(0)
    for bits in (2, 4, 8):
        for n in (1, 2, 3, 7, 16, 33):
            codes = rng.integers(0, 1 << bits, (5, n)).astype(np.uint8)
            packed = pack_rows(codes, bits)
            assert packed.shape == (5, -(-n * bits // 8))
            np.testing.assert_array_equal(unpack_rows(packed, bits, n), codes)
    assert pack_rows(np.array([[1, 2, 3]], np.uint8), 4).tolist() == [[0x21, 0x03]]


def test_tied_weights_lie_in_the_file_once_and_aligned(tmp_path: Path) -> None:
    config = tiny_config("llama", vocab=40000, layers=1)
    model = quantized(random_model(config), "w4-g32", "w4-g16-asym")
    out = made(model, tmp_path / "out")
    graph = onnx.load_model(out / "model.onnx", load_external_data=False).graph
    where = {
        t.name: {e.key: e.value for e in t.external_data}
        for t in graph.initializer
        if t.external_data
    }
    name = "model.embed_tokens.weight."
    assert where[name + "table"] == where[name + "codes"]
    assert where[name + "table_zeros"] == where[name + "zero_points"]
    assert int(where[name + "codes"]["length"]) == 40000 * 48 // 2 > 1 << 19
    for entry in where.values():
        large = int(entry["length"]) >= 1 << 20
        assert int(entry["offset"]) % (4096 if large else 64) == 0
        assert entry["location"] == "model.onnx.data"
    assert {n.op_type for n in graph.node} >= {"GatherBlockQuantized", "MatMulNBits"}


def test_a_name_in_onnx_makes_two_files(tmp_path: Path) -> None:
    model = tiny()
    out = made(model, tmp_path / "small.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small.onnx", "small.onnx.data"]
    assert_same_integers(model, out)
    np.testing.assert_allclose(
        ort.open_runner(out, threads=1).forward(PROMPT), Reference(model).forward(PROMPT), atol=2e-5
    )


@pytest.mark.parametrize(
    ("family", "scheme", "embed", "kv", "least"),
    [
        ("llama", "w4-g32", None, "float32", "1.20"),
        ("llama", "w4-g32", "w4-g32", "float32", "1.23"),
        ("llama", "w8-g32", None, "float16", "1.23"),
        ("llama", "w2-g16", "w8-channel", "float32", "1.24"),
        ("mistral", "w4-g32", "w4-g32", "float32", "1.24"),
        ("llama", "w4-g32", "w4-g16-asym", "float32", "1.27"),  # 44 columns, 3 blocks
        ("llama", "w4-g32", "w4-g32-asym", "float32", "1.23"),  # 2 blocks
        ("llama", "w4-g32", "w2-g16", "float32", "1.27"),
        ("llama", "w4-g32", "w4-g32", "int8", "1.27"),
    ],
)
def test_metadata_says_what_it_needs(
    family: str, scheme: str, embed: str | None, kv: Any, least: str, tmp_path: Path
) -> None:
    plain = random_model(tiny_config(family, context=64))
    model = quantized(plain, scheme, embed or "w8-channel")
    if embed is None:
        names = ("model.embed_tokens.weight", "lm_head.weight")
        tensors = {k: plain.tensors[k] if k in names else t for k, t in model.tensors.items()}
        model = replace(model, tensors=tensors)
    model = replace(model, provenance={"source_sha256": "ab" * 32, "tensors": {"x": 1}})
    proto = onnx.load_model(made(model, tmp_path / "out", kv=kv) / "model.onnx")
    found = {p.key: p.value for p in proto.metadata_props}
    assert found["edgeq.minimum_onnxruntime"] == least
    assert least in json.loads(found["edgeq.needs"]).values()
    assert json.loads(found["edgeq.provenance"]) == {"source_sha256": "ab" * 32}
    assert json.loads(found["edgeq.config"])["hidden"] == 44
    assert proto.ir_version == 10
    assert {o.domain: o.version for o in proto.opset_import} == {"": 21, "com.microsoft": 1}


@pytest.mark.slow
def test_ort_format_is_stamped_and_the_same(tmp_path: Path) -> None:
    out = made(tiny("gemma3"), tmp_path / "out", kv="int8", extra={"ort_format": True})
    wanted = {"model.onnx", "model.onnx.data", "model.ort", "model.required_operators.config"}
    assert {p.name for p in out.iterdir()} == wanted
    operators = (out / "model.required_operators.config").read_text()
    assert "com.microsoft;1;GatherBlockQuantized,GroupQueryAttention,MatMulNBits" in operators
    assert str(tmp_path) not in operators
    version = ort.versions()["onnxruntime"]
    assert f"onnxruntime {version}" in operators
    assert exact_form(out / "model.ort") is None  # no operator of it sums 8-bit products
    a, b = ort.open_runner(out, threads=1), ort.open_runner(out / "model.ort", threads=1)
    np.testing.assert_allclose(a.forward(PROMPT), b.forward(PROMPT), atol=1e-6)
    with pytest.raises(FormatError, match=r"not an \.onnx file"):
        list(ort.read_weights(out / "model.ort"))


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"extra": {"logit": "all"}}, "did you mean 'logits'"),
        ({"extra": {"logits": "none"}}, "all, last"),
        ({"extra": {"calibration": [1]}}, "for kv int8"),
        ({"kv": "int8", "extra": {"calibration": "a text"}}, "give the tokens"),
        ({"kv": "int8", "extra": {"calibration": [1, 101]}}, "outside the vocabulary"),
        ({"prefill": (16,)}, "any length"),
        ({"context": 129}, "model's own is 128"),
    ],
)
def test_options_are_checked(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        ort.check(tiny(), Options(**options))


def test_a_large_ort_file_is_refused() -> None:
    small = tiny()
    big = replace(small, tensors=_Huge(small.tensors))
    with pytest.raises(UnsupportedError, match="at most 2 GB"):
        ort.check(big, Options(extra={"ort_format": True}))
    ort.check(big, Options())


class _Huge(dict[str, Any]):
    """The tensors, and one of 2 GB that takes no memory."""

    def __init__(self, tensors: Any) -> None:
        super().__init__(tensors)
        self["unused"] = FloatTensor("float32", np.broadcast_to(np.float32(0), (1 << 29,)))


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=rf"'{package}'.*pip install 'edgeq\[ort\]'"):
        ort.check(tiny(), Options())


def test_files_of_others_and_damaged_ones(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="cannot load"):
        ort.open_runner(tmp_path)
    (tmp_path / "x.onnx").write_bytes(b"\xff" * 100)
    with pytest.raises(FormatError, match="not an ONNX file"):
        list(ort.read_weights(tmp_path / "x.onnx"))
    value = onnx.helper.make_tensor_value_info("x", 1, [1])
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    graph = onnx.helper.make_graph([node], "g", [value], [value])
    graph.output[0].name = "y"
    imports = [onnx.helper.make_opsetid("", 21)]
    other = onnx.helper.make_model(graph, opset_imports=imports, ir_version=10)
    onnx.save_model(other, tmp_path / "other.onnx")
    for use in (ort.open_runner, lambda path: list(ort.read_weights(path))):
        with pytest.raises(FormatError, match="not a decoder that edgeq wrote"):
            use(tmp_path / "other.onnx")
    out = made(tiny(), tmp_path / "out")
    data = out / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-4000])
    with pytest.raises(EdgeqError):
        ort.open_runner(out)
    with pytest.raises(FormatError, match="convert again"):
        list(ort.read_weights(out))


# --- memory -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_weights_are_streamed(tmp_path: Path) -> None:
    recipe = Recipe.from_options("w4-g32")
    config = replace(shape("smollm2-135m"), blocks=shape("smollm2-135m").blocks[:4])
    save(random_shape(config, recipe.scheme_for), tmp_path / "m.edgeq")
    model = load(tmp_path / "m.edgeq")
    tracemalloc.start()
    try:
        made(model, tmp_path / "out")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < ort.memory(model, Options()) < model.nbytes
    size = sum(p.stat().st_size for p in (tmp_path / "out").iterdir())
    assert size < 1.03 * (tmp_path / "m.edgeq").stat().st_size
    pieces = ort.read_weights(tmp_path / "out")
    assert max(p.levels.nbytes for p in pieces) < 8 << 20


@pytest.mark.heavy
def test_a_model_of_half_a_billion(tmp_path: Path) -> None:
    recipe = Recipe.from_options("w4-g32")
    save(random_shape(shape("qwen2.5-0.5b"), recipe.scheme_for), tmp_path / "m.edgeq")
    model = load(tmp_path / "m.edgeq")
    out = made(model, tmp_path / "out", compute="int8")
    size = sum(p.stat().st_size for p in out.iterdir())
    assert size < 1.03 * (tmp_path / "m.edgeq").stat().st_size
    want = log_softmax(Reference(model).forward([1, 2, 3]))
    got = log_softmax(ort.open_runner(out, threads=1).forward([1, 2, 3]))
    assert kl_divergence(want, got).mean() < 1e-2
