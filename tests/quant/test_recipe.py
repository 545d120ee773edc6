from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest

from edgeq.core.errors import FormatError, SchemeError, UsageError
from edgeq.formats.schemes import FloatScheme, QuantScheme, parse_scheme
from edgeq.importers.shapes import SHAPES as MODELS
from edgeq.model.artifact_layout import TensorLayout
from edgeq.quant import METHODS, Recipe, Rule
from edgeq.quant.presets import LADDER, presets_for
from edgeq.quant.rules import OUTER, Activations
from tests.families import scheme_of

SHAPES = {
    "model.embed_tokens.weight": (100, 64),
    "model.layers.0.input_layernorm.weight": (64,),
    "model.layers.0.self_attn.q_proj.weight": (64, 64),
    "model.layers.0.self_attn.q_proj.bias": (64,),
    "model.layers.0.self_attn.k_proj.weight": (32, 64),
    "model.layers.0.self_attn.v_proj.weight": (32, 64),
    "model.layers.0.mlp.down_proj.weight": (64, 172),
    "model.layers.1.mlp.down_proj.weight": (64, 172),
    "model.norm.weight": (64,),
    "lm_head.weight": (100, 64),
}


def texts(recipe: Recipe) -> dict[str, str]:
    return {name: str(scheme) for name, scheme in recipe.assign(SHAPES).items()}


def test_the_defaults() -> None:
    got = texts(Recipe.from_options())
    assert got == {
        "model.embed_tokens.weight": "w5-g32",
        "model.layers.0.input_layernorm.weight": "f32",
        "model.layers.0.self_attn.q_proj.weight": "w4-g32",
        "model.layers.0.self_attn.q_proj.bias": "f32",
        "model.layers.0.self_attn.k_proj.weight": "w5-g64",
        "model.layers.0.self_attn.v_proj.weight": "w5-g32",
        "model.layers.0.mlp.down_proj.weight": "w5-g32",
        "model.layers.1.mlp.down_proj.weight": "w5-g32",
        "model.norm.weight": "f32",
        "lm_head.weight": "w5-g32",
    }


@pytest.mark.parametrize(
    ("preset", "head"),
    [("w4-g64", "w8-channel"), ("w8-g32", "w8-g32"), ("w8-channel", "w8-channel"),
     ("w2-g16", "w8-channel"), ("bf16", "bf16")],
)  # fmt: skip
def test_embedding_and_head_follow_an_eight_bit_preset(preset: str, head: str) -> None:
    got = texts(Recipe.from_options(preset=preset))
    assert got["lm_head.weight"] == got["model.embed_tokens.weight"] == head
    assert got["model.layers.0.mlp.down_proj.weight"] == str(parse_scheme(preset))


def test_the_first_matching_rule_wins() -> None:
    recipe = Recipe.from_options(
        tensor_types=[r"layers\.0\.mlp=w8-g32", "down_proj=w3-g32", "^lm_head=w4-g32"]
    )
    got = texts(recipe)
    assert got["model.layers.0.mlp.down_proj.weight"] == "w8-g32"
    assert got["model.layers.1.mlp.down_proj.weight"] == "w3-g32"
    assert got["lm_head.weight"] == "w4-g32"
    assert got["model.embed_tokens.weight"] == "w5-g32"


def test_vectors_stay_floating_point() -> None:
    got = texts(Recipe.from_options(tensor_types=[r"layers\.0=w8-g32", "norm=bf16"]))
    assert got["model.layers.0.self_attn.q_proj.weight"] == "w8-g32"
    assert got["model.layers.0.self_attn.q_proj.bias"] == "f32"
    assert got["model.layers.0.input_layernorm.weight"] == "bf16"
    assert got["model.norm.weight"] == "bf16"


