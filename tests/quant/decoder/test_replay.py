"""Layer replay against the reference: the same numbers, one group of matrices at a time."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from edgeq.core.errors import UsageError
from edgeq.formats.tensor import FloatTensor, Tensor
from edgeq.model.formulas import Array, dense
from edgeq.model.model import Model
from edgeq.model.recording import linear_groups
from edgeq.model.reference import Reference
from edgeq.quant.decoder import replayed_experts
from edgeq.quant.decoder import replayed_model as module
from edgeq.quant.decoder.fixed_order import FixedOrderReference, fixed_order_dense
from edgeq.quant.decoder.replay import Replay, ReplayState
from edgeq.quant.decoder.static import dynamic_linear
from tests.families import CALIBRATED, quantized, random_model, tiny_config

SIZES = (17, 1, 40)
"""Tokens of the windows; longer and shorter than the families' sliding windows."""


@pytest.fixture(autouse=True)
def _experts_have_their_own_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few, as in the reference."""
    monkeypatch.setattr(replayed_experts, "LEAST_TOKENS", 1)


def windows(vocab: int = 101, seed: int = 3) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab, size) for size in SIZES]


def watched(model: Model, tokens: list[np.ndarray]) -> tuple[dict[str, list[Array]], list[Array]]:
    """Each matrix's inputs and the logits, window by window, as the reference has them."""
    seen: dict[str, list[Array]] = {}

    def watch(name: str, x: Array, weight: Tensor) -> Array:
        seen[name][-1] = x
        return dense(name, x, weight)

    reference, logits = Reference(model, linear=watch), []
    for window in tokens:
        for name, (_, k) in model.config.linears():
            # what stays is that no token of a window goes through an expert
            seen.setdefault(name, []).append(np.empty((0, k), np.float32))
        logits.append(reference.forward(window))
    return seen, logits


def assert_close(got: list[Array], want: list[Array]) -> None:
    assert len(got) == len(SIZES)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == np.float32
        np.testing.assert_allclose(a, b, atol=5e-5)


def noisy(w: Array, seed: int) -> Array:
    return (w + 0.05 * np.random.default_rng(seed).normal(size=w.shape)).astype(np.float32)


@pytest.mark.parametrize("family", CALIBRATED)
def test_inputs_and_logits_are_the_reference_s(family: str) -> None:
    model = random_model(tiny_config(family))
    inputs, logits = watched(model, windows())
    replay = Replay(model, windows())
    assert replay.n_tokens == sum(SIZES)
    order = []
    for step in replay:
        order.append(step.group)
        for name in step.group.linears:
            assert_close(list(step.inputs()), inputs.pop(name))
            np.testing.assert_array_equal(step.weights[name], model.tensors[name].numpy())
    assert tuple(order) == linear_groups(model.config)
    # every matrix has its group, but an embedding that is not the head, which multiplies nothing
    assert set(inputs) <= {"model.embed_tokens.weight"} - {model.config.head_name}
    assert_close(list(replay.logits()), logits)


@pytest.mark.parametrize("keep", [module.KEEP_BYTES, 0])
@pytest.mark.parametrize("family", CALIBRATED)
def test_replaced_weights_are_those_of_a_model_that_holds_them(
    family: str, keep: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "KEEP_BYTES", keep)
    model = random_model(tiny_config(family))
    placed: dict[str, Tensor] = {}
    if model.config.tied:  # the embedding is replaced with it
        head = model.config.head_name
        placed[head] = FloatTensor("float32", noisy(model.tensors[head].numpy(), 1))
    tensors = {**model.tensors, **placed}
    replay = Replay(model, windows(), float_inputs=True, replaced=placed)
    before, plain_logits = watched(model, windows())
    during: dict[str, list[Array]] = {}
    for step in replay:
        for name in step.group.linears:
            if step.group.expert is None:  # an expert's are the tokens of the changed model
                assert_close(list(step.float_inputs()), before[name])
            during[name] = list(step.inputs())
            if name not in placed:
                tensors[name] = FloatTensor("float32", noisy(step.weights[name], 2))
                step.replace(name, tensors[name].numpy())
            np.testing.assert_array_equal(step.weights[name], tensors[name].numpy())
            assert_close(list(step.inputs()), during[name])  # its own inputs stay
    after, logits = watched(replace(model, tensors=tensors), windows())
    for name, seen in after.items():
        if name not in during:
            continue
        assert_close(during[name], seen)
    assert_close(list(replay.logits()), logits)
    assert np.abs(logits[0] - plain_logits[0]).max() > 1e-2  # there was something to notice


def test_both_models_give_an_expert_the_same_tokens() -> None:
    """Those that the replayed model's router chooses, or all where these are few."""
    model = random_model(tiny_config("qwen3_moe"))
    replay = Replay(model, windows(), float_inputs=True)
    changed, counts = 0, set()
    for step in replay:
        for name in step.group.linears:
            step.replace(name, noisy(step.weights[name], 5))
        if step.group.expert is None:
            continue
        for x, x_float in zip(step.inputs(), step.float_inputs(), strict=True):
            assert x.shape == x_float.shape
            changed += int(np.abs(x - x_float).sum() > 0)
            counts.add(len(x))
    assert changed
    assert len(counts) > 3


def test_an_expert_of_few_tokens_has_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replayed_experts, "LEAST_TOKENS", 1000)
    model = random_model(tiny_config("granitemoe"))
    replay = Replay(model, windows())
    for step in replay:
        if step.group.expert is not None:
            assert tuple(len(x) for x in step.inputs()) == SIZES
    # what a layer computes is not changed by it
    assert_close(list(replay.logits()), watched(model, windows())[1])


