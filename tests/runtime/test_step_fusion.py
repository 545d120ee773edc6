"""The compiled engine's steps: the same few for every family, and refusals by name."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from edgeq.core.errors import UnsupportedError
from edgeq.model.block import BlockSpec
from edgeq.model.recording import RecordedOperation, RecordingBuilder, record
from edgeq.model.rope_spec import RopeSpec
from edgeq.runtime.kernels.abi import Step
from edgeq.runtime.step_fusion import ProgramStep, fuse
from tests.families import FAMILIES, tiny_config, with_blocks

LAYER = [
    ("NORM", "norm_in"), ("LINEARS", "qkv"), ("ATTENTION", "attention"), ("QUANTIZE", "o_proj"),
    ("LINEARS", "o_proj"), ("NORM", "norm_ffn"), ("GATED", "gate_up"), ("QUANTIZE", "down_proj"),
    ("LINEARS", "down_proj"),
]  # fmt: skip


ROPE = RopeSpec(10000.0, 4)


CONVOLUTION = [
    ("NORM", "norm_in"), ("LINEARS", "in_proj"), ("SHORT_CONV", "short_conv"), *LAYER[3:],
]  # fmt: skip


MIXTURE = [("LINEARS", "router"), ("EXPERTS", "experts")]
DELTA_NET = [
    ("NORM", "norm_in"), ("LINEARS", "in_proj"), ("DELTA_NET", "delta_net"), *LAYER[3:],
]  # fmt: skip
GATED_ATTENTION = [*LAYER[:3], ("OUTPUT_GATE", "output_gate"), *LAYER[3:]]


OWN_INPUT = [
    ("NORM", "norm_own"), ("LINEARS", "input_gate"), ("OWN_INPUT", "own_input"),
    ("LINEARS", "input_proj"),
]  # fmt: skip
ALL_INPUTS = [
    ("QUANTIZE", "layer_proj"), ("LINEARS", "layer_proj"), ("LAYER_INPUTS", "layer_inputs"),
]  # fmt: skip


def expected_steps(block: BlockSpec) -> list[tuple[str, str]]:
    attention = GATED_ATTENTION if block.output_gate else LAYER
    kinds = {"attention": attention, "short_conv": CONVOLUTION, "gated_delta_net": DELTA_NET}
    steps = kinds[block.mixer]
    return steps if block.experts is None else [*steps[:-3], *MIXTURE]


def names(steps: list[ProgramStep], layer: int | None) -> list[tuple[str, str]]:
    return [(step.kind.name, step.label) for step in steps if step.layer == layer]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_takes_few_steps_a_layer(family: str) -> None:
    config = tiny_config(family)
    layers = {i: expected_steps(block) for i, block in enumerate(config.blocks)}
    if not config.blocks[0].norm_before:  # the embedding is quantized as it is
        layers[0] = [("QUANTIZE", "norm_in"), *LAYER[1:]]
    own = OWN_INPUT if config.layer_input else []
    steps = fuse(record(config))
    for layer in range(config.layers):
        assert names(steps, layer) == [*layers[layer], *own]
    inputs = ALL_INPUTS if config.layer_input else []
    outer = [("EMBED", "embed"), *inputs, ("NORM", "final_norm"), ("HEAD", "head")]
    assert names(steps, None) == outer
    linears = [name for step in steps for name in step.linears]
    expected = Counter(name for name, _ in config.linears())
    assert Counter(linears) == expected + Counter([config.head_name] if config.tied else [])
    norms = [n for s in steps for n in (s.norm, s.post_norm, s.q_norm, s.k_norm) if n]
    assert sorted(norms) == sorted(name for name, _ in config.norms())


def qkv(b: RecordingBuilder, h: RecordedOperation) -> list[RecordedOperation]:
    return [b.linear(f"layers.0.{x}", h, f"{x}.weight") for x in "qkv"]


def test_norms_only_after_branches() -> None:
    """The stream itself is quantized for the linears, and a branch is normed before it is added."""
    b = RecordingBuilder()
    x = b.embed("embed")
    q, k, v = qkv(b, x)
    q, k = b.norm("layers.0.q_norm", q, "qn"), b.norm("layers.0.k_norm", k, "kn")
    q, k, v = (b.heads(f"{name.name}_heads", name, 2) for name in (q, k, v))
    mix = b.attend("layers.0.mix", 0, q, k, v)
    branch = b.norm("layers.0.attn_post_norm", b.linear("layers.0.o", mix, "o"), "post")
    x = b.add("layers.0.attn_out", x, branch)
    gate, up = b.linear("layers.0.gate", x, "gate"), b.linear("layers.0.up", x, "up")
    act = b.gated("layers.0.act", gate, up)
    x = b.add("layers.0.out", x, b.linear("layers.0.down", act, "down"))
    b.logits("logits", b.norm("final_norm", x, "last"), "head")
    steps = fuse(b.operations)
    assert names(steps, 0) == [("QUANTIZE", "norm_in"), *LAYER[1:]]
    attention = next(step for step in steps if step.kind == Step.ATTENTION)
    assert attention.norm_spans_heads
    assert attention.rope is None
    assert (attention.q_norm, attention.k_norm) == ("qn", "kn")
    stream = next(step for step in steps if step.label == "norm_ffn")
    assert (stream.norm, stream.post_norm, stream.branch) == ("", "post", "branch")
    gated = next(step for step in steps if step.kind == Step.GATED)
    assert (gated.x, gated.linears) == ("x", ("gate", "up"))


def test_factors_and_caps_are_part_of_steps() -> None:
    config = replace(tiny_config("gemma3"), residual_scale=0.25, logit_scale=0.5, logit_softcap=7.0)
    config = with_blocks(config, qk_norm_last=True)
    steps, plain = fuse(record(config)), fuse(record(tiny_config("gemma3")))
    assert [(s.kind, s.label) for s in steps] == [(s.kind, s.label) for s in plain]
    added = [step for step in steps if step.branch]
    assert [step.scale for step in added] == [0.25] * 2 * config.layers
    assert [step.scale for step in steps if step.kind == Step.NORM and not step.branch] == [1.0]
    assert (steps[-1].scale, steps[-1].cap) == (0.5, 7.0)
    assert all(step.norm_last for step in steps if step.kind == Step.ATTENTION)
    # absent, they leave every step as it was
    assert {(step.scale, step.cap, step.norm_last) for step in plain} == {(1.0, 0.0, False)}


def heads_of(b: RecordingBuilder, values: list[RecordedOperation]) -> list[RecordedOperation]:
    return [b.heads(value.name + "_heads", value, 2) for value in values]


def two_branches(b: RecordingBuilder, x: RecordedOperation) -> None:
    """Attention and feed-forward of one input, added together."""
    h = b.norm("layers.0.attn_norm", x, "n")
    q, k, v = heads_of(b, qkv(b, h))
    o = b.linear("layers.0.o", b.attend("layers.0.mix", 0, q, k, v), "o")
    both = b.add("layers.0.both", o, b.linear("layers.0.down", h, "down"))
    b.logits("logits", b.norm("final_norm", b.add("layers.0.out", x, both), "n"), "head")


def norms_around_rope(b: RecordingBuilder, x: RecordedOperation) -> None:
    q, k, v = heads_of(b, qkv(b, b.norm("layers.0.attn_norm", x, "n")))
    q, k = b.norm("layers.0.q_first", q, "n"), b.norm("layers.0.k_first", k, "n")
    q, k = b.rope("layers.0.q_rope", q, ROPE), b.rope("layers.0.k_rope", k, ROPE)
    q, k = b.norm("layers.0.q_norm", q, "n"), b.norm("layers.0.k_norm", k, "n")
    b.attend("layers.0.mix", 0, q, k, v)


def two_ropes(b: RecordingBuilder, x: RecordedOperation) -> None:
    q, k, v = heads_of(b, qkv(b, b.norm("layers.0.attn_norm", x, "n")))
    q, k = b.rope("layers.0.q_rope", q, ROPE), b.rope("layers.0.k_rope", k, RopeSpec(1e6, 4))
    b.attend("layers.0.mix", 0, q, k, v)


def norm_of_one_of_two(b: RecordingBuilder, x: RecordedOperation) -> None:
    q, k, v = heads_of(b, qkv(b, b.norm("layers.0.attn_norm", x, "n")))
    b.attend("layers.0.mix", 0, b.norm("layers.0.q_norm", q, "n"), k, v)


def unused_norm(b: RecordingBuilder, x: RecordedOperation) -> None:
    b.norm("layers.0.attn_norm", x, "n")
    b.logits("logits", b.norm("final_norm", x, "n"), "head")


def plain_feed_forward(b: RecordingBuilder, x: RecordedOperation) -> None:
    h = b.norm("layers.0.mlp_norm", x, "n")
    gate, up = b.linear("layers.0.gate", h, "gate"), b.linear("layers.0.up", h, "up")
    b.add("layers.0.out", gate, up)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (two_branches, r"layers\.0\.\w+ \(\w+\)"),
        (
            norms_around_rope,
            r"layers\.0\.mix \(attend\): q, k and v go through heads, norm, rope, n",
        ),
        (two_ropes, r"layers\.0\.mix \(attend\): q, k and v go through heads, rope; heads, rope"),
        (norm_of_one_of_two, r"layers\.0\.mix \(attend\): q, k and v go through heads, norm"),
        (unused_norm, r"layers\.0\.attn_norm \(norm\): no step uses its result"),
        (plain_feed_forward, r"layers\.0\.gate \(linear\): 2 linears have the same input"),
    ],
)
def test_an_order_without_a_step_is_refused_by_name(build: object, message: str) -> None:
    recorder = RecordingBuilder()
    build(recorder, recorder.embed("embed"))  # type: ignore[operator]
    with pytest.raises(UnsupportedError, match=f"no step for {message}.*backend='numpy'"):
        fuse(recorder.operations)
