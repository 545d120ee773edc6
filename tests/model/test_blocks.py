"""Blocks: what they refuse, their JSON, the older artifacts' keys, and the tensors they have."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from edgeq.core.errors import EdgeqError, FormatError, UnsupportedError
from edgeq.formats.tensor import FloatTensor
from edgeq.importers.shapes import SHAPES
from edgeq.model.block import BlockSpec
from edgeq.model.config import ModelConfig
from edgeq.model.model import Model
from edgeq.model.reference import Reference
from edgeq.model.rope_spec import RopeScaling, RopeSpec
from tests.families import FAMILIES, blocks, tiny_config, with_blocks

ROPE = RopeSpec(10000.0, 12)


@pytest.mark.parametrize("family", FAMILIES)
def test_json_holds_the_whole_configuration(family: str) -> None:
    config = tiny_config(family)
    described = json.loads(json.dumps(config.to_dict()))
    assert ModelConfig.from_dict(described) == config
    assert len(described["layer_blocks"]) == config.layers
    assert len(described["blocks"]) == len(set(config.blocks))


def test_equal_layers_are_written_once() -> None:
    described = SHAPES["gemma3-1b"].to_dict()
    assert len(described["blocks"]) == 2
    assert described["layer_blocks"] == [0, 0, 0, 0, 0, 1] * 4 + [0, 0]


FLAT: dict[str, dict[str, Any]] = {
    "llama": {
        "rope_theta": 500000.0, "rope_dim": 12,
        "rope_scaling": {"kind": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_context": 16},
    },
    "mistral": {"window": 6, "window_layers": [True, True], "tied": False},
    "qwen2": {"rope_theta": 1e6},
    "qwen3": {"rope_theta": 10000.0, "qk_norm": True, "heads": 6, "norm_eps": 1e-6},
    "gemma3": {
        "layers": 3, "norm_offset": 1.0, "norm_eps": 1e-6, "activation": "gelu_tanh",
        "rope_theta": 1e6, "rope_theta_local": 10000.0, "window": 5,
        "window_layers": [True, True, False], "qk_norm": True, "post_norms": True,
        "rope_scaling": {"kind": "linear", "factor": 8.0}, "embed_scale": 44**0.5,
        "attn_scale": 24**-0.5, "kv_heads": 1,
    },
    "phi3": {"rope_dim": 8, "head_dim": 11, "kv_heads": 4, "tied": False},
}  # fmt: skip
"""The keys of artifacts written before blocks, of the same models as `tiny_config` makes."""


def flat(family: str, **over: Any) -> dict[str, Any]:
    plain = {"hidden": 44, "ffn": 76, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 12,
             "vocab": 101, "context": 64, "bos": 1, "eos": [2], "window": None,
             "window_layers": [], "rope_scaling": None, "rope_theta_local": None,
             "qk_norm": False, "post_norms": False, "family": family}  # fmt: skip
    return {**plain, **FLAT[family], **over}


@pytest.mark.parametrize("family", FLAT)
def test_keys_of_older_artifacts_are_read(family: str) -> None:
    assert ModelConfig.from_dict(json.loads(json.dumps(flat(family)))) == tiny_config(family)


@pytest.mark.parametrize(
    ("over", "words"),
    [
        ({"layers": 0}, "layers is 0; it must be a positive whole number of at most 65536"),
        ({"layers": 1 << 40}, "layers is 1099511627776"),
        ({"layers": 3, "window_layers": [True]}, "window_layers names 1 of 3 layers"),
        ({"window_layers": [1, 0]}, "window_layers holds values other than true and false"),
        ({"window_layers": "yes"}, "window_layers is 'yes'; expected a list"),
        ({"window": 0, "window_layers": [True, True]}, "window is 0; it must be a positive"),
        ({"qk_norm": 1}, "qk_norm is 1; it must be true or false"),
        ({"rope_dim": 7}, "rope dim is 7; it must be an even number"),
        ({"rope_dim": 14}, "rope dim is 14; it must be at most head_dim 12"),
        ({"rope_theta": -1.0}, "rope base is -1.0; it must be above 0"),
        ({"rope_theta": 10**400}, "rope base is 1000"),
        ({"rope_scaling": [2]}, r"rope scaling is \[2\]; it must be an object"),
        ({"rope_scaling": {"kind": "ntk", "factor": 2.0}}, "rope scaling is of kind 'ntk'"),
        ({"rope_scaling": {"factor": 2.0}}, "is not readable"),
        ({"blocks": []}, "unknown keys"),
    ],
)
def test_damaged_keys_of_older_artifacts_are_refused(over: dict[str, Any], words: str) -> None:
    with pytest.raises(FormatError, match=words):
        ModelConfig.from_dict(flat("qwen2", **over))


def described(**over: Any) -> dict[str, Any]:
    return {**tiny_config("gemma3").to_dict(), **over}


BLOCK = tiny_config("gemma3").to_dict()["blocks"][0]


@pytest.mark.parametrize(
    ("over", "words"),
    [
        ({"blocks": {}}, "blocks must be a list"),
        ({"layer_blocks": None}, "layer_blocks must be a list"),
        ({"layer_blocks": [0] * 65537}, "layer_blocks must be a list of at most 65536"),
        ({"layer_blocks": []}, "blocks describes 0 layers"),
        ({"layer_blocks": [0, 2]}, "layer_blocks names block 2; there are 2 blocks"),
        ({"layer_blocks": [0, -1]}, "layer_blocks names block -1"),
        ({"layer_blocks": [0, True]}, "layer_blocks names block True"),
        ({"blocks": [7], "layer_blocks": [0]}, "a block is 7; it must be an object"),
        ({"blocks": [{**BLOCK, "wings": 2}], "layer_blocks": [0]}, "is not readable.*wings"),
        ({"blocks": [{**BLOCK, "rope": 3}], "layer_blocks": [0]}, "rope is 3"),
        ({"blocks": [{**BLOCK, "rope": {"dim": 2}}], "layer_blocks": [0]}, "is not readable"),
        ({"blocks": [{**BLOCK, "window": "4"}], "layer_blocks": [0]}, "window is '4'"),
        ({"blocks": [{**BLOCK, "mixer": "mamba"}], "layer_blocks": [0]}, "mixer 'mamba' is not"),
        ({"blocks": [{**BLOCK, "qk_norm": True}], "layer_blocks": [0]}, "qk_norm is True"),
        ({"layers": 3}, "unknown keys: layers"),
    ],
)
def test_damaged_blocks_are_refused(over: dict[str, Any], words: str) -> None:
    with pytest.raises(EdgeqError, match=words):
        ModelConfig.from_dict(described(**over))


def test_blocks_check_their_values() -> None:
    with pytest.raises(UnsupportedError, match="a layer without any norm"):
        BlockSpec(rope=ROPE, norm_before=False)
    with pytest.raises(FormatError, match="norm_after is 1"):
        BlockSpec(rope=ROPE, norm_after=1)  # type: ignore[arg-type]
    with pytest.raises(FormatError, match="rope is 12"):
        BlockSpec(rope=12)  # type: ignore[arg-type]
    with pytest.raises(FormatError, match="rope dim is 0"):
        RopeSpec(10000.0, 0)
    with pytest.raises(FormatError, match=r"rope scaling is 2\.0"):
        RopeSpec(10000.0, 12, 2.0)  # type: ignore[arg-type]
    with pytest.raises(FormatError, match="window is absent; a short convolution needs it"):
        BlockSpec(mixer="short_conv", rope=None)
    with pytest.raises(FormatError, match=r"rope is RopeSpec.*; a short convolution has none"):
        BlockSpec(mixer="short_conv", rope=ROPE, window=3)
    with pytest.raises(FormatError, match="qk_norm is 'head'; a short convolution has none"):
        BlockSpec(mixer="short_conv", rope=None, qk_norm="head", window=3)
    with pytest.raises(FormatError, match="blocks must be a tuple"):
        replace(tiny_config("llama"), blocks=list(blocks(12)))
    with pytest.raises(FormatError, match="tuple of BlockSpecs"):
        replace(tiny_config("llama"), blocks=({"rope": None},))


def test_layers_that_read_anothers_keys_check_what_they_name() -> None:
    own = BlockSpec(rope=ROPE, qk_norm="head")
    for wrong, words in (
        ({"kv_from": -1}, "kv_from is -1; it must be the number of a layer"),
        ({"kv_from": 0, "v_norm": True}, "norms neither"),
        ({"head_dim": 0}, "head_dim of a layer is 0"),
        ({"ffn": 1.5}, r"ffn of a layer is 1\.5"),
        ({"v_norm": 1}, "v_norm is 1"),
    ):
        with pytest.raises(FormatError, match=words):
            replace(own, **wrong)  # type: ignore[arg-type]
    with pytest.raises(FormatError, match=r"kv_from is 0; a short convolution has none"):
        BlockSpec(mixer="short_conv", rope=None, window=3, kv_from=0)
    for second, words in (
        ({"kv_from": 1}, "layer 1 reads the keys and values of layer 1; that must be a layer befo"),
        ({"kv_from": 0, "window": 4}, "window of layer 1 is 4, and of layer 0, .* None"),
        ({"kv_from": 0, "head_dim": 14}, "head_dim of layer 1 is 14"),
    ):
        with pytest.raises(FormatError, match=words):
            tiny_config("llama", blocks=(own, replace(own, **second)))  # type: ignore[arg-type]
    twice = (own, replace(own, kv_from=0), replace(own, kv_from=1))
    with pytest.raises(FormatError, match="with keys and values of its own"):
        tiny_config("llama", blocks=twice)
    with pytest.raises(FormatError, match="rope dim is 12; it must be at most head_dim 8"):
        tiny_config("llama", blocks=(replace(own, head_dim=8),))
    with pytest.raises(FormatError, match="6 pairs of a rope keep still; of 6"):
        RopeSpec(10000.0, 12, still=6)


def test_norms_follow_from_the_blocks() -> None:
    def parts(**fields: Any) -> dict[str, int]:
        config = tiny_config("llama", layers=1, **fields)
        start = "model.layers.0."
        return {name.removeprefix(start).removesuffix(".weight"): size[0]
                for name, size in config.norms() if name.startswith(start)}  # fmt: skip

    assert parts() == {"input_layernorm": 44, "post_attention_layernorm": 44}
    assert list(parts(norm_after=True)) == [
        "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ]  # fmt: skip
    assert parts(norm_before=False, norm_after=True, qk_norm="all") == {
        "self_attn.q_norm": 48, "self_attn.k_norm": 24, "post_attention_layernorm": 44,
        "post_feedforward_layernorm": 44,
    }  # fmt: skip
    assert parts(qk_norm="head")["self_attn.k_norm"] == 12


def test_ropes_are_named_by_where_they_are_used() -> None:
    gemma = tiny_config("gemma3")
    assert list(gemma.rope_names.values()) == ["local", "global"]
    assert list(tiny_config("mistral").rope_names.values()) == ["global"]
    assert with_blocks(gemma, rope=None).rope_names == {}
    ropes = (ROPE, RopeSpec(1e6, 12), RopeSpec(1e6, 12, RopeScaling("linear", 2.0)))
    three = replace(gemma, blocks=tuple(BlockSpec(rope=rope) for rope in ropes))
    assert list(three.rope_names.values()) == ["global", "global2", "global3"]


@pytest.mark.parametrize(
    ("name", "over"),
    [
        (
            "smollm3",
            {"no_rope_layers": [1, 1, 1, 0], "rope_parameters": {"rope_type": "default",
                                                                 "rope_theta": 5e6}},
        ),
        (
            "olmo2",
            {"num_hidden_layers": 2, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
             "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        ),
    ],
)  # fmt: skip
def test_blocks_compute_what_transformers_computes(name: str, over: dict[str, Any]) -> None:
    """Layers without positions; norms after only, and a norm over all heads of q and k."""
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers")
    ours = tiny_config(name)
    theirs = {
        "hidden_size": 44, "intermediate_size": 76, "num_hidden_layers": 4, "pad_token_id": 0,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "vocab_size": 101,
        "max_position_embeddings": 64, "tie_word_embeddings": True, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(name, **{**theirs, **over})
        module = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        for key, weight in module.named_parameters():
            weight.normal_(1.0 if "norm" in key else 0.0, 0.2)
        tokens = np.random.default_rng(5).integers(3, 101, 30)
        want = module(torch.from_numpy(tokens)[None]).logits[0].numpy()
        state = {key: value.numpy() for key, value in module.state_dict().items()}
    if ours.tied:
        del state["lm_head.weight"]
    model = Model(ours, {key: FloatTensor("float32", value) for key, value in state.items()})
    model.validate()
    got = Reference(model).forward(tokens)
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
    if name == "smollm3":  # positions in every layer are another model
        wrong = Reference(replace(model, config=with_blocks(ours, rope=ours.ropes[0]))).forward(
            tokens
        )
        assert np.abs(wrong - want).max() > 1e-2 * np.abs(want).max()


def test_tensors_of_a_short_convolution() -> None:
    config = tiny_config("lfm2")
    start = "model.layers.2."
    shapes = {**dict(config.linears()), **dict(config.floats())}
    own = {name.removeprefix(start): shape for name, shape in shapes.items() if start in name}
    assert {name: shape for name, shape in own.items() if name.startswith("conv.")} == {
        "conv.b_proj.weight": (44, 44), "conv.c_proj.weight": (44, 44),
        "conv.x_proj.weight": (44, 44), "conv.conv.weight": (44, 1, 3),
        "conv.out_proj.weight": (44, 44),
    }  # fmt: skip
    assert not any(name.startswith("self_attn.") for name in own)
    assert {"input_layernorm.weight", "mlp.down_proj.weight"} < own.keys()
    assert (config.mix_width, tiny_config("lfm2", hidden=60).mix_width) == (48, 60)


def test_gated_delta_nets_are_described_and_read_back() -> None:
    config = tiny_config("qwen3_5")
    data = json.loads(json.dumps(config.to_dict()))
    assert ModelConfig.from_dict(data) == config
    delta = config.blocks[0].delta
    assert delta is not None
    assert (delta.channels, delta.values, delta.group) == (2 * 10 + 54, 54, 3)
    assert config.mix_width == 54
    shapes = dict((*config.linears(), *config.floats()))
    assert shapes["model.layers.0.linear_attn.in_proj_qkv.weight"] == (74, 44)
    assert shapes["model.layers.0.linear_attn.conv1d.weight"] == (74, 1, 4)
    assert shapes["model.layers.0.linear_attn.A_log"] == (6,)
    assert shapes["model.layers.2.self_attn.g_proj.weight"] == (48, 44)
    # what older versions do not know is written only where it is needed
    plain = tiny_config("llama").to_dict()["blocks"][0]
    assert not plain.keys() & {"delta", "output_gate"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"delta": None}, "delta is None and mixer 'gated_delta_net'"),
        ({"window": None}, "window is absent; a gated delta net needs it"),
        ({"output_gate": True}, "output_gate is True; a gated delta net has none"),
        ({"qk_norm": "head"}, "qk_norm is 'head'; a gated delta net has none"),
        ({"mixer": "attention"}, "delta is DeltaSpec.* and mixer 'attention'"),
        ({"output_gate": 1}, "output_gate is 1; it must be true or false"),
    ],
    ids=str,
)
def test_gated_delta_nets_that_cannot_be(change: dict[str, Any], words: str) -> None:
    with pytest.raises(FormatError, match=words):
        replace(tiny_config("qwen3_5").blocks[0], **change)
