"""Write the documents that are made from the code: ``python docs/make.py``.

    docs/python.md    the functions and classes of `import edgeq`, from their docstrings
    CONTRIBUTING.md   the table of layers, from import-linter's contracts in pyproject.toml
    docs/models.md    the table of families, and of the targets that take them
    docs/raspberry-pi.md  the table of expected speeds, from `edgeq plan`

``python docs/make.py --check`` writes nothing and fails if a document is not current.
"""

from __future__ import annotations

import inspect
import re
import sys
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

TOPICS = {
    "Models and files": (
        "load", "open_source", "save", "inspect", "demo_model", "Model", "ModelConfig",
        "BlockSpec", "RopeSpec", "RopeScaling", "DeltaSpec", "ExpertsSpec", "Graph",
        "QuantTensor", "FloatTensor", "Reference",
    ),
    "Quantize": ("quantize", "repack", "verify_reproducible", "calibrate", "sensitivity", "sweep",
                 "QuantizationSummary", "Summary", "GraphSummary", "RepackSummary"),
    "Recipes and schemes": ("Recipe", "Rule", "QuantScheme", "parse_scheme", "PRESETS"),
    "Run": (
        "run", "chat", "Conversation", "generate", "Engine", "Draft", "Tokenizer", "SamplingParams",
        "Chunk", "embed", "rerank", "render_chat", "GrammarVocabulary", "warmup",
    ),
    "Serve": ("serve", "Server", "ServerSettings"),
    "Convert": ("convert", "validate", "Options", "Conversion", "ValidationReport"),
    "Package": ("package", "verify_package", "package_delta", "apply_delta", "Package",
                "PackageReport", "Delta"),
    "Evaluate": ("evaluate", "perplexity", "evaluate_graph", "Outcome", "Evaluation",
                 "GraphAccuracy"),
    "Measure": ("bench", "bench_graphs", "profile", "report", "Workload", "Measurement",
                "Document"),
    "Devices": ("plan", "device", "device_names", "detect", "doctor", "Plan", "DeviceProfile",
                "Detected", "Check"),
    "Results of other verbs": ("CalibrationStats", "Sensitivity", "SweepResult"),
    "Errors": (
        "EdgeqError", "FormatError", "SchemeError", "UnsupportedError", "UsageError",
        "MissingDependencyError", "DeviceError", "DoesNotFitError",
    ),
}  # fmt: skip

HEAD = """\
# edgeq in Python

Every command of the command line has a function of its name in Python. Functions take paths or
opened objects, and strings where they take objects (`recipe="w4-g32"`). They print nothing; a
`progress` is called with what is being done, the steps done, and the steps in total. Every error
that is raised on purpose is an `edgeq.EdgeqError`. `import edgeq` takes some milliseconds: NumPy,
Numba and converters are imported when they are first needed.

This page is made from the docstrings by `python docs/make.py`; its examples are run by the tests,
in a folder with a checkpoint `model`, its artifact `model.edgeq`, a `chat.edgeq` with a chat
template, a `graph.onnx` and a `text.txt`.
"""

_SECTION = re.compile(r"^(Args|Returns|Yields|Raises|Example|Attributes|Source):$", re.MULTILINE)
_ITEM = re.compile(r"^    (\S[^:]*): ", re.MULTILINE)


def python_page() -> str:
    """The text of docs/python.md."""
    import edgeq

    listed = [name for names in TOPICS.values() for name in names]
    missing = {*edgeq.__all__, "__version__"} ^ {*listed, "__version__"}
    if missing or len(listed) != len(set(listed)):
        raise SystemExit(f"docs/make.py: give these one topic each: {sorted(missing)}")
    parts = [HEAD]
    anchors: dict[str, str] = {}
    for name in listed:  # a heading's second occurrence gets a number
        anchor = name.lower()
        anchors[name] = f"{anchor}-1" if anchor in anchors.values() else anchor
    for topic, names in TOPICS.items():
        links = [f"[`{name}`](#{anchors[name]})" for name in names]
        parts.append(f"## {topic}\n\n{' · '.join(links)}\n")
        parts += [_entry(name, getattr(edgeq, name)) for name in names]
    return "\n".join(parts)


