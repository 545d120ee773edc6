"""The engine end to end: both backends, every family, threads, batches, caches, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeq.core.errors import UsageError
from edgeq.evaluation.text import kl_divergence, log_softmax
from edgeq.formats.schemes import FLOAT_TAGS, FloatType
from edgeq.formats.tensor import FloatTensor, Tensor, float32_to_bf16
from edgeq.importers import load
from edgeq.importers.lazy import GatheredRows
from edgeq.model.block import BlockSpec
from edgeq.model.memory_layout import BATCH
from edgeq.model.model import Model
from edgeq.model.reference import Reference
from edgeq.model.rope_spec import RopeSpec
from edgeq.runtime.engine import Engine
from edgeq.runtime.tokenizer import Tokenizer
from edgeq.runtime.weights import in_place
from tests.conftest import need, small_checkpoint, story_text
from tests.families import FAMILIES, dequantized, quantized, random_model, tiny_config
from tests.real_models import SMOLLM2, real_model

Array = NDArray[np.float32]
PER_LAYER = 2.5e-3
"""Bound of `typical_error` between two backends: each layer may round other values differently."""
IDS = np.random.default_rng(7).integers(3, 101, 600)
SCHEMES = [
    "w4-g32", "w4-g16", "w4-g64-asym", "w4-channel", "w8-channel", "w8-g32", "w8-tensor",
    "w8-g16-asym", "w3-g32", "w3-g16-asym", "w2-g16", "w2-g128-asym", "w4-g32-palette",
    "w3-g16-palette", "w2-g64-palette",
]  # fmt: skip


def logits(model: Model, ids: Any = IDS[:40], **options: Any) -> Array:
    with Engine(model, **options) as engine:
        return engine.forward(ids, all_logits=True)


def long(family: str) -> Model:
    return random_model(tiny_config(family, context=1024))


def typical_error(got: Array, want: Array) -> float:
    """The median error relative to the spread: one activation that rounds the other way moves
    a few logits by a whole step, which says nothing about a kernel."""
    return float(np.median(np.abs(got - want)) / want.std())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kv_bits", [4, 8, 16])
def test_backends_agree(family: str, kv_bits: int) -> None:
    model = quantized(long(family), "w4-g32")
    ids = IDS[:330]  # more than one batch and one chunk of keys
    compiled = logits(model, ids, kv_bits=kv_bits, threads=2)
    plain = logits(model, ids, kv_bits=kv_bits, backend="numpy")
    # a key that rounds the other way is read by all later positions, and a step of 4 bits is wide
    step = 4 if kv_bits == 4 else 1
    assert typical_error(compiled, plain) < PER_LAYER * model.config.layers * step
    assert np.mean(compiled.argmax(-1) == plain.argmax(-1)) > (0.95 if kv_bits == 4 else 0.97)


def mixed() -> Model:
    """A model of which every layer is of another kind."""
    whole, part = RopeSpec(10000.0, 12), RopeSpec(500.0, 6)
    kinds = (
        BlockSpec(rope=whole, norm_before=False, norm_after=True),
        BlockSpec(rope=None, qk_norm="all", window=5),
        BlockSpec(rope=part, qk_norm="all", norm_before=False, norm_after=True),
        BlockSpec(rope=None, qk_norm="head", norm_after=True, window=19),
        BlockSpec(rope=part, qk_norm="head", window=40),
        BlockSpec(rope=whole, qk_norm="head", qk_norm_last=True),
    )
    numbers = {"residual_scale": 0.4, "logit_scale": 0.5, "attn_softcap": 2.0, "logit_softcap": 9.0}
    return random_model(tiny_config("llama", blocks=kinds, context=1024, attn_scale=0.4, **numbers))


@pytest.mark.parametrize("family", [*FAMILIES, "mixed"])
@pytest.mark.parametrize("threads", [1, 3])
def test_float_models_against_the_reference(family: str, threads: int) -> None:
    """Prefill in chunks and decoding; only the 16-bit cache rounds."""
    model = mixed() if family == "mixed" else long(family)
    want = Reference(model).forward(IDS[:150])
    with Engine(model, kv_bits=16, threads=threads) as engine:
        rows = [engine.forward(IDS[a:b], all_logits=True) for a, b in ((0, 138), (138, 141))]
        rows += [engine.forward([token])[None] for token in IDS[141:150]]
    assert np.abs(np.concatenate(rows) - want).max() < 5e-3 * np.abs(want).max()


@pytest.mark.parametrize("kv_bits", [4, 8, 16])
def test_layers_of_many_kinds(kv_bits: int) -> None:
    model = quantized(mixed(), "w4-g32")
    want = logits(model, IDS[:330], kv_bits=kv_bits, threads=1)
    np.testing.assert_array_equal(logits(model, IDS[:330], kv_bits=kv_bits, threads=3), want)
    plain = logits(model, IDS[:330], kv_bits=kv_bits, backend="numpy")
    assert typical_error(want, plain) < PER_LAYER * model.config.layers
    with Engine(model, kv_bits=kv_bits, threads=3) as engine:
        engine.forward(IDS[:300])
        rows = np.stack([engine.forward([token]) for token in IDS[300:330]])
    np.testing.assert_array_equal(rows, want[300:])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_against_the_reference(scheme: str) -> None:
    """Dequantized weights in the float reference differ by the rounding of activations only."""
    model = quantized(random_model(tiny_config("llama")), scheme)
    got = logits(model, kv_bits=16, threads=1)
    exact = Reference(dequantized(model)).forward(IDS[:40])
    assert typical_error(got, exact) < 0.02
    plain = logits(model, kv_bits=16, backend="numpy")
    assert typical_error(got, plain) < 1e-4


@pytest.mark.parametrize("sizes", [
    {"hidden": 1, "ffn": 1, "heads": 1, "kv_heads": 1, "head_dim": 2, "vocab": 7},
    {"hidden": 17, "ffn": 33, "heads": 3, "kv_heads": 1, "head_dim": 6, "vocab": 101},
    {"hidden": 172, "ffn": 31, "heads": 7, "kv_heads": 7, "head_dim": 34, "vocab": 257},
    {"hidden": 15, "ffn": 300, "heads": 16, "kv_heads": 2, "head_dim": 16, "vocab": 33},
])  # fmt: skip
@pytest.mark.parametrize("scheme", ["w4-g32", "w3-g16-asym", "w8-channel", "w4-g32-palette"])
def test_awkward_sizes(sizes: dict[str, int], scheme: str) -> None:
    config = tiny_config("llama", **sizes)
    model = quantized(random_model(config), scheme)
    ids = IDS[:33] % config.vocab
    compiled = logits(model, ids, threads=2)
    plain = logits(model, ids, backend="numpy")
    assert typical_error(compiled, plain) < 2e-3


def of_type(model: Model, dtype: FloatType) -> Model:
    """The same model with every tensor of one float type."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.tensors.items():
        values = tensor.numpy()
        if dtype == "float16":
            tensors[name] = FloatTensor("float16", values.astype(np.float16))
        elif dtype == "bfloat16":
            tensors[name] = FloatTensor("bfloat16", float32_to_bf16(values))
        else:
            tensors[name] = FloatTensor("float32", values)
    return replace(model, tensors=tensors)


