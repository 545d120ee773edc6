from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from edgeq import quantize
from edgeq.core.errors import DoesNotFitError, FormatError, SchemeError, UsageError
from edgeq.formats.schemes import QuantScheme
from edgeq.formats.tensor import FloatTensor, QuantTensor, bf16_to_float32
from edgeq.importers import load as load_any
from edgeq.model.artifact import load, save
from edgeq.model.model import Model
from edgeq.model.origin import Origin
from edgeq.quant import METHODS, Recipe, quantize_tensor
from edgeq.quant.decoder.budget import CHUNK_WEIGHTS, make_budget
from edgeq.quant.rounders.rounding import METHOD_INPUTS, sqnr_db
from tests.conftest import need
from tests.families import FAMILIES, random_model, tiny_config
from tests.paths import ROOT

DATA_FREE = [method for method in METHODS if method not in METHOD_INPUTS]


def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "make_checkpoint", ROOT / "benchmarks" / "make_checkpoint.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 30 MB checkpoint in three shards."""
    out = tmp_path_factory.mktemp("checkpoint") / "stories"
    maker().make("stories15m", out, shards=3)
    return out


def tensor_of(model: Model, name: str) -> QuantTensor:
    tensor = model.tensors[name]
    assert isinstance(tensor, QuantTensor)
    return tensor


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", DATA_FREE)
def test_the_file_holds_what_quantize_tensor_gives(
    family: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # small chunks, so that most tensors come in several
    monkeypatch.setattr("edgeq.quant.decoder.budget.CHUNK_WEIGHTS", 1000)
    source = random_model(tiny_config(family, vocab=333))
    recipe = Recipe.from_options(
        tensor_types=["down_proj=w3-g16-asym", "up_proj=w8-tensor", "o_proj=w3-g32-palette"]
    )
    summary = quantize(source, tmp_path / "m.edgeq", recipe, method=method, threads=2)
    got = load(tmp_path / "m.edgeq")
    assert got.config == source.config
    for row in summary.tensors:
        tensor = source.tensors[row.name]
        assert row.shape == tuple(tensor.shape)
        assert row.nbytes == got.tensors[row.name].nbytes
        if not isinstance(row.scheme, QuantScheme):
            assert np.array_equal(got.tensors[row.name].numpy(), tensor.numpy())
            continue
        want = quantize_tensor(tensor.numpy(), row.scheme, method)
        held = tensor_of(got, row.name)
        assert held.scheme == want.scheme
        assert np.array_equal(held.packed, want.packed)
        assert np.array_equal(held.scales, want.scales)
        for part in ("zero_points", "palette"):
            assert np.array_equal(getattr(held, part), getattr(want, part))
        error = ((want.numpy() - tensor.numpy().astype(np.float64)) ** 2).sum()
        ratio = sqnr_db((tensor.numpy().astype(np.float64) ** 2).sum(), error)
        assert row.sqnr_db == pytest.approx(ratio, abs=0.02)
        assert got.provenance["sqnr_db"][row.name] == row.sqnr_db
    assert got.provenance["recipe"] == replace(recipe, method=method).to_dict()
    assert summary.bpw == pytest.approx(
        8 * got.nbytes / sum(np.prod(t.shape) for t in source.tensors.values())
    )


@pytest.mark.parametrize("preset", ["w4-g32", "w8-tensor", "w2-g16"])
def test_pieces_and_threads_do_not_change_the_file(
    preset: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe.from_options(preset=preset)
    files = []
    for threads, weights in ((1, 1 << 22), (2, 1 << 14), (3, 1)):
        monkeypatch.setattr("edgeq.quant.decoder.budget.CHUNK_WEIGHTS", weights)
        if weights == 1 and preset != "w4-g32":
            continue
        quantize(checkpoint, tmp_path / "m.edgeq", recipe, threads=threads)
        files.append(hashlib.sha256((tmp_path / "m.edgeq").read_bytes()).hexdigest())
    assert len(files) >= 2
    assert len(set(files)) == 1


def test_provenance_and_progress(checkpoint: Path, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    summary = quantize(
        checkpoint, tmp_path / "m.edgeq", progress=lambda *call: calls.append(call), fast=True
    )
    got = load(tmp_path / "m.edgeq")
    assert got.provenance["source"] == "stories"
    assert got.provenance["source_sha256"] == summary.source_sha256 == Origin(checkpoint).sha256
    assert Recipe.from_dict(got.provenance["recipe"]) == Recipe.from_options("w4-g32")
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", got.provenance["edgeq_version"])
    weights = sum(int(np.prod(t.shape)) for t in got.tensors.values())
    done = [call[1] for call in calls]
    assert done == sorted(done)
    assert done[-1] == calls[-1][2] == weights
    assert summary.file_bytes == (tmp_path / "m.edgeq").stat().st_size
    assert summary.source_bytes == 2 * weights
    opened = load_any(checkpoint)
    quantize(opened, tmp_path / "opened.edgeq", fast=True)
    assert (tmp_path / "opened.edgeq").read_bytes() == (tmp_path / "m.edgeq").read_bytes()
    changed = replace(opened, tensors=dict(opened.tensors))
    assert quantize(changed, tmp_path / "changed.edgeq", fast=True).source_sha256 is None
    assert summary.threads >= 1
    # half-byte codes and a scale of two bytes for 32; the 8-bit embedding is more than half
    assert 5 < summary.bpw < 8


def test_norms_of_a_checkpoint_stay_as_they_are(checkpoint: Path, tmp_path: Path) -> None:
    quantize(checkpoint, tmp_path / "m.edgeq", Recipe.from_options(tensor_types=["norm=bf16"]))
    got, source = load(tmp_path / "m.edgeq"), load_any(checkpoint)
    for name in ("model.norm.weight", "model.layers.3.input_layernorm.weight"):
        held, original = got.tensors[name], source.tensors[name]
        assert isinstance(held, FloatTensor)
        assert isinstance(original, FloatTensor)
        assert held.dtype == "bfloat16"
        assert np.array_equal(held.data, original.data)


def test_a_tied_head_is_stored_once(tmp_path: Path) -> None:
    model = random_model(tiny_config("llama"))
    doubled = {**model.tensors, "lm_head.weight": model.tensors["model.embed_tokens.weight"]}
    quantize(replace(model, tensors=doubled), tmp_path / "m.edgeq", fast=True)
    assert "lm_head.weight" not in load(tmp_path / "m.edgeq").tensors


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_float_schemes(dtype: str, tmp_path: Path) -> None:
    model = random_model(tiny_config("mistral"))
    quantize(model, tmp_path / "m.edgeq", Recipe.from_options(preset=dtype))
    got = load(tmp_path / "m.edgeq")
    for name, (_, _) in model.config.linears():
        held = got.tensors[name]
        assert isinstance(held, FloatTensor)
        assert held.dtype == dtype
        want = model.tensors[name].numpy()
        step = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 0.0}[dtype]
        assert (np.abs(held.numpy() - want) <= step * np.abs(want) + step * 1e-4).all()


def with_weight(value: float, name: str = "model.layers.1.mlp.up_proj.weight") -> Model:
    model = random_model(tiny_config("llama"))
    data = model.tensors[name].numpy()
    data[-1, 5 if data.ndim > 1 else ...] = value
    return replace(model, tensors={**model.tensors, name: FloatTensor("float32", data)})


@pytest.mark.parametrize(
    ("model", "options", "error", "words"),
    [
        (with_weight(np.nan), {}, FormatError, r"up_proj.weight holds nan at \[75, 5\]"),
        (with_weight(-np.inf), {}, FormatError, r"up_proj.weight holds -inf at \[75, 5\]"),
        (with_weight(np.inf), {"preset": "w4-tensor"}, FormatError, r"holds inf at \[75, 5\]"),
        (with_weight(np.nan), {"preset": "f16"}, FormatError, r"holds nan at \[75, 5\]"),
        (with_weight(3e38), {}, SchemeError, "up_proj.weight needs a scale of"),
        (with_weight(1e6), {"preset": "f16"}, SchemeError, "holds 1e.06, which f16 cannot"),
        (with_weight(3.4e38), {"preset": "bf16"}, SchemeError, "which bf16 cannot"),
        (with_weight(1), {"preset": "w4-g128"}, SchemeError, r"longer than a row of .*K=76"),
        (with_weight(1), {"tensor_types": ["nose=w4-g32"]}, SchemeError, "matches no tensor"),
        (with_weight(1), {"method": "gptq2"}, UsageError, "unknown method 'gptq2'"),
    ],
)
def test_refusals_leave_nothing_behind(
    model: Model, options: dict, error: type[Exception], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        quantize(
            model, tmp_path / "m.edgeq", Recipe.from_options(**{"preset": "w4-g32", **options})
        )
    assert not list(tmp_path.iterdir())


def test_bad_arguments(tmp_path: Path) -> None:
    model = random_model(tiny_config("llama"))
    for options, words in (
        ({"threads": -1}, "threads is -1"),
        ({"max_ram": -5}, "max_ram is -5"),
        ({"method": "none"}, "unknown method"),
    ):
        with pytest.raises(UsageError, match=words):
            quantize(model, tmp_path / "m.edgeq", **options)
    assert not list(tmp_path.iterdir())


def test_a_quantized_source_is_refused(tmp_path: Path) -> None:
    quantize(random_model(tiny_config("llama")), tmp_path / "m.edgeq", fast=True)
    with pytest.raises(UsageError, match=r"already quantized .*second rounding error"):
        quantize(tmp_path / "m.edgeq", tmp_path / "n.edgeq", fast=True)
    assert not (tmp_path / "n.edgeq").exists()


def test_a_float_artifact_may_be_a_source(tmp_path: Path) -> None:
    model = random_model(tiny_config("llama"))
    save(model, tmp_path / "float.edgeq")
    quantize(tmp_path / "float.edgeq", tmp_path / "a.edgeq", fast=True)
    quantize(model, tmp_path / "b.edgeq", fast=True)
    got, want = load(tmp_path / "a.edgeq"), load(tmp_path / "b.edgeq")
    name = "model.layers.0.mlp.up_proj.weight"
    assert np.array_equal(tensor_of(got, name).packed, tensor_of(want, name).packed)


def test_budgets() -> None:
    shapes = [(1000, 2048), (64, 8192), (64,)]
    free = make_budget(shapes, 4, None)
    assert (free.threads, free.chunk_weights) == (4, CHUNK_WEIGHTS)
    assert free.rows((1000, 2048)) == 64
    assert free.rows((10, 1 << 20)) == 16
    tight = make_budget(shapes, 4, 1 << 40)
    assert tight == free
    with pytest.raises(DoesNotFitError, match=r"max_ram of 10 MB is too little: .* need \d+ MB"):
        make_budget(shapes, 4, 10_000_000)
    need_mb = 0
    try:
        make_budget(shapes, 4, 10_000_000)
    except DoesNotFitError as err:
        need_mb = int(re.findall(r"need (\d+) MB", str(err))[0])
    least = make_budget(shapes, 4, (need_mb + 3) * 1_000_000)
    assert least.threads == 1
    assert least.release_every < free.release_every


LIMITED = """
import json, sys
from edgeq import quantize
summary = quantize(sys.argv[1], sys.argv[2], max_ram=int(sys.argv[3]), threads=2, fast=True)
print(json.dumps([summary.peak_rss_bytes, summary.threads]))
"""


def run_limited(source: Path, out: Path, max_ram: int) -> tuple[int, int]:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(source), str(out), str(max_ram)],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    peak, threads = json.loads(done.stdout)
    return peak, threads


def test_max_ram_holds(checkpoint: Path, tmp_path: Path) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("resident memory cannot be read here")
    quantize(checkpoint, tmp_path / "free.edgeq", fast=True)
    peak, _ = run_limited(checkpoint, tmp_path / "tight.edgeq", 140_000_000)
    assert peak <= 140_000_000
    assert (tmp_path / "tight.edgeq").read_bytes() == (tmp_path / "free.edgeq").read_bytes()


@pytest.mark.heavy
def test_a_model_of_a_billion_weights_takes_less_than_a_gigabyte() -> None:
    with tempfile.TemporaryDirectory() as name:  # gone at once: pytest would keep three of them
        folder = Path(name)
        maker().make("llama-3.2-1b", folder / "big", shards=3)
        peak, _ = run_limited(folder / "big", folder / "m.edgeq", 1_000_000_000)
        assert peak <= 1_000_000_000
        assert load(folder / "m.edgeq").config.vocab == 128256


def test_the_checkpoint_maker(checkpoint: Path) -> None:
    model = load_any(checkpoint)
    assert sorted(p.name for p in checkpoint.iterdir()) == [
        "config.json", "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors", "model.safetensors.index.json",
    ]  # fmt: skip
    assert model.config.vocab == 32000
    values = model.tensors["model.layers.2.mlp.up_proj.weight"].numpy()
    assert values.std() == pytest.approx(288**-0.5, rel=0.02)
    assert (model.tensors["model.norm.weight"].numpy() == 1).all()
    assert bf16_to_float32(np.array([0x3F80], np.uint16)) == 1


@pytest.mark.parametrize("shape", ["qwen2.5-0.5b", "llama-3.2-1b", "qwen3-0.6b", "mistral-7b"])
def test_the_checkpoint_maker_writes_configs_the_importer_reads(shape: str, tmp_path: Path) -> None:
    from edgeq.importers.huggingface.config import read_config
    from edgeq.importers.shapes import SHAPES

    (tmp_path / "config.json").write_text(json.dumps(maker().hf_config(SHAPES[shape])))
    assert read_config(tmp_path).model == SHAPES[shape]


@pytest.mark.parametrize("preset", ["w4-g32", "w3-g32", "w2-g16"])
def test_mse_loses_less_on_real_weights(preset: str, tmp_path: Path) -> None:
    source = need("models/stories260K")
    ratios = []
    for method in DATA_FREE:
        recipe = Recipe.from_options(preset=preset, method=method)
        summary = quantize(source, tmp_path / f"{method}.edgeq", recipe)
        ratios.append([t.sqnr_db for t in summary.tensors if t.sqnr_db is not None])
    gains = np.subtract(ratios[1], ratios[0])
    assert (gains >= 0).all()
    assert gains.mean() > 0.2
