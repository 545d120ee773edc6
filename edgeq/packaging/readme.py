"""The README.md of a package, for an app developer who does not know edgeq."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeq.core.markdown import inline_code, table
from edgeq.core.units import human_bytes, human_count
from edgeq.packaging import steps, templates
from edgeq.packaging.estimates import uncertainty
from edgeq.packaging.manifest import Manifest, ModelVariant
from edgeq.packaging.platforms import platform_named
from edgeq.packaging.runners import ENGINE

PARTS = {
    "README.md": "this page",
    "manifest.json": "all files with size and SHA-256, versions, memory and speed, for programs",
    "manifest.schema.json": "the JSON schema of `manifest.json`",
    "manifest.sig": "the signature of `manifest.json`, if the package is signed",
    "model-card.md": "how the weights were rounded, and how much accuracy that cost",
    "model": "the model",
    "ort": "the model for ONNX Runtime",
    "labels": "the names of the model's classes",
    "tokenizer": "the tokenizer, and the chat template if the model has one",
    "golden": "test inputs with the expected results",
    "certificates": "what was compared when the model was converted, with the results",
    "requirements.txt": "the Python packages that are installed, each with its SHA-256",
    "install.sh": "installs the packages and runs the golden tests",
    "run.sh": "starts the server",
    "run.py": "runs the model and its golden tests",
    "healthcheck.sh": "checks that the server answers",
    "wheels": "edgeq, as a Python wheel",
    "image": "to set up many SD cards: `user-data` for cloud-init, and a step for pi-gen",
    "required_operators.config": "the operators that a build of ONNX Runtime needs",
    "build.sh": "builds ONNX Runtime with only these operators",
    "android": "a Gradle module in Kotlin",
    "Package.swift": "makes this folder a Swift package",
    "ios": "the code in Swift, its tests, and the tokenizer in the form that Swift reads",
}
"""File or folder of a package -> its description."""
_FASTEST = 500
"""Tokens per second above which a figure is not shown, because what limits such small models, the
work beside the weights, is not estimated."""
_GRAPH_PARTS = {"ios": "the code in Swift, and its tests"}
"""The descriptions that differ in the package of a graph."""
_TOOL = (
    "This folder was made by edgeq, a tool that quantizes and converts models. You do not need "
    "edgeq to use the folder."
)
_ENGINE = (
    "This folder was made by edgeq, a tool that quantizes and converts models, and whose engine "
    "runs this model. edgeq is in the folder, and `install.sh` installs it."
)
"""What edgeq is, for a reader who does not know it; `_ENGINE` where its engine runs the model."""


def write(folder: Path, made: Manifest) -> None:
    """Write README.md.

    Args:
        folder: folder of the package, in which all other files are written already.
        made: manifest of the package; its list of files is not read.
    """
    templates.write(folder, "README.md", text(folder, made))


def text(folder: Path, made: Manifest) -> str:
    """The text of README.md."""
    platform = platform_named(made.platform)
    parts = [
        f"# {made.name} for {platform.title}",
        _lead(made),
        "## Steps",
        steps.steps(made),
        "## What is in this folder",
        table(["name", "size", "content"], _contents(folder, made), "lrl"),
        "## Forms of the model",
        _forms(folder, made),
        *_memory(made),
        *_speed(made),
        "## Check this package",
        _check(made),
        "## License",
        _license(made),
        "## How it was made",
        _origin(made),
    ]
    return "\n\n".join(parts) + "\n"


def _lead(made: Manifest) -> str:
    model = made.model
    if made.kind == "graph":
        said = f"A model with the {_ends(model, 'input')} and the {_ends(model, 'output')}."
    else:
        chat = "" if model["chat"] else " It has no chat template, so it continues texts."
        said = (
            f"A language model of the {model['family']} family with "
            f"{human_count(model['parameters'])} parameters, a vocabulary of "
            f"{model['vocabulary']} tokens, its tokenizer, and the code to use it. It runs on the "
            "device; no text leaves it." + chat
        )
    engine = any(variant.target == ENGINE for variant in made.variants)
    return f"{said}\n\n{_ENGINE if engine else _TOOL}"


def _ends(model: Mapping[str, Any], what: str) -> str:
    """The inputs or outputs of a graph, with their types and shapes."""
    known = model[f"{what}s"]
    listed = ", ".join(f"{inline_code(one['name'])} {one['dtype']} {one['shape']}" for one in known)
    return f"{what} {listed}" if len(known) == 1 else f"{what}s {listed}"


def _contents(folder: Path, made: Manifest) -> list[tuple[str, str, str]]:
    """The names in the folder of the package, with their sizes and descriptions.

    README.md and manifest.json are written later, and have no size.
    """
    names = {path.name for path in folder.iterdir()} | {"README.md", "manifest.json"}
    parts = PARTS | (_GRAPH_PARTS if made.kind == "graph" else {})
    known = [(name, what) for name, what in parts.items() if name in names]
    known += [
        (name, "the same for the further recipe in its name")
        for name in sorted(names)
        if name.startswith("model-card-")
    ]
    service = f"{made.name}.service"
    if service in names:
        known.append((service, "the systemd service that `install.sh` sets up"))
    return [(f"`{name}`", _size(folder / name), what) for name, what in known]


def _size(path: Path) -> str:
    """The size of a file, or of all files in a folder; nothing if it does not exist yet."""
    files = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]
    return human_bytes(sum(one.stat().st_size for one in files)) if files else ""


def _forms(folder: Path, made: Manifest) -> str:
    parts = []
    for variant in made.variants:
        size = sum((folder / file).stat().st_size for file in variant.files)
        rows = [
            ("files", f"`{variant.entry}`, {human_bytes(size)}"),
            ("weights", _weights(variant)),
            ("needs", "; ".join(variant.requires.values())),
            ("for", variant.devices),
        ]
        if variant.context:
            rows.append(("context", f"{variant.context} tokens"))
        parts += [
            f"### {variant.title} (`{variant.id}`)",
            table(["what", ""], rows),
            "Why this form: " + " ".join(variant.why),
        ]
    return "\n\n".join(parts)


def _weights(variant: ModelVariant) -> str:
    bits = re.match(r"(?:w|palette|int)(\d+)", variant.scheme)
    return f"{bits[1]} bits each (`{variant.scheme}`)" if bits else variant.scheme


def _memory(made: Manifest) -> list[str]:
    """The table of tiers: the memory of each form and context, and the devices that have it."""
    graph = made.kind == "graph"
    titles = _titles(made)
    rows = []
    for tier in made.tiers:
        variant = made.variant(tier.variant)
        (row,) = (row for row in variant.memory if (row["context"] or None) == tier.context)
        weights, cache, other, needed = (
            human_bytes(row[f"{part}_bytes"]) for part in ("weights", "cache", "other", "total")
        )
        title = titles[variant.id]
        rows.append(
            [title, weights, other, needed]
            if graph
            else [title, f"{tier.context} tokens", weights, cache, other, needed,
                  _ram(tier.least_ram_bytes)]
        )  # fmt: skip
    if graph:
        return [
            "## Memory",
            "The figures are computed from the model (`edgeq inspect`), and were not measured on a "
            "device. The app and the runtime's own buffers need memory in addition.",
            table(["form", "file", "activations", "needed"], rows, "lrrr"),
        ]
    head = ["form", "context", "weights", "KV cache", "other", "needed", "smallest RAM"]
    return [
        "## Memory",
        f"{_choice(made)} {_said(made)}",
        table(head, rows, "l" + "r" * (len(head) - 1)),
        "Smallest RAM is the memory of the smallest device in edgeq's table (`edgeq devices list`) "
        "on which a program can have as much memory as the row needs, if no other program runs.",
    ]


def _choice(made: Manifest) -> str:
    """How the code of a package chooses among the tiers."""
    if made.platform == "ort-mobile":
        return (
            "Take the first row for which there is free memory: its context is the `max_length` "
            "to set. Programs find the rows as `tiers` in `manifest.json`."
        )
    where = "`run.sh`" if made.platform == "rpi" else "`LanguageModel`"
    when = "the server starts" if made.platform == "rpi" else "it is opened"
    if len(made.tiers) == len({variant.form for variant in made.variants}):
        return (
            f"{where} refuses to load the model if less memory is free than the table says when "
            f"{when}."
        )
    return (
        f"{where} takes the first row of its form for which there is free memory when {when}. The "
        "rows are the `tiers` in `manifest.json`."
    )


def _ram(nbytes: int | None) -> str:
    """The memory of a device, which is a round number."""
    if nbytes is None:
        return "none known"
    return f"{nbytes / (1 << 30):g} GiB" if nbytes >= 1 << 30 else f"{nbytes / (1 << 20):g} MiB"


def _said(made: Manifest) -> str:
    """What the figures of a language model are and what they leave out."""
    return "The figures are computed by `edgeq plan`, and were not measured on a device. " + (
        "They include the process, its libraries and the server."
        if made.platform == "rpi"
        else "The app and the runtime's own buffers need memory in addition."
    )


def _titles(made: Manifest) -> dict[str, str]:
    """Identifier of a variant -> its name in tables, with the scheme if the package has several."""
    several = len(made.variants) > len({variant.form for variant in made.variants})
    return {
        variant.id: f"{variant.title}, {variant.scheme}" if several else variant.title
        for variant in made.variants
    }


def _speed(made: Manifest) -> list[str]:
    titles = _titles(made)
    rows = [
        (titles[variant.id], row["device"], _number(row["decode_tokens_per_s"]),
         _number(row["prefill_tokens_per_s"]), "yes" if row["fits"] else "no")
        for variant in made.variants for row in variant.speed
    ]  # fmt: skip
    if not rows:
        return [
            "## Expected speed",
            "The speed is not estimated, because `edgeq plan` estimates only language models. Time "
            "the model on your own device before you promise a speed.",
        ]
    head = [
        "form", "device", "generated tokens per second", "prompt tokens per second",
        "fits in memory",
    ]  # fmt: skip
    return ["## Expected speed", uncertainty(made.platform), table(head, rows, "llrrl")]


def _number(value: float | None) -> str:
    if value is None:
        return "unknown"
    if value > _FASTEST:
        return f"over {_FASTEST}"
    return f"about {value:.0f}" if value >= 1 else f"{value:.2g}"


def _check(made: Manifest) -> str:
    signed = (
        " If the package is signed, add `--verify-key KEY.pub` with the public key of whoever made "
        "it: then deliberate changes are found too."
    )
    edited = (
        " A file that you changed or added, as the steps above may ask for, counts as wrong."
        if made.platform == "android"
        else ""
    )
    if made.platform == "rpi" and made.kind != "graph":
        where = "`install.sh` does this. To do it again on the Pi:"
        command = f"/opt/{made.name}/venv/bin/edgeq package --verify /opt/{made.name}/package"
    else:
        where = "On a computer on which edgeq is installed, run in this folder:"
        command = "edgeq package --verify ."
    checked = "certificates" if made.kind == "graph" else "certificates and the tokenizer"
    return (
        f"{where}\n\n```\n{command}\n```\n\n"
        f"It compares the SHA-256 of every file with `manifest.json`, checks the {checked}, runs "
        "the golden tests, and names the first thing that is wrong." + edited + signed
    )


def _license(made: Manifest) -> str:
    model = made.model

    def known(what: str, unknown: str) -> str:
        if not model[what]:
            return unknown
        return f"{inline_code(model[what])} (said by {model[f'{what}_said_by']})"

    license = known(
        "license",
        "**unknown**: edgeq found no license in the model's files. Ask whoever published the "
        "model before you ship it",
    )
    return (
        f"- License of the model: {license}.\n"
        f"- Base model: {known('base_model', 'not stated in the files of the model')}.\n"
        "- License of the code in this folder that is not the model: Apache-2.0."
    )


def _origin(made: Manifest) -> str:
    sha = made.model["source_sha256"]
    source = inline_code(str(made.model["source"] or "a model")) + (
        f" (SHA-256 `{sha}`)" if sha else ""
    )
    libraries = ", ".join(f"{name} {version}" for name, version in made.versions.items())
    return (
        f"edgeq {made.edgeq} made this folder from {source}"
        + (f", with {libraries}" if libraries else "")
        + ". The same source and versions give the same bytes on the same kind of machine: there "
        "are no times and no random numbers in it."
    )