def _entry(name: str, value: Any) -> str:
    if not callable(value):
        listed = ", ".join(f"`{key}`" for key in value)
        return f"### {name}\n\nRecipes by name, for decoders and graphs: {listed}.\n"
    text = inspect.getdoc(value) or ""
    parts = [f"### {name}", ""]
    if not (inspect.isclass(value) and issubclass(value, Exception)):
        parts += ["```python", _signature(name, value), "```", ""]
    return "\n".join([*parts, _markdown(text)])


def _signature(name: str, value: Any) -> str:
    text = f"edgeq.{name}{inspect.signature(value)}"
    text = re.sub(r"'([^',()]*(?:\[[^']*\])?[^',()]*)'", r"\1", text)  # annotations are strings
    text = re.sub(r"\s*-> None$", "", text).replace("<factory>", "...")
    if len(text) <= 96:
        return text
    inside = re.fullmatch(r"(.*?\()(.*)(\).*)", text, re.DOTALL)
    assert inside is not None
    pieces, depth, current = [], 0, ""
    for char in inside[2]:
        depth += (char in "[({") - (char in "])}")
        if char == "," and not depth:
            pieces.append(current.strip())
            current = ""
        else:
            current += char
    pieces.append(current.strip())
    return "\n".join([inside[1], *(f"    {piece}," for piece in pieces), inside[3]])


def _markdown(docstring: str) -> str:
    """A Google-style docstring as Markdown."""
    pieces = _SECTION.split(docstring)
    parts = [pieces[0].strip(), ""]
    for title, body in zip(pieces[1::2], pieces[2::2], strict=True):
        if title == "Example":
            code = inspect.cleandoc("\n" + body.rstrip())
            parts += ["```pycon", code, "```", ""]
        elif _ITEM.search(body) and title in ("Args", "Raises", "Attributes"):
            items = _ITEM.split(body.rstrip())
            rows = [
                f"- **{', '.join(f'`{part}`' for part in names.split(', '))}**: "
                + " ".join(text.split())
                for names, text in zip(items[1::2], items[2::2], strict=True)
            ]
            parts += [*([] if title == "Args" else [f"{title}:", ""]), *rows, ""]
        else:
            parts += [f"{title}: {' '.join(body.split())}", ""]
    return "\n".join(parts)


def layers_table() -> str:
    """The table of layers in CONTRIBUTING.md."""
    document = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    (layers,) = (c["layers"] for c in document["tool"]["importlinter"]["contracts"]
                 if c["type"] == "layers")  # fmt: skip
    rows = ["| layer | packages | may import |", "| --- | --- | --- |"]
    last = len(layers) - 1
    for at, layer in enumerate(layers):
        number, apart = last - at, "|" in layer
        names = [name.strip() for name in re.split("[|:]", layer)]
        shown = " ".join(f"`{name}`" for name in names if not name.startswith("_"))
        below = "the standard library, NumPy" if not number else f"{number - 1} and below"
        if not shown:
            continue
        rows.append(f"| {number} | {shown} | {below}{', never each other' if apart else ''} |")
    return "\n".join(rows) + "\n"


TARGETS = ("ort", "genai", "tflite", "litertlm", "coreml", "gguf")


