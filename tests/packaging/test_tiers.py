"""Tiers: what the manifest says of them, and which of them the code of each platform chooses."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgeq.core.errors import EdgeqError, FormatError, UnsupportedError, UsageError
from edgeq.devices.model_header import ModelFacts, facts_of
from edgeq.devices.profile import find
from edgeq.importers import load
from edgeq.model.artifact import save
from edgeq.packaging import estimates
from edgeq.packaging.build import package
from edgeq.packaging.manifest import Manifest, ModelVariant, read_manifest
from edgeq.packaging.platforms import PLATFORMS, Form
from edgeq.packaging.schema import schema
from edgeq.packaging.tiers import Tier
from edgeq.packaging.verify import verify_package
from tests.families import quantized, random_model, tiny_config
from tests.packaging.conftest import need_runtimes
from tests.packaging.kotlin import compiled, need_kotlin
from tests.packaging.test_glue import STUBS, faults, sources
from tests.packaging.test_manifest import resealed
from tests.paths import DEMO

KOTLIN = """
package program

import edgeq.model.LanguageModel
import edgeq.model.Tier

fun main(arguments: Array<String>) {
    for (free in arguments) {
        val tier = Tier.firstWithin(LanguageModel.TIERS, free.toLong())
        println(tier?.let { "${it.name} ${it.variant} ${it.context} ${it.neededBytes}" } ?: "none")
    }
}
"""
"""Prints the tier that is chosen for each number of free bytes."""


RECIPES = {
    "rpi": ["w8-g32"], "ort-mobile": ["w8-g32"], "ios": ["w8-g32"],
    "android": ["w8-channel", "w8-g32"],
}  # fmt: skip
"""Recipes of 8 bits that the runtimes of a platform have."""
IDS = {
    "rpi": ["edgeq-w8-g32-512", "edgeq-w8-g32-256", "edgeq-512", "edgeq-256"],
    "ort-mobile": ["genai-w8-g32-512", "genai-w8-g32-256", "genai-512", "genai-256"],
    # the length of the cache is part of these two files
    "android": ["litertlm-w8-channel-512", "litertlm-512"],
    "ios": ["coreml-w8-g32-512", "coreml-512"],
}
"""Identifiers of the tiers of each platform's first form."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of random weights in w4-g32, with the demo's tokenizer."""
    config = tiny_config("llama", vocab=2048, bos=0, eos=(1,), context=512)
    model = replace(quantized(random_model(config), "w4-g32"), files=load(DEMO).files)
    path = tmp_path_factory.mktemp("source") / "tiny.edgeq"
    save(model, path)
    return path


class Tiered:
    """Packages of one model in two recipes, each made when it is first asked for."""

    def __init__(self, folder: Path, source: Path) -> None:
        self.folder, self.source = folder, source

    def __getitem__(self, platform: str) -> Path:
        need_runtimes(platform)
        path = self.folder / platform
        if not path.exists():
            package(self.source, platform, path, name="tale", variants=RECIPES[platform])
        return path


@pytest.fixture(scope="module")
def tiered(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Tiered:
    return Tiered(tmp_path_factory.mktemp("tiered"), tiny)


def nonconforming(raw: bytes) -> list[str]:
    """What a manifest has against its JSON schema."""
    checker = pytest.importorskip("jsonschema_rs").validator_for(schema())
    return [str(error) for error in checker.iter_errors(json.loads(raw))]


@pytest.mark.slow
@pytest.mark.parametrize("platform", sorted(PLATFORMS))
def test_a_package_of_two_recipes_has_tiers_from_the_largest_to_the_smallest(
    platform: str, tiered: Tiered
) -> None:
    folder = tiered[platform]
    raw = (folder / "manifest.json").read_bytes()
    made = Manifest.from_bytes(raw)
    form = PLATFORMS[platform].models[0]
    tiers = made.tiers_of(form.id)
    needed = [tier.needed_bytes for tier in tiers]
    assert needed == sorted(needed, reverse=True)
    assert sorted(tier.id for tier in tiers) == sorted(IDS[platform])
    assert all((folder / tier.entry).exists() for tier in made.tiers)
    assert {tier.by for tier in made.tiers} == {"edgeq plan"}
    assert {tier.compute_units for tier in tiers} == {form.compute_units}
    assert nonconforming(raw) == []
    assert json.loads((folder / "manifest.schema.json").read_text("utf-8")) == schema()
    readme = (folder / "README.md").read_text("utf-8").partition("## Memory")[2]
    rows = [line for line in readme.splitlines() if " tokens | " in line]
    assert [row.split(" | ")[:2] for row in rows] == [
        [f"| {variant.title}, {variant.scheme}", f"{tier.context} tokens"]
        for tier, variant in ((tier, made.variant(tier.variant)) for tier in made.tiers)
    ]
    report = verify_package(folder)
    assert report.passed, report.fault
    assert not report.not_run
    assert sum(check.startswith("golden tests") for check, _ in report.checks) == len(made.variants)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["litertlm", "ort"])
def test_the_kotlin_code_chooses_the_first_tier_that_fits(
    kind: str, tiered: Tiered, tmp_path: Path
) -> None:
    need_kotlin()
    folder = tiered["android"]
    made = read_manifest(folder)
    tiers = made.tiers_of("genai" if kind == "ort" else "litertlm")
    root = folder / "android/src"
    places = [root / "main", root / kind, root / f"androidTest{kind.capitalize()}"]
    files = [path for place in places for path in sources(place, ".kt")]
    main = tmp_path / "main.kt"
    main.write_text(KOTLIN)
    command = compiled([*files, *sources(STUBS, ".kt"), main], tmp_path / "out.jar")
    free = [size + more for size in (t.needed_bytes for t in tiers) for more in (-1, 0, 1)]
    done = subprocess.run(
        [*command, "program.MainKt", *map(str, [0, *free])], capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    want = []
    for size in [0, *free]:
        fit = next((tier for tier in tiers if tier.needed_bytes <= size), None)
        want.append(f"{fit.id} {fit.variant} {fit.context} {fit.needed_bytes}" if fit else "none")
    assert done.stdout.splitlines() == want
    assert want[0] == "none"
    assert len(set(want)) == len(tiers) + 1


@pytest.mark.slow
def test_the_swift_code_has_the_tiers_of_the_manifest(tiered: Tiered) -> None:
    folder = tiered["ios"]
    code = folder / "ios/Sources/LanguageModel.swift"
    found = re.findall(
        r'name: "(.*?)",\s+variant: "(.*?)",\s+context: (\d+),\s+neededBytes: (\d+),\s+'
        r'computeUnits: \.(\w+),\s+file: "(.*?)",\s+digest: "(\w+)"',
        code.read_text("utf-8"),
    )
    tiers = read_manifest(folder).tiers
    assert [row[:6] for row in found] == [
        (tier.id, tier.variant, str(tier.context), str(tier.needed_bytes), tier.compute_units,
         Path(tier.entry).name)
        for tier in tiers
    ]  # fmt: skip
    assert len({row[6] for row in found}) == 2  # the compiled versions lie side by side
    described = (folder / "Package.swift").read_text("utf-8")
    assert all(f'.copy("{tier.entry}")' in described for tier in tiers)
    pytest.importorskip("tree_sitter")
    grammar = pytest.importorskip("tree_sitter_swift")
    assert [
        one for path in sources(folder, ".swift") for one in faults(path, grammar.language())
    ] == []


def run_sh(folder: Path, place: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run `run.sh` with a program in the place of edgeq that prints its arguments."""
    program = place / "venv/bin/edgeq"
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    clean = {k: v for k, v in os.environ.items() if k not in ("CONTEXT", "MODEL", "MEMORY_MIB")}
    return subprocess.run(
        [folder / "run.sh"], env=clean | {"PREFIX": str(place)} | settings, capture_output=True,
        text=True, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_run_sh_chooses_the_first_tier_that_fits(tiered: Tiered, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiered["rpi"], tmp_path / "copy"))
    tiers = read_manifest(folder).tiers
    script = folder / "run.sh"
    text = script.read_text()
    rows = [f"{-(-t.needed_bytes // (1 << 20))} {t.context} {t.entry}" for t in tiers]
    assert "\n".join(rows) in text
    # all of them need the same number of MiB, so that a test of the choice needs other figures
    sizes = [400, 300, 250, 200]
    other = [f"{size} {t.context} {t.entry}" for size, t in zip(sizes, tiers, strict=True)]
    script.write_text(text.replace("\n".join(rows), "\n".join(other)))
    for free, number in ((9999, 0), (400, 0), (399, 1), (300, 1), (250, 2), (249, 3), (200, 3)):
        arguments = run_sh(folder, tmp_path, MEMORY_MIB=str(free)).stdout.splitlines()
        assert arguments[:2] == ["serve", f"tale={folder}/{tiers[number].entry}"]
        assert arguments[arguments.index("--ctx-size") + 1] == str(tiers[number].context)
    for free in (199, 0):
        done = run_sh(folder, tmp_path, MEMORY_MIB=str(free))
        assert done.returncode == 1
        assert f"needs 200 MiB of memory, and {free} MiB are free" in done.stderr
        assert f"set CONTEXT={tiers[-1].context}" in done.stderr
    done = run_sh(folder, tmp_path, MEMORY_MIB="0", CONTEXT="77")
    assert "\n77\n" in done.stdout
    assert f"tale={folder}/model/tale.edgeq\n" in done.stdout


