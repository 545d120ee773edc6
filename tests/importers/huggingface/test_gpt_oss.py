"""gpt-oss as Transformers computes it: whole, step by step, in chunks, in MXFP4 and without."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from edgeq.core.errors import EdgeqError
from edgeq.formats.kept import KeptTensor
from edgeq.importers import load
from edgeq.model.model import Model
from edgeq.model.reference import Reference
from edgeq.runtime.engine import Engine

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

WINDOW, LAYERS, EXPERTS, HIDDEN, FFN = 12, 4, 8, 64, 96
TOKENS = np.random.default_rng(3).integers(0, 128, 70)
# what the config.json of openai/gpt-oss-20b holds, but for its sizes
CONFIG: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"], "attention_bias": True, "attention_dropout": 0.0,
    "eos_token_id": 2, "experts_per_token": 4, "head_dim": 16, "hidden_act": "silu",
    "hidden_size": HIDDEN, "initial_context_length": 32, "initializer_range": 0.02,
    "intermediate_size": FFN, "layer_types": ["sliding_attention", "full_attention"] * 2,
    "max_position_embeddings": 1024, "model_type": "gpt_oss", "num_attention_heads": 8,
    "num_experts_per_tok": 4, "num_hidden_layers": LAYERS, "num_key_value_heads": 2,
    "num_local_experts": EXPERTS, "output_router_logits": False, "pad_token_id": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "rope_type": "yarn",
        "original_max_position_embeddings": 32, "truncate": False,
    },
    "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": WINDOW,
    "swiglu_limit": 7.0, "tie_word_embeddings": False, "transformers_version": "4.55.0.dev0",
    "use_cache": True, "vocab_size": 128,
}  # fmt: skip
QUANTIZATION = {
    "modules_to_not_convert": [
        "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
    ],
    "quant_method": "mxfp4",
}  # fmt: skip

Arrays = dict[str, NDArray[Any]]


def random_arrays(seed: int = 0) -> Arrays:
    """Every tensor of the model under Transformers' names, of sizes that all matter."""
    rng = np.random.default_rng(seed)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**CONFIG)
    )
    arrays = {}
    for name, weight in model.state_dict().items():
        shape = tuple(weight.shape)
        if name.endswith("norm.weight"):
            values = 1 + 0.2 * rng.normal(size=shape)
        elif "sinks" in name:
            values = rng.normal(size=shape)
        elif "bias" in name:
            values = 0.3 * rng.normal(size=shape)
        elif "experts" in name:
            # so large that some gates and values are clamped
            values = 3 * rng.normal(size=shape) / shape[1] ** 0.5
        else:
            values = rng.normal(size=shape) / (1 if "embed" in name else shape[-1] ** 0.5)
        arrays[name] = values.astype(np.float32)
    return arrays


def write(folder: Path, arrays: Arrays, **over: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**CONFIG, **over}))
    return folder


def theirs(arrays: Arrays) -> NDArray[np.float32]:
    """Transformers' logits of float weights."""
    config = transformers.AutoConfig.for_model(**CONFIG)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.load_state_dict({name: torch.from_numpy(values) for name, values in arrays.items()})
    with torch.no_grad():
        logits: NDArray[np.float32] = model(torch.from_numpy(TOKENS[None])).logits[0].numpy()
    return logits


