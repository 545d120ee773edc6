"""The iOS and macOS part of a package: the whole folder is a Swift package that uses Core ML."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from edgeq.converters.coreml.graph_run import GraphPackage
from edgeq.converters.coreml.run import DecoderPackage
from edgeq.core.hashing import file_sha256
from edgeq.importers.huggingface.tokenizer import end_ids, hf_tokenizer
from edgeq.packaging import labels, templates
from edgeq.packaging.manifest import Manifest, ModelVariant
from edgeq.packaging.pictures import picture_holes
from edgeq.packaging.source import GraphSource, ModelSource, need_float_ends
from edgeq.packaging.tiers import Tier
from edgeq.runtime.tokenizer import Tokenizer

_CLASS = "PreTrainedTokenizerFast"
"""The tokenizer class with which swift-transformers reads any byte-pair tokenizer.json."""
_CHAT = 'try tokenizer.applyChatTemplate(messages: [["role": "user", "content": message]])'
_SWIFT_PACKAGE: Mapping[str, Mapping[str, str]] = {
    "model": {
        "kind": "language model",
        "packages": """
    dependencies: [
        .package(url: "https://github.com/huggingface/swift-transformers", from: "1.0.0")
    ],""",
        "products": """
            dependencies: [.product(name: "Tokenizers", package: "swift-transformers")],""",
        "tokenizer": ', .copy("ios/tokenizer")',
    },
    "graph": {"kind": "model", "packages": "", "products": "", "tokenizer": ""},
}
"""Kind of source -> the parts of Package.swift that only this kind has."""
_FACTORS = {
    "stretch": "(x: across, y: down)",
    "crop": "(x: max(across, down), y: max(across, down))",
    "pad": "(x: min(across, down), y: min(across, down))",
}


def check(source: ModelSource | GraphSource) -> None:
    """Refuse a graph whose inputs the Swift code cannot fill; see `edgeq.packaging.glue.check`."""
    if isinstance(source, GraphSource):
        need_float_ends(source.opened, "Swift")


def module_name(name: str) -> str:
    """The name of the Swift module of a package: ``smollm2-135m`` becomes ``Smollm2135m``."""
    return "".join(part.capitalize() for part in re.split("-+", name))


def write(folder: Path, made: Manifest, source: ModelSource | GraphSource) -> None:
    """Write the Swift package; see `edgeq.packaging.glue.write_glue`."""
    variant = made.variants[0]
    kind = "graph" if made.kind == "graph" else "model"
    holes: dict[str, Any] = {
        **_SWIFT_PACKAGE[kind],
        "name": made.name,
        "module": module_name(made.name),
        "entries": ", ".join(f'.copy("{one.entry}")' for one in made.variants),
        "file": PurePosixPath(variant.entry).name,
        "labels": "",
        "digest": _digest(folder, variant),
        "units": made.tiers[0].compute_units,
    }
    if isinstance(source, GraphSource):
        holes |= _graph_holes(folder, made, variant)
        _write_helpers(folder, made, holes)
        code, name = "graph/GraphModel.swift", "GraphModel.swift"
    else:
        holes |= _model_holes(folder, made, source)
        code, name = "model/LanguageModel.swift", "LanguageModel.swift"
        _write_tokenizer(folder / "ios/tokenizer", source.opened.files, made)
    for place, template in (
        ("Package.swift", "Package.swift"),
        ("ios/Sources/ModelFiles.swift", "ModelFiles.swift"),
        (f"ios/Sources/{name}", code),
        ("ios/Tests/GoldenTests.swift", f"{kind}/GoldenTests.swift"),
    ):
        templates.write(folder, place, templates.filled(f"ios/{template}", **holes))


def _write_helpers(folder: Path, made: Manifest, holes: dict[str, Any]) -> None:
    """Write the code for images and for class names, if these are known."""
    if picture := picture_holes(made):
        known = {name: ", ".join(picture.pop(name)) for name in ("mean", "std")}
        text = templates.filled(
            "ios/graph/Picture.swift",
            factor=_FACTORS[picture["resize"]], **known, **picture,
        )  # fmt: skip
        templates.write(folder, "ios/Sources/Picture.swift", text)
    if made.model["labels"]:
        holes["labels"] = f', .copy("{labels.FILE}")'
        text = templates.filled("ios/graph/Labels.swift", file=PurePosixPath(labels.FILE).name)
        templates.write(folder, "ios/Sources/Labels.swift", text)


def _digest(folder: Path, variant: ModelVariant) -> str:
    """A name for the compiled version of a model: it depends on all of its files."""
    files = {file: file_sha256(folder / file) for file in variant.files}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16]


def _model_holes(folder: Path, made: Manifest, source: ModelSource) -> dict[str, Any]:
    files = source.opened.files
    tokenizer = Tokenizer(files)
    config = source.opened.config
    ends = {*end_ids(files, hf_tokenizer(files)), *config.eos, *tokenizer.turn_end_ids}
    return {
        "tiers": "\n".join(_tier(folder, made, tier) for tier in made.tiers),
        "ends": ", ".join(map(str, sorted(ends))),
        "prompt": _CHAT if tokenizer.has_chat_template else "tokenizer.encode(text: message)",
    }


def _tier(folder: Path, made: Manifest, tier: Tier) -> str:
    """A tier as an element of an array in Swift."""
    package = DecoderPackage(folder / tier.entry)
    functions = [f"({n}, {swift(package.function(n).name)})" for n in sorted(package.lengths)]
    lines = (
        f"name: {swift(tier.id)}",
        f"variant: {swift(tier.variant)}",
        f"context: {tier.context}",
        f"neededBytes: {tier.needed_bytes}",
        f"computeUnits: .{tier.compute_units}",
        f"file: {swift(PurePosixPath(tier.entry).name)}",
        f"digest: {swift(_digest(folder, made.variant(tier.variant)))}",
        f"functions: [{', '.join(functions)}]",
    )
    return "        Tier(\n" + ",\n".join(f"            {line}" for line in lines) + "),"


def _graph_holes(folder: Path, made: Manifest, variant: ModelVariant) -> dict[str, Any]:
    package = GraphPackage(folder / variant.entry)

    def ends(part: str, known: Mapping[str, Any]) -> str:
        return "\n".join(
            f"        {swift(end['name'])}: End(shape: {end['shape']}, "
            f"feature: {swift(known[end['name']][0])}),"
            for end in made.model[part]
        )

    return {
        "inputs": ends("inputs", package.inputs),
        "outputs": ends("outputs", package.outputs),
    }


def _write_tokenizer(folder: Path, files: Mapping[str, bytes], made: Manifest) -> None:
    """Write the tokenizer for swift-transformers: with a config.json and a tokenizer class."""
    folder.mkdir(parents=True)
    for name, content in sorted(files.items()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    config = json.loads(files.get("tokenizer_config.json", b"{}"))
    config.setdefault("tokenizer_class", _CLASS)
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    templates.write(folder, "tokenizer_config.json", text)
    about = json.dumps({"model_type": made.model["family"]}) + "\n"
    templates.write(folder, "config.json", about)


def swift(text: str) -> str:
    """A text as a Swift string literal."""
    return templates.quoted(text, {}, lambda char: f"\\u{{{ord(char):x}}}", str.isprintable)