@pytest.mark.slow
def test_run_sh_reads_how_much_memory_is_free(tiered: Tiered, tmp_path: Path) -> None:
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        pytest.skip("there is no /proc/meminfo")
    done = run_sh(tiered["rpi"], tmp_path)
    (said,) = re.findall(r"run\.sh: (\d+) MiB of memory are free", done.stderr)
    (total,) = re.findall(r"MemTotal: +(\d+) kB", meminfo.read_text())
    assert 0 < int(said) < int(total) >> 10


def facts() -> ModelFacts:
    """The size of a small model with a long context."""
    config = tiny_config("llama", vocab=2048, bos=0, eos=(1,), context=4096)
    return facts_of(quantized(random_model(config), "w4-g32"), "tiny")


def tiers_with(platform: str, form: Form, more: int) -> list[Tier]:
    """The tiers of a model whose weights take so many bytes more than those of the small one."""
    memory = tuple(
        row
        | {"weights_bytes": row["weights_bytes"] + more, "total_bytes": row["total_bytes"] + more}
        for row in estimates.memory(form, facts(), 0, 4096)
    )
    variant = ModelVariant(
        form.id, form.id, form.title, form.target, "model/x", ("model/x",), "w4-g32", (), {}, "",
        "c", "g", 4096, memory,
    )  # fmt: skip
    return estimates.tiers(platform, form, [variant])


