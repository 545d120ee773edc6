"""The ONNX Runtime part of a package: the required operators, and a build script for them."""

from __future__ import annotations

from pathlib import Path

from edgeq.converters.ort.ort_format import operators_config
from edgeq.packaging import templates
from edgeq.packaging.manifest import Manifest
from edgeq.packaging.source import GraphSource, ModelSource

OPERATORS = "required_operators.config"
MINIMAL = "--minimal_build extended --disable_ml_ops --disable_rtti"
"""Build flags of an ONNX Runtime that reads only .ort files."""
WHOLE = "--disable_ml_ops"
"""Build flags of an ONNX Runtime that reads .onnx files, the format of language models here."""


def write(folder: Path, made: Manifest, source: ModelSource | GraphSource) -> None:
    """Write the operator list and the build script; see `edgeq.packaging.glue.write_glue`."""
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
