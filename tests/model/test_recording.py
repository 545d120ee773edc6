"""What is recorded of a decoder, and the groups of matrices that follow from it."""

from __future__ import annotations

import pytest

from edgeq.model.decoder import LAYER_STEPS
from edgeq.model.recording import linear_groups, record
from edgeq.model.reference import Reference
from edgeq.model.trace import TracedReference
from tests.families import FAMILIES, random_model, tiny_config


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_runs_the_recorded_operations(family: str) -> None:
    config = tiny_config(family)
    computed = list(TracedReference(random_model(config), keep=True).trace([3, 4, 5]))
    assert computed == [step.name for step in record(config) if step.kind != "heads"]
    layer = [name.removeprefix("layers.0.") for name in computed if name.startswith("layers.0.")]
    layer = [name for name in layer if "." not in name]  # not those of a single expert
    order = list(LAYER_STEPS)
    if config.blocks[0].qk_norm_last:
        order = [step for step in order if not step.endswith("_norm") or step[0] not in "qk"]
        order[order.index("mix") : order.index("mix")] = ["q_norm", "k_norm"]
    assert layer == sorted(layer, key=order.index)


@pytest.mark.parametrize("family", FAMILIES)
def test_matrices_of_a_group_get_the_same_input(family: str) -> None:
    model = random_model(tiny_config(family))
    inputs: dict[str, object] = {}

    def watch(name: str, x: object, weight: object) -> object:
        inputs[name] = x  # compared by identity below
        return x @ weight.numpy().T  # type: ignore[operator, attr-defined]

    Reference(model, linear=watch).forward(list(range(3, 67)))  # type: ignore[arg-type]
    groups = linear_groups(model.config)
    assert [name for group in groups for name in group.linears] == list(inputs)
    for group in groups:
        assert len({id(inputs[name]) for name in group.linears}) == 1
    together = [{name for name in inputs if inputs[name] is x} for x in inputs.values()]
    assert all(set(group.linears) in together for group in groups)


def test_groups_of_experts() -> None:
    groups = [g for g in linear_groups(tiny_config("granitemoe")) if g.layer == 1]
    experts = [f"layer 1 expert {e} {kind}" for e in range(5) for kind in ("mlp_in", "mlp_out")]
    assert [str(group) for group in groups[2:]] == ["layer 1 mlp_in", *experts]
    router, inner, outer = groups[2:5]
    # the norm before them cannot be scaled for one of them alone
    assert router.linears == ("model.layers.1.mlp.router.weight",)
    assert router.source is inner.source is None
    assert outer.source == "model.layers.1.mlp.experts.0.up_proj.weight"
    assert not outer.adds_to_residual


def test_groups_of_a_layer() -> None:
    start = "model.layers.1."
    of = {
        family: [g for g in linear_groups(tiny_config(family)) if g.layer == 1]
        for family in ("llama", "gemma3", "olmo2")
    }
    for groups in of.values():
        assert [str(group) for group in groups] == [
            f"layer 1 {kind}" for kind in ("attn_in", "attn_out", "mlp_in", "mlp_out")
        ]
        assert groups[1].source == start + "self_attn.v_proj.weight"
        assert groups[3].source == start + "mlp.up_proj.weight"
    sources = {family: (groups[0].source, groups[2].source) for family, groups in of.items()}
    assert sources == {
        "llama": (start + "input_layernorm.weight", start + "post_attention_layernorm.weight"),
        "gemma3": (start + "input_layernorm.weight", start + "pre_feedforward_layernorm.weight"),
        "olmo2": (None, None),
    }
    adds = {family: [group.adds_to_residual for group in groups] for family, groups in of.items()}
    assert adds["llama"] == [False, True, False, True]
    assert adds["gemma3"] == adds["olmo2"] == [False] * 4


def test_the_head_comes_last() -> None:
    head = linear_groups(tiny_config("mistral"))[-1]
    assert (head.layer, head.kind, head.linears) == (2, "head", ("lm_head.weight",))
    assert (head.source, str(head)) == ("model.norm.weight", "head")
