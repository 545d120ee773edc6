"""Core ML packages: executed against the reference, their integers read back, truly packed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeq
from edgeq.converters import Options
from edgeq.converters.coreml.decoder import CoreMLDecoderTarget
from edgeq.converters.coreml.exec.blob import Reader
from edgeq.converters.coreml.exec.machine import Machine
from edgeq.converters.coreml.run import DecoderPackage
from edgeq.converters.validate.bisect import first_divergence, traced_passes
from edgeq.converters.validate.integers import compare_integers
from edgeq.core.errors import (
    EdgeqError,
    FormatError,
    MissingDependencyError,
    UnsupportedError,
    UsageError,
)
from edgeq.core.memory import peak_rss_bytes, reset_peak_rss
from edgeq.formats.spill import Spill
from edgeq.formats.tensor import QuantTensor
from edgeq.model.model import Model
from edgeq.model.reference import Reference
from tests.conftest import need
from tests.families import ATTENTION_FAMILIES, quantized, random_model, tiny_config
from tests.greedy import NEAR, assert_reference_choices
from tests.paths import DEMO

coreml = CoreMLDecoderTarget()

pytest.importorskip("coremltools")


IOS16 = {"target_os": "ios16"}


def tiny(family: str, scheme: str, **over: Any) -> Model:
    return quantized(random_model(tiny_config(family, **over), seed=3), scheme)


def written(model: Model, folder: Path, **options: Any) -> Path:
    out = folder / "model.mlpackage"
    coreml.write(model, out, Options(**options))
    return out


def ran(path: Path, prompt: list[int], steps: int) -> list[int]:
    runner, said = coreml.open_runner(path), []
    tokens = prompt
    for _ in range(steps):
        said.append(int(runner.forward(np.asarray(tokens, np.int64))[-1].argmax()))
        tokens = said[-1:]
    runner.close()
    return said


PROMPT = [1, 17, 80, 3, 99, 42, 5]


@pytest.mark.parametrize(
    ("family", "scheme", "extra"),
    [
        *((family, "w4-g32", {}) for family in ATTENTION_FAMILIES),
        *((family, "w4-channel", IOS16) for family in ATTENTION_FAMILIES),
        ("gemma3", "w8-channel", {"shapes": "enumerated"}),
    ],
)
def test_64_greedy_tokens_are_the_references(
    family: str, scheme: str, extra: Mapping[str, str], tmp_path: Path
) -> None:
    model = tiny(family, scheme, context=80)
    out = written(model, tmp_path, prefill=(4, 16), extra=extra)
    assert_reference_choices(model, PROMPT, ran(out, PROMPT, 64), NEAR["float16"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["demo", "stories260K"])
def test_real_models_pass_validation(name: str, tmp_path: Path) -> None:
    """Their own words, prefill and decoding; every integer; 64 greedy tokens."""
    from edgeq import quantize
    from edgeq.converters.convert import convert
    from edgeq.importers import load
    from edgeq.quant import Recipe

    source = DEMO if name == "demo" else need("models/stories260K")
    packed = tmp_path / "model.edgeq"
    quantize(source, packed, Recipe.from_options("w4-g32"))
    model = load(packed)
    out = tmp_path / "model.mlpackage"
    made = convert(model, "coreml", out, Options(prefill=(16,)))
    assert made.certificate is not None
    assert_reference_choices(model, [1, 2, 3], ran(out, [1, 2, 3], 64), NEAR["float16"])
    assert made.nbytes < 1.03 * packed.stat().st_size + 2e6  # the program itself is 1 MB


def test_several_prefills_and_single_tokens_agree(tmp_path: Path) -> None:
    model = tiny("gemma3", "w4-g32")
    out = written(model, tmp_path, prefill=(4, 16))
    prompt = list(range(3, 41))  # 16, 16 and a padded 16
    whole, single = coreml.open_runner(out), coreml.open_runner(out)
    a = whole.forward(np.asarray(prompt))
    for token in prompt:
        b = single.forward(np.asarray([token]))
    right = Reference(model).forward(prompt, all_logits=False)
    np.testing.assert_allclose(a[0], right, atol=1e-4)
    np.testing.assert_allclose(b[0], right, atol=1e-4)
    # 24 places are left: 16, and the last 8 in a call of 16 would pass the end
    a = whole.forward(np.asarray(prompt[:26]))
    right = Reference(model).forward(prompt + prompt[:26], all_logits=False)
    np.testing.assert_allclose(a[0], right, atol=1e-4)
    with pytest.raises(UsageError, match="1 tokens for the 0 places left of 64"):
        whole.forward(np.asarray([1]))
    whole.reset()
    np.testing.assert_allclose(
        whole.forward(np.asarray(prompt[:5]))[0],
        Reference(model).forward(prompt[:5], all_logits=False),
        atol=1e-4,
    )
    with pytest.raises(UsageError, match="no tokens"):
        whole.forward(np.asarray([], np.int64))


@pytest.mark.parametrize("precision", ["float16", "float32"])
@pytest.mark.parametrize("family", ["gemma3", "gemma2", "granite", "qwen2"])
def test_every_step_is_right_in_every_precision(
    family: str, precision: str, tmp_path: Path
) -> None:
    model = tiny(family, "w4-g32")
    out = written(model, tmp_path, prefill=(8,), extra={"precision": precision})
    runner = coreml.open_runner(out)
    assert runner.precision == precision

    def trace(tokens: Any, past: Any) -> Mapping[str, Any]:
        return coreml.trace(out, tokens, past)

    with Spill() as spill:
        passes = traced_passes(trace, PROMPT * 2, spill)
    assert first_divergence(model, passes, runner.precision) is None


@pytest.mark.parametrize("family", ATTENTION_FAMILIES)
def test_every_step_is_traced_by_its_name(family: str, tmp_path: Path) -> None:
    from edgeq.model.trace import TracedReference

    model = tiny(family, "w4-g32")
    out = written(model, tmp_path, prefill=(4,))
    builder = TracedReference(model)
    builder.trace(PROMPT[:2])
    right = builder.trace(PROMPT[2:])
    found = coreml.trace(out, PROMPT[2:], PROMPT[:2])
    assert set(found) == set(right)
    for name, value in found.items():
        expected = right[name][-1:] if name in ("head", "logits") else right[name]
        assert value.size == expected.size
        np.testing.assert_allclose(value.reshape(expected.shape), expected, atol=5e-5, err_msg=name)


def test_a_large_residual_stream_does_not_overflow_float16(tmp_path: Path) -> None:
    from edgeq.formats.tensor import FloatTensor

    model = tiny("llama", "w4-g32")
    tensors = dict(model.tensors)
    embed = model.tensors["model.embed_tokens.weight"].numpy() * 300
    tensors["model.embed_tokens.weight"] = FloatTensor("float32", embed)  # squares pass 65504
    model = Model(model.config, tensors)
    right = Reference(model).forward(PROMPT, all_logits=False)
    for precision in ("mixed", "float16"):
        out = written(model, tmp_path / precision, extra={"precision": precision})
        machine = Machine("float16")
        functions = DecoderPackage(out).functions
        state = machine.new_state(functions["decode"])
        for at, token in enumerate(PROMPT):
            inputs = {"tokens": [[token]], "position": [at]}
            logits = machine.run(functions["decode"], inputs, state)["logits"]
        np.testing.assert_allclose(logits[0], right, atol=0.03 * np.abs(right).max())


def test_floats_past_float16_are_refused_rather_than_made_infinite(tmp_path: Path) -> None:
    from edgeq.formats.tensor import FloatTensor

    model = tiny("llama", "w4-g32")
    name = "model.layers.1.mlp.up_proj.weight"
    huge = np.full(model.tensors[name].shape, 7e4, np.float32)
    model = Model(model.config, {**model.tensors, name: FloatTensor("float32", huge)})
    with pytest.raises(
        UnsupportedError, match=f"{name} has the value 7e.04.*set precision to float32"
    ):
        written(model, tmp_path)
    assert not list(tmp_path.iterdir())
    out = written(model, tmp_path, extra={"precision": "float32"})
    right = Reference(model).forward(PROMPT, all_logits=False)
    got = coreml.open_runner(out).forward(np.asarray(PROMPT))
    np.testing.assert_allclose(got[0], right, rtol=1e-3)


@pytest.mark.parametrize("extra", [{}, IOS16, {"shapes": "enumerated"}])
def test_one_token_at_a_time_is_enough(extra: Mapping[str, str], tmp_path: Path) -> None:
    model = tiny("llama", "w4-channel", context=16)
    out = written(model, tmp_path, context=12, extra=extra)  # shorter than any prefill
    right = Reference(model).forward(PROMPT, all_logits=False)
    runner = coreml.open_runner(out)
    np.testing.assert_allclose(runner.forward(np.asarray(PROMPT))[0], right, atol=1e-4)
    assert runner.context == 12


# --- integers ---------------------------------------------------------------------------------

IOS18_SCHEMES = ["w4-g32", "w4-g16", "w4-g64-asym", "w4-channel", "w4-tensor", "w8-g32",
                 "w8-channel-asym", "w2-g16-asym", "w2-channel", "w3-g32", "w3-g32-asym",
                 "w4-g32-palette", "w3-channel-palette", "w2-g32-palette"]  # fmt: skip
IOS16_SCHEMES = ["w8-channel", "w8-channel-asym", "w4-channel", "w3-channel", "w2-channel",
                 "w4-tensor", "w4-channel-palette", "w2-channel-palette"]  # fmt: skip


@pytest.mark.parametrize(
    ("scheme", "target"),
    [*((s, "ios18") for s in IOS18_SCHEMES), *((s, "ios16") for s in IOS16_SCHEMES)],
)
def test_integers_are_the_artifacts_own_and_truly_packed(
    scheme: str, target: str, tmp_path: Path
) -> None:
    # rows of 44 and 76 weights: no whole groups
    model = quantized(
        random_model(tiny_config("mistral", vocab=40, layers=1)), scheme, embed=scheme
    )
    out = written(model, tmp_path, prefill=(4,), extra={"target_os": target})
    equal, faults = compare_integers(model, lambda: coreml.read_weights(out))
    assert not faults
    assert len(equal) == 9
    assert all(equal.values())
    prompt = [token % 40 for token in PROMPT]
    right = Reference(model).forward(prompt, all_logits=False)
    got = coreml.open_runner(out).forward(np.asarray(prompt))
    np.testing.assert_allclose(got[0], right, atol=1e-4)
    assert _weight_bytes(out) == sum(_packed_bytes(t, target) for t in _matrices(model))


def _matrices(model: Model) -> list[QuantTensor]:
    found = [model.tensors[name] for name, _ in model.config.linears()]
    return [t for t in found if isinstance(t, QuantTensor)]


def _weight_bytes(out: Path) -> int:
    """Bytes of integers, whatever their width."""
    reader = Reader(next(out.rglob("weight.bin")))
    return sum(
        n for _, kind, n in reader.blobs() if kind.startswith(("int", "uint")) and kind != "int32"
    )


def _packed_bytes(tensor: QuantTensor, target: str) -> int:
    n, k = tensor.shape
    scheme = tensor.scheme
    bits = 4 if target == "ios16" and scheme.bits == 3 else scheme.bits
    size = scheme.group_size if scheme.group_size and scheme.group_size < k else None
    padded = -(-k // (size or 1)) * (size or 1)
    if size is None and scheme.group_size:
        padded = k
    whole = -(-n * padded * bits // 8)
    zeros = 0
    if tensor.zero_points is not None:
        width = 4 if scheme.bits == 4 else 8
        zeros = -(-n * (padded // size if size else 1) * width // 8)
    return whole + zeros


def test_a_tied_embedding_is_stored_once(tmp_path: Path) -> None:
    model = tiny("llama", "w4-g32", vocab=1000)
    out = written(model, tmp_path, prefill=(4, 8))
    reader = Reader(next(out.rglob("weight.bin")))
    sizes = [n for _, kind, n in reader.blobs() if kind == "int8"]
    assert sizes == [1000 * 44]
    # three functions share every weight
    kinds = [kind for _, kind, _ in reader.blobs()]
    assert kinds.count("int4") == 14


@pytest.mark.parametrize(
    ("scheme", "extra", "match"),
    [
        (
            "w4-g32",
            IOS16,
            "Core ML on ios16 cannot hold .* as w4-g32; quantize it as one of .*w4-channel",
        ),
        ("w4-g32-palette", IOS16, "cannot hold"),
        ("w2-channel-asym", IOS16, None),
        ("w8-g32", IOS16, "quantize it as one of w8-channel"),
    ],
)
def test_what_ios16_lacks_is_refused_with_what_it_has(
    scheme: str, extra: Mapping[str, str], match: str | None, tmp_path: Path
) -> None:
    model = tiny("llama", scheme)
    if match is None:  # zero points of narrow codes are held in 8 bits
        out = written(model, tmp_path, extra=extra)
        assert not compare_integers(model, lambda: coreml.read_weights(out))[1]
        return
    with pytest.raises(UnsupportedError, match=match):
        coreml.check(model, Options(extra=extra))
    with pytest.raises(UnsupportedError):
        written(model, tmp_path, extra=extra)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"extra": {"target_os": "ios15"}}, "unknown target_os 'ios15'"),
        ({"extra": {"precison": "mixed"}}, "unknown option of coreml 'precison'; did you mean"),
        ({"extra": {"precision": "bf16"}}, "unknown precision 'bf16'"),
        (
            {"extra": {"target_os": "ios16", "shapes": "functions"}},
            "use shapes enumerated, or ios18",
        ),
        ({"kv": "int8"}, "--kv is int8, but Core ML keeps keys and values in float16"),
        ({"compute": "int8"}, "--compute is int8, but Core ML multiplies in floating point"),
        ({"context": 65}, "the model allows 1 to 64"),
        ({"prefill": (100,)}, "prefill length 100 is outside 1 to the context, 64"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(EdgeqError, match=match):
        coreml.check(tiny("llama", "w4-g32"), Options(**options))


# --- the package ------------------------------------------------------------------------------


def test_the_package_is_one_that_coremltools_reads(tmp_path: Path) -> None:
    """coremltools' own reader infers every type again, from the file alone."""
    import coremltools as ct
    from coremltools.converters.mil.frontend.milproto.load import load

    for name, extra in (("a", {}), ("b", IOS16), ("c", {"shapes": "enumerated"})):
        model = tiny("gemma3", "w8-channel")
        out = written(model, tmp_path / name, prefill=(4,), extra=extra)
        opened = ct.models.MLModel(str(out), skip_model_load=True)
        spec = opened.get_spec()
        program = load(spec, spec.specificationVersion, file_weights_dir=opened.weights_dir)
        names = ["decode", "prefill_4"] if not extra else ["main"]
        assert sorted(program.functions) == names
        for function in spec.mlProgram.functions.values():
            block = next(iter(function.block_specializations.values()))
            mine = {o.name: [d.constant.size for d in o.type.tensorType.dimensions]
                    for op in block.operations for o in op.outputs}  # fmt: skip
            assert mine["final_norm"][-1] == 44
        described = spec.description
        if not extra:
            assert described.defaultFunctionName == "decode"
            assert [s.name for s in described.functions[0].state] == ["key_cache", "value_cache"]
        elif extra is IOS16:
            assert spec.specificationVersion == 7
            shapes = described.input[0].type.multiArrayType.enumeratedShapes.shapes
            assert [list(s.shape) for s in shapes] == [[1, 1], [1, 4]]