def packed(arrays: Arrays, seed: int = 1) -> tuple[Arrays, Arrays]:
    """The same model with random experts in MXFP4: as the file holds it, and as floats.

    Transformers' own function makes the floats.
    """
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    rng = np.random.default_rng(seed)
    stored, plain = dict(arrays), dict(arrays)
    for name in arrays:
        if not name.endswith(("gate_up_proj", "down_proj")):
            continue
        count, k, n = arrays[name].shape
        del stored[name]
        blocks = rng.integers(0, 256, (count, n, k // 32, 16), dtype=np.uint8)
        scales = rng.integers(120, 125, (count, n, k // 32), dtype=np.uint8)
        stored[f"{name}_blocks"], stored[f"{name}_scales"] = blocks, scales
        floats = convert_moe_packed_tensors(
            torch.from_numpy(blocks), torch.from_numpy(scales), dtype=torch.float32
        )
        plain[name] = floats.numpy()
    return stored, plain


@pytest.fixture(scope="module")
def arrays() -> Arrays:
    return random_arrays()


@pytest.fixture(scope="module")
def model(arrays: Arrays, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(write(tmp_path_factory.mktemp("gpt-oss"), arrays))


@pytest.fixture(scope="module")
def wanted(arrays: Arrays) -> NDArray[np.float32]:
    return theirs(arrays)


def assert_close(got: NDArray[np.floating], want: NDArray[np.floating]) -> None:
    assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()


def test_the_model_is_what_the_file_says(model: Model) -> None:
    c = model.config
    assert [block.window for block in c.blocks] == [WINDOW, None, WINDOW, None]
    assert all(block.sinks for block in c.blocks)
    assert c.experts is not None
    assert (c.experts.count, c.experts.chosen, c.experts.ffn) == (EXPERTS, 4, FFN)
    assert (c.experts.normalize, c.experts.biases, c.activation) == (True, True, "clamped_swiglu")
    (rope,) = c.ropes
    assert rope.scaling is not None
    assert (rope.base, rope.scaling.truncate, rope.scaling.factor) == (150000.0, False, 32.0)


def test_whole_step_by_step_and_in_chunks(model: Model, wanted: NDArray[np.float32]) -> None:
    """Past the window, which is shorter than the text by far."""
    reference = Reference(model, keep=True)
    assert_close(reference.forward(TOKENS), wanted)
    for size in (1, 17):
        cache = reference.new_cache()
        parts = [
            reference.forward(TOKENS[a : a + size], cache) for a in range(0, len(TOKENS), size)
        ]
        assert_close(np.concatenate(parts), wanted)


def test_clamps_and_sinks_take_part(arrays: Arrays, model: Model) -> None:
    """Without one of them the logits would be others, so that the tests above test them."""
    want = Reference(model).forward(TOKENS)
    silent = {k: v - 100 if "sinks" in k else v for k, v in arrays.items()}
    assert np.abs(theirs(silent) - want).max() > 0.01 * np.abs(want).max()
    largest = 0.0

    class Watched(Reference):
        def gated(self, name: str, gate: Any, up: Any) -> Any:
            nonlocal largest
            largest = max(largest, gate.max(initial=0), np.abs(up).max(initial=0))
            return super().gated(name, gate, up)

    Watched(model).forward(TOKENS)
    assert largest > 7


def test_the_pytorch_decoder(model: Model, wanted: NDArray[np.float32]) -> None:
    from edgeq.quant.training.decoder import TorchDecoder

    weights = {name: torch.from_numpy(t.numpy()) for name, t in model.tensors.items()}
    with torch.no_grad():
        logits, _ = TorchDecoder(model.config, len(TOKENS))(weights, torch.from_numpy(TOKENS[None]))
    assert_close(logits[0].numpy(), wanted)


def test_the_engine_on_floats(model: Model, wanted: NDArray[np.float32]) -> None:
    with Engine(model, context=128, kv_bits=16, threads=2) as engine:
        whole = engine.forward(TOKENS, all_logits=True)
        engine.reset()
        single = np.stack([engine.forward([int(token)]) for token in TOKENS])
    np.testing.assert_array_equal(whole, single)
    far = np.abs(whole - wanted).max(axis=1) > 5e-3 * np.abs(wanted).max()
    assert far.mean() < 0.05  # a float16 cache moves a token or two past a tie


def test_mxfp4_has_the_values_of_transformers(tmp_path: Path, arrays: Arrays) -> None:
    """Bit for bit, and so the logits."""
    stored, plain = packed(arrays)
    model = load(write(tmp_path / "m", stored, quantization_config=QUANTIZATION))
    for i in range(LAYERS):
        at = f"model.layers.{i}.mlp.experts."
        both, down = plain[at + "gate_up_proj"], plain[at + "down_proj"]
        for e in range(EXPERTS):
            for part, values in (
                ("gate_proj", both[e].T[::2]), ("up_proj", both[e].T[1::2]),
                ("down_proj", down[e].T),
            ):  # fmt: skip
                tensor = model.tensors[f"{at}{e}.{part}.weight"]
                assert isinstance(tensor, KeptTensor)
                assert (tensor.source_type, str(tensor.scheme)) == ("MXFP4", "w4-g32-palette")
                np.testing.assert_array_equal(tensor.numpy(), values)
                np.testing.assert_array_equal(tensor.rows(3, 20), values[3:20])
    want = theirs(plain)
    assert_close(Reference(model).forward(TOKENS), want)
    assert model.integers()["kept"] == {"MXFP4": 3 * EXPERTS * LAYERS}  # type: ignore[index]


def test_the_engine_keeps_mxfp4(tmp_path: Path, arrays: Arrays) -> None:
    """The same logits for any number of threads, and however a text is cut."""
    stored, _ = packed(arrays)
    model = load(write(tmp_path / "m", stored, quantization_config=QUANTIZATION))
    want = Reference(model).forward(TOKENS)
    logits = None
    for threads in (1, 2, 3, 4):
        with Engine(model, context=128, threads=threads) as engine:
            for size in (70, 1, 23) if threads < 3 else (70, 23):
                engine.reset()
                parts = [
                    engine.forward(TOKENS[a : a + size], all_logits=True)
                    for a in range(0, len(TOKENS), size)
                ]
                got = np.concatenate(parts)
                logits = got if logits is None else logits
                np.testing.assert_array_equal(got, logits)
    assert logits is not None
    p, q = (x - np.log(np.exp(x).sum(axis=1, keepdims=True)) for x in (want, logits))
    assert (np.exp(p) * (p - q)).sum(axis=1).mean() < 5e-2


def test_rows_that_are_no_whole_blocks_are_refused(tmp_path: Path, arrays: Arrays) -> None:
    stored, _ = packed(arrays)
    folder = write(tmp_path / "m", stored, quantization_config=QUANTIZATION, hidden_size=60)
    with pytest.raises(EdgeqError, match=r"blocks of 32 weights.* has 60 .*hidden_size"):
        load(folder)
    write(tmp_path / "m", stored, quantization_config=QUANTIZATION, intermediate_size=128)
    with pytest.raises(EdgeqError, match=r"gate_up_proj_blocks has shape \[8, 192, 2, 16\]"):
        load(folder)


@pytest.mark.parametrize(
    ("over", "words"),
    [
        ({"swiglu_limit": 5.0}, r"swiglu_limit is 5\.0"),
        ({"swiglu_alpha": 1.5}, r"swiglu_alpha is 1\.5"),
        ({"experts_per_token": 2}, "experts_per_token is 2 .* say 4"),
        ({"initial_context_length": 64}, "initial_context_length is 64 .* say 32"),
        ({"num_local_experts": 6}, "gate_up_proj_bias has shape|gate_up_proj has shape"),
        ({"num_local_experts": 6, "num_experts": 8}, "contradict"),
    ],
)
def test_other_settings_are_refused(
    tmp_path: Path, arrays: Arrays, over: dict[str, Any], words: str
) -> None:
    with pytest.raises(EdgeqError, match=words):
        load(write(tmp_path / "m", arrays, **over))


def test_mxfp4_that_config_json_does_not_know(tmp_path: Path, arrays: Arrays) -> None:
    stored, _ = packed(arrays)
    with pytest.raises(EdgeqError, match="has no quantization_config that says how"):
        load(write(tmp_path / "m", stored))
    name = "model.layers.1.mlp.experts.down_proj_scales"
    missing = {k: v for k, v in stored.items() if k != name}
    with pytest.raises(EdgeqError, match=f"tensor {name} is missing"):
        load(write(tmp_path / "m", missing, quantization_config=QUANTIZATION))
    wrong = {**stored, name: stored[name].astype(np.int32)}
    with pytest.raises(EdgeqError, match=f"{name} is I32; its layout asks for U8"):
        load(write(tmp_path / "m", wrong, quantization_config=QUANTIZATION))


def test_what_transformers_saves_is_read(tmp_path: Path, arrays: Arrays) -> None:
    config = transformers.AutoConfig.for_model(**CONFIG)
    saved = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    saved.load_state_dict({name: torch.from_numpy(values) for name, values in arrays.items()})
    saved.save_pretrained(tmp_path)
    again = {k: v.float().numpy() for k, v in saved.state_dict().items()}
    assert set(load_file_names(tmp_path)) == set(arrays)
    assert_close(Reference(load(tmp_path)).forward(TOKENS), theirs(again))


def load_file_names(folder: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "np") as file:
        return list(file.keys())


def rounded_limits() -> dict[str, Any]:
    """The settings of the model as llama.cpp computes it."""
    return {
        "quantization_config": QUANTIZATION,
        "rope_scaling": {**CONFIG["rope_scaling"], "truncate": True},
    }


def test_mxfp4_goes_to_gguf_bit_for_bit(tmp_path: Path, arrays: Arrays) -> None:
    """The blocks that llama.cpp's converter makes of these: the scale, then pairs of codes that
    are 16 apart; and back again as the same codes."""
    gguf = pytest.importorskip("gguf")
    from edgeq.converters.gguf.decoder import GgufDecoderTarget
    from edgeq.converters.options import Options

    stored, plain = packed(arrays)
    model = load(write(tmp_path / "m", stored, **rounded_limits())).packed()
    target, out = GgufDecoderTarget(), tmp_path / "model.gguf"
    target.check(model, Options())
    target.write(model, out, Options())
    tensors = {t.name: t for t in gguf.GGUFReader(out).tensors}
    for i in range(LAYERS):
        at = f"model.layers.{i}.mlp.experts."
        for name, ours, step in (
            ("gate", "gate_up_proj", slice(0, None, 2)), ("up", "gate_up_proj", slice(1, None, 2)),
            ("down", "down_proj", slice(None)),
        ):  # fmt: skip
            tensor = tensors[f"blk.{i}.ffn_{name}_exps.weight"]
            assert tensor.tensor_type.name == "MXFP4"
            blocks, scales = (stored[f"{at}{ours}_{end}"][:, step] for end in ("blocks", "scales"))
            codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*blocks.shape[:3], 32)
            pairs = codes[..., :16] | (codes[..., 16:] << 4)
            wanted = np.concatenate([scales[..., None], pairs], axis=-1)
            np.testing.assert_array_equal(tensor.data.reshape(wanted.shape), wanted)
            bias = tensors[f"blk.{i}.ffn_{name}_exps.bias"]
            np.testing.assert_array_equal(bias.data, plain[f"{at}{ours}_bias"][:, step])
        sinks = plain[f"model.layers.{i}.self_attn.sinks"]
        np.testing.assert_array_equal(tensors[f"blk.{i}.attn_sinks.weight"].data, sinks)
    again = load(out)
    assert again.config.blocks == model.config.blocks
    np.testing.assert_allclose(
        Reference(again).forward(TOKENS), Reference(model).forward(TOKENS), rtol=1e-4, atol=1e-4
    )


def test_llama_cpp_computes_it(tmp_path: Path, arrays: Arrays) -> None:
    """Floating point, so that what it computes is what we do, past the window too."""
    pytest.importorskip("llama_cpp")
    from edgeq.converters.gguf.decoder import GgufDecoderTarget
    from edgeq.converters.gguf.run import LlamaRunner
    from edgeq.converters.options import Options

    over = {"rope_scaling": rounded_limits()["rope_scaling"]}
    model = load(write(tmp_path / "m", arrays, **over))
    GgufDecoderTarget().write(model, tmp_path / "model.gguf", Options())
    runner = LlamaRunner(tmp_path / "model.gguf", 1)
    try:
        got = runner.forward(TOKENS)
    finally:
        runner.close()
    want = Reference(model).forward(TOKENS)
    assert np.abs(got - want).max() < 1e-3 * np.abs(want).max()


def test_a_saved_state_and_lookup(tmp_path: Path, arrays: Arrays) -> None:
    """A prompt that is loaded again, and tokens that are proposed from the text before."""
    stored, _ = packed(arrays)
    model = load(write(tmp_path / "m", stored, quantization_config=QUANTIZATION))
    with Engine(model, context=256, threads=2) as engine:
        want = [engine.forward(TOKENS)]
        for _ in range(20):
            want.append(engine.forward([int(want[-1].argmax())]))
        engine.reset()
        engine.forward(TOKENS)
        engine.save_state(tmp_path / "state")
        # a guess of several tokens, of which all are right but the last
        guess = [int(row.argmax()) for row in want[:9]]
        rows = engine.forward([*guess[:-1], (guess[-1] + 1) % 128], all_logits=True)
        np.testing.assert_array_equal(rows[:8], want[1:9])
        engine.truncate(len(TOKENS) + 8)
        np.testing.assert_array_equal(engine.forward([guess[-1]]), want[9])
    with Engine(model, context=256, threads=3) as engine:
        engine.load_state(tmp_path / "state")
        for before, after in pairwise(want):
            np.testing.assert_array_equal(engine.forward([int(before.argmax())]), after)
