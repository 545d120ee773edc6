"""The exporters in examples/: what they write computes what PyTorch does."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs PyTorch")
pytest.importorskip("onnx", reason="needs the extra ort")
pytest.importorskip("onnxruntime", reason="needs the extra ort")

import torch

from edgeq.graph.execute import Session
from edgeq.graph.files import read
from tests.conftest import need
from tests.paths import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
EXAMPLES = ROOT / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_resnet20(tmp_path: Path) -> None:
    module = example("export_resnet20")
    torch.manual_seed(0)
    model = module.ResNet20().eval()
    for norm in model.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(norm.running_mean, -0.5, 0.5)
            torch.nn.init.uniform_(norm.running_var, 0.5, 2)
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "r.th")
    module.export(tmp_path / "r.th", tmp_path / "r.onnx")
    x = np.random.default_rng(0).standard_normal((1, 3, 32, 32)).astype(np.float32)
    graph = read(tmp_path / "r.onnx")
    want = model(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(Session(graph)({"image": x})["logits"], want, rtol=1e-4, atol=1e-4)
    assert sum(node.op == "Conv" for node in graph.nodes) == 19
    assert {node.op for node in graph.nodes} <= {
        "Conv", "Relu", "Add", "Slice", "Pad", "ReduceMean", "GlobalAveragePool", "Linear",
        "Reshape",
    }  # fmt: skip


def test_the_published_weights_fit(tmp_path: Path) -> None:
    weights = need("data/cifar_resnet20/resnet20-12fca82f.th")
    example("export_resnet20").export(weights, tmp_path / "r.onnx")
    assert read(tmp_path / "r.onnx").info("logits").shape == (1, 10)


def test_an_encoder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=24,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    model.save_pretrained(tmp_path / "bert")
    assert json.loads((tmp_path / "bert" / "config.json").read_text())["hidden_size"] == 32
    example("export_minilm").export(tmp_path / "bert", tmp_path / "e.onnx", 16)
    ids = np.random.default_rng(0).integers(0, 50, (1, 16))
    mask = (np.arange(16) < 11).astype(np.int64)[None]
    with torch.no_grad():
        hidden = model(
            input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)
        ).last_hidden_state.numpy()
    want = hidden[:, :11].mean(axis=1)
    want /= np.linalg.norm(want)
    graph = read(tmp_path / "e.onnx")
    got = Session(graph)({"input_ids": ids, "attention_mask": mask})["embedding"]
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert sum(node.op == "LayerNormalization" for node in graph.nodes) == 5
