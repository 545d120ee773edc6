"""ONNX Runtime's part of a package: the operators that it needs, and how to build it with them."""

from __future__ import annotations

from pathlib import Path

from edgeq.converters.ort.ort_format import operators_config
from edgeq.packaging import templates
from edgeq.packaging.manifest import Manifest
from edgeq.packaging.source import GraphSource, ModelSource

OPERATORS = "required_operators.config"
MINIMAL = "--minimal_build extended --disable_ml_ops --disable_rtti"
"""Flags of a build that reads .ort files alone."""
WHOLE = "--disable_ml_ops"
"""Flags of a build that reads .onnx files, as a language model is one."""


def write(folder: Path, made: Manifest, source: ModelSource | GraphSource) -> None:
    """Write the files; as `edgeq.packaging.glue.write_glue`."""
    variant = made.variants[0]
    entry = folder / variant.entry
    if made.kind == "graph":
        own = entry.with_suffix(f".{OPERATORS}")
        text = own.read_text("utf-8")
    else:
        text = operators_config(entry / "model.onnx", made.versions["onnxruntime"])
    templates.write(folder, OPERATORS, text)
    build = templates.filled(
        "ort_mobile/build.sh",
        name=made.name,
        ort_version=made.versions["onnxruntime"],
        flags=MINIMAL if made.kind == "graph" else WHOLE,
    )
    templates.write(folder, "build.sh", build, executable=True)