def test_devices_take_the_first_tier_that_they_have_memory_for() -> None:
    form = PLATFORMS["rpi"].models[0]
    # between what a Zero 2 can give to a short context and to a long one
    usable = find("rpi-zero-2w").usable_bytes
    assert usable is not None
    rows = estimates.memory(form, facts(), 0, 4096)
    middle = (rows[0]["total_bytes"] + rows[-1]["total_bytes"]) // 2
    tiers = tiers_with("rpi", form, usable - middle)
    assert [tier.context for tier in tiers] == [4096, 2048, 1024, 512, 256]
    assert "rpi-zero-2w" not in tiers[0].devices
    assert tiers[0].least_ram_bytes == 1 << 30
    taking = [tier for tier in tiers if "rpi-zero-2w" in tier.devices]
    assert len(taking) == 1
    assert taking[0].needed_bytes <= usable
    assert taking[0].least_ram_bytes == 512 << 20
    named = [name for tier in tiers for name in tier.devices]
    assert sorted(named) == sorted(one.name for one in estimates.devices_of("rpi"))


def test_a_model_for_which_no_device_is_known_says_so() -> None:
    form = PLATFORMS["ios"].models[0]
    (tier,) = tiers_with("ios", form, 100 << 30)
    assert tier.least_ram_bytes is None
    assert tier.devices == ()


def test_each_platform_has_its_own_devices() -> None:
    found = {name: [one.name for one in estimates.devices_of(name)] for name in PLATFORMS}
    assert all(name.startswith("rpi") for name in found["rpi"])
    assert all(name.startswith("iphone") for name in found["ios"])
    assert {"phone-low", "phone-mid", "phone-high", "pixel-8"} <= set(found["android"])
    assert not {"pc", "iphone-15", "rpi5"} & set(found["android"])
    assert set(found["ort-mobile"]) == {*found["rpi"], *found["ios"], *found["android"]}


