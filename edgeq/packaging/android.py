"""The Android part of a package: a Gradle module in Kotlin with one flavor for each runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from edgeq.converters.tflite.graph_run import METADATA
from edgeq.converters.tflite.lower.subgraph import SIGNATURE
from edgeq.converters.tflite.read import read
from edgeq.packaging import labels, templates
from edgeq.packaging.manifest import Manifest, ModelVariant
from edgeq.packaging.pictures import picture_holes
from edgeq.packaging.prompts import around_a_message
from edgeq.packaging.source import GraphSource, ModelSource, need_float_ends
from edgeq.packaging.tiers import Tier

KOTLIN = "kotlin/edgeq/model"
"""Folder of the Kotlin package edgeq.model below a source set."""
FLAVORS = {"litertlm": "litertlm", "genai": "ort", "litert": "litert", "ort": "ort"}
"""Identifier of a form -> flavor of the Gradle module."""
DEPENDENCIES = {
    "litertlm": "com.google.ai.edge.litertlm:litertlm-android:0.18.0",
    "litert": "com.google.ai.edge.litert:litert:2.1.0",
    "ort": "com.microsoft.onnxruntime:onnxruntime-android:1.27.0",
}
"""Flavor -> the Maven coordinates of its runtime. onnxruntime-genai is not on Maven; its releases
have an AAR. Sources, November 2026: mvnrepository.com and javadoc.io (onnxruntime-android 1.27.0),
ai.google.dev/edge/litert/android (LiteRT 2.1.0, Android 6 and later), skills.sh/android/skills
(litertlm-android 0.18.0)."""
GENAI = "libs/onnxruntime-genai-android.aar"
"""The library of onnxruntime-genai in the Gradle module; whoever uses the module puts it there."""
MIN_SDK = {"litertlm": 31, "genai": 24}
_LEAST_SDK = 24
"""The lowest API level of forms that are not in `MIN_SDK`."""
EXTENSIONS = {"litertlm": ("litertlm",), "genai": ("onnx", "data")}
"""Identifier of a form of a language model -> extensions of its large files."""
_GRADLE: Mapping[str, Mapping[str, str]] = {
    "model": {
        "kind": "language model",
        "class": "LanguageModel",
        "abis": """
        // the runtimes' libraries exist for 64-bit ARM; x86_64 is for the emulator
        ndk { abiFilters += listOf("arm64-v8a", "x86_64") }""",
        "resources": """\
    // In the APK of the golden tests. What an app compresses is set in the app: see README.md.
    androidResources { noCompress += listOf("litertlm", "data", "onnx") }""",
        "libraries": """\
    implementation("org.jetbrains.kotlinx:kotlinx-coroutines-android:1.9.0")
""",
    },
    "graph": {
        "kind": "model",
        "class": "GraphModel",
        "abis": "",
        "resources": """\
    androidResources { noCompress += listOf("tflite", "onnx", "bin") }""",
        "libraries": "",
    },
}
"""Kind of source -> the lines of build.gradle.kts that only this kind has."""
_CODE = {
    "litertlm": ("model/LiteRtLm.kt", "model/LiteRtLmGoldenTest.kt"),
    "genai": ("model/Genai.kt", "model/GenaiGoldenTest.kt"),
    "litert": ("graph/LiteRt.kt", "graph/GoldenTest.kt"),
    "ort": ("graph/Ort.kt", "graph/GoldenTest.kt"),
}


def check(source: ModelSource | GraphSource) -> None:
    """Refuse a graph whose inputs the Kotlin code cannot fill; see `edgeq.packaging.glue.check`."""
    if isinstance(source, GraphSource):
        need_float_ends(source.opened, "Kotlin")


def write(folder: Path, made: Manifest, source: ModelSource | GraphSource) -> None:
    """Write the Gradle module; see `edgeq.packaging.glue.write_glue`."""
    root = folder / "android"
    kind = "graph" if made.kind == "graph" else "model"
    firsts = {variant.form: variant for variant in reversed(made.variants)}
    forms = [variant for variant in made.variants if variant is firsts[variant.form]]
    flavors = {variant.form: FLAVORS[variant.form] for variant in forms}
    least = max(MIN_SDK.get(form, _LEAST_SDK) for form in flavors)
    gradle = templates.filled(
        "android/build.gradle.kts",
        **_GRADLE[kind],
        name=made.name,
        min_sdk=least if len(flavors) == 1 else min(MIN_SDK.values()),
        flavors="\n".join(_flavor(form, flavors[form]) for form in flavors),
        sources="\n".join(
            f'android.sourceSets["{flavors[variant.form]}"].assets.srcDir("../{_assets(variant)}")'
            for variant in forms
        ),
        dependencies="\n".join(_dependency(form, flavors[form]) for form in flavors),
        labels=(
            f'\nandroid.sourceSets["main"].assets.srcDir("../{PurePosixPath(labels.FILE).parent}")'
            if made.model.get("labels")
            else ""
        ),
    )
    templates.write(root, "build.gradle.kts", gradle)
    manifest = templates.filled("android/AndroidManifest.xml")
    templates.write(root, "src/main/AndroidManifest.xml", manifest)
    if kind == "model":
        files = templates.filled("android/ModelFiles.kt", name=made.name)
        templates.write(root, f"src/main/{KOTLIN}/ModelFiles.kt", files)
    else:
        _write_helpers(root, made)
    for variant in forms:
        flavor = flavors[variant.form]
        code, test = _CODE[variant.form]
        holes = (
            _graph_holes(folder, made, variant)
            if isinstance(source, GraphSource)
            else _model_holes(folder, made, variant, source)
        )
        name = "GraphModel.kt" if kind == "graph" else "LanguageModel.kt"
        text = templates.filled(f"android/{code}", **holes)
        templates.write(root, f"src/{flavor}/{KOTLIN}/{name}", text)
        place = f"src/androidTest{flavor.capitalize()}/{KOTLIN}/GoldenTest.kt"
        templates.write(root, place, templates.filled(f"android/{test}", **holes))


def _write_helpers(root: Path, made: Manifest) -> None:
    """The code for pictures and for names, where these are known."""
    if picture := picture_holes(made):
        for name in ("mean", "std"):
            picture[name] = ", ".join(f"{value}f" for value in picture[name])
        text = templates.filled("android/graph/Picture.kt", **picture)
        templates.write(root, f"src/main/{KOTLIN}/Picture.kt", text)
    if made.model["labels"]:
        text = templates.filled("android/graph/Labels.kt", file=PurePosixPath(labels.FILE).name)
        templates.write(root, f"src/main/{KOTLIN}/Labels.kt", text)


def _assets(variant: ModelVariant) -> str:
    """The folder of the package whose files become assets of the app for a form."""
    return str(PurePosixPath(variant.entry).parent)


def _flavor(form: str, flavor: str) -> str:
    least = f" minSdk = {MIN_SDK[form]} " if form in MIN_SDK else " "
    return f'        create("{flavor}") {{ dimension = "runtime";{least}}}'


def readme_holes(made: Manifest) -> dict[str, str]:
    """What the README of a package says of the module's flavors; the first is recommended."""
    forms = list(dict.fromkeys(variant.form for variant in made.variants))
    named = " and ".join(
        f"`{FLAVORS[form]}` (for apps with a `minSdk` of {MIN_SDK.get(form, _LEAST_SDK)} or more)"
        for form in forms
    )
    choice, last = (
        ("a flavor for each runtime", "The app chooses one:")
        if len(forms) > 1
        else ("one flavor", "The app names it:")
    )
    flavor = FLAVORS[forms[0]]
    large = [extension for form in forms for extension in EXTENSIONS.get(form, ())]
    genai = templates.filled("android/genai.md", name=made.name, aar=GENAI)
    return {
        "flavors": f"The module has {choice}, {named}. {last}",
        "flavor": flavor,
        "task": flavor.capitalize(),
        "assets": _assets(made.variants[0]),
        "extensions": ", ".join(map(kotlin, large)),
        "genai": genai if "genai" in forms else "",
    }