@pytest.mark.parametrize("dtype", FLOAT_TAGS)
@pytest.mark.parametrize("sizes", [
    {}, {"hidden": 17, "ffn": 33, "heads": 3, "kv_heads": 1, "head_dim": 6, "vocab": 101},
    {"hidden": 172, "ffn": 1100, "heads": 7, "kv_heads": 7, "head_dim": 34, "vocab": 257},
])  # fmt: skip
def test_float_weights_run_from_where_they_lie(dtype: FloatType, sizes: dict[str, int]) -> None:
    model = of_type(random_model(tiny_config("qwen3", **sizes)), dtype)
    ids = IDS[:40] % model.config.vocab
    got = logits(model, ids, kv_bits=16, threads=2)
    want = Reference(model).forward(ids)
    # the 16-bit cache rounds keys and values
    assert np.abs(got - want).max() < 5e-3 * np.abs(want).max()


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("dtype", FLOAT_TAGS)
def test_float_rows_in_another_order_keep_their_type(dtype: FloatType, mmap: bool) -> None:
    """The rows of q and k of some files: they are brought in order without being widened."""
    model = of_type(random_model(tiny_config("llama")), dtype)
    name = "model.layers.0.self_attn.q_proj.weight"
    tensor: Any = model.tensors[name]
    order = np.random.default_rng(0).permutation(tensor.shape[0])
    scattered = FloatTensor(dtype, tensor.data[np.argsort(order)].copy())
    gathered = GatheredRows(scattered, order)
    same = replace(model, tensors={**model.tensors, name: gathered})
    np.testing.assert_array_equal(logits(same, threads=2, mmap=mmap), logits(model, threads=2))
    rows: Any = in_place(same, np.empty).tensors[name]
    assert (rows.dtype, rows.nbytes) == (dtype, tensor.nbytes)
    np.testing.assert_array_equal(rows.data, tensor.data)


