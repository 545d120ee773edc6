"""Recipes of graphs: text forms, files, presets, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgeq.core.errors import EdgeqError, FormatError, SchemeError, UsageError
from edgeq.formats.schemes import FloatScheme, QuantScheme, Scheme, parse_scheme
from edgeq.quant.graph.choices import choices, float_nodes, outer_nodes
from edgeq.quant.graph.recipe import check_rules
from edgeq.quant.graph.weights import weight_nodes
from edgeq.quant.presets import DEFAULTS, PRESETS, presets_for
from edgeq.quant.recipe import Recipe
from edgeq.quant.rules import Activations, Rule
from tests.graph_made import cnn, encoder


def scheme_of(text: str) -> Scheme:
    return parse_scheme(text, method=True)


@pytest.mark.parametrize("name", presets_for("graph"))
def test_presets_are_whole_and_survive_their_dictionary(name: str) -> None:
    recipe = Recipe.named(name, "graph")
    again = Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
    assert again == recipe
    about = PRESETS[name].about
    assert about
    assert not about.endswith(".")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_for_something(name: str) -> None:
    preset = PRESETS[name]
    assert preset.decoder is not None or preset.graph is not None
    assert (preset.graph is None) == (not preset.about)


def test_presets_are_not_taken_for_sources_they_are_not_for() -> None:
    for name in ("mixed-4.5bpw", "palette3", "w8a8-dynamic"):
        with pytest.raises(SchemeError, match="unknown preset for a graph"):
            Recipe.named(name, "graph")
    for name in ("w8a8-mixed", "w8-dynamic", "w4a8-gptq"):
        with pytest.raises(SchemeError, match="unknown preset"):
            Recipe.named(name)


def test_presets_say_what_they_need() -> None:
    needing = {name for name in presets_for("graph") if Recipe.named(name, "graph").needs}
    assert DEFAULTS["graph"] in needing
    assert {"w8-dynamic", "w8-channel", "w4-g32", "fp16"}.isdisjoint(needing)
    assert {"w4-g32-gptq", "w4a8-gptq", "w8a8-mixed"} <= needing


def test_a_scheme_alone_is_for_weights_alone() -> None:
    recipe = Recipe.named("w4-g64", "graph")
    assert recipe.default == QuantScheme(4, True, "group", 64)
    assert recipe.graph is not None
    assert (recipe.activations, recipe.graph.outer) == (None, None)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("w8a8-statik", "did you mean 'w8a8-static'"),
        ("w5-channel", "cannot have 5 bits; use 4 or 8"),
        ("w4-g48", "48"),
        ("", "unknown preset"),
    ],
)
def test_unknown_presets_name_the_known(text: str, word: str) -> None:
    with pytest.raises(SchemeError, match=word):
        Recipe.named(text, "graph")


@pytest.mark.parametrize(
    ("change", "kind", "word"),
    [
        ({"weigths": "w8-channel"}, FormatError, "did you mean 'weights'"),
        ({"weights": 8}, FormatError, "no text"),
        ({"activations": "int8"}, SchemeError, "static"),
        ({"observer": "max"}, SchemeError, "minmax"),
        ({"scope": "some"}, SchemeError, "layers"),
        ({"rest": "bf16"}, SchemeError, "use f32 or f16"),
        ({"rest": "w8-channel"}, SchemeError, "use f32 or f16 for float constants"),
        ({"target": {"bpw": 4.5}}, FormatError, "target is for decoders"),
        ({"graph": {"scop": "all"}}, FormatError, "did you mean 'scope'"),
        ({"graph": 3}, FormatError, "write a table"),
        ({"equalise": "yes"}, SchemeError, "true or false"),
        ({"bias_correction": None}, SchemeError, "true or false"),
        ({"mixed": 2}, SchemeError, "between 0 and 1"),
        ({"mixed": True}, SchemeError, "between 0 and 1"),
        ({"rules": [["(", "f32"]]}, SchemeError, "regular expression"),
        ({"rules": ["head"]}, FormatError, "not readable"),
        ({"rules": 3}, FormatError, "not readable"),
        ({"weights": "f32", "activations": "static"}, SchemeError, "integer weights"),
        ({"activations": {"mode": "int8"}}, SchemeError, "static"),
        ({"weights": "w4-g32", "activations": "static"}, SchemeError, "channel or tensor"),
    ],
)
def test_what_cannot_be_is_refused(change: dict, kind: type[EdgeqError], word: str) -> None:
    with pytest.raises(kind, match=word):
        Recipe.from_dict({"weights": "w8-channel", **change})


def test_weights_must_be_said() -> None:
    with pytest.raises(FormatError, match="does not say weights"):
        Recipe.from_dict({"scope": "all"})


def test_files_may_change_a_preset(tmp_path: Path) -> None:
    toml = tmp_path / "r.toml"
    toml.write_text('preset = "w8a8-static"\nobserver = "entropy"\nrules = [["head", "fp16"]]\n')
    recipe = Recipe.from_file(toml)
    assert recipe.activations == Activations("static", "entropy")
    assert recipe.rules == (Rule("head", FloatScheme("float16")),)
    same = tmp_path / "r.json"
    same.write_text(json.dumps(recipe.to_dict()))
    assert Recipe.from_file(same) == recipe


def test_graph_options_may_have_a_table_of_their_own(tmp_path: Path) -> None:
    flat, table = tmp_path / "flat.toml", tmp_path / "table.toml"
    flat.write_text(
        'weights = "w4-channel-gptq"\nactivations = "static"\nobserver = "mse"\n'
        'equalise = true\nouter = "w8-channel"\nmixed = 0.5\n'
    )
    table.write_text(
        'default = "w4-channel"\nmethod = "gptq"\n[activations]\nmode = "static"\n'
        'observer = "mse"\n[graph]\nequalize = true\nouter = "w8-channel"\nmixed = 0.5\n'
    )
    recipe = Recipe.from_file(table)
    assert recipe.graph is not None
    assert recipe == Recipe.from_file(flat)
    assert recipe == Recipe.from_dict(recipe.to_dict())


def test_one_file_serves_both_kinds_of_sources(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text('preset = "w4-g32-gptq"\n[graph]\nrest = "float32"\n')
    decoder, graph = Recipe.from_file(path, "decoder"), Recipe.from_file(path, "graph")
    assert decoder == Recipe.named("w4-g32-gptq")
    preset = Recipe.named("w4-g32-gptq", "graph").to_dict()
    assert graph == Recipe.from_dict({**preset, "rest": "f32"})
    plain = tmp_path / "plain.json"
    plain.write_text('{"default": "w4-g32-mse", "rules": [["head", "f16"]]}')
    decoder, graph = Recipe.from_file(plain), Recipe.from_file(plain, "graph")
    assert (str(decoder.default), decoder.method) == ("w4-g32", "mse")
    assert str(graph.default) == "w4-g32-mse"
    assert decoder.rules[0] == graph.rules[0]


@pytest.mark.parametrize(
    ("name", "text", "word"),
    [
        ("r.toml", "weights = ", "is not TOML"),
        ("r.json", '{"default": "w4-g32-mse", "method": "rtn"}', "say the method once"),
        ("r.json", "[1]", "contains no recipe"),
        ("r.json", '{"preset": 3}', "no text"),
        ("r.json", '{"preset": "none-such"}', "unknown preset"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, text: str, word: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(EdgeqError, match=word) as caught:
        Recipe.from_file(path)
    assert str(path) in str(caught.value)


def for_graph(preset: str | None = None, **options: Any) -> Recipe:
    return Recipe.from_options(preset, source="graph", **options)


def test_options_come_before_the_recipe() -> None:
    recipe = for_graph(
        "w4a8-static", tensor_types=["linear=w8-channel"], method="gptq", observer="minmax"
    )
    assert isinstance(recipe.default, QuantScheme)
    assert recipe.default.method == "gptq"
    assert recipe.activations == Activations("static", "minmax")
    assert recipe.rules[0] == Rule("linear", scheme_of("w8-channel"))
    assert str(for_graph("w4-channel", method="palette").default) == "w4-channel-palette"
    assert str(for_graph("palette4", method="mse").default) == "w4-channel-mse"
    assert for_graph() == Recipe.named(DEFAULTS["graph"], "graph")
    with pytest.raises(UsageError, match="either a preset or"):
        for_graph("w8-channel", file="r.json")
    with pytest.raises(UsageError, match="nothing to round"):
        for_graph("fp16", method="gptq")
    with pytest.raises(SchemeError, match="unknown method"):
        for_graph("w8-channel", method="awq")
    with pytest.raises(SchemeError, match="REGEX=SCHEME"):
        for_graph(tensor_types=["linear"])


def test_a_decoder_has_one_method() -> None:
    with pytest.raises(SchemeError, match="all weights of a decoder are rounded by one"):
        Recipe((), scheme_of("w4-g32-gptq"))


def test_rules_choose_and_must_match() -> None:
    graph = cnn()
    recipe = for_graph("w8-channel", tensor_types=["^conv2$=f32", "conv=w4-channel"])
    found = {name: str(choice) for name, choice in choices(graph, recipe).items()}
    assert found == {
        "conv0": "w4-channel", "conv2": "f32", "conv4": "w4-channel", "linear10": "w8-channel",
    }  # fmt: skip
    assert float_nodes(graph, recipe) == {"conv2"}
    with pytest.raises(SchemeError, match="'nowhere' matches no node"):
        check_rules(for_graph(tensor_types=["nowhere=f32"]), graph.nodes)


def test_first_last_and_depthwise_layers_are_the_outer_ones() -> None:
    graph = cnn()
    assert outer_nodes(graph, weight_nodes(graph)) == {"conv0", "conv2", "linear10"}
    inner = encoder()
    assert outer_nodes(inner, weight_nodes(inner)) == frozenset()
    found = choices(graph, Recipe.named("w4a8-static", "graph"))
    assert [getattr(scheme, "bits", None) for scheme in found.values()] == [8, 8, 4, 8]


def test_tables_may_have_a_scheme_of_their_own() -> None:
    graph = encoder()
    nodes = {node.name: node.op for node in weight_nodes(graph)}
    assert "Gather" in nodes.values()
    recipe = Recipe.named("w4-g32", "graph")
    for name, scheme in choices(graph, recipe).items():
        assert str(scheme) == ("w4-g64-mse" if nodes[name] == "Gather" else "w4-g32")
    assert recipe.graph is not None
    assert recipe.graph.tables == scheme_of("w4-g64-mse")
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert set(choices(graph, Recipe.named("w4-g16", "graph")).values()) == {scheme_of("w4-g16")}