def _dependency(form: str, flavor: str) -> str:
    lines = [f'    "{flavor}Implementation"("{DEPENDENCIES[flavor]}")']
    if form == "genai":
        lines += [
            "    // From the releases of onnxruntime-genai; put it into android/libs. No library",
            "    // can be built that contains an AAR file, so the app adds it: see README.md.",
            f'    "{flavor}CompileOnly"(files("{GENAI}"))',
            f'    "androidTest{flavor.capitalize()}Implementation"(files("{GENAI}"))',
        ]
    return "\n".join(lines)


def _model_holes(
    folder: Path, made: Manifest, variant: ModelVariant, source: ModelSource
) -> dict[str, Any]:
    before, after = around_a_message(source.opened.files)
    return {
        "name": made.name,
        "tiers": "\n".join(_tier(folder, made, tier) for tier in made.tiers_of(variant.form)),
        "before": kotlin(before),
        "after": kotlin(after),
        "start": ", ".join(map(str, made.model["start_tokens"])),
    }


def _tier(folder: Path, made: Manifest, tier: Tier) -> str:
    """A tier as an argument of a list in Kotlin."""
    variant = made.variant(tier.variant)
    base = folder / _assets(variant)

    def asset(file: str) -> str:
        return kotlin((folder / file).relative_to(base).as_posix())

    files = [
        f"                    {asset(file)} to {(folder / file).stat().st_size}L,"
        for file in variant.files
    ]
    return "\n".join(
        (
            "            Tier(",
            f"                name = {kotlin(tier.id)},",
            f"                variant = {kotlin(tier.variant)},",
            f"                entry = {asset(tier.entry)},",
            f"                context = {tier.context},",
            f"                neededBytes = {tier.needed_bytes}L,",
            "                files = mapOf(",
            *files,
            "                ),",
            "            ),",
        )
    )


def _graph_holes(folder: Path, made: Manifest, variant: ModelVariant) -> dict[str, Any]:
    orders: dict[str, Any] = {}
    if variant.form == "litert":
        settings = read(folder / variant.entry, entry=METADATA).settings
        orders = {
            name: end["order"]
            for part in ("inputs", "outputs")
            for name, end in settings[part].items()
        }

    def ends(part: str) -> str:
        lines = []
        for end in made.model[part]:
            arguments = [f"intArrayOf({', '.join(map(str, end['shape']))})"]
            if orders:
                arguments.append(f"intArrayOf({', '.join(map(str, orders[end['name']]))})")
            lines.append(f"            {kotlin(end['name'])} to End({', '.join(arguments)}),")
        return "\n".join(lines)

    return {
        "name": made.name,
        "file": PurePosixPath(variant.entry).name,
        "variant": variant.id,
        "signature": SIGNATURE,
        "inputs": ends("inputs"),
        "outputs": ends("outputs"),
    }


def kotlin(text: str) -> str:
    """A text as a Kotlin string literal; characters outside ASCII are escaped in UTF-16."""

    def escaped(char: str) -> str:
        raw = char.encode("utf-16-be")
        return "".join(f"\\u{raw[i : i + 2].hex()}" for i in range(0, len(raw), 2))

    return templates.quoted(
        text, {"$": "\\$"}, escaped, lambda char: char.isascii() and char.isprintable()
    )