def test_a_quantized_model_is_replayed_too() -> None:
    model = quantized(random_model(tiny_config("qwen3")), "w4-g32")
    replay = Replay(model, windows())
    for _ in replay:
        pass
    assert_close(list(replay.logits()), watched(model, windows())[1])


@pytest.mark.parametrize("family", CALIBRATED)
def test_a_replay_computes_with_the_product_it_is_given(family: str) -> None:
    """Rounded inputs, and the unreplaced stream as it was."""
    model = random_model(tiny_config(family))
    replay = Replay(model, windows(), float_inputs=True, linear=dynamic_linear)
    before, _ = watched(model, windows())
    for step in replay:
        if step.group.expert is None:
            assert_close(list(step.float_inputs()), before[step.group.linears[0]])
    # the same sums: another order would round some inputs to another integer
    reference = FixedOrderReference(model, linear=dynamic_linear(fixed_order_dense))
    assert_close(list(replay.logits()), [reference.forward(window) for window in windows()])


@pytest.mark.parametrize("layer", [1, 2])
def test_a_replay_goes_on_where_another_was(layer: int) -> None:
    model = random_model(tiny_config("llama"))
    whole = Replay(model, windows(), float_inputs=True)
    state: ReplayState | None = None
    want: list[list[Array]] = []
    for step in whole:
        if step.group.layer == layer and state is None:
            state = whole.state()
        if step.group.layer == 0 and step.group.kind == "attn_in":
            step.replace(step.group.linears[0], noisy(step.weights[step.group.linears[0]], 3))
        if state is not None:
            want += [list(step.inputs()), list(step.float_inputs())]
    assert state is not None
    assert state.layer == layer
    rest = Replay(model, windows(), float_inputs=True, state=state)
    got: list[list[Array]] = []
    for step in rest:
        got += [list(step.inputs()), list(step.float_inputs())]
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)
    for x, y in zip(rest.logits(), whole.logits(), strict=True):
        np.testing.assert_array_equal(x, y)


def test_weights_of_one_group_at_a_time() -> None:
    model = random_model(tiny_config("llama", layers=3))
    replay = Replay(model, windows(), float_inputs=True)
    for step in replay:
        for name in step.group.linears:
            assert step.weights[name] is step.weights[name]
        held = {*replay._main.weights, *replay._float.weights}  # type: ignore[union-attr]
        assert held <= set(step.group.linears) | {model.config.head_name}
    assert len(step.weights) == 1


def test_progress_counts_the_groups() -> None:
    told: list[tuple[str, int, int]] = []
    model = random_model(tiny_config("phi3"))
    for _ in Replay(model, windows(), progress=lambda *call: told.append(call)):
        pass
    assert told[0] == ("layer 0 attn_in", 0, 9)
    assert [call[1] for call in told] == list(range(10))
    assert told[-2:] == [("head", 8, 9), ("logits", 9, 9)]


def test_what_is_over_is_over() -> None:
    model = random_model(tiny_config("llama"))
    replay = Replay(model, windows())
    steps = iter(replay)
    first = next(steps)
    half = first.inputs()
    next(half)
    next(steps)
    with pytest.raises(UsageError, match="layer 0 attn_in is over"):
        next(half)
    with pytest.raises(UsageError, match="is over"):
        first.weights[first.group.linears[0]]
    with pytest.raises(UsageError, match="is over"):
        first.replace(first.group.linears[0], np.zeros((48, 44), np.float32))
    with pytest.raises(UsageError, match="at layer 0 attn_out"):
        replay.state()
    with pytest.raises(UsageError, match="has steps left"):
        next(replay.logits())
    with pytest.raises(UsageError, match="was iterated already"):
        next(iter(replay))


def test_wrong_use_is_explained() -> None:
    model = random_model(tiny_config("llama"))
    with pytest.raises(UsageError, match="no windows"):
        Replay(model, [])
    with pytest.raises(UsageError, match="at least one"):
        Replay(model, [np.array([], np.int64)])
    with pytest.raises(UsageError, match="token 101 is outside the vocabulary of 101"):
        Replay(model, [np.array([3, 101])])
    with pytest.raises(UsageError, match="65 tokens, and the model supports 64"):
        Replay(model, [np.zeros(65, np.int64)])
    wrong = FloatTensor("float32", np.zeros(3, np.float32))
    with pytest.raises(UsageError, match="no tensor nothing"):
        Replay(model, windows(), replaced={"nothing": wrong})
    with pytest.raises(UsageError, match=r"has the shape \[44\] and cannot be replaced by \[3\]"):
        Replay(model, windows(), replaced={"model.norm.weight": wrong})
    replay = Replay(model, windows())
    with pytest.raises(UsageError, match="not begun"):
        replay.state()
    step = next(iter(replay))
    with pytest.raises(UsageError, match="float_inputs=True"):
        step.float_inputs()
    with pytest.raises(UsageError, match="is not in layer 0 attn_in"):
        step.replace("model.layers.0.mlp.down_proj.weight", np.zeros((44, 76), np.float32))
    with pytest.raises(UsageError, match=r"cannot be replaced by \[2, 2\]"):
        step.replace(step.group.linears[0], np.zeros((2, 2), np.float32))
    with pytest.raises(KeyError):
        step.weights["lm_head.weight"]


def test_groups_cover_every_matrix_once_in_order() -> None:
    config = tiny_config("mistral")
    found = linear_groups(config)
    names = [name for group in found for name in group.linears]
    assert len(names) == len(set(names))
    assert set(names) == {name for name, _ in config.linears()} - {"model.embed_tokens.weight"}
    assert all(a.layer <= b.layer for a, b in pairwise(found))
    assert (found[-1].layer, found[-1].kind) == (config.layers, "head")
