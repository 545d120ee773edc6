"""Gemma 4 against Transformers: random checkpoints with the settings of the published ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeq.core.errors import EdgeqError
from edgeq.importers import load
from edgeq.importers.shapes import SHAPES
from edgeq.model.reference import Reference
from edgeq.model.rotary import rope_frequencies
from edgeq.runtime.engine import Engine

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LAYERS = ["sliding_attention", "sliding_attention", "full_attention"] * 2
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 24,
    "vocab_size": 64,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 12,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sliding_window": 6,
    "layer_types": LAYERS,
    "num_kv_shared_layers": 3,
    "use_double_wide_mlp": True,
    "final_logit_softcapping": 4.0,
}
TOKENS = np.random.default_rng(0).integers(3, 64, 40)


def spread(model: Any) -> None:
    """Random values in which every tensor matters."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            vector = weight.ndim == 1
            size = 0.2 if vector else 1.0 if "embed" in name else 1.3 / weight.shape[-1] ** 0.5
            weight.copy_(float(vector and "norm" in name) + size * torch.randn_like(weight))
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.copy_(0.8 + 0.2 * torch.randn_like(buffer))


def checkpoint(folder: Path, **over: Any) -> Path:
    config = transformers.AutoConfig.for_model("gemma4_text", **SIZES | over)
    model = transformers.AutoModelForCausalLM.from_config(config)
    spread(model)
    model.save_pretrained(folder)
    return folder


def theirs(folder: Path) -> NDArray[np.float32]:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    )
    with torch.no_grad():
        logits: NDArray[np.float32] = model.eval()(torch.tensor(TOKENS[None])).logits[0].numpy()
    return logits


def assert_equal(folder: Path) -> None:
    want = theirs(folder)
    reference = Reference(load(folder))
    assert np.abs(reference.forward(TOKENS) - want).max() < 1e-4 * np.abs(want).max()
    cache = reference.new_cache()
    parts = [reference.forward(TOKENS[a:b], cache) for a, b in ((0, 17), (17, 18), (18, 40))]
    assert np.abs(np.concatenate(parts) - want).max() < 1e-4 * np.abs(want).max()


def edit(folder: Path, over: dict[str, Any], remove: tuple[str, ...] = ()) -> None:
    path = folder / "config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k not in remove} | over
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    "over",
    [
        {},
        {"num_kv_shared_layers": 0},
        {"use_double_wide_mlp": False, "final_logit_softcapping": None},
        {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
        {"global_head_dim": 8},
        {"use_bidirectional_attention": "vision"},
        {
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "proportional", "rope_theta": 500.0, "factor": 4.0,
                    "partial_rotary_factor": 0.5,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            }
        },
    ],
    ids=lambda over: ",".join(over) or "published",
)  # fmt: skip
def test_logits_are_those_of_transformers(tmp_path: Path, over: dict[str, Any]) -> None:
    """Whole, in parts and token by token, past the window."""
    assert_equal(checkpoint(tmp_path, **over))