def models_table() -> str:
    """The families, and which targets take the smallest published model of each."""
    import edgeq
    from edgeq.converters.targets import target_named
    from edgeq.importers.huggingface.families import FAMILIES
    from edgeq.importers.shapes import SHAPES, parameters

    tokenizer = edgeq.load(edgeq.demo_model()).files
    titles = [target_named(target).title for target in TARGETS]
    rows = [f"| family | `model_type` | shapes | edgeq | {' | '.join(titles)} |",
            "| --- | --- | --- " + "| --- " * (1 + len(TARGETS)) + "|"]  # fmt: skip
    for name, family in FAMILIES.items():
        smallest = min(family.shapes, key=lambda shape: parameters(SHAPES[shape]))
        takes = ["yes", *targets_of(SHAPES[smallest], tokenizer)]
        cells = ", ".join(family.model_types), ", ".join(family.shapes), *takes
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def targets_of(config: Any, files: Mapping[str, bytes]) -> list[str]:
    """For each target, whether it takes a model of a shape with 4-bit weights."""
    import numpy as np

    import edgeq
    from edgeq.converters.options import Options
    from edgeq.converters.targets import target_named
    from edgeq.core.errors import UnsupportedError
    from edgeq.formats.tensor import part_shapes
    from edgeq.importers.shapes import biases

    scheme = edgeq.parse_scheme("w4-g32")
    config = replace(config, vocab=2048, ffn=1024)  # no target asks for more of these
    tensors: dict[str, Any] = {}
    alike: dict[tuple[int, int], Any] = {}  # of experts there are thousands of one shape
    for name, shape in config.linears():  # targets look at scales, and not at the codes
        if shape not in alike:
            parts = {
                part: np.zeros(size, kind) if part == "packed" else np.ones(size, kind)
                for part, (kind, size) in part_shapes(scheme, shape).items()
            }
            alike[shape] = edgeq.QuantTensor(scheme, shape, **parts)
        tensors[name] = alike[shape]
    for name, size in (*config.floats(), *biases(config)):
        tensors[name] = edgeq.FloatTensor("float32", np.zeros(size, np.float32))
    model = edgeq.Model(config, tensors, files)
    found = []
    for target in TARGETS:
        try:
            target_named(target).decoder_target().check(model, Options())
            found.append("yes")
        except UnsupportedError:
            found.append("no")
    return found


BOARDS = ("rpi-zero-2w", "rpi4-4gb", "rpi5-8gb")
SHAPES = ("smollm2-135m", "qwen2.5-0.5b", "llama-3.2-1b")
PI_CONTEXT = 2048


def pi_table() -> str:
    """Memory, speed and energy of known models on each Raspberry Pi, as `edgeq plan` gives them."""
    import edgeq

    rows = ["| board | model | memory | prompt, tok/s | answer, tok/s | J per token |",
            "| --- | --- | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for board in BOARDS:
        for shape in SHAPES:
            plan = edgeq.plan(shape=shape, device=board, bits=4, context=PI_CONTEXT)
            size = f"{plan.total_bytes / 2**20:.0f} MiB"
            joules = "unknown" if plan.joules_per_token is None else f"{plan.joules_per_token:.2f}"
            speed = f"{plan.prefill_tokens_per_s:.0f} | {plan.decode_tokens_per_s:.1f} | {joules}"
            if not plan.fits:
                size, speed = f"{size}: does not fit", "| |"
            rows.append(f"| {plan.device} | {shape} | {size} | {speed} |")
    return "\n".join(rows) + "\n"


def with_table(path: str, table: Callable[[], str]) -> str:
    """The text of a page in which the table with the same first column is the current one."""
    text, rows = (ROOT / path).read_text("utf-8"), table()
    start = "|".join(rows.split("|")[:2]) + "|"
    pattern = re.compile(rf"^{re.escape(start)}.*?\n(?=\n)", re.MULTILINE | re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"docs/make.py: {path} has no table that starts {start!r}")
    return pattern.sub(lambda _: rows, text)


DOCUMENTS: dict[str, Callable[[], str]] = {
    "docs/python.md": python_page,
    **{
        path: partial(with_table, path, table)
        for path, table in (
            ("CONTRIBUTING.md", layers_table),
            ("docs/models.md", models_table),
            ("docs/raspberry-pi.md", pi_table),
        )
    },
}
"""Path -> what makes its text."""


def main() -> int:
    """Write or check every document."""
    stale = []
    for path, make in DOCUMENTS.items():
        text, file = make(), ROOT / path
        if not file.exists() or file.read_text("utf-8") != text:
            stale.append(path)
            if "--check" not in sys.argv:
                file.write_text(text, "utf-8")
    print("\n".join(f"{'stale' if '--check' in sys.argv else 'written'}: {path}" for path in stale))
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