def test_the_same_model_makes_the_same_package(tmp_path: Path) -> None:
    model = tiny("qwen3", "w4-g32")
    a, b = (written(model, tmp_path / name) for name in "ab")
    files = sorted(p.relative_to(a) for p in a.rglob("*") if p.is_file())
    assert len(files) == 3
    for file in files:
        assert (a / file).read_bytes() == (b / file).read_bytes()


def test_nothing_is_left_of_a_package_that_could_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama", "w4-g32")
    (tmp_path / "file").write_text("")
    with pytest.raises(EdgeqError, match="cannot be written: Not a directory"):
        coreml.write(model, tmp_path / "file" / "x.mlpackage", Options())

    def stop(label: str, done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        coreml.write(model, tmp_path / "x.mlpackage", Options(), stop)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_progress_counts_every_constant(tmp_path: Path) -> None:
    model = tiny("llama", "w4-g32")
    said: list[tuple[str, int, int]] = []
    coreml.write(model, tmp_path / "x.mlpackage", Options(), lambda *a: said.append(a))
    assert [done for _, done, _ in said] == list(range(1, said[-1][2] + 1))
    assert len(said) == 2 * len(_matrices(model))  # numbers and scales


def test_foreign_or_damaged_files_are_refused(tmp_path: Path) -> None:
    out = written(tiny("llama", "w4-g32"), tmp_path)
    model = next(out.rglob("model.mlmodel"))
    package = DecoderPackage(out)
    entries = package.file.spec.description.metadata.userDefined
    about = json.loads(entries["edgeq"])
    entries["edgeq"] = json.dumps({**about, "format": 99})
    model.write_bytes(package.file.spec.SerializeToString())
    with pytest.raises(FormatError, match="written by another version of edgeq: its format is 99"):
        coreml.open_runner(out)
    entries["edgeq"] = "{"
    model.write_bytes(package.file.spec.SerializeToString())
    with pytest.raises(FormatError, match="its description is damaged"):
        coreml.open_runner(out)
    del entries["edgeq"]
    model.write_bytes(package.file.spec.SerializeToString())
    with pytest.raises(FormatError, match="not a language model that edgeq wrote"):
        coreml.open_runner(out)
    assert coreml.execute(out).outputs["logits"].shape == (1, 101)  # though any program runs


def test_versions_name_what_took_part(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(coreml.versions()) == {"coremltools", "numpy"}
    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'edgeq\[coreml\]'"):
        coreml.versions()
    with pytest.raises(MissingDependencyError, match="to write Core ML packages"):
        coreml.check(tiny("llama", "w4-g32"), Options())


@pytest.mark.slow
def test_the_smoke_test_runs_where_there_is_no_mac(tmp_path: Path) -> None:
    root = Path(edgeq.__file__).parent.parent
    script = root / "examples" / "coreml_smoke_test.py"
    env = {**os.environ, "PYTHONPATH": str(root)}
    out = written(tiny("llama", "w4-g32"), tmp_path, prefill=(8,))

    def call(*arguments: str) -> Any:
        command = [sys.executable, script, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=env)

    done = call(str(out), "--here", "--steps", "4", "--tokens", "1,17,80")
    assert (done.returncode, done.stderr) == (0, "")  # nor do coremltools' own warnings show
    assert done.stdout.startswith("here  ok")
    assert "4 of 4 greedy tokens equal" in done.stdout
    if sys.platform != "darwin":
        done = call(str(out))
        assert (done.returncode, done.stdout) == (1, "")
        assert "on a Mac only" in done.stderr
    done = call(str(tmp_path / "absent.mlpackage"), "--here")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")


def test_the_memory_of_writing_is_predicted(tmp_path: Path) -> None:
    model = tiny("llama", "w4-g32")
    small = coreml.memory(model, Options(prefill=(4,)))
    assert coreml.memory(model, Options(prefill=(4, 8))) > small
    reset_peak_rss()
    before = peak_rss_bytes()
    written(model, tmp_path, prefill=(4,))
    after = peak_rss_bytes()
    if before is not None and after is not None:
        assert after - before < small