@pytest.mark.parametrize("kv_bits", [8, 16])
def test_float_and_packed_matrices_side_by_side(kv_bits: int) -> None:
    """Rows are quantized where a packed matrix reads them, and only there."""
    model = random_model(tiny_config("llama"))
    packed, half = quantized(model, "w4-g32"), of_type(model, "float16")
    for parts in (("q_proj", "down_proj"), ("o_proj", "up_proj"), ("embed_tokens", "v_proj"),
                  ("lm_head", "gate_proj")):  # fmt: skip
        tensors = {
            name: (half if any(part in name for part in parts) else packed).tensors[name]
            for name in model.tensors
        }
        both = replace(model, tensors=tensors)
        compiled = logits(both, kv_bits=kv_bits, threads=2)
        plain = logits(both, kv_bits=kv_bits, backend="numpy")
        assert typical_error(compiled, plain) < PER_LAYER * model.config.layers


CHANGED = (
    "gemma2",
    "granite",
    "minicpm",
    "exaone4",
    "olmo3",
    "hunyuan_v1_dense",
    "ernie4_5",
    "glm4",
)


@pytest.mark.parametrize("family", CHANGED)
@pytest.mark.parametrize("scheme", ["w4-g32", "w8-g32"])
def test_divergence_from_the_same_integers(family: str, scheme: str) -> None:
    """At every position, with a cache of 8 bits, in pieces; a sequence kept and taken up again."""
    model = quantized(random_model(tiny_config(family)), scheme)
    ids = IDS[:40]
    want = log_softmax(Reference(model).forward(ids))
    with Engine(model, kv_bits=8, threads=2) as engine:
        rows = [engine.forward(ids[a:b], all_logits=True) for a, b in ((0, 7), (7, 8), (8, 31))]
        kept = engine.snapshot()
        rows.append(engine.forward(ids[31:], all_logits=True))
        engine.reset()
        engine.restore(kept)
        np.testing.assert_array_equal(engine.forward(ids[31:], all_logits=True), rows[-1])
    assert kl_divergence(want, log_softmax(np.concatenate(rows))).max() < 5e-3


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "gemma3",
        "gemma2",
        "hunyuan_v1_dense",
        "mistral",
        "smollm3",
        "olmo2",
        "lfm2",
        "qwen3_5",
    ],
)
@pytest.mark.parametrize(("kv_bits", "kind"), [
    (4, "w4-g32"), (8, "w4-g32"), (16, "w4-g32"), (8, "float16"), (16, "bfloat16"), (8, "float32"),
])  # fmt: skip
def test_bits_do_not_depend_on_threads_or_batches(family: str, kv_bits: int, kind: Any) -> None:
    model = of_type(long(family), kind) if kind in FLOAT_TAGS else quantized(long(family), kind)
    ids = IDS[: BATCH + 150]
    want = logits(model, ids, threads=1, kv_bits=kv_bits)
    for threads in (2, 3, 4):
        got = logits(model, ids, threads=threads, kv_bits=kv_bits)
        np.testing.assert_array_equal(got, want)
    with Engine(model, threads=2, kv_bits=kv_bits) as engine:
        pieces = [
            engine.forward(ids[a:b], all_logits=True)
            for a, b in ((0, 1), (1, 8), (8, 9), (9, 77), (77, 260), (260, 261), (261, len(ids)))
        ]
        np.testing.assert_array_equal(np.concatenate(pieces), want)
        engine.truncate(100)
        again = engine.forward(ids[100:], all_logits=True)
        np.testing.assert_array_equal(again, want[100:])


