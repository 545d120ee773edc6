"""The specification against Hugging Face transformers, and against itself."""

from __future__ import annotations

import warnings
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeq import importers
from edgeq.core.errors import FormatError, UsageError
from edgeq.model.block import BlockSpec
from edgeq.model.formulas import (
    QUERY_BLOCK,
    activation,
    apply_rope,
    convolution,
    dense,
    rms_norm,
    softmax,
)
from edgeq.model.model import Model
from edgeq.model.reference import Reference
from edgeq.model.rope_spec import RopeScaling, RopeSpec
from edgeq.model.rotary import rope_frequencies, rope_tables
from tests.conftest import need
from tests.families import (
    FAMILIES,
    dequantized,
    quantized,
    random_model,
    tiny_config,
    with_blocks,
)

_BASE: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 76,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

# name -> (family, configuration over _BASE); every prompt below is longer than the windows and
# than the original context here
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "llama-mha-untied": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "llama-biases": ("llama", {"attention_bias": True}),
    "llama-linear-rope": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "llama-3.1": ("llama", {"rope_parameters": _LLAMA3, "head_dim": 24}),
    "mistral": ("mistral", {"sliding_window": 7, "tie_word_embeddings": False}),
    "mistral-full": ("mistral", {"sliding_window": None, "head_dim": 10}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 20, "tie_word_embeddings": True}),
    "gemma3": (
        "gemma3_text",
        {
            "num_hidden_layers": 4,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "sliding_window": 5,
            "query_pre_attn_scalar": 24,
            "layer_types": [
                f"{kind}_attention" for kind in ("sliding", "sliding", "full", "sliding")
            ],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "phi3": (
        "phi3",
        {
            "num_key_value_heads": 4,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
            },
            "sliding_window": 9,
            "tie_word_embeddings": False,
        },
    ),
    "lfm2": (
        "lfm2",
        {
            "num_hidden_layers": 5,
            "layer_types": ["conv", "conv", "full_attention", "conv", "full_attention"],
            "block_multiple_of": 8,
        },
    ),
    "lfm2-untied": (
        "lfm2",
        {
            "head_dim": 16,
            "full_attn_idxs": [1],
            "conv_L_cache": 6,
            "block_auto_adjust_ff_dim": False,
            "tie_word_embeddings": False,
        },
    ),
    "qwen3_5": (
        "qwen3_5_text",
        {
            "num_hidden_layers": 4,
            "head_dim": 16,
            "linear_key_head_dim": 6,
            "linear_value_head_dim": 9,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
    ),
    "qwen3_5-mixed": (
        "qwen3_5_text",
        {
            "num_hidden_layers": 3,
            "head_dim": 12,
            "layer_types": ["full_attention", "linear_attention", "linear_attention"],
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 4,
            "linear_num_key_heads": 3,
            "linear_num_value_heads": 3,
            "linear_conv_kernel_dim": 3,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "partial_rotary_factor": 0.5,
                "mrope_interleaved": True,
                "mrope_section": [1, 1, 1],
            },
            "tie_word_embeddings": True,
        },
    ),
    "phi3-gqa": ("phi3", {"sliding_window": None, "tie_word_embeddings": False}),
}

PROMPT = np.random.default_rng(5).integers(3, 101, 40)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """name -> (folder written by transformers, its logits of PROMPT), made on demand."""
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers")
    made: dict[str, tuple[Path, np.ndarray]] = {}

    def make(name: str) -> tuple[Path, np.ndarray]:
        if name not in made:
            family, over = CASES[name]
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                torch.manual_seed(len(made))
                config = transformers.AutoConfig.for_model(family, **{**_BASE, **over})
                model = transformers.AutoModelForCausalLM.from_config(
                    config, dtype=torch.float32, attn_implementation="eager"
                ).eval()
                for key, weight in model.named_parameters():
                    norm = "norm" in key
                    weight.normal_(0.0, 0.2)
                    if norm and "gemma" not in family:
                        weight.add_(1.0)
                folder = tmp_path_factory.mktemp(name)
                model.save_pretrained(folder)
                logits = model(torch.from_numpy(PROMPT)[None]).logits[0].numpy()
            made[name] = folder, logits
        return made[name]

    return make


def relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


@pytest.mark.parametrize("name", CASES)
def test_equals_transformers(name: str, checkpoints: Any) -> None:
    folder, want = checkpoints(name)
    model = importers.load(folder)
    assert model.config.family == CASES[name][0].removesuffix("_text")
    reference = Reference(model, keep=True)
    assert want.std() > 0.1  # a model whose logits say nothing would prove nothing
    whole = reference.forward(PROMPT)
    assert whole.dtype == np.float32
    assert whole.shape == want.shape
    assert relative(whole, want) < 1e-4
    cache = reference.new_cache()
    steps = np.stack([reference.forward([t], cache, all_logits=False) for t in PROMPT])
    assert relative(steps, want) < 1e-4
    cache.truncate(11)
    parts = [reference.forward(PROMPT[a:b], cache) for a, b in ((11, 13), (13, 29), (29, 40))]
    assert relative(np.concatenate(parts), want[11:]) < 1e-4


def _spoiled(model: Model, **over: Any) -> Model:
    names = {f.name for f in fields(BlockSpec)}
    of_blocks = {key: over.pop(key) for key in list(over) if key in names}
    return replace(model, config=with_blocks(replace(model.config, **over), **of_blocks))


@pytest.mark.parametrize(
    ("name", "over"),
    [
        ("mistral", {"window": 8}),
        ("gemma3", {"window": 5}),
        ("gemma3", {"rope": RopeSpec(1e6, 16)}),
        ("gemma3", {"rope": RopeSpec(1e4, 16)}),
        ("gemma3", {"norm_after": False}),
        ("gemma3", {"norm_offset": 0.0}),
        ("gemma3", {"embed_scale": 1.0}),
        ("gemma3", {"attn_scale": 0.25}),
        ("gemma3", {"activation": "silu"}),
        ("qwen3", {"qk_norm": None}),
        ("phi3", {"rope": RopeSpec(10000.0, 12)}),
        ("llama-3.1", {"rope": None}),
        ("llama-3.1", {"rope": RopeSpec(500000.0, 24)}),
        ("llama-3.1", {"rope": RopeSpec(500000.0, 24, RopeScaling("llama3", 8.0, 1.0, 4.0, 32))}),
    ],
)
def test_every_feature_shows_in_the_logits(
    name: str, over: dict[str, Any], checkpoints: Any
) -> None:
    """The comparison above would notice each of these being wrong."""
    folder, want = checkpoints(name)
    got = Reference(_spoiled(importers.load(folder), **over)).forward(PROMPT)
    assert relative(got, want) > 1e-3