def test_the_engine_and_a_window_it_leaves_behind(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    want = theirs(folder)
    with Engine(load(folder), kv_bits=16, threads=2) as engine:
        got = engine.forward(TOKENS, all_logits=True)
        assert np.abs(got - want).max() < 5e-3 * np.abs(want).max()


def test_published_files_say_the_larger_heads_in_another_way(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    want = load(folder).config
    edit(folder, {"global_head_dim": 24}, ("per_layer_config",))
    assert load(folder).config == want


@pytest.mark.parametrize(
    ("over", "words"),
    [
        ({"attention_k_eq_v": True}, "attention_k_eq_v is True"),
        ({"enable_moe_block": True}, "enable_moe_block is True"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention is 'all'"),
        ({"vocab_size_per_layer_input": 32}, "vocab_size_per_layer_input is 32"),
        ({"num_kv_shared_layers": 6}, "num_kv_shared_layers is 6.*below 6"),
        ({"num_kv_shared_layers": 5}, "shares keys and values, of which none of the first 1"),
        ({"num_kv_shared_layers": -1}, "num_kv_shared_layers is -1"),
        ({"per_layer_config": {"2": {"rms_norm_eps": 0.5}}}, "per_layer_config of layer 2"),
        ({"per_layer_config": {"9": {"head_dim": 24}}}, "per_layer_config of layer 9"),
        ({"per_layer_config": {"2": {"head_dim": 24}}}, "heads of 8 and 24 values"),
        ({"per_layer_config": [24]}, r"per_layer_config is \[24\]"),
        ({"rope_parameters": {"rope_type": "default"}}, "the key 'rope_type'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn", "rope_theta": 1e4}}},
         "rope_type in full_attention is 'yarn'|no settings of sliding_attention"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling is"),
        ({"hidden_activation": "relu"}, "hidden_activation is 'relu'"),
        ({"altup_num_inputs": 4}, "altup_num_inputs is 4"),
    ],
    ids=lambda v: ",".join(v) if isinstance(v, dict) else "",
)  # fmt: skip
def test_what_is_not_computed_is_refused_by_name(
    made: Path, over: dict[str, Any], words: str
) -> None:
    path = made / "config.json"
    before = path.read_text()
    try:
        edit(made, over)
        with pytest.raises(EdgeqError, match=words):
            load(made)
    finally:
        path.write_text(before)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("gemma4"))


def test_a_model_that_sees_and_hears_and_what_is_left_of_it(tmp_path: Path) -> None:
    """The text part gives the logits of the whole model; all else is on a list."""
    text = transformers.AutoConfig.for_model("gemma4_text", **SIZES)
    vision = transformers.AutoConfig.for_model(
        "gemma4_vision", hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, position_embedding_size=16,
    )  # fmt: skip
    config = transformers.AutoConfig.for_model(
        "gemma4", text_config=text, vision_config=vision, audio_config=None
    )
    model = transformers.AutoModelForImageTextToText.from_config(config)
    spread(model)
    state = dict(model.state_dict())
    # published files hold keys and values of layers that read those of others
    prefix = next(n for n in state if n.endswith("layers.0.self_attn.k_proj.weight"))
    extra = prefix.replace("layers.0", "layers.4")
    assert extra not in state
    state[extra] = torch.zeros_like(state[prefix])
    model.save_pretrained(tmp_path, state_dict=state)
    with torch.no_grad():
        want = model.float().eval()(torch.tensor(TOKENS[None])).logits[0].numpy()
    got = load(tmp_path)
    assert np.abs(Reference(got).forward(TOKENS) - want).max() < 1e-4 * np.abs(want).max()
    left = " ".join(got.provenance["left_out"])
    assert "of the vision part" in left
    assert "1 tensor of the layers whose keys and values are those of another" in left


def test_shapes_of_published_models() -> None:
    small, large = SHAPES["gemma4-e2b"], SHAPES["gemma4-e4b"]
    assert (small.layers, small.hidden, small.kv_heads) == (35, 1536, 1)
    assert (large.layers, large.hidden, large.kv_heads) == (42, 2560, 2)
    for config, first, period in ((small, 15, 5), (large, 24, 6)):
        for i, block in enumerate(config.blocks):
            full = (i + 1) % period == 0
            assert (block.window is None) == full
            assert config.head_dim_of(i) == (512 if full else 256)
            source = (first // period * period - 1) if full else first - 2
            assert block.kv_from == (source if i >= first else None)
    assert [small.ffn_of(i) for i in (14, 15)] == [6144, 12288]
    assert {large.ffn_of(i) for i in range(42)} == {10240}
    turning = rope_frequencies(small.blocks[4].rope)  # type: ignore[arg-type]
    assert turning.size == 256
    assert np.count_nonzero(turning) == 64
