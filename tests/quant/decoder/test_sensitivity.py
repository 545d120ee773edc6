"""Sensitivities: measured as said, of use to the allocation, kept in a file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgeq import quantize
from edgeq.cli import main
from edgeq.core.errors import FormatError, UsageError
from edgeq.devices.model_header import facts
from edgeq.devices.planner import budget_bytes, plan
from edgeq.devices.profile import find
from edgeq.evaluation.text import kl_divergence, log_softmax
from edgeq.formats.schemes import FloatScheme, QuantScheme, parse_scheme
from edgeq.formats.spill import Spill
from edgeq.formats.tensor import FloatTensor
from edgeq.model.artifact import load as load_artifact
from edgeq.model.model import Model
from edgeq.model.reference import Reference
from edgeq.quant import Recipe
from edgeq.quant.decoder import bit_search
from edgeq.quant.decoder.allocate import allocate, total_bytes
from edgeq.quant.decoder.calibrate import CalibrationText, model_sha256
from edgeq.quant.decoder.losses import EMBEDDING, EVERY, candidates
from edgeq.quant.decoder.replay import Replay
from edgeq.quant.decoder.round_model import rounded_model
from edgeq.quant.decoder.sensitivity import Sensitivity, measure_sensitivity
from edgeq.quant.presets import LADDER
from edgeq.quant.rounders.hessian import Hessian, weighted_error
from edgeq.quant.rounders.rounding import quantize_tensor
from tests.families import quantized, random_model, tiny_config
from tests.paths import DEMO

BASE = QuantScheme(4)
PALETTE = QuantScheme(4, codebook="palette")


def text(vocab: int = 101, tokens: int = 40, windows: int = 2) -> CalibrationText:
    rng = np.random.default_rng(5)
    cut = tuple(rng.integers(0, vocab, tokens) for _ in range(windows))
    return CalibrationText(cut, "", tokens, None)


def divergence(model: Model, base: Model) -> float:
    parts = [
        kl_divergence(
            log_softmax(Reference(base).forward(window)),
            log_softmax(Reference(model).forward(window)),
        )
        for window in text().windows
    ]
    return float(np.concatenate(parts).mean())


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_a_loss_is_the_divergence_with_that_tensor_alone_rounded(family: str) -> None:
    model = random_model(tiny_config(family))
    names = [name for name, _ in model.config.linears()]
    found = measure_sensitivity(model, text(), BASE)
    assert list(found.losses) == names
    assert found.n_tokens == 80
    for name in (names[0], names[3], names[-1]):
        w = model.tensors[name].numpy()
        for scheme in ("w4-g32", "w2-g32", "w8-channel"):
            tensor = quantize_tensor(w, parse_scheme(scheme), "mse")  # type: ignore[arg-type]
            other = replace(model, tensors={**model.tensors, name: tensor})
            want = divergence(other, model)
            assert found.losses[name][scheme] == pytest.approx(want, rel=2e-3, abs=1e-9), name
        losses = found.losses[name]
        assert losses["w2-g32"] > losses["w3-g32"] > losses["w4-g32"] > losses["w8-channel"]


def test_losses_are_those_of_the_method_and_of_palettes_apart() -> None:
    model = random_model(tiny_config("llama"))
    name = "model.layers.1.mlp.up_proj.weight"
    options = {"use_quantized_inputs": True, "damping": 0.02}
    found = measure_sensitivity(
        model, text(), PALETTE, method="gptq", options=options, names=[name, EMBEDDING]
    )
    assert found.method == "gptq"
    moments = Hessian(model.config.hidden)
    for step in (replay := Replay(model, text().windows)):
        if name in step.group.linears:
            for x in step.inputs():
                moments.add(x)
    assert replay.n_tokens == moments.n
    w = model.tensors[name].numpy()
    for scheme in ("w3-g32", "w3-g32-palette", "w4-g32-palette"):
        tensor = quantize_tensor(w, parse_scheme(scheme), "gptq", hessian=moments, damping=0.02)  # type: ignore[arg-type]
        want = divergence(replace(model, tensors={**model.tensors, name: tensor}), model)
        assert found.losses[name][scheme] == pytest.approx(want, rel=2e-3, abs=1e-9)
    # a head is rounded as in an artifact: by the mean squares of its inputs
    moments = Hessian(model.config.hidden)
    for step in Replay(model, text().windows):
        if step.group.kind == "head":
            for x in step.inputs():
                moments.add(x)
    embedding = model.tensors[EMBEDDING].numpy()
    table = quantize_tensor(embedding, BASE, "imatrix", importance=moments.diagonal)
    want = divergence(replace(model, tensors={**model.tensors, EMBEDDING: table}), model)
    assert found.losses[EMBEDDING]["w4-g32"] == pytest.approx(want, rel=2e-3, abs=1e-9)


def test_the_error_that_gptq_leaves_is_predicted() -> None:
    """Without carrying it out: in the same proportion for all tensors and bits, or nearly."""
    model = random_model(tiny_config("llama", hidden=96, ffn=160))
    calibration = text(windows=10)
    foretold, left = [], []
    names = [name for name, _ in model.config.linears() if "layers" in name]
    found = measure_sensitivity(model, calibration, BASE, method="gptq", mode="output", names=names)
    for step in Replay(model, calibration.windows):
        moments = None
        for name in step.group.linears if step.group.kind != "head" else ():
            if moments is None:
                moments = Hessian(step.weights[name].shape[1])
                for x in step.inputs():
                    moments.add(x)
            w = step.weights[name]
            for scheme in map(QuantScheme, (2, 3, 4)):
                tensor = quantize_tensor(w, scheme, "gptq", hessian=moments, sweeps=0)
                signal = weighted_error(w, np.zeros_like(w), moments)
                left.append(weighted_error(w, tensor.numpy(), moments) / signal)
                foretold.append(found.losses[name][str(scheme)])
    ratios = np.array(foretold) / np.array(left)
    assert ratios.max() / ratios.min() < 1.5


def test_output_errors_are_relative_to_the_output() -> None:
    model = random_model(tiny_config("llama"))
    name = "model.layers.1.mlp.down_proj.weight"
    found = measure_sensitivity(model, text(), BASE, mode="output", names=[name])
    assert list(found.losses) == [name]
    inputs: list[np.ndarray] = []

    def watch(at: str, x: np.ndarray, weight: object) -> np.ndarray:
        if at == name:
            inputs.append(x)
        return x @ weight.numpy().T  # type: ignore[attr-defined,no-any-return]

    for window in text().windows:
        Reference(model, linear=watch).forward(window)
    x, w = np.concatenate(inputs).astype(np.float64), model.tensors[name].numpy()
    rounded = quantize_tensor(w, BASE, "mse").numpy()
    want = np.square(x @ (w - rounded).T).sum() / np.square(x @ w.T).sum()
    assert found.losses[name]["w4-g32"] == pytest.approx(want, rel=1e-4)


def test_candidates_suit_the_row_and_the_base() -> None:
    names = [str(scheme) for scheme in candidates(BASE, 100)]
    assert names == [
        "w2-g32",
        "w2-g64",
        "w3-g32",
        "w3-g64",
        "w4-g32",
        "w4-g64",
        "w5-g32",
        "w5-g64",
        "w6-g32",
        "w6-g64",
        "w8-channel",
        "f16",
    ]
    assert str(candidates(QuantScheme(4, False, "group", 64), 300)[0]) == "w2-g64-asym"
    assert FloatScheme("float16") in candidates(QuantScheme(4, group_size=128), 44)
    palettes = [str(scheme) for scheme in candidates(PALETTE, 100)]
    assert set(names) < set(palettes)
    assert {f"w{bits}-g{group}-palette" for bits in (2, 3, 4) for group in (32, 64)} == (
        set(palettes) - set(names)
    )


def test_a_target_is_met_and_beats_uniform_bits(tmp_path: Path) -> None:
    model = random_model(tiny_config("llama", hidden=64, ffn=128, layers=3))
    # a model where tensors differ much in what they mind, as trained ones do
    tensors = dict(model.tensors)
    for i, (name, _) in enumerate(model.config.linears()):
        if "down_proj" in name or "v_proj" in name:
            w = tensors[name].numpy()
            w[:, :: 7 + i] *= 6
            tensors[name] = replace(tensors[name], data=w)  # type: ignore[type-var]
    model = replace(model, tensors=tensors)
    uniform = quantized(model, "w3-g32", "w8-channel")
    total = sum(int(np.prod(t.shape)) for t in model.tensors.values())
    bpw = 8 * uniform.nbytes / total
    out = tmp_path / "m.edgeq"
    calibration = replace(text(), text_sha256="1")
    recipe = replace(Recipe.from_options("w3-g32-mse"), target={"bpw": bpw})
    summary = quantize(model, out, recipe, calibration=calibration)
    assert 0.99 * bpw <= summary.bpw <= bpw
    plain = quantize(model, tmp_path / "u.edgeq", Recipe.from_options("w3-g32-mse"))
    assert summary.bpw <= plain.bpw
    mixed, same = load_artifact(out), load_artifact(tmp_path / "u.edgeq")
    assert divergence(mixed, model) < divergence(same, model)
    assert summary.target == mixed.provenance["target"]
    tried = mixed.provenance["target"]["tried"]
    assert mixed.provenance["target"]["kept"] == "mixed"
    assert tried["mixed"] == pytest.approx(divergence(mixed, model), rel=1e-3)
    (rival,) = set(tried) - {"mixed"}
    assert tried["mixed"] < tried[rival]
    # the rival is what a recipe of its two schemes gives, within the same bytes
    inner, outer = rival.split(" with embedding and head in ")
    recipe = Recipe.from_options(inner, tensor_types=[f"embed_tokens={outer}"], method="mse")
    plain = quantize(model, tmp_path / "r.edgeq", recipe)
    assert plain.bpw <= bpw
    again = load_artifact(tmp_path / "r.edgeq")
    assert tried[rival] == pytest.approx(divergence(again, model), rel=1e-3)


def indifferent(model: Model, method: str) -> Sensitivity:
    """Wrong sensitivities: as if all tensors but those of queries and keys minded nothing."""
    losses = {
        name: {
            str(scheme): 4.0**-scheme.bits if minds and isinstance(scheme, QuantScheme) else 1e-9
            for scheme in candidates(BASE, k)
        }
        for name, (_, k) in model.config.linears()
        for minds in ["q_proj" in name or "k_proj" in name]
    }
    return Sensitivity("kl", method, 1, "", model_sha256(model), losses)


@pytest.mark.parametrize("preset", ["mixed-4.5bpw", "4.75bpw"])
def test_a_preset_of_the_size_is_written_where_it_is_better(preset: str, tmp_path: Path) -> None:
    model = random_model(tiny_config("llama", hidden=64, ffn=128, layers=5))
    calibration = replace(text(), text_sha256="1")
    rung = quantize(model, tmp_path / "rung.edgeq", "4.75bpw", calibration=calibration)
    recipe = replace(Recipe.from_options(preset), target={"bpw": rung.bpw})
    summary = quantize(
        model, tmp_path / "m.edgeq", recipe, calibration=calibration,
        sensitivity=indifferent(model, "gptq"),
    )  # fmt: skip
    assert summary.target is not None
    tried, kept = summary.target["tried"], summary.target["kept"]
    assert len(tried) == 3
    assert tried["4.75bpw"] == min(tried.values())
    assert kept == "4.75bpw"
    assert summary.target["chosen"][0] == sum(t.nbytes for t in summary.tensors)
    # its integers are those of the preset itself
    got, want = (load_artifact(tmp_path / f"{name}.edgeq") for name in ("m", "rung"))
    assert got.provenance["sensitive_layers"] == want.provenance["sensitive_layers"]
    assert got.tensors.keys() == want.tensors.keys()
    for name, tensor in want.tensors.items():
        np.testing.assert_array_equal(got.tensors[name].numpy(), tensor.numpy(), err_msg=name)


def test_presets_that_do_not_fit_or_round_otherwise_are_no_rivals(tmp_path: Path) -> None:
    model = random_model(tiny_config("llama", hidden=64, ffn=128))
    calibration = replace(text(), text_sha256="1")

    def rivals(preset: str, target: dict[str, float], rules: tuple[str, ...] = ()) -> set[str]:
        recipe = replace(Recipe.from_options(preset, tensor_types=rules), target=target)
        found = quantize(
            model, tmp_path / "m.edgeq", recipe, calibration=calibration,
            sensitivity=indifferent(model, recipe.method),
        ).target  # fmt: skip
        assert found is not None
        return {label for label in found["tried"] if label.endswith("bpw")}

    bits = {name: 8 * known_bytes(model, Recipe.named(name)) / weights_of(model) for name in LADDER}
    assert rivals("mixed-4.5bpw", {"bpw": bits["5.5bpw"] + 0.01}) == {"5.5bpw"}
    assert rivals("mixed-4.5bpw", {"bpw": bits["5.5bpw"] - 0.01}) == {"4.75bpw"}
    assert rivals("mixed-4.5bpw", {"bpw": bits["2.25bpw"] - 0.01}) == set()
    assert rivals("w4-g32-mse", {"bpw": bits["5.5bpw"]}) == set()
    # the user's rules hold in the preset too, and count
    rule = ("down_proj=f16",)
    assert rivals("mixed-4.5bpw", {"bpw": bits["5.5bpw"] + 0.01}, rule) < {*LADDER} - {"5.5bpw"}
    # of the size of a file, what is not tensors takes a part
    of_tensors = known_bytes(model, Recipe.named("5.5bpw"))
    assert rivals("mixed-4.5bpw", {"bytes": of_tensors + 100}) < {*LADDER} - {"5.5bpw"}
    assert rivals("mixed-4.5bpw", {"bytes": 2 * of_tensors + 40_000}) == {"8.5bpw"}


def known_bytes(model: Model, recipe: Recipe) -> int:
    """Bytes of the tensors of an artifact."""
    shapes = {name: model.tensors[name].shape for name in bit_search.stored(model)}
    return total_bytes(bit_search.assigned(model, recipe), shapes)


def weights_of(model: Model) -> int:
    """How many weights an artifact holds."""
    return sum(int(np.prod(model.tensors[name].shape)) for name in bit_search.stored(model))


def test_bits_that_do_worse_than_one_scheme_for_all_are_not_kept(tmp_path: Path) -> None:
    model = random_model(tiny_config("llama"))
    wrong = indifferent(model, "mse")
    out = tmp_path / "m.edgeq"
    recipe = replace(Recipe.from_options("w4-g32-mse"), target={"bpw": 6.0})
    calibration = replace(text(), text_sha256="1")
    summary = quantize(model, out, recipe, calibration=calibration, sensitivity=wrong)
    assert summary.target is not None
    tried, kept = summary.target["tried"], summary.target["kept"]
    assert tried[kept] < tried["mixed"]
    inner = {str(t.scheme) for t in summary.tensors if "proj" in t.name}
    outer = {str(t.scheme) for t in summary.tensors if "embed" in t.name}
    assert str(summary.recipe.default) in inner  # the recipe says what was written
    assert f"{inner.pop()} with embedding and head in {outer.pop()}" == kept
    assert not inner
    assert not outer
    assert summary.bpw <= 6.0
    assert summary.target["chosen"][0] == sum(t.nbytes for t in summary.tensors)
    # without a text nothing can be tried, and the sensitivities are believed
    believed = quantize(model, out, recipe, sensitivity=wrong)
    assert believed.target is not None
    assert set(believed.target) == {"chosen", "front", "not_tried"}
    assert "no calibration text" in believed.target["not_tried"]
    assert len({str(t.scheme) for t in believed.tensors if "proj" in t.name}) > 1


@pytest.mark.parametrize("preset", ["w3-g32-gptq", "w4-g32-mse"])
def test_a_recipe_tried_in_memory_is_what_the_artifact_holds(preset: str, tmp_path: Path) -> None:
    model = random_model(tiny_config("qwen3"))
    recipe = Recipe.from_options(preset)
    out = tmp_path / "m.edgeq"
    summary = quantize(model, out, recipe, calibration=text(), threads=1)
    schemes = {t.name: t.scheme for t in summary.tensors}
    with Spill(tmp_path) as spill:
        tried = rounded_model(model, recipe, schemes, text(), spill)
    assert not list(tmp_path.glob("edgeq-*"))  # the file has no name, and its tensors stay
    written = load_artifact(out)
    assert tried.tensors.keys() == written.tensors.keys()
    for name, tensor in written.tensors.items():
        np.testing.assert_array_equal(tried.tensors[name].numpy(), tensor.numpy(), err_msg=name)


def test_what_was_measured_is_kept_and_read_back(tmp_path: Path) -> None:
    model = random_model(tiny_config("qwen2"))
    found = measure_sensitivity(model, text(), BASE, mode="output")
    path = tmp_path / "s.json"
    path.write_text(found.to_json(), "utf-8")
    again = Sensitivity.load(path)
    assert again == found
    again.check_model(model)
    with pytest.raises(UsageError, match="another model"):
        again.check_model(random_model(tiny_config("qwen2"), seed=1))
    for version in (1, 9):  # an older one does not say how tensors were rounded
        other = found.to_json().replace('"format_version": 2', f'"format_version": {version}')
        path.write_text(other, "utf-8")
        with pytest.raises(FormatError, match="make it again"):
            Sensitivity.load(path)
    path.write_text("[]", "utf-8")
    with pytest.raises(FormatError, match="is not a sensitivity file"):
        Sensitivity.load(path)


def test_a_file_that_is_not_text_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_bytes(b"\xff" * 5000)
    with pytest.raises(FormatError, match=r"is not JSON.*edgeq sensitivity") as told:
        Sensitivity.load(path)
    assert len(str(told.value)) < 300 + len(str(path))


def test_palettes_are_chosen_only_by_recipes_that_have_them() -> None:
    model = random_model(tiny_config("llama"))
    names = ["model.layers.0.self_attn.v_proj.weight"]
    both = measure_sensitivity(model, text(), PALETTE, names=names)
    plain = measure_sensitivity(model, text(), BASE, names=names)
    assert both.suited(PALETTE) == both
    assert both.suited(BASE) == plain
    with pytest.raises(UsageError, match="--palette"):
        plain.suited(PALETTE)


def test_relative_output_errors_are_not_added_up() -> None:
    model = random_model(tiny_config("llama"))
    found = measure_sensitivity(model, text(), BASE, mode="output")
    with pytest.raises(UsageError, match="are not additive"):
        found.suited(BASE)


def test_of_a_quantized_model_its_rounded_weights_count_as_exact() -> None:
    model = quantized(random_model(tiny_config("llama")), "w4-g32")
    name = "model.layers.0.self_attn.v_proj.weight"
    found = measure_sensitivity(model, text(), BASE, names=[name])
    wide = replace(
        model,
        tensors={n: FloatTensor("float32", t.numpy()) for n, t in model.tensors.items()},
    )
    want = measure_sensitivity(wide, text(), BASE, names=[name])
    assert found.losses[name] == pytest.approx(want.losses[name])


def test_scaled_losses_are_the_divergence_of_kinds_of_matrices() -> None:
    """Each third of the depth has a factor of its own for each kind; embedding and head none."""
    model = random_model(tiny_config("llama", layers=3))
    found = measure_sensitivity(model, text(tokens=60), BASE, mode="scaled")
    exact = measure_sensitivity(model, text(tokens=60), BASE, mode="kl")
    output = measure_sensitivity(model, text(tokens=60), BASE, mode="output")
    assert list(found.losses) == list(exact.losses)
    for name, losses in found.losses.items():
        # one matrix of a kind in each third here, so it is measured by itself; at some of
        # the positions, which random text makes the same within a fifth or so
        assert losses["w4-g32"] == pytest.approx(exact.losses[name]["w4-g32"], rel=0.35), name
        if name != EMBEDDING:
            ratios = [losses[text] / output.losses[name][text] for text in losses]
            assert ratios == pytest.approx([ratios[0]] * len(ratios))


def test_scaled_losses_of_a_kind_add_up_to_its_divergence() -> None:
    model = random_model(tiny_config("mistral", layers=6, hidden=64))
    names = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in (2, 3)]
    found = measure_sensitivity(model, text(tokens=60), BASE, mode="scaled", names=names)
    tensors = {n: quantize_tensor(model.tensors[n].numpy(), BASE, "mse") for n in names}
    other = replace(model, tensors={**model.tensors, **tensors})
    parts = [
        kl_divergence(
            log_softmax(Reference(model).forward(window)[::EVERY]),
            log_softmax(Reference(other).forward(window)[::EVERY]),
        )
        for window in text(tokens=60).windows
    ]
    want = float(np.concatenate(parts).mean())
    assert sum(found.losses[n]["w4-g32"] for n in names) == pytest.approx(want, rel=2e-3)


def test_windows_that_are_measured_on_are_not_rounded_by() -> None:
    many = text(windows=40)
    rounding, measuring = bit_search._split(many)
    assert len(measuring) == 8
    assert len(rounding.windows) == 32
    seen = {window.tobytes() for window in rounding.windows}
    assert not any(window.tobytes() in seen for window in measuring)
    few = text(windows=9)
    rounding, measuring = bit_search._split(few)
    assert rounding is few  # too little text to spare any
    assert len(measuring) == 5


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sensitivities of the demo model, by the command."""
    folder = tmp_path_factory.mktemp("sensitivity")
    story = folder / "text.txt"
    story.write_text((DEMO / "heldout.txt").read_text("utf-8")[:2500], "utf-8")
    path = folder / "s.json"
    args = ["sensitivity", str(DEMO), "--calib", str(story), "--mode", "scaled",
            "--method", "mse", "--calib-windows", "2", "-o", str(path)]  # fmt: skip
    assert main(args) == 0
    return path