def test_qwen2_needs_its_biases(checkpoints: Any) -> None:
    folder, want = checkpoints("qwen2")
    model = importers.load(folder)
    bare = {k: t for k, t in model.tensors.items() if not k.endswith(".bias")}
    assert relative(Reference(replace(model, tensors=bare)).forward(PROMPT), want) > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_and_steps_agree_past_a_block_of_queries(family: str) -> None:
    model = random_model(tiny_config(family, context=300))
    model.validate()
    tokens = np.random.default_rng(1).integers(0, 101, QUERY_BLOCK + 21)
    reference = Reference(model, keep=True)
    whole = reference.forward(tokens)
    cache = reference.new_cache()
    steps = np.stack([reference.forward([t], cache, all_logits=False) for t in tokens])
    assert cache.n_past == tokens.size
    # a recurrent state carries each rounding of the products on
    recurrent = any(block.delta for block in model.config.blocks)
    np.testing.assert_allclose(steps, whole, atol=1e-4 if recurrent else 2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_equals_its_dequantized_values(family: str) -> None:
    model = quantized(random_model(tiny_config(family)), "w4-g32")
    tokens = np.arange(3, 20)
    want = Reference(dequantized(model)).forward(tokens)
    np.testing.assert_array_equal(Reference(model).forward(tokens), want)
    np.testing.assert_array_equal(Reference(model, keep=True).forward(tokens), want)


def test_linear_hook_sees_every_product() -> None:
    config = tiny_config("gemma3")
    model = random_model(config)
    seen: dict[str, tuple[int, ...]] = {}

    def watch(name: str, x: np.ndarray, weight: Any) -> np.ndarray:
        seen[name] = (*x.shape, *weight.shape)
        return dense(name, x, weight)

    got = Reference(model, linear=watch).forward([3, 4, 5])
    np.testing.assert_array_equal(got, Reference(model).forward([3, 4, 5]))
    # a tied head is the embedding; an untied embedding is looked up, never multiplied
    assert seen == {name: (3, k, n, k) for name, (n, k) in config.linears()}


def test_kv_hook_rounds_what_the_cache_holds() -> None:
    config = tiny_config("llama")
    model = random_model(config)
    shapes = []

    def halve(kind: str, layer: int, x: np.ndarray) -> np.ndarray:
        shapes.append(x.shape)
        return x * np.float32(0.5)

    got = Reference(model, kv=halve).forward([3, 4, 5])
    assert shapes == [(3, config.kv_heads, config.head_dim)] * (2 * config.layers)
    tensors = dict(model.tensors)
    for name in tensors:
        if "k_proj" in name or "v_proj" in name:  # the same by halved weights
            tensors[name] = replace(tensors[name], data=tensors[name].numpy() * np.float32(0.5))
    want = Reference(replace(model, tensors=tensors)).forward([3, 4, 5])
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_large_head_is_multiplied_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(tiny_config("mistral"))
    want = Reference(model).forward([3, 4])
    monkeypatch.setattr("edgeq.model.formulas.BLOCK_ELEMENTS", 500)
    np.testing.assert_allclose(Reference(model).forward([3, 4]), want, atol=1e-5)


def test_last_logits_only() -> None:
    reference = Reference(random_model(tiny_config("qwen2")))
    all_ = reference.forward([3, 4, 5])
    last = reference.forward([3, 4, 5], all_logits=False)
    assert last.shape == (101,)
    np.testing.assert_allclose(last, all_[-1], atol=1e-6)


def test_window_start() -> None:
    config = tiny_config("gemma3")  # window 5 on layers 0 and 1
    assert [config.blocks[0].first_seen(p) for p in (0, 4, 5, 9)] == [0, 0, 1, 5]
    assert [config.blocks[0].positions_seen(n) for n in (1, 5, 6, 10)] == [1, 5, 5, 5]
    assert config.blocks[2].first_seen(60) == 0
    assert config.blocks[2].positions_seen(61) == 61


def test_rms_norm_and_softmax() -> None:
    x = np.array([[3.0, -4.0]], np.float32)
    root = np.sqrt(12.5 + 1e-5)
    got = rms_norm(x, np.array([1.0, 2.0], np.float32), 1e-5, offset=1.0)
    np.testing.assert_allclose(got, [[3 / root * 2, -4 / root * 3]], rtol=1e-6)
    assert got.dtype == np.float32
    scores = np.array([1e4, 1e4, -np.inf], np.float32)
    np.testing.assert_array_equal(softmax(scores), [0.5, 0.5, 0.0])


def test_a_convolution_sees_its_taps_and_no_position_before_the_first() -> None:
    x = np.array([[1, 10], [2, 20], [3, 30], [4, 40]], np.float32)
    taps = np.array([[[100, 10, 1]], [[0, 0.5, 2]]], np.float32)
    np.testing.assert_array_equal(convolution(x, taps), [[1, 20], [12, 45], [123, 70], [234, 95]])


def test_activations() -> None:
    x = np.array([-200.0, -1.0, 0.0, 1.0, 50.0], np.float32)
    np.testing.assert_allclose(
        activation("silu", x), [0.0, -0.26894142, 0.0, 0.73105858, 50.0], atol=1e-6
    )
    # values of the tanh form, 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))
    np.testing.assert_allclose(
        activation("gelu_tanh", x), [0.0, -0.15880801, 0.0, 0.84119199, 50.0], atol=1e-6
    )


def test_rope_turns_pairs_and_keeps_the_rest() -> None:
    config = tiny_config("phi3")  # 8 of 11 dimensions rotate
    cos, sin = rope_tables(config.ropes[0], n_positions=50)
    assert cos.shape == sin.shape == (50, 4)
    assert cos.dtype == np.float32
    x = np.random.default_rng(0).normal(size=(50, 2, 11)).astype(np.float32)
    turned = apply_rope(x, cos, sin)
    np.testing.assert_array_equal(turned[..., 8:], x[..., 8:])
    np.testing.assert_array_equal(turned[0], x[0])
    pairs = x[..., :4] + 1j * x[..., 4:8]
    angles = np.arange(50)[:, None, None] * 10000.0 ** -(np.arange(4) / 4)
    want = pairs * np.exp(1j * angles)
    np.testing.assert_allclose(turned[..., :4], want.real, atol=1e-5)
    np.testing.assert_allclose(turned[..., 4:8], want.imag, atol=1e-5)


def test_rope_tables_are_exact_far_out() -> None:
    """float32 angles would be off by 1e-2 here."""
    config = tiny_config("qwen2")
    cos, _ = rope_tables(config.ropes[0], 131072)
    assert abs(float(cos[131071, 0]) - np.cos(131071.0)) < 1e-7


def test_local_layers_use_their_own_base_unstretched() -> None:
    local, whole = tiny_config("gemma3").ropes
    assert local == RopeSpec(10000.0, 12)
    assert not np.array_equal(rope_tables(local, 9)[0], rope_tables(whole, 9)[0])
    stretched = np.arange(9 * 8).reshape(9, 8)[:, :1] / 64  # 8 times slower
    angle = np.cos(stretched * rope_frequencies(RopeSpec(1e6, 12))[:1])
    np.testing.assert_allclose(rope_tables(whole, 9)[0][:, :1], angle, atol=1e-6)


def test_missing_tensor_is_named() -> None:
    model = random_model(tiny_config("llama"))
    tensors = {k: t for k, t in model.tensors.items() if k != "model.norm.weight"}
    with pytest.raises(FormatError, match=r"tensor model\.norm\.weight is missing"):
        Reference(replace(model, tensors=tensors)).forward([3])


@pytest.mark.parametrize("token", [-1, 101])
def test_token_outside_the_vocabulary_is_refused(token: int) -> None:
    reference = Reference(random_model(tiny_config("llama")))
    with pytest.raises(UsageError, match=f"token {token} is outside the vocabulary of 101"):
        reference.forward([3, token])


def test_empty_tokens_and_bad_truncation_are_refused() -> None:
    reference = Reference(random_model(tiny_config("llama")))
    with pytest.raises(UsageError, match="at least one"):
        reference.forward([])
    cache = reference.new_cache()
    reference.forward([3, 4], cache)
    with pytest.raises(UsageError, match="cache of 2 tokens to 3"):
        cache.truncate(3)


def test_keep_excludes_a_hook() -> None:
    with pytest.raises(UsageError, match="leave out linear"):
        Reference(random_model(tiny_config("llama")), linear=dense, keep=True)


def test_stories260k_tells_its_golden_sentence() -> None:
    from edgeq.runtime.tokenizer import Tokenizer

    model = importers.load(need("models/stories260K"))
    tokenizer = Tokenizer(model.files)
    reference = Reference(model, keep=True)
    cache = reference.new_cache()
    ids = tokenizer.encode("Once upon a time")
    step = list(ids)
    for _ in range(60):
        token = int(reference.forward(step, cache, all_logits=False).argmax())
        ids.append(token)
        step = [token]
    assert tokenizer.decode(ids).startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the "
        "park. One day, she saw a big, red ball. She wanted to play with it, but it was too high."
    )