@pytest.mark.parametrize(
    ("options", "default"),
    [
        ({}, "w4-g32"),
        ({"bits": 8}, "w8-channel"),
        ({"bits": 4}, "w4-g32"),
        ({"bits": 3}, "w3-g32"),
        ({"bits": 2}, "w2-g16-asym"),
        ({"bits": 2, "group": 32}, "w2-g32-asym"),
        ({"bits": 8, "group": 64}, "w8-g64"),
        ({"group": 128}, "w4-g128"),
        ({"preset": "w4-g256-asym"}, "w4-g256-asym"),
    ],
)
def test_options(options: dict, default: str) -> None:
    assert str(Recipe.from_options(**options).default) == default


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"bits": 7}, SchemeError, "bits is 7; use one of 2, 3, 4, 5, 6, 8"),
        ({"bits": 4, "group": 48}, SchemeError, "group_size is 48; use one of 16, 32"),
        ({"preset": "w4-g32", "bits": 4}, UsageError, "either a preset or bits and group"),
        ({"preset": "w4-g23"}, SchemeError, "group_size is 23"),
        ({"tensor_types": ["down_proj"]}, SchemeError, "write REGEX=SCHEME"),
        ({"tensor_types": ["=w4-g32"]}, SchemeError, "write REGEX=SCHEME"),
        ({"tensor_types": ["a=w9-g32"]}, SchemeError, "bits is 9"),
        ({"tensor_types": ["a(=w4-g32"]}, SchemeError, r"'a\(' is not a regular expression"),
    ],
)
def test_options_that_cannot_be(options: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Recipe.from_options(**options)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("blk.0.down_proj=w8-g32", "matches no tensor; near it are model.layers.0.mlp.down_proj"),
        ("^lm_heat=w8-g32", "matches no tensor; near it are .*lm_head.weight"),
        ("layernorm=w8-g32", "matches only vectors .*give them f32, f16 or bf16"),
        ("q_proj=w4-g128", r"group_size 128 is longer than a row of .*q_proj.weight \(K=64\); "
                           "use 16, 32, 64 or a scale per channel"),
    ],
)  # fmt: skip
def test_rules_that_do_not_suit_the_model(rule: str, words: str) -> None:
    with pytest.raises(SchemeError, match=words):
        Recipe.from_options(tensor_types=[rule]).assign(SHAPES)


def test_built_in_rules_need_not_match() -> None:
    tied = {name: shape for name, shape in SHAPES.items() if "mlp" in name}
    assert set(map(str, Recipe.from_options().assign(tied).values())) == {"w5-g32"}


def test_rules_of_presets_are_for_rows_as_long_as_their_groups() -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    default = Recipe.from_options()
    got = {k: str(default.assign({name: (32, k)})[name]) for k in (32, 33, 64, 576)}
    assert got == {32: "w4-g32", 33: "w5-g64", 64: "w5-g64", 576: "w5-g64"}
    # a rule of the user's is refused, not left out
    own = Recipe.from_options(tensor_types=["k_proj=w5-g64"])
    with pytest.raises(SchemeError, match="group_size 64 is longer than a row"):
        own.assign({name: (32, 32)})


def bits_per_weight(recipe: Recipe, model: str) -> float:
    """Stored bits per weight of a known model's matrices."""
    shapes = dict(MODELS[model].linears())
    schemes = recipe.assign(shapes)
    stored = sum(8 * TensorLayout(schemes[name], shapes[name]).nbytes for name in shapes)
    return stored / sum(math.prod(shape) for shape in shapes.values())


@pytest.mark.parametrize("name", LADDER)
def test_a_size_is_that_of_a_large_model(name: str) -> None:
    bits = bits_per_weight(Recipe.named(name), "mistral-7b")
    assert -0.01 < bits - float(name.removesuffix("bpw")) < 0.15


@pytest.mark.parametrize("model", MODELS)
def test_each_size_is_larger_than_the_one_below(model: str) -> None:
    sizes = {name: bits_per_weight(Recipe.named(name), model) for name in LADDER}
    assert all(a < b for a, b in pairwise(sizes.values())), sizes


def test_an_equals_sign_in_the_pattern() -> None:
    assert Rule.parse("(?=down)down_proj=w8-g32") == Rule("(?=down)down_proj", scheme_of("w8-g32"))


def test_through_json_and_back() -> None:
    recipe = Recipe.from_options(
        preset="w2-g16-sym", tensor_types=["norm=f16", "q_proj=w8-channel"], method="mse"
    )
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert recipe.rules[0].scheme == FloatScheme("float16")


def test_everything_through_json_and_back() -> None:
    recipe = Recipe(
        rules=(Rule("down_proj", scheme_of("w8-g32")),),
        default=scheme_of("w3-g32"),
        method="gptq",
        transforms=("awq", "rotate"),
        activations=Activations("static", "entropy"),
        options={"damping": 0.02, "act_order": True},
        training={"method": "distill", "steps": 30},
        target={"bpw": 3.5},
    )
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_a_recipe_of_an_older_artifact_is_read() -> None:
    old = {"method": "mse", "default": "w4-g32", "rules": [[OUTER, "w8-channel"]]}
    assert Recipe.from_dict(old) == Recipe.from_options("w4-g32", method="mse")
    assert Recipe.from_options("w4-g32", method="mse").to_dict() == old


@pytest.mark.parametrize("name", presets_for("decoder"))
def test_every_preset_is_a_recipe(name: str) -> None:
    recipe = Recipe.named(name)
    assert recipe.method in METHODS
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert recipe.rules[-1].pattern == OUTER
    # a name that is also a scheme means that scheme, and its method
    try:
        scheme = parse_scheme(name, method=True)
    except SchemeError:
        return
    assert isinstance(scheme, QuantScheme)
    assert recipe.default == scheme.stored
    assert recipe.method == (scheme.method or "rtn")


