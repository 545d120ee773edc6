"""Each key of a GGUF file is carried out as llama.cpp does, harmless, or refused by its name."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeq.core.errors import EdgeqError, FormatError, UnsupportedError
from edgeq.importers import load
from edgeq.model.block import BlockSpec, DeltaSpec
from edgeq.model.model import Model
from edgeq.model.reference import Reference
from edgeq.model.rope_spec import RopeScaling, RopeSpec
from tests.conftest import need
from tests.families import random_model, tiny_config, windows
from tests.importers.gguf.test_importer import BPE, interleaved, write
from tests.real_models import SMOLLM2, real_model

gguf = pytest.importorskip("gguf")

TOKENS = np.arange(40) * 7 % 101
ARCHITECTURES = (
    "llama", "mistral3", "qwen2", "qwen3", "gemma3", "gemma2", "phi3", "smollm3", "olmo2",
    "granite", "minicpm", "exaone4", "hunyuan_v1_dense", "ernie4_5", "glm4", "lfm2", "qwen3_5",
)  # fmt: skip


OWN = {
    "gemma2": {"attn_logit_softcapping", "final_logit_softcapping"},
    "granite": {"logit_scale", "residual_scale", "embedding_scale", "attention.scale"},
    "minicpm": {"logit_scale", "residual_scale", "embedding_scale"},
    "qwen3_5": {"rope.dimension_sections"},
}
"""Keys that an architecture has and others refuse, without the name of the architecture."""


def short(arch: str) -> str:
    return {"hunyuan_v1_dense": "hunyuan-dense", "qwen3_5": "qwen35"}.get(arch, arch)


def model_of(arch: str, **over: Any) -> Model:
    """A model of an architecture, plain enough that a file can say all of it."""
    plain: dict[str, Any] = {"rope_scaling": None, "context": 64}
    if arch == "mistral3":
        arch, plain = "ministral3", {**plain, "rope_temperature": 0.0}
    if arch == "gemma3":
        plain |= {"attn_scale": 12**-0.5, "window": 5, "window_layers": (True, True, False)}
    if arch == "exaone4":
        plain |= {"window": None, "window_layers": (), "rope_layers": ()}
    if arch == "qwen3_5":
        plain["delta"] = DeltaSpec(key_heads=4, value_heads=4, key_dim=8, value_dim=8)
    return random_model(tiny_config(arch, **(plain | over)))


def file_of(
    path: Path,
    arch: str,
    keys: dict[str, Any] | None = None,
    tensors: dict[str, NDArray[Any]] | None = None,
    model: Model | None = None,
) -> Path:
    """A GGUF file with keys added or, at None, left out; ``{a}`` is the architecture."""

    def change(found: dict[str, Any]) -> None:
        if arch == "gemma3":
            found["gemma3.attention.sliding_window_pattern"] = 3
        for key, value in (keys or {}).items():
            name = key.replace("{a}", short(arch))
            found.pop(name, None)
            if value is not None:
                found[name] = value

    write(path / "m.gguf", model or model_of(arch), change, tensors)
    return path / "m.gguf"


def assert_computes(path: Path, model: Model) -> None:
    got, want = Reference(load(path)).forward(TOKENS), Reference(model).forward(TOKENS)
    assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()


HARMLESS: dict[str, Any] = {
    "{a}.vocab_size": 101,
    "{a}.attention.value_length": 12,
    "{a}.attention.causal": True,
    "{a}.expert_count": 0,
    "{a}.expert_used_count": 0,
    "{a}.final_logit_softcapping": 0.0,
    "{a}.attention.clamp_kqv": 0.0,
    "{a}.attention.max_alibi_bias": 0.0,
    "{a}.use_parallel_residual": False,
    "{a}.logit_scale": 1.0,
    "{a}.residual_scale": 1.0,
    "{a}.rope.scaling.attn_factor": 1.0,
    "{a}.rope.scaling.yarn_ext_factor": 0.0,
    "{a}.attention.temperature_scale": 0.0,
    "{a}.rope.scaling.original_context_length": 32,
    "{a}.rope.scaling.finetuned": True,
    "{a}.rope.dimension_sections": [0, 0, 0, 0],
    "{a}.tensor_data_layout": "Meta AI original pth",
    "{a}.pooling_type": 3,
    "general.type": "model",
    "general.sampling.temp": 0.7,
    "general.quantized_by": "somebody",
    "clip.has_vision_encoder": True,
}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_harmless_keys_change_nothing(tmp_path: Path, arch: str) -> None:
    model = model_of(arch)
    sizes = {"{a}.attention.value_length": model.config.head_dim}
    harmless = {key: value for key, value in HARMLESS.items() if key[4:] not in OWN.get(arch, ())}
    path = file_of(tmp_path, arch, harmless | sizes)
    assert_computes(path, model)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    ("keys", "scaling"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, 4.0),
        ({"rope.scaling.factor": 4.0}, 4.0),  # the type is linear where none is given
        ({"rope.scale_linear": 4.0}, 4.0),  # the older key
        ({"rope.scaling.factor": 2.0, "rope.scale_linear": 4.0}, 2.0),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
        ({"rope.scaling.type": "linear"}, None),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 0.0}, None),
    ],
)
def test_rotary_stretching(
    tmp_path: Path, arch: str, keys: dict[str, Any], scaling: float | None
) -> None:
    path = file_of(tmp_path, arch, {"{a}." + key: value for key, value in keys.items()})
    model = model_of(arch)
    stretched = None if scaling is None else RopeScaling("linear", scaling)
    want = model_of(arch, rope_scaling=stretched)
    assert_computes(path, want)
    if scaling is not None:  # and it makes a difference
        plain = Reference(model).forward(TOKENS)
        assert np.abs(Reference(want).forward(TOKENS) - plain).max() > 1e-2 * np.abs(plain).max()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"{a}.rope.scaling.type": "dynamic", "{a}.rope.scaling.factor": 4.0}, "type is 'dynamic'"),
    ({"{a}.rope.scaling.type": "longrope"}, "rope_factors_short.weight is missing|the longrope"),
    (
        {
            "{a}.rope.scaling.type": "yarn",
            "{a}.rope.scaling.factor": 4.0,
            "{a}.rope.scaling.yarn_ext_factor": 0.5,
        },
        r"yarn_ext_factor is 0\.5|type is 'yarn'",
    ),
    ({"{a}.rope.scaling.attn_factor": 1.2}, r"rope.scaling.attn_factor is 1\.2"),
    ({"{a}.rope.scaling.yarn_log_multiplier": 0.1}, r"yarn_log_multiplier is 0\.1"),
    ({"{a}.rope.dimension_sections": [2, 2, 2, 0]}, "rope.dimension_sections is"),
    ({"{a}.attention.causal": False}, "attention.causal is False"),
    ({"{a}.attention.clamp_kqv": 8.0}, r"attention.clamp_kqv is 8\.0"),
    ({"{a}.attention.max_alibi_bias": 8.0}, r"attention.max_alibi_bias is 8\.0"),
    ({"{a}.attention.scale": 0.5}, r"attention.scale is 0\.5"),
    ({"{a}.attention.value_length": 8}, "attention.value_length is 8"),
    ({"{a}.attention.key_length_mla": 8}, "attention.key_length_mla is 8"),
    ({"{a}.attention.layer_norm_epsilon": 1e-3}, "attention.layer_norm_epsilon is 0.001"),
    ({"{a}.attention.shared_kv_layers": 1}, "attention.shared_kv_layers is 1"),
    ({"{a}.rope.scaling.yarn_ext_factor": 1.0}, r"yarn_ext_factor is 1\.0"),
    ({"{a}.attn_logit_softcapping": 50.0}, r"attn_logit_softcapping is 50\.0"),
    ({"{a}.final_logit_softcapping": 30.0}, r"final_logit_softcapping is 30\.0"),
    ({"{a}.logit_scale": 8.0}, r"logit_scale is 8\.0"),
    ({"{a}.residual_scale": 0.22}, r"residual_scale is 0\.2"),
    ({"{a}.embedding_scale": 12.0}, r"embedding_scale is 12\.0"),
    ({"{a}.expert_count": 8, "{a}.expert_used_count": 2}, "expert_count is 8, .*expert_used_count"),
    ({"{a}.leading_dense_block_count": 1}, "leading_dense_block_count is 1"),
    ({"{a}.nextn_predict_layers": 1}, "nextn_predict_layers is 1"),
    ({"{a}.use_parallel_residual": True}, "use_parallel_residual is True"),
    ({"{a}.hidden_activation": "relu"}, "hidden_activation is 'relu'"),
    ({"{a}.tensor_data_layout": "other"}, "tensor_data_layout is 'other'"),
    ({"{a}.embedding_length_per_layer_input": 8}, "embedding_length_per_layer_input is 8"),
    ({"general.type": "adapter"}, "of type 'adapter' and no model"),
    ({"general.type": "mmproj"}, "of type 'mmproj' and no model"),
    ({"arch": "mpt"}, "architecture is 'mpt', which edgeq does not run"),
    # values of other types and sizes
    ({"{a}.context_length": None}, r"\.context_length is missing"),
    ({"{a}.context_length": "long"}, "context_length is 'long'"),
    ({"{a}.context_length": 0}, "context_length is 0"),
    ({"{a}.block_count": True}, "block_count is True"),
    ({"{a}.attention.head_count": []}, "head_count"),
    ({"{a}.attention.head_count": 0}, "head_count is 0"),
    ({"{a}.feed_forward_length": [76, 75]}, "feed_forward_length differs from layer to layer"),
    ({"{a}.rope.scaling.factor": "4"}, "rope.scaling.factor is '4'"),
    ({"{a}.rope.scaling.type": 1}, "rope.scaling.type is 1"),
    ({"{a}.rope.freq_base": float("inf")}, "rope.freq_base is inf"),
    ({"{a}.attention.sliding_window": "on"}, "sliding_window is 'on'"),
]


@pytest.mark.parametrize(
    ("arch", "keys", "words"),
    [
        (arch, keys, words)
        for arch in ARCHITECTURES
        for keys, words in REFUSED
        if not {key[4:] for key in keys} & OWN.get(arch, set())
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_is_not_understood_is_refused_by_name(
    tmp_path: Path, arch: str, keys: dict[str, Any], words: str
) -> None:
    with pytest.raises(EdgeqError, match=words):
        load(file_of(tmp_path, arch, keys))


@pytest.mark.parametrize("arch", [arch for arch in ARCHITECTURES if arch != "mistral3"])
def test_temperatures_of_other_architectures_than_mistral3(tmp_path: Path, arch: str) -> None:
    for scale in (0.1, 1.0):
        with pytest.raises(UnsupportedError, match=rf"temperature_scale is {scale}"):
            load(file_of(tmp_path, arch, {"{a}.attention.temperature_scale": scale}))


YARN = RopeScaling("yarn", 4.0, original_context=16, attention_factor=0.1 * math.log(4.0) + 1)
LONGROPE = RopeScaling(
    "longrope", 4.0, original_context=16, attention_factor=1.25,
    short_factors=(1.0, 1.5, 2.0, 4.5), long_factors=(1.0, 2.0, 5.0, 7.5),
)  # fmt: skip


@pytest.mark.parametrize("arch", [arch for arch in ARCHITECTURES if arch != "gemma3"])
def test_yarn(tmp_path: Path, arch: str) -> None:
    model = model_of(arch, rope_scaling=YARN)
    assert_computes(file_of(tmp_path, arch, model=model), model)
    further = {"{a}.rope.scaling.attn_factor": 1.5, "{a}.rope.scaling.yarn_beta_slow": 0.5}
    scaling = replace(YARN, attention_factor=1.5 * YARN.attention_factor, beta_slow=0.5)
    path = file_of(tmp_path, arch, further, model=model)
    assert_computes(path, model_of(arch, rope_scaling=scaling))


def test_yarn_and_temperature_of_ministral3(tmp_path: Path) -> None:
    model = model_of("mistral3", rope_scaling=replace(YARN, attention_factor=1.0),
                     rope_temperature=0.25)  # fmt: skip
    path = file_of(tmp_path, "mistral3", model=model)
    assert load(path).config.blocks == model.config.blocks
    assert_computes(path, model)


def test_longrope_of_phi3(tmp_path: Path) -> None:
    model = model_of("phi3", rope_scaling=LONGROPE)
    path = file_of(tmp_path, "phi3", model=model)
    assert load(path).config.blocks == model.config.blocks
    assert_computes(path, model)
    twice = file_of(tmp_path, "phi3", {"{a}.rope.scaling.factor": 2.0}, model=model)
    with pytest.raises(UnsupportedError, match="stretches rotary positions twice"):
        load(twice)
    tensors = {"rope_factors_short.weight": np.ones(3, np.float32)}
    with pytest.raises(EdgeqError, match=r"rope_factors_long.weight|must hold a number above 0 fo"):
        load(file_of(tmp_path, "phi3", tensors=tensors))


@pytest.mark.parametrize("arch", ["qwen2", "gemma3"])
def test_longrope_of_architectures_without_it(tmp_path: Path, arch: str) -> None:
    tensors = {f"rope_factors_{name}.weight": np.ones(6, np.float32) for name in ("long", "short")}
    with pytest.raises(UnsupportedError, match=f"longrope method.* not compute for the {arch}"):
        load(file_of(tmp_path, arch, tensors=tensors))


@pytest.mark.parametrize(
    "arch", [arch for arch in ARCHITECTURES if arch not in ("phi3", "glm4", "qwen3_5")]
)
def test_heads_that_rotate_in_part(tmp_path: Path, arch: str) -> None:
    with pytest.raises(UnsupportedError, match="dimension_count is 6 and heads have 12"):
        load(file_of(tmp_path, arch, {"{a}.rope.dimension_count": 6}))


@pytest.mark.parametrize(
    "arch", ["llama", "mistral3", "qwen2", "qwen3", "smollm3", "granite", "ernie4_5", "glm4"]
)
def test_windows_of_architectures_without_one(tmp_path: Path, arch: str) -> None:
    key = "{a}.attention.sliding_window"
    with pytest.raises(UnsupportedError, match=f"{arch}.attention.sliding_window is 16"):
        load(file_of(tmp_path, arch, {key: 16}))
    for off in (0, 64, 4096):  # none, and windows that hold the whole context
        path = file_of(tmp_path, arch, {key: off})
        assert set(windows(load(path).config)) == {None}
        assert_computes(path, model_of(arch))


def test_windows_of_olmo3(tmp_path: Path) -> None:
    """OLMo 3's files are of OLMo 2's architecture; a window is all that tells them apart."""
    for scaling in (None, RopeScaling("linear", 4.0)):
        whole = RopeSpec(5e5, 12, scaling)
        blocks = tuple(
            BlockSpec(
                norm_before=False, norm_after=True, qk_norm="all",
                rope=RopeSpec(5e5, 12) if local else whole, window=7 if local else None,
            )
            for local in (True, True, True, False, True)
        )  # fmt: skip
        model = random_model(tiny_config("olmo3", blocks=blocks))
        assert_computes(file_of(tmp_path, "olmo2", model=model), model)


def test_windows_of_exaone4(tmp_path: Path) -> None:
    """Models of 64 layers have them, in which layers without one do not rotate."""
    kinds = [(i + 1) % 4 != 0 for i in range(64)]
    model = model_of("exaone4", layers=64, window=5, window_layers=kinds, rope_layers=kinds)
    path = file_of(tmp_path, "exaone4", model=model)
    assert load(path).config.blocks == model.config.blocks
    assert_computes(path, model)
    absent = file_of(tmp_path, "exaone4", {"{a}.attention.sliding_window": None}, model=model)
    assert set(windows(load(absent).config)) == {4096, None}


def test_multipliers_of_granite(tmp_path: Path) -> None:
    keys = {"embedding_scale": 2.0, "residual_scale": 0.5, "logit_scale": 4.0}
    want = model_of("granite", embed_scale=2.0, residual_scale=0.5, logit_scale=0.25)
    path = file_of(tmp_path, "granite", {"{a}." + key: value for key, value in keys.items()})
    assert_computes(path, want)
    usual = file_of(tmp_path, "granite", {"{a}.attention.scale": None})
    assert_computes(usual, model_of("granite", attn_scale=12**-0.5))


def test_multipliers_of_minicpm_must_be_there(tmp_path: Path) -> None:
    for key in ("embedding_scale", "residual_scale", "logit_scale"):
        with pytest.raises(FormatError, match=f"minicpm.{key} is missing"):
            load(file_of(tmp_path, "minicpm", {"{a}." + key: None}))


def test_stretched_base_of_hunyuan(tmp_path: Path) -> None:
    keys = {"{a}.rope.freq_base": 10000.0, "{a}.rope.scaling.alpha": 1000.0}
    path = file_of(tmp_path, "hunyuan_v1_dense", keys)
    assert_computes(path, model_of("hunyuan_v1_dense"))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {"{a}.attention.head_count_kv": [0, 2]},
            r"head_count_kv is \[0, 2\]; expected one number",
        ),
        ({"{a}.attention.head_count_kv": [0, 2, 1]}, r"head_count_kv is \[0, 2, 1\]; expected"),
        ({"{a}.attention.head_count_kv": [0, 0, 0]}, r"head_count_kv is \[0, 0, 0\]; expected"),
        ({"{a}.attention.head_count_kv": [2, 2, 2]}, r"tensor blk\.0\.attn_q\.weight is missing"),
        ({"{a}.attention.head_count_kv": [0, 0, 2]}, r"blk\.1\.shortconv\.in_proj\.weight is miss"),
        ({"{a}.shortconv.l_cache": None}, "shortconv.l_cache is missing"),
        (
            {"{a}.shortconv.l_cache": 4},
            r"shortconv\.conv\.weight has shape \[44, 3\] and must hold",
        ),
    ],
    ids=str,
)
def test_short_convolutions_that_do_not_fit(
    tmp_path: Path, keys: dict[str, Any], words: str
) -> None:
    with pytest.raises(FormatError, match=words):
        load(file_of(tmp_path, "lfm2", keys))


def test_windows_of_phi3(tmp_path: Path) -> None:
    path = file_of(tmp_path, "phi3", {"{a}.attention.sliding_window": 9})
    assert_computes(path, model_of("phi3", window=9))


def test_gemma_without_a_window_or_a_base(tmp_path: Path) -> None:
    path = file_of(tmp_path, "gemma3", {"{a}.attention.sliding_window": None})
    assert windows(load(path).config) == (None,) * 3
    with pytest.raises(EdgeqError, match=r"gemma3\.rope\.freq_base is missing"):
        load(file_of(tmp_path, "gemma3", {"{a}.rope.freq_base": None}))


def test_soft_caps_and_windows_of_gemma2(tmp_path: Path) -> None:
    caps = {"{a}.attn_logit_softcapping": 0.75, "{a}.final_logit_softcapping": 2.0}
    want = model_of("gemma2", attn_softcap=0.75, logit_softcap=2.0)
    assert_computes(file_of(tmp_path, "gemma2", caps), want)
    absent = file_of(tmp_path, "gemma2", dict.fromkeys((*caps, "{a}.attention.sliding_window")))
    config = load(absent).config
    assert (config.attn_softcap, config.logit_softcap) == (50, 30)  # as llama.cpp assumes
    assert windows(config) == (4096, None, 4096)
    for key in caps:
        with pytest.raises(UnsupportedError, match=r"by which llama\.cpp divides"):
            load(file_of(tmp_path, "gemma2", {key: 0.0}))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    "name",
    [
        "blk.0.ffn_gate.bias",
        "blk.1.ffn_down.bias",
        "blk.0.attn_sinks.weight",
        "blk.0.attn_sub_norm.weight",
        "blk.0.attn_q.scale",
        "blk.7.attn_norm.weight",
        "blk.0.ffn_gate_inp.weight",
        "output.bias",
        "output_norm.bias",
        "token_embd_norm.weight",
        "v.patch_embd.weight",
    ],
)
def test_tensors_that_nothing_reads_are_named(tmp_path: Path, arch: str, name: str) -> None:
    if arch == "lfm2" and name == "token_embd_norm.weight":
        name = "output_norm.weight"  # its last norm has the other's name
    path = file_of(tmp_path, arch, tensors={name: np.ones(4, np.float32)})
    with pytest.raises(UnsupportedError, match=f"holds 1 tensors .* does not use: {name}"):
        load(path)


@pytest.mark.parametrize("original", [16, 4096, 8192, 32768])
def test_llama3s_factors_in_a_tensor(tmp_path: Path, original: int) -> None:
    model = model_of("llama", rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, original))
    path = file_of(tmp_path, "llama", model=model)
    assert_computes(path, model)
    twice = file_of(tmp_path, "llama", {"{a}.rope.scaling.factor": 2.0}, model=model)
    with pytest.raises(UnsupportedError, match="stretches rotary positions twice"):
        load(twice)


@pytest.mark.parametrize("factors", [np.ones(5), np.full(6, 2.0), np.full(6, np.nan)])
def test_rotary_factors_that_are_no_llama3s(tmp_path: Path, factors: NDArray[Any]) -> None:
    path = file_of(tmp_path, "llama", tensors={"rope_freqs.weight": factors.astype(np.float32)})
    with pytest.raises(UnsupportedError, match="factors other than those of Llama"):
        load(path)


def test_rotary_factors_of_one(tmp_path: Path) -> None:
    ones = {"rope_freqs.weight": np.ones(6, np.float32)}
    assert_computes(file_of(tmp_path, "llama", tensors=ones), model_of("llama"))


@pytest.mark.parametrize(
    "arch",
    [arch for arch in ARCHITECTURES if arch not in ("llama", "mistral3", "granite", "exaone4")],
)
def test_rotary_factors_of_other_architectures(tmp_path: Path, arch: str) -> None:
    half = model_of(arch).config.ropes[0].dim // 2
    path = file_of(tmp_path, arch, tensors={"rope_freqs.weight": np.full(half, 2, np.float32)})
    with pytest.raises(UnsupportedError, match="does not use: rope_freqs"):
        load(path)


def test_biases_of_the_attention_are_read(tmp_path: Path) -> None:
    model = model_of("llama")
    rng = np.random.default_rng(1)
    biased, stored = dict(model.tensors), {}
    for i in range(model.config.layers):
        for letter, part, size in (
            ("q", "q", 48),
            ("k", "k", 24),
            ("v", "v", 24),
            ("o", "output", 44),
        ):
            values = rng.standard_normal(size).astype(np.float32)
            biased[f"model.layers.{i}.self_attn.{letter}_proj.bias"] = type(
                model.tensors["model.norm.weight"]
            )("float32", values)
            heads = {"q": 4, "k": 2}.get(letter)
            stored[f"blk.{i}.attn_{part}.bias"] = interleaved(values, heads) if heads else values
    assert_computes(file_of(tmp_path, "llama", tensors=stored), replace(model, tensors=biased))


def test_phi3_with_projections_apart(tmp_path: Path) -> None:
    model = model_of("phi3")
    ends = np.cumsum([model.tensors[f"model.layers.0.self_attn.{x}_proj.weight"].shape[0]
                      for x in "qk"])  # fmt: skip

    class Apart(gguf.GGUFWriter):
        def add_tensor(self, name: str, tensor: Any, **rest: Any) -> None:
            if "attn_qkv" not in name:
                super().add_tensor(name, tensor, **rest)
                return
            for letter, part in zip("qkv", np.split(tensor, ends), strict=True):
                stored = name.replace("qkv", letter)
                super().add_tensor(stored, np.ascontiguousarray(part), **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFWriter", Apart)
        path = file_of(tmp_path, "phi3")
    assert_computes(path, model)
    name = "blk.0.attn_q.weight"  # beside the fused matrix it is one too many
    tensors = {name: load(path).tensors["model.layers.0.self_attn.q_proj.weight"].numpy()}
    with pytest.raises(EdgeqError, match=r"does not use: blk\.0\.attn_q"):
        load(file_of(tmp_path, "phi3", tensors=tensors))


def test_a_published_file() -> None:
    config = load(real_model(SMOLLM2)).config
    assert (config.layers, config.hidden, config.heads, config.kv_heads) == (30, 576, 9, 3)
    assert config.blocks == (BlockSpec(rope=RopeSpec(100000.0, 64)),) * 30
    assert config.tied


def test_more_tokens_than_embeddings(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write(path, random_model(tiny_config("llama", rope_scaling=None, vocab=9)), tokenizer=BPE)
    with pytest.raises(FormatError, match="lists 10 tokens and its embeddings hold 9"):
        load(path)


def test_a_vocabulary_is_no_model() -> None:
    with pytest.raises(FormatError, match="holds a vocabulary and no tensors"):
        load(need("data/tokenizers/ggml-vocab-llama-spm.gguf"))
