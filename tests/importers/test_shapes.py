"""Known shapes, and random models in them."""

from __future__ import annotations

import numpy as np
import pytest

from edgeq.core.errors import UnsupportedError
from edgeq.formats.packing import TILE
from edgeq.formats.schemes import QuantScheme, parse_scheme
from edgeq.formats.tensor import FloatTensor, QuantTensor
from edgeq.importers.shapes import SHAPES, parameters, random_model, random_tensor, shape
from edgeq.model.reference import Reference
from edgeq.quant import Recipe
from tests.families import scheme_of, tiny_config

PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "gemma3-270m": 268_098_176,
    "gemma3-1b": 999_885_952,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "tinyllama-1.1b": 1_100_048_384,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "mistral-7b": 7_248_023_552,
    "phi3-mini": 3_821_079_552,
    "phi-4-mini": 3_836_021_760,
    "gemma2-2b": 2_614_341_888,
    "granite-3.3-2b": 2_533_539_840,
    "smollm3-3b": 3_075_098_624,
    "olmo2-1b": 1_484_916_736,
    "olmo3-7b": 7_298_011_136,
    "exaone4-1.2b": 1_279_391_488,
    "hunyuan-0.5b": 539_010_048,
    "ernie4.5-0.3b": 360_748_032,
    "falcon3-1b": 1_669_408_768,
    "minicpm-2b": 2_724_880_896,
    "lfm2-350m": 354_483_968,
    "lfm2-700m": 742_489_344,
    "lfm2-1.2b": 1_170_340_608,
    "lfm2-2.6b": 2_569_272_320,
    "qwen3.5-0.8b": 752_393_024,
    "qwen3.5-2b": 1_881_825_088,
    "qwen3.5-4b": 4_205_751_296,
    "gemma4-e2b": 4_628_569_379,
    "gemma4-e4b": 7_463_013_418,
    "stories15m": 15_191_712,
    "stories110m": 109_529_856,
}
"""Parameters as the models' cards give them, or as the classes of Transformers have them."""

SCHEMES = ("w8-channel", "w8-g32", "w4-g32", "w4-g128", "w3-g32", "w2-g16")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    config = SHAPES[name]
    biases = 0
    if config.family == "qwen2":
        biases = sum(n for bias, (n,) in config.biases() if "o_proj" not in bias)
    assert parameters(config) + biases == PUBLISHED[name]


def test_names() -> None:
    assert shape(" Llama-3.2-1B ") is SHAPES["llama-3.2-1b"]
    with pytest.raises(UnsupportedError, match=r"did you mean 'gemma3-1b'.*known: .*tinyllama"):
        shape("gemma-1b")


@pytest.mark.parametrize(
    "name", [*SCHEMES, "w4-g64-asym", "w3-channel", "w8-tensor", "w4-g32-palette"]
)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (17, 31), (16, 64), (33, 172), (48, 192)])
def test_random_tensors_are_whole(name: str, n: int, k: int) -> None:
    scheme = parse_scheme(name)
    assert isinstance(scheme, QuantScheme)
    tensor = random_tensor(np.random.default_rng(0), scheme, n, k)
    values = tensor.numpy()
    assert values.shape == (n, k)
    assert np.isfinite(values).all()
    # what no quantizer would have written is not there either
    again = QuantTensor.from_codes(scheme, tensor.codes(), *_params(tensor), tensor.palette)
    np.testing.assert_array_equal(tensor.packed, again.packed)
    np.testing.assert_array_equal(tensor.scales, again.scales)
    bits = tensor.scales.astype(np.float32).view(np.uint32)
    assert not (bits & 0xFFFF).any(), "scales must be exact in bfloat16"


def _params(tensor: QuantTensor) -> tuple[np.ndarray, np.ndarray | None]:
    scales, zeros = tensor.row_params()
    return scales, None if tensor.zero_points is None else zeros


def test_products_are_of_order_one() -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal(2048, np.float32)
    for name in (*SCHEMES, "w4-g32-palette"):
        scheme = parse_scheme(name)
        assert isinstance(scheme, QuantScheme)
        y = random_tensor(rng, scheme, 512, 2048).numpy() @ x
        assert 0.3 < y.std() < 3, name


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "phi3"])
def test_random_models_run(family: str) -> None:
    config = tiny_config(family)
    recipe = Recipe.from_options("w4-g32")
    model = random_model(config, recipe.scheme_for, seed=3)
    model.validate()
    logits = Reference(model).forward(np.array([1, 5, 7]))
    assert np.isfinite(logits).all()
    assert 0.01 < logits.std() < 100
    again = Reference(random_model(config, recipe.scheme_for, seed=3)).forward(np.array([1, 5, 7]))
    np.testing.assert_array_equal(logits, again)
    other = random_model(config, recipe.scheme_for, seed=4)
    assert (Reference(other).forward(np.array([1, 5, 7])) != logits).any()


def test_the_recipe_is_followed_and_progress_reported() -> None:
    told: list[tuple[str, int, int]] = []
    recipe = Recipe.from_options("w4-g32", tensor_types=["down_proj=f16", "gate=bf16"])
    model = random_model(
        tiny_config("llama"), recipe.scheme_for, progress=lambda *args: told.append(args)
    )
    held = {
        name: str(t.scheme) if isinstance(t, QuantTensor) else t.dtype
        for name, t in model.tensors.items()
        if isinstance(t, QuantTensor | FloatTensor)
    }
    assert held["model.embed_tokens.weight"] == "w8-channel"
    assert held["model.layers.0.self_attn.q_proj.weight"] == "w4-g32"
    assert held["model.layers.0.mlp.down_proj.weight"] == "float16"
    assert held["model.layers.0.mlp.gate_proj.weight"] == "bfloat16"
    assert held["model.norm.weight"] == "float32"
    assert told[-1][1] == told[-1][2] == len(told)


def test_rows_past_n_are_worth_nothing() -> None:
    scheme = scheme_of("w4-g32")
    tensor = random_tensor(np.random.default_rng(0), scheme, 17, 64)
    assert tensor.scales.shape == (2, 2, TILE)
    assert (tensor.scales[1, :, 1:] == 0).all()
    assert (tensor.scales[1, :, 0] > 0).all()
