"""Training through the rounding: the torch decoder, fake quantization, and what is written."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeq.core.errors import MissingDependencyError, SchemeError, UsageError
from edgeq.evaluation.text import kl_divergence, log_softmax, perplexity
from edgeq.formats.schemes import QuantScheme, Scheme, parse_scheme
from edgeq.formats.tensor import QuantTensor
from edgeq.importers import load
from edgeq.model.model import Model
from edgeq.model.reference import Reference
from edgeq.quant.decoder.calibrate import CalibrationText, cut_windows
from edgeq.quant.recipe import Recipe
from edgeq.quant.rounders.hessian import Hessian
from edgeq.quant.rounders.qparams import snap_scales
from edgeq.quant.rounders.rounding import quantize_tensor
from edgeq.quant.training import TRAINING_METHODS, train
from edgeq.quant.training.adaround import SoftRounding
from edgeq.quant.training.decoder import TorchDecoder
from edgeq.quant.training.fake import FakeQuant
from edgeq.quant.training.loop import Teacher, batches, loss_of, padded, rate_at
from edgeq.quant.training.settings import TrainingSettings
from edgeq.quant.training.student import Student, float_weights
from edgeq.runtime.tokenizer import Tokenizer
from tests.conftest import need
from tests.families import FAMILIES, random_model, rounded, scheme_of, tiny_config

torch = pytest.importorskip("torch")

SCHEMES = (
    "w4-g32",
    "w3-g32",
    "w2-g16",
    "w8-channel",
    "w4-channel-asym",
    "w3-g16-asym",
    "w4-tensor",
    "w4-g32-palette",
    "w2-g32-palette",
)


def text(model: Model, n: int = 6, length: int = 24, seed: int = 5) -> CalibrationText:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, model.config.vocab, n * (length - 1))
    return cut_windows(tokens, context=length, bos=1)


def assigned(model: Model, preset: str) -> dict[str, Scheme]:
    recipe = Recipe.from_options(preset=preset)
    return recipe.assign({name: tensor.shape for name, tensor in model.tensors.items()})


def started(model: Model, schemes: Mapping[str, Scheme]) -> dict[str, QuantTensor]:
    return {
        name: begun(model.tensors[name].numpy(), scheme)
        for name, scheme in schemes.items()
        if isinstance(scheme, QuantScheme)
    }


def begun(w: NDArray[np.float32], scheme: Scheme | str) -> QuantTensor:
    """The matrix rounded, to begin with."""
    wanted = parse_scheme(scheme) if isinstance(scheme, str) else scheme
    assert isinstance(wanted, QuantScheme)
    return rounded(w, wanted) if wanted.codebook else quantize_tensor(w, wanted, "mse")


def divergence(model: Model, base: Model, windows: CalibrationText) -> float:
    """Mean KL of the model from the base over all positions."""
    both = [
        [log_softmax(Reference(m).forward(window)) for window in windows.windows]
        for m in (base, model)
    ]
    return float(np.mean([kl_divergence(p, q).mean() for p, q in zip(*both, strict=True)]))


def matrix(n: int = 19, k: int = 76, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(n, k)).astype(np.float32) * np.float32(0.1)


# --- the decoder ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_torch_decoder_is_the_reference(family: str) -> None:
    model = random_model(tiny_config(family))
    windows = np.random.default_rng(1).integers(0, model.config.vocab, (3, 21))
    with torch.no_grad():
        logits, states = TorchDecoder(model.config, 30)(
            float_weights(model), torch.from_numpy(windows)
        )
    assert len(states) == model.config.layers
    for window, found in zip(windows, logits.numpy(), strict=True):
        np.testing.assert_allclose(found, Reference(model).forward(window), atol=1e-4)


# --- fake quantization ------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_training_begins_at_the_tensor_it_is_given(scheme: str) -> None:
    w = matrix()
    start = begun(w, scheme)
    fake = FakeQuant(w, start)
    packed = fake.tensor()
    (scales, zeros), (given, given_zeros) = packed.row_params(), start.row_params()
    np.testing.assert_array_equal(scales, snap_scales(given))
    np.testing.assert_array_equal(zeros, given_zeros)
    np.testing.assert_array_equal(packed.codes(), start.codes())
    if start.palette is not None:
        np.testing.assert_array_equal(packed.palette, start.palette)


def test_training_keeps_the_sign_of_scales() -> None:
    w, hessian = matrix(32, 96), Hessian(96)
    hessian.add(matrix(300, 96, seed=1))
    start = quantize_tensor(
        w,
        parse_scheme("w4-g32"),
        "gptq",
        hessian=hessian,
        signed_scales=True,  # type: ignore[arg-type]
    )
    scales, _ = start.row_params()
    assert (scales < 0).any()
    fake = FakeQuant(w, start)
    np.testing.assert_array_equal(fake.tensor().numpy(), start.numpy())
    with torch.no_grad():
        fake.growth += 0.2
    grown, _ = fake.tensor().row_params()
    np.testing.assert_allclose(grown / scales, np.exp(0.2), rtol=0.01)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_packed_is_what_training_saw(scheme: str) -> None:
    fake = FakeQuant(matrix(), begun(matrix(), scheme))
    rng = np.random.default_rng(3)
    with torch.no_grad():
        for kind, spread in (("latents", 3.0), ("growth", 0.3), ("zeros", 2.0), ("palette", 9.0)):
            if (parameter := fake.parameters().get(kind)) is not None:
                parameter += torch.from_numpy(rng.normal(size=parameter.shape) * spread).float()
    packed = fake.tensor()
    np.testing.assert_array_equal(packed.numpy(), fake.weight().detach().numpy())
    scales, _ = packed.row_params()
    np.testing.assert_array_equal(scales, snap_scales(scales))
    assert packed.scheme == parse_scheme(scheme)


def test_a_scale_has_the_gradient_of_lsq() -> None:
    w = matrix(16, 32)
    start = begun(w, "w3-g32")
    fake = FakeQuant(w, start)
    with torch.no_grad():
        fake.latents += torch.from_numpy(matrix(16, 32, 9)).reshape(16, 1, 32) * 30
    steps = fake.latents.detach().numpy()[:, 0]
    fake.weight().sum().backward()
    levels = np.clip(np.rint(steps), -4, 3)
    inside = (steps >= -4.5) & (steps <= 3.5)
    wanted = np.where(inside, levels - steps, levels).sum(axis=1)  # equation 3, by d/d scale
    scales, _ = fake.tensor().row_params()
    # growth is the scale's logarithm
    got = fake.growth.grad.numpy() / scales
    np.testing.assert_allclose(got[:, 0], wanted, rtol=1e-4, atol=1e-4)


def test_a_weight_that_is_cut_off_has_no_gradient() -> None:
    fake = FakeQuant(matrix(16, 32), begun(matrix(16, 32), "w4-g32"))
    with torch.no_grad():
        fake.latents[:, :, ::2] = 9.0
    fake.weight().sum().backward()
    gradient = fake.latents.grad.numpy()
    assert not gradient[:, :, ::2].any()
    assert (gradient[:, :, 1::2] > 0).all()


# --- learned rounding -------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_soft_rounding_settles_on_a_neighbor(scheme: str) -> None:
    w = matrix()
    fake = FakeQuant(w, begun(w, scheme))
    soft = SoftRounding(fake)
    with torch.no_grad():
        first = torch.from_numpy(np.abs(soft.weight().numpy() - w))
        hard = torch.from_numpy(np.abs(fake.weight().numpy() - w))
        assert first.mean() < 0.7 * hard.mean()  # at first a weight is where the float one is
        assert float(soft.regularizer(2.0)) > 0.01
        draw = torch.rand(soft.variables.shape, generator=torch.Generator().manual_seed(0))
        soft.variables.copy_(torch.where(draw < 0.5, -99.0, 99.0))
        assert float(soft.regularizer(2.0)) == 0
        wanted = soft.weight().numpy()
    soft.settle()
    np.testing.assert_array_equal(fake.tensor().numpy(), wanted)


def layer_error(model: Model, base: Model, windows: CalibrationText) -> float:
    """Squared error of the last hidden states, relative."""
    decoder = TorchDecoder(model.config, 64)
    ids = torch.from_numpy(padded(windows.windows))
    with torch.no_grad():
        ours, theirs = (decoder(float_weights(m), ids)[1][-1] for m in (model, base))
    return float((ours - theirs).square().mean() / theirs.square().mean())


def test_learned_rounding_keeps_more_of_the_layers_output() -> None:
    model = random_model(tiny_config("llama"))
    schemes, windows = assigned(model, "w3-g32"), text(model, 12)
    start = started(model, schemes)
    trained = train(
        model, schemes, windows, method="adaround", steps=60, learning_rate=0.05, init=start
    )
    before, after = (
        replace(model, tensors={**model.tensors, **tensors}) for tensors in (start, trained)
    )
    assert layer_error(after, model, windows) < 0.8 * layer_error(before, model, windows)
    for name, tensor in start.items():
        found = trained[name]
        assert isinstance(found, QuantTensor)
        moved = np.abs(found.codes().astype(int) - tensor.codes())
        assert moved.max() <= 1
        np.testing.assert_array_equal(found.scales, tensor.scales)
        if "embed" in name:
            assert not moved.any()


def test_learned_rounding_passes_float_layers_by() -> None:
    model = random_model(tiny_config("llama"))
    schemes = assigned(model, "w3-g32")
    schemes |= {n: parse_scheme("f32") for n in schemes if ".layers.0." in n}
    start = started(model, schemes)
    trained = train(
        model, schemes, text(model), method="adaround", steps=20, learning_rate=0.5, init=start
    )
    assert not any(".layers.0." in n for n, t in trained.items() if isinstance(t, QuantTensor))
    name = "model.layers.1.mlp.up_proj.weight"
    assert not np.array_equal(trained[name].numpy(), start[name].numpy())


# --- from end to end --------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_runs_what_was_trained(family: str) -> None:
    model = random_model(tiny_config(family))
    schemes = assigned(model, "w4-g32")
    schemes |= {n: scheme_of("w2-g16") for n in schemes if n.endswith("gate_proj.weight")}
    schemes |= {n: parse_scheme("bf16") for n in schemes if n.endswith("up_proj.weight")}
    student = Student(model, schemes, started(model, schemes))
    with torch.no_grad():
        for parameters in student.parameters().values():
            for parameter in parameters:
                parameter += 0.01
    window = np.arange(20)
    tensors = {n: t for n, t in model.tensors.items() if not n.endswith("up_proj.weight")}
    held = {
        n: rounded_to_bf16(t.numpy())
        for n, t in model.tensors.items()
        if n.endswith("up_proj.weight")
    }
    written = replace(model, tensors={**tensors, **held, **student.tensors()})
    with torch.no_grad():
        logits, _ = TorchDecoder(model.config, 20)(
            student.weights(), torch.from_numpy(window)[None]
        )
    np.testing.assert_allclose(Reference(written).forward(window), logits[0].numpy(), atol=1e-4)


def rounded_to_bf16(values: NDArray[np.float32]) -> Any:
    from edgeq.formats.tensor import FloatTensor, float32_to_bf16

    return FloatTensor("bfloat16", float32_to_bf16(values))


@pytest.mark.parametrize("preset", ["w3-g32", "w2-g16", "w4-channel-asym"])
def test_distillation_brings_the_model_nearer_to_its_teacher(preset: str) -> None:
    model = random_model(tiny_config("qwen2"))
    schemes, windows = assigned(model, preset), text(model, 12)
    start = started(model, schemes)
    trained = train(model, schemes, windows, steps=40, batch=4, init=start, hidden=0.5)
    before = divergence(replace(model, tensors={**model.tensors, **start}), model, windows)
    after = divergence(replace(model, tensors={**model.tensors, **trained}), model, windows)
    assert after < 0.6 * before
    assert set(trained) == set(model.tensors)  # norms and biases too
    assert all(trained[n].scheme == s for n, s in schemes.items() if isinstance(s, QuantScheme))


def test_fine_tuning_learns_the_text() -> None:
    model = random_model(tiny_config("llama"))
    schemes, windows = assigned(model, "w4-g32"), text(model, 4)
    trained = train(model, schemes, windows, method="qat", steps=40, batch=4, learning_rate=0.1)
    after = replace(model, tensors={**model.tensors, **trained})
    tokens = np.concatenate([w[1:] for w in windows.windows])
    score = {m: perplexity(Reference(m).forward, tokens, context=24, bos=1) for m in (model, after)}
    assert score[after].nll_per_token < score[model].nll_per_token - 0.3


@pytest.mark.parametrize("method", TRAINING_METHODS)
def test_a_seed_repeats_a_run(method: str) -> None:
    model = random_model(tiny_config("llama"))
    schemes, windows = assigned(model, "w3-g32"), text(model)
    told: list[tuple[str, int, int]] = []

    def run(seed: int) -> dict[str, NDArray[np.float32]]:
        told.clear()
        trained = train(
            model, schemes, windows, method=method, steps=6, batch=2, seed=seed,
            learning_rate=0.5, progress=lambda *at: told.append(at),
        )  # fmt: skip
        return {name: tensor.numpy() for name, tensor in trained.items()}

    first, again, other = run(1), run(1), run(2)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert any(not np.array_equal(first[name], other[name]) for name in first)
    total = 6 * (model.config.layers if method == "adaround" else 1)
    label = "rounding" if method == "adaround" else "training"
    assert told == [(label, i + 1, total) for i in range(total)]


def test_a_teacher_may_be_another_model() -> None:
    model = random_model(tiny_config("llama"))
    teacher = random_model(tiny_config("qwen3", hidden=60), seed=3)
    schemes, windows = assigned(model, "w8-channel"), text(model)
    trained = train(model, schemes, windows, steps=40, learning_rate=1.0, teacher=teacher)
    after = replace(model, tensors={**model.tensors, **trained})
    assert divergence(after, teacher, windows) < divergence(model, teacher, windows)
    with pytest.raises(UsageError, match="hidden states of another shape"):
        train(model, schemes, windows, steps=1, teacher=teacher, hidden=1.0)
    small = random_model(tiny_config("llama", vocab=33))
    with pytest.raises(UsageError, match="33 tokens in its vocabulary"):
        train(model, schemes, windows, steps=1, teacher=small)


def test_windows_of_other_lengths_are_not_trained_past_their_end() -> None:
    model = random_model(tiny_config("llama"))
    schemes = assigned(model, "w3-g32")
    whole = text(model, 2, 24).windows
    uneven = CalibrationText((whole[0], whole[1][:9]), "", 24, 1)
    alone = replace(uneven, windows=(whole[1][:9],))
    # the loss of both at once is the mean over positions of the two losses apart
    start = started(model, schemes)
    before = replace(model, tensors={**model.tensors, **start})
    got = first_loss(model, schemes, start, uneven)
    p, q = ([log_softmax(Reference(m).forward(w)) for w in uneven.windows] for m in (model, before))
    wanted = np.concatenate([kl_divergence(a, b) for a, b in zip(p, q, strict=True)]).mean()
    assert got == pytest.approx(wanted, rel=1e-3)
    assert first_loss(model, schemes, start, alone) == pytest.approx(
        kl_divergence(p[1], q[1]).mean(), rel=1e-3
    )


def first_loss(
    model: Model,
    schemes: Mapping[str, Scheme],
    start: dict[str, QuantTensor],
    text_: CalibrationText,
) -> float:
    decoder = TorchDecoder(model.config, 64)
    student = Student(model, schemes, start)
    teacher = Teacher(decoder, float_weights(model))
    ids = torch.from_numpy(padded(text_.windows))
    return float(loss_of(student.weights(), decoder, teacher, ids, 0.0).detach())


def test_every_window_is_seen_before_any_is_seen_again() -> None:
    windows = [np.full(3, i) for i in range(7)]
    seen = [int(row[0]) for batch in batches(windows, 3, 14, seed=0) for row in batch]
    assert len(seen) == 42
    assert all(sorted(seen[i : i + 7]) == list(range(7)) for i in range(0, 42, 7))


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [rate_at(step, 200) for step in range(200)]
    assert rates[0] < 0.2
    assert max(rates) > 0.95
    assert rates[-1] < 0.001
    assert rate_at(0, 1) == 1.0


# --- refusals ---------------------------------------------------------------------------------


def test_without_torch_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(tiny_config("llama"))
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "torch" else find(name, *a)
    )
    with pytest.raises(MissingDependencyError, match=r"edgeq\[train\]"):
        train(model, assigned(model, "w4-g32"), text(model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "distil"}, "did you mean 'distill'"),
        ({"steps": 0}, "steps is 0"),
        ({"batch": 0}, "batch is 0"),
        ({"learning_rate": -1.0}, "learning_rate is -1"),
        ({"hidden": -1.0}, "hidden is -1"),
        ({"method": "qat", "hidden": 1.0}, "leave it out"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TrainingSettings(**change)


def test_what_cannot_be_trained_is_refused() -> None:
    model = random_model(tiny_config("llama"))
    schemes, windows = assigned(model, "w4-g32"), text(model)
    with pytest.raises(UsageError, match="no text"):
        train(model, schemes, replace(windows, windows=()))
    with pytest.raises(SchemeError, match="no scheme for tensor"):
        train(model, {}, windows)
    with pytest.raises(SchemeError, match="nothing to train"):
        train(model, assigned(model, "bf16"), windows)
    with pytest.raises(SchemeError, match="same recipe"):
        train(model, schemes, windows, init=started(model, assigned(model, "w3-g32")))
    done = replace(model, tensors={**model.tensors, **started(model, schemes)})
    with pytest.raises(UsageError, match="already quantized"):
        train(done, schemes, windows)


def test_a_diverging_run_says_so() -> None:
    model = random_model(tiny_config("llama"))
    with pytest.raises(UsageError, match="use a learning_rate below 1e"):
        train(model, assigned(model, "w4-g32"), text(model), steps=20, learning_rate=1e30)


# --- a real model -----------------------------------------------------------------------------


@pytest.mark.slow
def test_distillation_at_three_bits_beats_least_squares_on_other_text() -> None:
    model = load(need("models/stories260K"))
    tokenizer = Tokenizer(model.files)
    story = need("data/text_tinystories_train/tinystories_train_2MB.txt").read_text()
    bos = tokenizer.bos
    tokens = tokenizer.encode(story[:150_000], add_bos=False)
    windows = cut_windows(np.array(tokens), context=128, bos=bos)
    schemes = assigned(model, "w3-g32")
    start = started(model, schemes)
    trained = train(model, schemes, windows, steps=30, batch=8, init=start, threads=1)
    test = tokenizer.encode(story[-6000:], add_bos=False)
    base = Reference(model, keep=True)
    scores = [
        perplexity(
            Reference(replace(model, tensors={**model.tensors, **tensors}), keep=True).forward,
            test, context=128, bos=bos, base=base.forward,
        )
        for tensors in (start, trained)
    ]  # fmt: skip
    before, after = scores
    assert after.nll_per_token < before.nll_per_token - 0.05
    assert after.kl_mean is not None
    assert before.kl_mean is not None
    assert after.kl_mean < 0.7 * before.kl_mean