def test_the_command_writes_what_quantize_reads(
    kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["sensitivity", str(DEMO), "--calib", str(kept.with_name("text.txt")), "-o", str(kept)]
    assert main(args) == 1
    assert "--force" in capsys.readouterr().err
    artifact = tmp_path / "m.edgeq"
    again = ["quantize", str(DEMO), "-o", str(artifact), "--preset", "w4-g32",
             "--target-bpw", "4.7", "--sensitivity", str(kept), "--no-card"]  # fmt: skip
    assert main([*again, "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0.99 * 4.7 <= found["bpw"] <= 4.7
    sensitivity = Sensitivity.load(kept)
    assert sensitivity.method == "mse"
    shapes = {t["name"]: tuple(t["shape"]) for t in found["tensors"]}
    fixed = {n: FloatScheme("float32") for n, s in shapes.items() if len(s) != 2}
    want = allocate(sensitivity, shapes, fixed, bpw=4.7)  # type: ignore[arg-type]
    got = {t["name"]: t["scheme"] for t in found["tensors"] if len(t["shape"]) == 2}
    assert got == {name: str(scheme) for name, scheme in want.schemes.items()}
    assert found["target"]["chosen"][:2] == [want.chosen.nbytes, round(want.chosen.bpw, 4)]
    # the front it was chosen from is shown too
    assert main([*again, "--force"]) == 0
    out = capsys.readouterr().out
    (chosen,) = (line for line in out.splitlines() if line.endswith("chosen"))
    assert f"{want.chosen.bpw:.2f}" in chosen


def test_bits_are_chosen_for_the_memory_of_a_device(
    kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def device(usable: int) -> Path:
        path = tmp_path / "small.toml"
        path.write_text(
            f'[small]\ntitle = "Small"\nkind = "generic"\nusable_bytes = "{usable / 1024} KiB"\n'
            'sources.usable_bytes = "estimate: for a test"\n',
            "utf-8",
        )
        return path

    known, ample = facts(DEMO), 400 << 20
    context = known.config.context
    beside = ample - budget_bytes(known, find(str(device(ample))), context)
    wanted = known.quantized(Recipe.from_options("w4-g32-mse")).weights_bytes
    room = int(0.85 * wanted)
    small, out = device(beside + room), tmp_path / "m.edgeq"
    args = ["quantize", str(DEMO), "-o", str(out), "--preset", "w4-g32-mse", "--no-card",
            "--target-device", str(small), "--sensitivity", str(kept),
            "--format", "json"]  # fmt: skip
    assert main(args) == 0
    said = capsys.readouterr()
    assert "would not fit" in said.err
    found = json.loads(said.out)
    assert 0.85 * room <= found["file_bytes"] <= room
    assert len({t["scheme"] for t in found["tensors"] if "proj" in t["name"]}) > 1
    made = plan(facts(out), find(str(small)), context=context)
    made.require()


def test_the_summary_says_what_was_compared_and_written(
    kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["quantize", str(DEMO), "-o", str(tmp_path / "m.edgeq"), "--preset", "w4-g32-mse",
            "--target-bpw", "4.7", "--sensitivity", str(kept), "--no-card", "--force"]  # fmt: skip
    assert main(args) == 0
    said = capsys.readouterr().out
    assert "(mixed, " in said.splitlines()[0]
    assert "not compared with a uniform recipe: no calibration text was given" in said
    story = kept.with_name("text.txt")
    assert main([*args, "--calib", str(story), "--calib-windows", "2"]) == 0
    said = capsys.readouterr().out
    assert "measured on the calibration text, KL in nats per token:" in said
    (written,) = (line for line in said.splitlines() if line.endswith("(written)"))
    label = written.split(maxsplit=1)[1].removesuffix("  (written)")
    target = load_artifact(tmp_path / "m.edgeq").provenance["target"]
    assert label == target["kept"]
    first = said.splitlines()[0]
    assert ("(mixed, " in first) == (label == "mixed")
    assert ("so the uniform recipe was written" in said) == (label != "mixed")


def test_sensitivities_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    good = Sensitivity("kl", "mse", 1, "", "", {"a": {"w4-g32": 0.5}}).to_json()
    for wrong, what in ((good.replace("0.5", "NaN"), "not finite"),
                        (good.replace('"kl"', '"klm"'), "unknown mode 'klm'")):  # fmt: skip
        path.write_text(wrong, "utf-8")
        with pytest.raises(FormatError, match=what):
            Sensitivity.load(path)
