"""The public face given what it cannot take: an EdgeqError, or a TypeError that says the type."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeq
from edgeq.quant.decoder.quality_report import HeldOut
from tests.families import quantized, random_model, tiny_config
from tests.paths import DEMO

SCHEME = edgeq.QuantScheme(4)
TEXT = DEMO / "heldout.txt"
MODEL = random_model(tiny_config("llama"))
WRONG: list[Any] = [None, 7, 2.5, "", "no such", b"bytes", [], {}, object(), np.zeros(3)]
PATHS: list[Any] = [None, 7, b"bytes", [], "no/such/file", ".", __file__]

CALLS: dict[str, tuple[Callable[[Any, Path], Any], list[Any]]] = {
    "load": (lambda bad, at: edgeq.load(bad), PATHS),
    "quantize source": (lambda bad, at: edgeq.quantize(bad, at / "o.edgeq"), PATHS),
    "repack source": (lambda bad, at: edgeq.repack(bad, at / "o.edgeq"), [*PATHS, MODEL]),
    "repack out": (lambda bad, at: edgeq.repack(MODEL, bad), [None, 7, b"bytes", []]),
    "verify_reproducible source": (
        lambda bad, at: edgeq.verify_reproducible(bad, at / "o.edgeq"), PATHS,
    ),
    "verify_reproducible file": (lambda bad, at: edgeq.verify_reproducible(MODEL, bad), PATHS),
    "quantize out": (
        lambda bad, at: edgeq.quantize(MODEL, bad), [None, 7, b"bytes", [], ".", "no/such/o.edgeq"],
    ),
    "quantize recipe": (
        lambda bad, at: edgeq.quantize(MODEL, at / "o.edgeq", bad),
        ["w7-g32", "palette5", "", 4, [], {}, SCHEME, b"w4-g32"],
    ),
    "quantize method": (
        lambda bad, at: edgeq.quantize(MODEL, at / "o.edgeq", method=bad), ["gptg", "", 4, []],
    ),
    "quantize threads": (
        lambda bad, at: edgeq.quantize(MODEL, at / "o.edgeq", threads=bad), ["2", 2.0, True, -1],
    ),
    "quantize max_ram": (
        lambda bad, at: edgeq.quantize(MODEL, at / "o.edgeq", max_ram=bad), ["1G", 1e9, -1, 1],
    ),
    "quantize card": (
        lambda bad, at: edgeq.quantize(MODEL, at / "o.edgeq", card=bad), [None, 7, HeldOut],
    ),
    "quantize calibration": (
        lambda bad, at: edgeq.quantize(MODEL, at / "o.edgeq", "w4-g32-gptq", calibration=bad),
        ["a text", [1, 2, 3], 7],
    ),
    "quantize stats": (
        lambda bad, at: edgeq.quantize(MODEL, at / "o.edgeq", stats=bad), ["m.calib", 7],
    ),
    "quantize sensitivity": (
        lambda bad, at: edgeq.quantize(MODEL, at / "o.edgeq", sensitivity=bad), ["s.json", 7],
    ),
    "save model": (lambda bad, at: edgeq.save(bad, at / "o.edgeq"), WRONG),
    "save path": (lambda bad, at: edgeq.save(MODEL, bad), [None, 7, b"bytes", [], "."]),
    "parse_scheme": (lambda bad, at: edgeq.parse_scheme(bad), WRONG),
    "Recipe rules": (lambda bad, at: edgeq.Recipe(bad, SCHEME), [None, 7, "x", [7], ("a=w4-g32",)]),
    "Recipe default": (lambda bad, at: edgeq.Recipe((), bad), WRONG),
    "Recipe options": (
        lambda bad, at: edgeq.Recipe((), SCHEME, options=bad),
        [None, 7, "crossed", {"cross": True}, {"crossed": 1}],
    ),
    "Recipe target": (
        lambda bad, at: edgeq.Recipe((), SCHEME, target=bad), [4.5, "4.5", {}, {"bpw": "4.5"}],
    ),
    "Recipe training": (
        lambda bad, at: edgeq.Recipe((), SCHEME, training=bad), [True, "distill", {"methd": "qat"}],
    ),
    "Recipe.from_options": (
        lambda bad, at: edgeq.Recipe.from_options(bad), ["w7-g32", "", 4, b"w4-g32", []],
    ),
    "Recipe.from_options bits": (
        lambda bad, at: edgeq.Recipe.from_options(bits=bad), ["4", 4.0, 7, True],
    ),
    "Recipe.from_options tensor_types": (
        lambda bad, at: edgeq.Recipe.from_options(tensor_types=bad),
        [None, 7, "no rule", ["a=b"], [None], [7]],
    ),
    "Recipe.from_file": (lambda bad, at: edgeq.Recipe.from_file(bad), PATHS),
    "Recipe.from_dict": (lambda bad, at: edgeq.Recipe.from_dict(bad), WRONG),
    "Rule pattern": (lambda bad, at: edgeq.Rule(bad, SCHEME), [None, 7, b"x", [], "("]),
    "Rule scheme": (lambda bad, at: edgeq.Rule("x", bad), WRONG),
    "Rule.parse": (lambda bad, at: edgeq.Rule.parse(bad), WRONG),
    "QuantScheme bits": (lambda bad, at: edgeq.QuantScheme(bad), [None, "4", 4.0, 7, True]),
    "QuantScheme group": (
        lambda bad, at: edgeq.QuantScheme(4, group_size=bad), [None, "32", 32.0, 48],
    ),
    "FloatTensor dtype": (lambda bad, at: edgeq.FloatTensor(bad, np.zeros(3)), [None, 7, "F8", []]),
    "FloatTensor data": (lambda bad, at: edgeq.FloatTensor("float32", bad), WRONG),
    "QuantTensor scheme": (
        lambda bad, at: edgeq.QuantTensor(bad, (16, 32), np.zeros(1), np.zeros(1)), WRONG,
    ),
    "QuantTensor shape": (
        lambda bad, at: edgeq.QuantTensor(SCHEME, bad, np.zeros(1), np.zeros(1)), WRONG,
    ),
    "QuantTensor packed": (
        lambda bad, at: edgeq.QuantTensor(SCHEME, (16, 32), bad, np.zeros(1)), WRONG,
    ),
    "Model config": (lambda bad, at: edgeq.Model(bad, {}), WRONG),
    "Model tensors": (lambda bad, at: edgeq.Model(MODEL.config, bad).validate(), WRONG),
    "ModelConfig.from_dict": (lambda bad, at: edgeq.ModelConfig.from_dict(bad), WRONG),
    "BlockSpec rope": (lambda bad, at: edgeq.BlockSpec(rope=bad), [7, "1e4", {}, []]),
    "BlockSpec mixer": (lambda bad, at: edgeq.BlockSpec(rope=None, mixer=bad), ["mamba", None, 7]),
    "BlockSpec experts": (lambda bad, at: edgeq.BlockSpec(rope=None, experts=bad), [7, "8", {}]),
    "ExpertsSpec": (
        lambda bad, at: edgeq.ExpertsSpec(count=8, chosen=bad, ffn=16),
        ["2", 0, 9, 1.5, None],
    ),
    "BlockSpec window": (lambda bad, at: edgeq.BlockSpec(rope=None, window=bad), ["7", 0, -1, []]),
    "RopeSpec base": (lambda bad, at: edgeq.RopeSpec(bad, 64), [0, "1e4", None, []]),
    "RopeSpec dim": (lambda bad, at: edgeq.RopeSpec(1e4, bad), [7, "64", None, []]),
    "DeltaSpec key_heads": (
        lambda bad, at: edgeq.DeltaSpec(key_heads=bad, value_heads=4, key_dim=8, value_dim=8),
        [0, -1, 3, 2.0, True, "2", None, []],
    ),
    "RopeSpec temperature": (
        lambda bad, at: edgeq.RopeSpec(1e4, 64, None, bad, 8), [-1, "0", None, []],
    ),
    "RopeScaling attention_factor": (
        lambda bad, at: edgeq.RopeScaling("yarn", 2.0, attention_factor=bad), [0, "2", None, []],
    ),
    "RopeScaling": (lambda bad, at: edgeq.RopeScaling("linear", bad), [0, "2", None, []]),
    "Reference": (lambda bad, at: edgeq.Reference(bad), WRONG),
    "Reference.forward": (lambda bad, at: edgeq.Reference(MODEL).forward(bad), WRONG),
    "Engine": (lambda bad, at: edgeq.Engine(bad), WRONG),
    "Engine backend": (lambda bad, at: edgeq.Engine(MODEL, backend=bad), ["numb"]),
    "open_source": (lambda bad, at: edgeq.open_source(bad), PATHS),
    "inspect": (lambda bad, at: edgeq.inspect(bad), PATHS),
    "Draft tokens": (
        lambda bad, at: edgeq.Draft(edgeq.Engine(MODEL, backend="numpy"), MODEL, bad),
        ["2", 0, 17, 1.5, True],
    ),
    "Draft engine": (lambda bad, at: edgeq.Draft(bad, MODEL), WRONG),
    "run draft": (lambda bad, at: edgeq.run(DEMO, "Once", draft=bad), PATHS[1:]),
    "embed model": (lambda bad, at: edgeq.embed(bad, "Once"), PATHS),
    "embed texts": (lambda bad, at: edgeq.embed(DEMO, bad), [None, 7, b"bytes", [], [7], ""]),
    "embed pooling": (lambda bad, at: edgeq.embed(DEMO, "Once", pooling=bad), ["max", 7, ""]),
    "embed dimensions": (
        lambda bad, at: edgeq.embed(DEMO, "Once", dimensions=bad), [0, -1, 1 << 30, "8", 8.0],
    ),
    "embed prompt": (lambda bad, at: edgeq.embed(DEMO, "Once", prompt=bad), [7, b"a"]),
    "embed prompt_name": (
        lambda bad, at: edgeq.embed(DEMO, "Once", prompt_name=bad), [7, "", "query"],
    ),
    "rerank model": (lambda bad, at: edgeq.rerank(bad, "q", ["Once"]), [*PATHS, DEMO]),
    "rerank query": (lambda bad, at: edgeq.rerank(DEMO, bad, ["Once"]), [None, 7, b"bytes"]),
    "rerank documents": (lambda bad, at: edgeq.rerank(DEMO, "q", bad), [None, 7, "Once", [], [7]]),
    "run model": (lambda bad, at: edgeq.run(bad, "Hello"), PATHS),
    "run prompt": (lambda bad, at: edgeq.run(DEMO, bad), [None, 7, b"bytes", []]),
    "run max_tokens": (lambda bad, at: edgeq.run(DEMO, "Once", max_tokens=bad), ["2", 0, 1.5]),
    "chat": (lambda bad, at: edgeq.chat(bad), [*PATHS, DEMO]),
    "calibrate model": (lambda bad, at: edgeq.calibrate(bad, TEXT), PATHS),
    "calibrate text_file": (lambda bad, at: edgeq.calibrate(DEMO, bad), PATHS[:-1]),
    "calibrate observer": (
        lambda bad, at: edgeq.calibrate(DEMO, TEXT, windows=1, observer=bad), ["most", ""],
    ),
    "sensitivity model": (lambda bad, at: edgeq.sensitivity(bad, TEXT), PATHS),
    "sensitivity scheme": (
        lambda bad, at: edgeq.sensitivity(DEMO, TEXT, scheme=bad), ["w7-g32", "f16", 4, None],
    ),
    "sensitivity mode": (
        lambda bad, at: edgeq.sensitivity(DEMO, TEXT, windows=1, mode=bad), ["most"],
    ),
    "sweep models": (lambda bad, at: edgeq.sweep(bad, "w4-g32", at / "o"), [[], None, 7, b"bytes"]),
    "sweep recipes": (lambda bad, at: edgeq.sweep(DEMO, bad, at / "o"), ["w7-g32", None, 7]),
    "convert source": (lambda bad, at: edgeq.convert(bad, "gguf", at / "o.gguf"), PATHS),
    "convert target": (lambda bad, at: edgeq.convert(MODEL, bad, at / "o.gguf"), ["ggml", "", 7]),
    "convert out": (lambda bad, at: edgeq.convert(MODEL, "gguf", bad), [".", "no/such/o.gguf"]),
    "validate": (lambda bad, at: edgeq.validate(bad, MODEL, "gguf"), ["no/such.gguf", __file__]),
    "package source": (lambda bad, at: edgeq.package(bad, "rpi", at / "o"), PATHS),
    "package platform": (
        lambda bad, at: edgeq.package(DEMO, bad, at / "o"), ["wii", "", 7, None, []],
    ),
    "package out": (lambda bad, at: edgeq.package(DEMO, "rpi", bad), [".", "no/such", __file__, 7]),
    "package name": (
        lambda bad, at: edgeq.package(DEMO, "rpi", at / "o", name=bad), ["", "A b", 7, []],
    ),
    "package forms": (
        lambda bad, at: edgeq.package(DEMO, "rpi", at / "o", forms=bad),
        [[], "edgeq", ["coreml"], [7], 7],
    ),
    "package context": (
        lambda bad, at: edgeq.package(DEMO, "rpi", at / "o", context=bad), [0, -1, "64", 2.5],
    ),
    "package labels": (
        lambda bad, at: edgeq.package(DEMO, "rpi", at / "o", labels=bad), [[], 7, "no/such"],
    ),
    "package license": (
        lambda bad, at: edgeq.package(DEMO, "rpi", at / "o", license=bad), [7, [], b"mit"],
    ),
    "package sign": (
        lambda bad, at: edgeq.package(DEMO, "rpi", at / "o", sign=bad), ["no/such", __file__],
    ),
    "verify_package": (lambda bad, at: edgeq.verify_package(bad), PATHS),
    "package_delta old": (lambda bad, at: edgeq.package_delta(bad, at, at / "o"), PATHS),
    "apply_delta old": (lambda bad, at: edgeq.apply_delta(bad, at / "d", at / "o"), PATHS),
    "evaluate model": (lambda bad, at: edgeq.evaluate(bad, TEXT, layout="lambada"), PATHS),
    "evaluate task": (lambda bad, at: edgeq.evaluate(DEMO, bad), PATHS),
    "perplexity model": (lambda bad, at: edgeq.perplexity(bad, "Once upon a time"), PATHS),
    "perplexity text": (lambda bad, at: edgeq.perplexity(DEMO, bad), [None, 7, b"bytes", [], ""]),
    "perplexity base": (
        lambda bad, at: edgeq.perplexity(DEMO, "Once upon a time", base=bad), [7, MODEL, "no such"],
    ),
    "evaluate_graph": (lambda bad, at: edgeq.evaluate_graph(bad, "samples.npz"), PATHS),
    "bench model": (lambda bad, at: edgeq.bench(bad), PATHS),
    "bench n_gen": (lambda bad, at: edgeq.bench(MODEL, n_prompt=[], n_gen=bad), [[], [-1], [0]]),
    "bench_graphs": (lambda bad, at: edgeq.bench_graphs([bad]), ["a.mlpackage", "no such.onnx"]),
    "profile models": (lambda bad, at: edgeq.profile(bad), [[], None, 7, "no such", "."]),
    "profile meters": (lambda bad, at: edgeq.profile(DEMO, meters=[bad]), ["tea:1", ""]),
    "report sources": (
        lambda bad, at: edgeq.report(bad, at / "o.html"), [[], None, 7, "no such", "."],
    ),
    "report out": (lambda bad, at: edgeq.report([], bad), ["report.pdf", "", None, 7]),
    "plan model": (lambda bad, at: edgeq.plan(bad, "rpi5"), PATHS),
    "plan device": (lambda bad, at: edgeq.plan(MODEL, bad), ["rpi55", "", 7, None]),
    "plan shape": (lambda bad, at: edgeq.plan(device="rpi5", shape=bad), [None, "gpt-5", 7]),
    "plan context": (lambda bad, at: edgeq.plan(MODEL, "rpi5", context=bad), [-1, 1 << 40]),
    "device": (lambda bad, at: edgeq.device(bad), ["rpi55", "", None, 7, "no/such.toml"]),
    "detect": (lambda bad, at: edgeq.detect(bad), [7, "no/such", b"bytes"]),
    "Workload": (lambda bad, at: edgeq.Workload(repeats=bad), [0, -1]),
    "Conversation": (
        lambda bad, at: edgeq.Conversation(
            edgeq.Engine(MODEL, backend="numpy"), edgeq.Tokenizer(bad)
        ), [None, 7, "no such"],
    ),
    "GrammarVocabulary": (
        lambda bad, at: edgeq.GrammarVocabulary(bad, 100, (1,)), [None, 7, "no such", b"bytes"],
    ),
    "serve": (lambda bad, at: edgeq.serve(bad, edgeq.ServerSettings(port=0)), [*PATHS, []]),
    "Server": (lambda bad, at: edgeq.Server(bad, edgeq.ServerSettings(port=0)), [*PATHS, []]),
    "ServerSettings": (lambda bad, at: edgeq.ServerSettings(port=bad), [-1, "80", None, True]),
}  # fmt: skip
"""What is called -> how, given a bad argument and a folder; and the bad arguments."""


@pytest.mark.parametrize(
    ("name", "bad"), [(name, bad) for name, (_, bads) in CALLS.items() for bad in bads],
    ids=lambda value: value if isinstance(value, str) and value in CALLS else repr(value)[:20],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(name: str, bad: Any, tmp_path: Path) -> None:
    with pytest.raises((edgeq.EdgeqError, TypeError)) as found:
        CALLS[name][0](bad, tmp_path)
    said = str(found.value)
    assert said
    assert len(said) < 2000
    assert not list(tmp_path.iterdir())


def test_a_wrong_type_is_said_with_what_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="recipe must be Recipe, str or None, not int"):
        edgeq.quantize(MODEL, tmp_path / "o.edgeq", 4)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be Model, Graph, str or PathLike, not NoneType"):
        edgeq.quantize(None, tmp_path / "o.edgeq")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="threads must be int or None, not str"):
        edgeq.quantize(MODEL, tmp_path / "o.edgeq", threads="2")  # type: ignore[arg-type]


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    summary = edgeq.quantize(MODEL, tmp_path / "o.edgeq", threads=np.int64(1))  # type: ignore[arg-type]
    assert summary.threads == 1


@pytest.mark.parametrize(
    ("recipe", "schemes"),
    [("w4-g32", {"w4-g32"}), ("w3-g32-mse", {"w3-g32"}), ("palette4", {"w4-g32-palette"}),
     ("w4-g16-asym", {"w4-g16-asym"}), (" W4-G32 ", {"w4-g32"}),
     (None, {"w4-g32", "w5-g32", "w5-g64"})],
)  # fmt: skip
def test_a_recipe_by_its_name(recipe: str | None, schemes: set[str], tmp_path: Path) -> None:
    summary = edgeq.quantize(MODEL, tmp_path / "o.edgeq", recipe)
    assert {str(t.scheme) for t in summary.tensors if "proj" in t.name} == schemes
    again = edgeq.quantize(MODEL, tmp_path / "p.edgeq", edgeq.Recipe.from_options(recipe))
    assert again.recipe == summary.recipe


def test_an_unknown_recipe_lists_the_known_and_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(
        edgeq.SchemeError, match=r"did you mean 'palette4-gptq'\?.*known: 2.25bpw, "
    ):
        edgeq.quantize(MODEL, tmp_path / "o.edgeq", "palete4-gptq")


def test_what_is_printed_is_a_line(tmp_path: Path) -> None:
    model = quantized(MODEL, "w4-g32")
    summary = edgeq.quantize(MODEL, tmp_path / "o.edgeq", "w4-g32")
    shown = {
        "QuantTensor": model.tensors["model.layers.0.self_attn.q_proj.weight"],
        "FloatTensor": model.tensors["model.norm.weight"],
        "Model": model,
        "Recipe": edgeq.Recipe.from_options("mixed-palette-4.5bpw"),
        "Summary": summary,
        "Quality": summary.quality,
    }
    for name, value in shown.items():
        text = repr(value)
        assert name in text
        assert len(text) < 120, text
        assert "\n" not in text
        assert "array" not in text
    assert repr(model.tensors["model.layers.0.self_attn.q_proj.weight"]) == (
        "<QuantTensor w4-g32 [48, 44], 1728 bytes>"
    )
    assert "w4-g32-palette, gptq, 4.5 bpw, 1 rule" in repr(shown["Recipe"])


def test_every_public_name_was_tried() -> None:
    """A new function or class of the face gets its calls above."""
    results = {
        "CalibrationStats", "Check", "Chunk", "Conversion", "Delta", "Detected", "DeviceProfile",
        "Document", "Evaluation", "Graph", "GraphAccuracy", "GraphSummary", "Measurement",
        "Options", "Outcome", "Package", "PackageReport", "Plan", "QuantizationSummary",
        "RepackSummary", "Sensitivity",
        "Summary", "SweepResult", "ValidationReport",
    }  # fmt: skip
    without_arguments = {"demo_model", "device_names", "doctor", "warmup"}
    elsewhere = {"PRESETS", "SamplingParams", "Tokenizer", "generate", "render_chat", "__version__"}
    errors = {name for name in edgeq.__all__ if name.endswith("Error")}
    tried = {name.split(" ")[0].split(".")[0] for name in CALLS}
    untried = results | without_arguments | elsewhere | errors
    assert set(edgeq.__all__) - untried == tried