def test_a_cache_whose_length_is_part_of_the_file_has_one_row() -> None:
    found = facts()
    config = found.config
    for platform, form, bits, rows in (
        ("android", "litertlm", 32, 1), ("android", "genai", 32, 5), ("ios", "coreml", 16, 1),
    ):  # fmt: skip
        (known,) = (one for one in PLATFORMS[platform].models if one.id == form)
        memory = estimates.memory(known, found, 1000, 4096)
        assert len(memory) == rows
        numbers = 2 * len(config.blocks) * config.kv_heads * config.head_dim * 4096
        assert memory[-1]["cache_bytes"] == numbers * bits // 8
        assert memory[-1]["weights_bytes"] == 1000


def test_manifests_of_graphs_conform_to_the_schema(small_graph: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    made = package(small_graph, "rpi", tmp_path / "out").manifest
    (tier,) = made.tiers
    assert (tier.context, tier.by) == (None, "edgeq inspect")
    (row,) = made.variants[0].memory
    assert row["other_bytes"] > 0
    raw = (tmp_path / "out/manifest.json").read_bytes()
    assert nonconforming(raw) == []


def test_tiers_out_of_order_are_refused(rpi_made: Path) -> None:
    data = json.loads((rpi_made / "manifest.json").read_bytes())
    row = data["variants"][0]["memory"][0]
    more = row | {"context": 64, "total_bytes": row["total_bytes"] + 1}
    data["variants"][0]["memory"].append(more)
    tier = data["tiers"][0] | {"id": "x", "context": 64, "needed_bytes": more["total_bytes"]}
    data["tiers"].append(tier)
    with pytest.raises(FormatError, match="the tier x comes after one that needs less memory"):
        Manifest.from_bytes(resealed(data))
    data["tiers"].reverse()
    assert len(Manifest.from_bytes(resealed(data)).tiers) == 2
    data["tiers"][0]["id"] = data["tiers"][1]["id"]
    with pytest.raises(FormatError, match="two tiers have the same identifier"):
        Manifest.from_bytes(resealed(data))


def test_verify_names_a_tier_whose_figures_were_changed(rpi: Path) -> None:
    """Even with the digest of the changed manifest."""
    place = rpi / "manifest.json"
    data = json.loads(place.read_bytes())
    data["tiers"][0]["needed_bytes"] -= 1 << 20
    place.write_bytes(resealed(data))
    report = verify_package(rpi)
    assert report.place == "manifest.json"
    assert "the tier edgeq-128 needs" in str(report.fault)


def test_the_schema_refuses_what_the_reader_refuses(rpi_made: Path) -> None:
    raw = (rpi_made / "manifest.json").read_bytes()
    assert nonconforming(raw) == []
    for key, value in (
        ("context", "many"), ("needed_bytes", 0), ("needed_bytes", None), ("more", 1),
        ("devices", [1]), ("by", "a guess"), ("compute_units", "gpu"),
    ):  # fmt: skip
        data = json.loads(raw)
        data["tiers"][0][key] = value
        assert nonconforming(json.dumps(data).encode()), key
    for key in json.loads(raw):
        data = json.loads(raw)
        del data[key]
        assert nonconforming(json.dumps(data).encode()), key


@pytest.mark.parametrize(
    ("variants", "words"),
    [
        ("w8-g32", "give a list of recipes"),
        ([7], "give a list of recipes"),
        (7, "give a list of recipes"),
        (None, "give a list of recipes"),
        (["w8-g32", "w8-g32"], "given twice"),
        (["w4-g32"], "given twice"),
        (["nonsense"], "nonsense"),
    ],
)
def test_recipes_that_cannot_be_added_are_refused_before_any_work(
    variants: Any, words: str, tiny: Path, tmp_path: Path
) -> None:
    with pytest.raises(EdgeqError, match=words):
        package(tiny, "rpi", tmp_path / "out", preset="w4-g32", variants=variants)
    assert not list(tmp_path.iterdir())


def test_a_recipe_that_no_runtime_of_the_package_has_is_refused(tiny: Path, tmp_path: Path) -> None:
    need_runtimes("android")
    with pytest.raises(UnsupportedError, match="LiteRT-LM does not run the recipe w8-g32: "):
        package(tiny, "android", tmp_path / "out", forms=["litertlm"], variants=["w8-g32"])
    assert not list(tmp_path.iterdir())


def test_recipes_are_for_language_models(small_graph: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="variants are for language models"):
        package(small_graph, "rpi", tmp_path / "out", variants=["w8-g32"])
