"""Recipes of graphs: text forms, files, presets, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgeq.core.errors import EdgeqError, FormatError, SchemeError, UsageError
from edgeq.quant.graph.choices import choices, float_nodes, outer_nodes
from edgeq.quant.graph.presets import DEFAULT_PRESET, PRESETS
from edgeq.quant.graph.recipe import GraphRecipe, GraphRule, choice_text, parse_choice
from edgeq.quant.graph.weights import WeightScheme, weight_nodes
from tests.graph_made import cnn, encoder


@pytest.mark.parametrize(
    "text", ["w8-channel", "w8-tensor", "w4-channel-gptq", "w4-g32-mse", "f32", "fp16"]
)
def test_a_choice_has_one_text_form(text: str) -> None:
    assert choice_text(parse_choice(text)) == text
    assert parse_choice(f" {text.upper()} ") == parse_choice(text)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_whole_and_survive_their_dictionary(name: str) -> None:
    recipe = GraphRecipe.named(name)
    again = GraphRecipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
    assert again == recipe
    about, _ = PRESETS[name]
    assert about
    assert not about.endswith(".")


def test_presets_say_what_they_need() -> None:
    needing = {name for name in PRESETS if GraphRecipe.named(name).needs_samples}
    assert DEFAULT_PRESET in needing
    assert {"w8-dynamic", "w8-channel", "w4-g32", "fp16"}.isdisjoint(needing)
    assert {"w4-g32-gptq", "w4a8-gptq", "w8a8-mixed"} <= needing


def test_a_scheme_alone_is_for_weights_alone() -> None:
    recipe = GraphRecipe.named("w4-g64")
    assert recipe.weights == WeightScheme(4, "group", 64, "rtn")
    assert (recipe.activations, recipe.outer) == ("float", None)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("w8a8-statik", "did you mean 'w8a8-static'"),
        ("w5-channel", "unknown preset"),
        ("w4-g48", "48"),
        ("", "unknown preset"),
    ],
)
def test_unknown_presets_name_the_known(text: str, word: str) -> None:
    with pytest.raises(SchemeError, match=word):
        GraphRecipe.named(text)


@pytest.mark.parametrize(
    ("change", "kind", "word"),
    [
        ({"weigths": "w8-channel"}, FormatError, "did you mean 'weights'"),
        ({"weights": 8}, FormatError, "no text"),
        ({"activations": "int8"}, SchemeError, "static"),
        ({"observer": "max"}, SchemeError, "minmax"),
        ({"scope": "some"}, SchemeError, "layers"),
        ({"rest": "bf16"}, SchemeError, "fp16"),
        ({"equalise": "yes"}, SchemeError, "true or false"),
        ({"bias_correction": None}, SchemeError, "true or false"),
        ({"mixed": 2}, SchemeError, "between 0 and 1"),
        ({"mixed": True}, SchemeError, "between 0 and 1"),
        ({"rules": [["(", "f32"]]}, SchemeError, "regular expression"),
        ({"rules": ["head"]}, FormatError, "not readable"),
        ({"rules": 3}, FormatError, "not readable"),
        ({"weights": "f32", "activations": "static"}, SchemeError, "integer weights"),
        ({"weights": "w4-g32", "activations": "static"}, SchemeError, "channel or tensor"),
    ],
)
def test_what_cannot_be_is_refused(change: dict, kind: type[EdgeqError], word: str) -> None:
    with pytest.raises(kind, match=word):
        GraphRecipe.from_dict({"weights": "w8-channel", **change})


def test_weights_must_be_said() -> None:
    with pytest.raises(FormatError, match="does not say weights"):
        GraphRecipe.from_dict({})


def test_files_may_change_a_preset(tmp_path: Path) -> None:
    toml = tmp_path / "r.toml"
    toml.write_text('preset = "w8a8-static"\nobserver = "entropy"\nrules = [["head", "fp16"]]\n')
    recipe = GraphRecipe.from_file(toml)
    assert recipe.observer == "entropy"
    assert recipe.rules == (GraphRule("head", "fp16"),)
    assert recipe.activations == "static"
    same = tmp_path / "r.json"
    same.write_text(json.dumps(recipe.to_dict()))
    assert GraphRecipe.from_file(same) == recipe


@pytest.mark.parametrize(
    ("name", "text", "word"),
    [
        ("r.toml", "weights = ", "is not TOML"),
        ("r.json", "[1]", "contains no recipe"),
        ("r.json", '{"preset": 3}', "no text"),
        ("r.json", '{"preset": "none-such"}', "unknown preset"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, text: str, word: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(EdgeqError, match=word) as caught:
        GraphRecipe.from_file(path)
    assert str(path) in str(caught.value)


def test_options_come_before_the_recipe() -> None:
    recipe = GraphRecipe.from_options(
        "w4a8-static", rules=["linear=w8-channel"], method="gptq", observer="minmax"
    )
    assert isinstance(recipe.weights, WeightScheme)
    assert (recipe.weights.method, recipe.observer) == ("gptq", "minmax")
    assert recipe.rules[0] == GraphRule("linear", parse_choice("w8-channel"))
    assert GraphRecipe.from_options() == GraphRecipe.named(DEFAULT_PRESET)
    with pytest.raises(UsageError, match="either a preset or"):
        GraphRecipe.from_options("w8-channel", "r.json")
    with pytest.raises(UsageError, match="nothing to round"):
        GraphRecipe.from_options("fp16", method="gptq")
    with pytest.raises(SchemeError, match="unknown method"):
        GraphRecipe.from_options("w8-channel", method="awq")
    with pytest.raises(SchemeError, match="REGEX=SCHEME"):
        GraphRecipe.from_options(rules=["linear"])


def test_rules_choose_and_must_match() -> None:
    graph = cnn()
    recipe = GraphRecipe.from_options("w8-channel", rules=["^conv2$=f32", "conv=w4-channel"])
    found = {name: choice_text(choice) for name, choice in choices(graph, recipe).items()}
    assert found == {
        "conv0": "w4-channel", "conv2": "f32", "conv4": "w4-channel", "linear10": "w8-channel",
    }  # fmt: skip
    assert float_nodes(graph, recipe) == {"conv2"}
    with pytest.raises(SchemeError, match="'nowhere' matches no node"):
        GraphRecipe.from_options(rules=["nowhere=f32"]).check(graph.nodes)


def test_first_last_and_depthwise_layers_are_the_outer_ones() -> None:
    graph = cnn()
    assert outer_nodes(graph, weight_nodes(graph)) == {"conv0", "conv2", "linear10"}
    inner = encoder()
    assert outer_nodes(inner, weight_nodes(inner)) == frozenset()
    found = choices(graph, GraphRecipe.named("w4a8-static"))
    assert [scheme.bits for scheme in found.values()] == [8, 8, 4, 8]


def test_tables_may_have_a_scheme_of_their_own() -> None:
    graph = encoder()
    nodes = {node.name: node.op for node in weight_nodes(graph)}
    assert "Gather" in nodes.values()
    recipe = GraphRecipe.named("w4-g32")
    for name, scheme in choices(graph, recipe).items():
        assert choice_text(scheme) == ("w4-g64-mse" if nodes[name] == "Gather" else "w4-g32")
    assert GraphRecipe.from_dict(recipe.to_dict()).tables == WeightScheme(4, "group", 64, "mse")
    assert set(choices(graph, GraphRecipe.named("w4-g16")).values()) == {parse_choice("w4-g16")}
