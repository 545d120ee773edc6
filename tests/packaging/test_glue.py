"""The code around the models for Android and iOS: parsed, compiled where a compiler is, and run."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeq.core.errors import UnsupportedError
from edgeq.graph.ir import Info
from edgeq.graph.onnx.save import write_onnx
from edgeq.packaging.android import DEPENDENCIES, kotlin
from edgeq.packaging.build import package
from edgeq.packaging.glue import check
from edgeq.packaging.ios import module_name, swift
from edgeq.packaging.source import GraphSource
from edgeq.packaging.verify import verify_package
from tests.graph_made import Made
from tests.packaging.conftest import Apps, need_runtimes
from tests.packaging.kotlin import compiled, need_kotlin
from tests.packaging.swift import compiled as swift_compiled
from tests.packaging.swift import need_swift
from tests.paths import ROOT, TESTS

TEMPLATES = ROOT / "edgeq" / "packaging" / "templates"
STUBS = TESTS / "packaging" / "kotlin_stubs"


def sources(folder: Path, suffix: str) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob(f"*{suffix}")) if path.is_file())


def faults(path: Path, language: Any) -> list[str]:
    """Lines of a source that its grammar has no rule for."""
    import tree_sitter

    parser = tree_sitter.Parser(tree_sitter.Language(language))
    pending, found = [parser.parse(path.read_bytes()).root_node], []
    while pending:
        node = pending.pop()
        if node.is_error or node.is_missing:
            found.append(f"{path.name}:{node.start_point.row + 1}")
        pending += node.children
    return found


@pytest.mark.parametrize("kind", ["model", "graph"])
def test_swift_is_swift(kind: str, apps: Apps) -> None:
    pytest.importorskip("tree_sitter")
    grammar = pytest.importorskip("tree_sitter_swift")
    files = list(sources(apps[f"ios {kind}"], ".swift"))
    assert {path.name for path in files} >= {"Package.swift", "ModelFiles.swift"}
    assert [fault for path in files for fault in faults(path, grammar.language())] == []


@pytest.mark.parametrize("kind", ["model", "graph"])
def test_kotlin_is_kotlin(kind: str, apps: Apps) -> None:
    pytest.importorskip("tree_sitter")
    grammar = pytest.importorskip("tree_sitter_kotlin")
    files = [*sources(apps[f"android {kind}"], ".kt"), *sources(apps[f"android {kind}"], ".kts")]
    assert len(files) >= 5
    assert [fault for path in files for fault in faults(path, grammar.language())] == []


def test_a_parser_sees_what_is_wrong(tmp_path: Path) -> None:
    pytest.importorskip("tree_sitter")
    for name, text in (("swift", "func f( { }"), ("kotlin", "fun f( { }")):
        grammar = pytest.importorskip(f"tree_sitter_{name}")
        (tmp_path / name).write_text(text)
        assert faults(tmp_path / name, grammar.language())


@pytest.mark.parametrize("platform", ["android", "ios", "ort-mobile"])
@pytest.mark.parametrize("kind", ["model", "graph"])
def test_nothing_is_left_to_fill(platform: str, kind: str, apps: Apps) -> None:
    for suffix in (".swift", ".kt", ".kts", ".md", ".sh", ".xml"):
        for path in sources(apps[f"{platform} {kind}"], suffix):
            left = re.findall(r"@[A-Z_]+@", path.read_text("utf-8"))
            assert left == [], path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "flavor"),
    [("model", "litertlm"), ("model", "ort"), ("graph", "litert"), ("graph", "ort")],
)
def test_kotlin_compiles_against_stand_ins(
    kind: str, flavor: str, apps: Apps, tmp_path: Path
) -> None:
    need_kotlin()
    root = apps[f"android {kind}"] / "android/src"
    places = [root / "main", root / flavor, root / f"androidTest{flavor.capitalize()}"]
    files = [path for place in places for path in sources(place, ".kt")]
    assert len(files) >= 2
    compiled([*files, *sources(STUBS, ".kt")], tmp_path / "out.jar")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["model", "graph"])
def test_the_gradle_build_file_compiles_and_names_folders_that_are_there(
    kind: str, apps: Apps, tmp_path: Path
) -> None:
    """The script as the body of a function, against stubs that hold what it sets; and it is run."""
    need_kotlin()
    module = apps[f"android {kind}"] / "android"
    text = (module / "build.gradle.kts").read_text("utf-8")
    script = tmp_path / "script.kt"
    script.write_text(f"fun script() {{\n{text}\n}}\n")
    command = compiled([script, TESTS / "packaging/gradle_stubs/gradle.kt"], tmp_path / "out.jar")
    done = subprocess.run([*command, "GradleKt"], capture_output=True, text=True, check=True)
    said: dict[str, list[list[str]]] = {}
    for line in done.stdout.splitlines():
        what, *words = line.split(" ")
        said.setdefault(what, []).append(words)
    assert said["plugin"] == [["com.android.library"], ["org.jetbrains.kotlin.android"]]
    assert said["namespace"] == [["edgeq.model", "35", "17"]]
    flavors = {"model": {"litertlm": "31", "ort": "24"}, "graph": {"litert": "24", "ort": "24"}}
    assert dict(said["flavor"]) == flavors[kind]
    assert {"androidTest", *flavors[kind]} <= {source for source, _ in said["assets"]}
    for source, folder in said["assets"]:
        assert (module / folder).is_dir(), source
    for flavor in flavors[kind]:
        assert [f"{flavor}Implementation", DEPENDENCIES[flavor]] in said["dependency"]
        assert list(sources(module / "src" / flavor, ".kt"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["model", "graph"])
def test_swift_compiles_against_stubs(kind: str, apps: Apps, tmp_path: Path) -> None:
    need_swift()
    folder = apps[f"ios {kind}"]
    files = list(sources(folder / "ios/Sources", ".swift"))
    swift_compiled(folder, files, tmp_path)
    broken = tmp_path / "ModelFiles.swift"
    text = (folder / "ios/Sources/ModelFiles.swift").read_text("utf-8")
    broken.write_text(text.replace("return nil", "return 7.5"))
    others = [path for path in files if path.name != broken.name]
    with pytest.raises(AssertionError, match="cannot convert"):
        swift_compiled(folder, [broken, *others], tmp_path)


def test_files_named_in_the_code_are_there(apps: Apps) -> None:
    for platform, kind in (("android", "model"), ("ios", "model"), ("ios", "graph")):
        folder = apps[f"{platform} {kind}"]
        if platform == "ios":
            text = (folder / "Package.swift").read_text("utf-8")
            for name in re.findall(r'\.copy\("([^"]+)"\)', text):
                assert (folder / name).exists(), name
            continue
        for flavor, base in (("litertlm", "model"), ("ort", "ort")):
            code = folder / f"android/src/{flavor}/kotlin/edgeq/model/LanguageModel.kt"
            named = re.findall(r'"([^"]+)" to (\d+)L', code.read_text("utf-8"))
            assert named
            for name, size in named:
                assert (folder / base / name).stat().st_size == int(size)


def test_the_prompt_around_a_message_is_that_of_the_template(apps: Apps) -> None:
    code = apps["android model"] / "android/src/ort/kotlin/edgeq/model/LanguageModel.kt"
    text = code.read_text("utf-8")
    assert 'BEFORE = "<|user|> "' in text
    assert "START = intArrayOf(0)" in text  # of texts without a template
    assert r'AFTER = "\n<|assistant|>[2026-01-01]"' in text


def test_axes_of_the_litert_file_are_moved_as_its_runner_moves_them(apps: Apps) -> None:
    """The table in the Kotlin code, used as the code uses it, gives what LiteRT is fed."""
    code = apps["android graph"] / "android/src/litert/kotlin/edgeq/model/GraphModel.kt"
    (found,) = re.findall(
        r'"x" to End\(intArrayOf\(([\d, ]+)\), intArrayOf\(([\d, ]+)\)\)', code.read_text("utf-8")
    )
    shape, order = ([int(n) for n in part.split(",")] for part in found)
    assert shape == [1, 3, 8, 8]
    assert order == [0, 2, 3, 1]
    values = np.arange(np.prod(shape)).reshape(shape)
    strides = [int(np.prod(shape[axis + 1 :])) for axis in range(len(shape))]
    places = [
        sum(at[axis] * strides[order[axis]] for axis in range(len(shape)))
        for at in np.ndindex(*(shape[axis] for axis in order))
    ]
    assert np.array_equal(values.ravel()[places], values.transpose(order).ravel())


def test_a_picture_becomes_the_input_in_swift(apps: Apps) -> None:
    folder = apps["ios graph"]
    text = (folder / "ios/Sources/Picture.swift").read_text("utf-8")
    assert "let mean: [Float] = [0.5, 0.4, 0.3], deviation: [Float] = [0.2, 0.2, 0.2]" in text
    assert "min(across, down)" in text
    assert "channel * width * height + pixel" in text
    assert "GraphModel.input(of:)" in (folder / "README.md").read_text("utf-8")
    assert verify_package(folder).passed


def test_inputs_that_the_code_does_not_feed_are_refused(tmp_path: Path) -> None:
    made = Made(x=Info((4,), "int64"))
    table = made.constant(np.ones((8, 32), np.float32))
    rows = made.node("Gather", [table, "x"], (4, 32), axis=0)
    path = tmp_path / "table.onnx"
    write_onnx(made.graph(rows), path)
    for platform in ("android", "ios"):
        need_runtimes(platform)
        with pytest.raises(UnsupportedError, match=r"supports only float32 .*, and 'x' is int64"):
            package(path, platform, tmp_path / "out")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["table.onnx"]


@pytest.mark.parametrize("text", ['a"b\\c', "$x", "a\nb\tc", "é€👋", "\x01\x0c\x08", ""])
def test_texts_are_strings_of_both_languages(text: str) -> None:
    assert "\n" not in kotlin(text) + swift(text)
    assert kotlin(text).isascii()
    assert "$" not in kotlin(text).replace("\\$", "")
    assert re.fullmatch(r'"(?:[^"\\]|\\(?:["\\nrt0]|u\{[0-9a-f]+\}))*"', swift(text))


def test_module_names_are_identifiers() -> None:
    assert module_name("smollm2-135m-q4") == "Smollm2135mQ4"


def test_inputs_are_refused_before_the_graph_is_quantized() -> None:
    made = Made(x=Info((4,), "int64"))
    table = made.constant(np.ones((8, 32), np.float32))
    source = GraphSource(made.graph(made.node("Gather", [table, "x"], (4, 32), axis=0)))
    for platform in ("android", "ios"):
        with pytest.raises(UnsupportedError, match="supports only float32"):
            check(platform, source)
    assert "graph" not in vars(source)


def test_language_models_open_alike_in_both_runtimes_for_android() -> None:
    """An app can take the other runtime's package: the code that opens a model differs in the
    lines that name the runtime alone."""
    folder = TEMPLATES / "android" / "model"
    shared = []
    for name in ("Genai.kt", "LiteRtLm.kt"):
        code = (folder / name).read_text("utf-8")
        start = code.index("        /** The ways to run the model")
        end = code.index("ModelFiles.install(context, tier.files)")
        shared.append(code[start:end])
    assert "fun open(" in shared[0]
    assert shared[0] == shared[1]
