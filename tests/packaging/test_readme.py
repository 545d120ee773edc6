"""The steps of a package's README: what they name is there, and what they show runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

from edgeq.importers import load
from edgeq.model.artifact import save
from edgeq.packaging import steps
from edgeq.packaging.android import FLAVORS
from edgeq.packaging.build import package
from edgeq.packaging.manifest import read_manifest
from edgeq.packaging.prompts import QUESTIONS
from tests.packaging.conftest import Apps, need_runtimes

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|> {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def gradle(folder: Path) -> str:
    return (folder / "android" / "build.gradle.kts").read_text("utf-8")


@pytest.mark.parametrize("kind", ["model", "graph"])
def test_android_steps_name_the_flavors_and_files_of_the_module(kind: str, apps: Apps) -> None:
    folder = apps[f"android {kind}"]
    readme, module = (folder / "README.md").read_text("utf-8"), gradle(folder)
    made = re.findall(r'create\("(\w+)"\) \{ dimension = "runtime"', module)
    assert re.findall(r"`(\w+)` \(for apps with a `minSdk` of \d+ or more\)", readme) == made
    (chosen,) = re.findall(r'missingDimensionStrategy\("runtime", "(\w+)"\)', readme)
    assert chosen == made[0]
    assert f"connected{chosen.capitalize()}DebugAndroidTest" in readme
    if kind == "model":
        (assets,) = re.findall(r"adds `\.\./(\w+)` to the assets", readme)
        assert f'android.sourceSets["{chosen}"].assets.srcDir("../{assets}")' in module
        (large,) = re.findall(r"noCompress \+= listOf\((.*)\)", readme)
        found = {path.suffix[1:] for path in folder.rglob("*") if path.stat().st_size > 100_000}
        assert set(re.findall(r'"(\w+)"', large)) >= found & {"litertlm", "onnx", "data"}


def test_a_library_in_an_aar_file_is_added_by_the_app(apps: Apps) -> None:
    """The Android Gradle plugin builds no library whose `implementation` has an AAR file."""
    folder = apps["android model"]
    uses = dict(re.findall(r'"(\w+)"\(files\("([^"]+\.aar)"\)\)', gradle(folder)))
    assert set(uses) == {"ortCompileOnly", "androidTestOrtImplementation"}
    (added,) = re.findall(
        r'implementation\(rootProject\.files\("(.+)"\)\)', (folder / "README.md").read_text("utf-8")
    )
    assert {f"tale-teller/android/{path}" for path in uses.values()} == {added}


@pytest.mark.parametrize("kind", ["model", "graph"])
def test_android_steps_of_one_form_name_no_other_flavor(kind: str, apps: Apps) -> None:
    made = read_manifest(apps[f"android {kind}"])
    for variant in made.variants:
        text = steps.steps(replace(made, variants=(variant,)))
        flavor = FLAVORS[variant.form]
        assert f"The module has one flavor, `{flavor}` (" in text
        assert f"connected{flavor.capitalize()}DebugAndroidTest" in text
        assert ("**The flavor `ort`**" in text) == (variant.form == "genai")
        others = {one for one in FLAVORS.values() if one != flavor}
        assert not [one for one in others if f"`{one}`" in text]


@pytest.mark.slow
@pytest.mark.parametrize("chat", [True, False])
def test_the_example_for_onnxruntime_genai_writes_the_golden_tokens(
    chat: bool, chat_artifact: Path, tmp_path: Path
) -> None:
    """The code of the README, but that a golden prompt is asked, and the likeliest token taken."""
    need_runtimes("ort-mobile")
    model = load(chat_artifact)
    config = json.loads(model.files["tokenizer_config.json"])
    config |= {"chat_template": TEMPLATE}
    if not chat:
        del config["chat_template"]
    files = dict(model.files) | {"tokenizer_config.json": json.dumps(config).encode()}
    save(replace(model, files=files), tmp_path / "tale.edgeq")
    folder = tmp_path / "out"
    package(tmp_path / "tale.edgeq", "ort-mobile", folder, context=128)
    (example,) = re.findall(
        r"```\n( *import onnxruntime_genai.*?)```", (folder / "README.md").read_text("utf-8"),
        re.DOTALL,
    )  # fmt: skip
    program = textwrap.dedent(example)
    assert ("apply_chat_template" in program) == chat
    program = program.replace("Hello", QUESTIONS[0])
    program = program.replace("max_length=128", "max_length=128, do_sample=False")
    done = subprocess.run(
        [sys.executable, "-B", "-c", program], cwd=folder, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    prompts = json.loads((folder / "golden/prompts.json").read_text("utf-8"))["prompts"]
    results = json.loads((folder / "golden/genai.json").read_text("utf-8"))["results"]
    asked = QUESTIONS[0] if chat else "Once upon a time"
    golden = next(
        result["text"]
        for prompt, result in zip(prompts, results, strict=True)
        if asked in prompt.get("rendered", prompt.get("text"))
    )
    assert done.stdout.strip().startswith(golden.strip())