@pytest.mark.parametrize("threads", [1, 3])
def test_greedy_equals_one_step_at_a_time(threads: int) -> None:
    model = quantized(long("qwen2"), "w4-g32")
    with Engine(model, threads=threads) as engine:
        token = int(engine.forward(IDS[:20]).argmax())
        found = engine.greedy(token, 300)
        assert engine.n_past == 320
        engine.truncate(20)
        stepwise = []
        for _ in range(300):
            token = int(engine.forward([token]).argmax())
            stepwise.append(token)
    assert found == stepwise


def test_last_logits_are_the_last_row_of_all() -> None:
    model = quantized(long("llama"), "w8-channel")
    for n in (1, 2, BATCH, BATCH + 1, 2 * BATCH + 5):
        with Engine(model, threads=2) as engine:
            last = engine.forward(IDS[:n])
        np.testing.assert_array_equal(last, logits(model, IDS[:n], threads=2)[-1])


def test_an_int8_cache_costs_little_on_a_real_model() -> None:
    model = load(small_checkpoint())
    text = story_text().read_text("utf-8")[5000:20000]
    ids = Tokenizer(model.files).encode(text, add_bos=False)
    losses = []
    for start in range(0, 2550, 255):
        window = [1, *ids[start : start + 255]]
        full, short = (log_softmax(logits(model, window, kv_bits=b)) for b in (16, 8))
        losses.append(kl_divergence(full, short))
    assert np.concatenate(losses).mean() <= 1e-3


def test_a_cache_of_4_bits_keeps_the_answers_of_a_published_model() -> None:
    model = load(real_model(SMOLLM2))
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text("utf-8")
    ids = Tokenizer(model.files).encode(text)[:300]
    full, short = (log_softmax(logits(model, ids, kv_bits=b)) for b in (16, 4))
    assert 1e-3 < kl_divergence(full, short).mean() < 0.06
    assert np.mean(full.argmax(-1) == short.argmax(-1)) > 0.85


def test_greedy_text_of_a_real_model() -> None:
    model = load(need("models/stories260K"))
    tokenizer = Tokenizer(model.files)
    with Engine(model, kv_bits=16) as engine:
        ids = tokenizer.encode("Once upon a time")
        first = int(engine.forward(ids).argmax())
        text = tokenizer.decode([*ids, first, *engine.greedy(first, 58)])
    assert text.startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play"
    )


def test_memory_is_counted() -> None:
    model = quantized(long("llama"), "w4-g32")
    with Engine(model, context=512, threads=1) as engine:
        c = model.config
        # the engine pads head_dim 12 to 32 for keys and 16 for values
        # codes, the scales and zero point, and for every 16 positions a key in float16
        assert engine.kv_bytes == c.layers * c.kv_heads * 512 * (32 + 16 + 7 + 4)
        assert 0 < engine.scratch_bytes < 4_000_000


@pytest.mark.parametrize(("options", "message"), [
    ({"context": 65}, "context is 65; this model supports 1 to 64 tokens"),
    ({"context": 0}, "context is 0"),
    ({"threads": 0}, "threads is 0; use 1 to 256"),
    ({"kv_bits": 6}, "kv_bits is 6; use 4, 8 or 16"),
    ({"backend": "cuda"}, "unknown backend 'cuda'.*numba, numpy"),
])  # fmt: skip
def test_options_outside_what_is_allowed(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Engine(random_model(tiny_config("llama")), **options)


def test_tokens_outside_what_is_allowed() -> None:
    with Engine(random_model(tiny_config("llama")), threads=1) as engine:
        with pytest.raises(UsageError, match="no tokens"):
            engine.forward([])
        with pytest.raises(UsageError, match=r"token id 101 is outside the vocabulary 0 \.\. 100"):
            engine.forward([101])
        with pytest.raises(UsageError, match="token id -1"):
            engine.greedy(-1, 2)
        engine.forward(IDS[:60])
        with pytest.raises(UsageError, match="the context has 60 tokens and 5 more were given"):
            engine.forward(IDS[:5])
        with pytest.raises(UsageError, match="cannot truncate to 61"):
            engine.truncate(61)
        assert engine.greedy(5, 0) == []
        assert engine.n_past == 60
