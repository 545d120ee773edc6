"""Packages of the demo's model and of a small graph, made once."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeq.graph.onnx.save import write_onnx
from edgeq.importers import load
from edgeq.model.artifact import save
from edgeq.packaging.build import package
from edgeq.quant import Recipe, quantize_model
from edgeq.quant.graph.images import Preprocess
from edgeq.quant.graph.samples import samples_of
from tests.graph_made import cnn
from tests.paths import DEMO

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|> {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}[{{ strftime_now('%d %b %Y') }}]"
)
"""A chat template that writes the date, as that of Llama 3 does."""


@pytest.fixture(scope="session")
def chat_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model in w4-g32, with a chat template."""
    folder = tmp_path_factory.mktemp("source")
    plain = folder / "plain.edgeq"
    quantize_model(load(DEMO), plain, Recipe.from_options(preset="w4-g32"))
    model = load(plain)
    config = json.loads(model.files["tokenizer_config.json"]) | {"chat_template": TEMPLATE}
    files = dict(model.files) | {"tokenizer_config.json": json.dumps(config).encode()}
    path = folder / "tale.edgeq"
    save(replace(model, files=files), path)
    return path


@pytest.fixture(scope="session")
def small_graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of pictures, in float."""
    path = tmp_path_factory.mktemp("graph") / "tiny.onnx"
    write_onnx(cnn(), path)
    return path


@pytest.fixture(scope="session")
def samples() -> list[dict[str, Any]]:
    rng = np.random.default_rng(3)
    return [{"x": rng.normal(size=(1, 3, 8, 8)).astype(np.float32)} for _ in range(16)]


def need_runtimes(platform: str) -> None:
    """Skip the test, by name, where a runtime of a platform is not installed."""
    packages = {
        "rpi": ("onnxruntime",),
        "ort-mobile": ("onnxruntime", "onnxruntime_genai"),
        "android": ("onnxruntime", "onnxruntime_genai", "ai_edge_litert", "litert_lm_builder"),
        "ios": ("coremltools",),
    }
    for name in packages[platform]:
        pytest.importorskip(name)


class Apps:
    """Packages of the two models, each made when it is first asked for.

    Args:
        folder: where they are made.
        sources: kind of model -> the model and options.
    """

    def __init__(self, folder: Path, sources: dict[str, tuple[Path, dict[str, Any]]]) -> None:
        self.folder, self.sources = folder, sources

    def __getitem__(self, name: str) -> Path:
        """The package of a platform and kind, such as "android graph"."""
        platform, kind = name.split()
        need_runtimes(platform)
        path = self.folder / f"{platform}-{kind}"
        if not path.exists():
            source, options = self.sources[kind]
            package(source, platform, path, name="tale-teller", **options)
        return path


@pytest.fixture(scope="session")
def apps(
    chat_artifact: Path, small_graph: Path, samples: Any, tmp_path_factory: pytest.TempPathFactory
) -> Apps:
    plain = samples_of(cnn(), samples)
    known = Preprocess(mean=(0.5, 0.4, 0.3), std=(0.2,), resize="pad", layout="nchw")
    data = type(plain)(**{**vars(plain), "preprocess": known, "pictures": True})
    graph = {"data": data, "labels": ["cat", "dog", "küken", "fish", "none"]}
    return Apps(
        tmp_path_factory.mktemp("apps"),
        {"model": (chat_artifact, {"context": 128}), "graph": (small_graph, graph)},
    )


@pytest.fixture(scope="session")
def rpi_made(chat_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "tale-rpi"
    package(chat_artifact, "rpi", path, context=128)
    return path


@pytest.fixture
def rpi(rpi_made: Path, tmp_path: Path) -> Path:
    """A copy of the package for the Raspberry Pi, to be changed."""
    return Path(shutil.copytree(rpi_made, tmp_path / "rpi"))