@pytest.mark.parametrize(
    ("name", "needs", "extra"),
    [
        ("w4-g32", set(), None),
        ("palette4", set(), None),
        ("w8a8-dynamic", set(), None),
        ("w8a8-static", {"ranges"}, None),
        ("w4-g32-imatrix", {"importance"}, None),
        ("w4-g32-gptq", {"hessian"}, None),
        ("w4-awq-gptq", {"hessian", "transforms"}, None),
        ("mixed-4.5bpw", {"hessian", "target"}, None),
        ("mixed-palette-4.5bpw", {"hessian", "target"}, None),
        ("w3-g32-distill", {"hessian", "training"}, "train"),
    ],
)
def test_what_presets_need(name: str, needs: set[str], extra: str | None) -> None:
    recipe = Recipe.named(name)
    assert recipe.needs == needs
    assert recipe.extra == extra


def test_options_change_a_preset() -> None:
    recipe = Recipe.from_options(
        preset="w4-awq-gptq", tensor_types=["down_proj=w8-g32"], method="mse"
    )
    assert (recipe.method, recipe.transforms) == ("mse", ("awq",))
    assert [str(rule.scheme) for rule in recipe.rules] == ["w8-g32", "w8-channel"]


TOML = """
default = "w4-g32"
method = "gptq"
rules = [["down_proj", "w8-g32"]]
transforms = ["awq"]
[activations]
mode = "static"
observer = "mse"
[options]
damping = 0.05
"""


def test_a_recipe_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(TOML)
    recipe = Recipe.from_file(path)
    assert recipe == Recipe(
        rules=(Rule("down_proj", scheme_of("w8-g32")), Rule(OUTER, scheme_of("w8-channel"))),
        default=scheme_of("w4-g32"),
        method="gptq",
        transforms=("awq",),
        activations=Activations("static", "mse"),
        options={"damping": 0.05},
    )
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe.to_dict()))
    assert Recipe.from_file(path) == recipe


def test_a_recipe_file_may_build_on_a_preset(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text('{"preset": "w4-g32-gptq", "rules": [["q_proj", "w8-g32"]], "method": "mse"}')
    recipe = Recipe.from_file(path)
    assert recipe == Recipe.from_options("w4-g32", tensor_types=["q_proj=w8-g32"], method="mse")


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("{", FormatError, "is not JSON"),
        ("[1]", FormatError, "contains no recipe"),
        ("{}", FormatError, "neither default nor preset"),
        ('{"default": "w4-g32", "preset": "w4-g32"}', FormatError, "either preset or default"),
        ('{"default": "w4-g33"}', SchemeError, "recipe.json: group_size is 33"),
        ('{"default": 4}', FormatError, "4 is no text"),
        ('{"preset": "w4-gptq"}', SchemeError, "unknown preset 'w4-gptq'"),
        ('{"default": "w4-g32", "rule": []}', FormatError, "did you mean 'rules'"),
        ('{"default": "w4-g32", "rules": 7}', FormatError, "write a list"),
        ('{"default": "w4-g32", "rules": ["a"]}', FormatError, "not readable"),
        ('{"default": "w4-g32", "options": {"dampening": 1}}', SchemeError, "'damping'"),
        ('{"default": "w4-g32", "options": {"damping": "a"}}', SchemeError, "must be int or float"),
        ('{"default": "w4-g32", "activations": {"mode": "dyn"}}', SchemeError, "'dynamic'"),
        ('{"default": "w4-g32", "training": {"method": "dist"}}', UsageError, "'distill'"),
        ('{"default": "w4-g32", "training": {"step": 5}}', SchemeError, "'steps'"),
        ('{"default": "w4-g32", "training": {"steps": 0}}', UsageError, "steps is 0"),
        ('{"default": "w4-g32", "target": {"bits": 5}}', SchemeError, "give one number"),
        ('{"default": "w4-g32", "target": {"bpw": -5}}', SchemeError, "positive number"),
    ],
)
def test_recipe_files_that_cannot_be(
    text: str, error: type[Exception], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(text)
    with pytest.raises(error, match=words):
        Recipe.from_file(path)


def test_a_toml_file_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text("default = w4")
    with pytest.raises(FormatError, match="is not TOML"):
        Recipe.from_file(path)
    with pytest.raises(FormatError, match="cannot be read"):
        Recipe.from_file(tmp_path / "none.json")


@pytest.mark.parametrize(
    "data", [{}, {"method": "rtn", "default": 4, "rules": []},
             {"method": "rtn", "default": "w4-g32", "rules": [["a"]]}],
)  # fmt: skip
def test_a_damaged_recipe_is_refused(data: dict) -> None:
    with pytest.raises(FormatError, match="not readable"):
        Recipe.from_dict(data)
