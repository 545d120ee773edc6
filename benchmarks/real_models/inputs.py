"""The published models that are measured, and real inputs for each of them.

    ocr-detection       drawn pages of text, 192 x 384 pixels
    ocr-recognition     drawn lines of text, 48 x 320
    ocr-direction       drawn lines of text, half of them upside down, 48 x 192
    yolov8n             four test pictures of CIFAR-10 enlarged to one of 320 x 320
    basic-pitch         windows of two seconds of speech and of chords played over it
    magika              first and last 1024 bytes of source files, texts and pictures
    minilm, resnet8, dscnn   see benchmarks/vision/subjects.py

Calibration takes the first part of the inputs, and nothing is measured on that part.
"""

from __future__ import annotations

import io
import sys
import tarfile
import wave
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.graph.files import read
from edgeq.graph.ir import Graph

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks" / "vision"))
Feeds = dict[str, NDArray[Any]]
LINES = 24
"""Inputs of a model that are made, of which two thirds calibrate."""
_TEXT = (
    "The quick brown fox jumps over the lazy dog near 12 km of river bank, invoice no. 4711, total "
    "389.50 EUR paid on 2024-03-17 by Anna Schmidt; please send it to the office in Leipzig or to "
    "support@example.org before Friday noon, otherwise page 8 will be printed again (see appendix)"
)
_WORDS = _TEXT.split()


@dataclass(frozen=True)
class Model:
    """A published model with inputs.

    Args:
        name: of the row.
        about: what it is and where it comes from.
        load: reads its float graph.
        inputs: makes inputs of a graph.
        decide: what users take from the outputs: arrays to compare for equality, or floats whose
            directions are compared.
        checked: inputs on which a converted file is compared with its source.
    """

    name: str
    about: str
    load: Callable[[], Graph]
    inputs: Callable[[Graph], list[Feeds]]
    decide: Callable[[Feeds], NDArray[Any]]
    checked: int = 4


def models(folder: Path, data: Path, work: Path) -> list[Model]:
    """All models, none of them read yet.

    Args:
        folder: the published packages, unpacked.
        data: the shared data.
        work: for files that are made on the way.
    """
    ocr = folder / "rapidocr_onnxruntime" / "models"
    pitch = folder / "basic_pitch" / "saved_models" / "icassp_2022"

    def shaped(path: Path, *shape: int) -> Callable[[], Graph]:
        return lambda: read(path, shapes={_input(path): shape})

    def lines(turned: bool) -> Callable[[Graph], list[Feeds]]:
        return lambda graph: _fed(graph, (_line(i, graph, turned) for i in range(LINES)))

    top = lambda made: _first(made).argmax(-1)  # noqa: E731
    found = [
        Model(
            "ocr-detection", "PP-OCRv4 detection (rapidocr-onnxruntime), 192 x 384",
            shaped(ocr / "ch_PP-OCRv4_det_infer.onnx", 1, 3, 192, 384),
            lambda graph: _fed(graph, (_page(i, graph) for i in range(LINES // 2))),
            lambda made: _first(made) > 0.3, 2,
        ),
        Model(
            "ocr-recognition", "PP-OCRv4 recognition (rapidocr-onnxruntime), 48 x 320",
            shaped(ocr / "ch_PP-OCRv4_rec_infer.onnx", 1, 3, 48, 320), lines(False), top, 2,
        ),
        Model(
            "ocr-direction", "PP-OCR v2 direction (rapidocr-onnxruntime), 48 x 192",
            shaped(ocr / "ch_ppocr_mobile_v2.0_cls_infer.onnx", 1, 3, 48, 192), lines(True), top,
        ),
        Model(
            "yolov8n", "YOLOv8n, 18 classes (nudenet), 320 x 320",
            shaped(folder / "nudenet" / "320n.onnx", 1, 3, 320, 320),
            lambda graph: _fed(graph, _mosaics(data, LINES)),
            lambda made: _first(made)[:, 4:].max(axis=1) > 0.1, 2,
        ),
        *(
            Model(
                f"basic-pitch-{kind}", f"Basic Pitch (basic-pitch), .{kind}",
                lambda kind=kind: read(pitch / f"nmp.{kind}"),
                lambda graph: _fed(graph, _sounds(data, LINES)),
                lambda made: np.concatenate([(v > 0.5).reshape(-1) for v in made.values()]), 2,
            )
            for kind in ("onnx", "tflite")
        ),
        Model(
            "magika", "Magika standard v3.3 (magika), file types of 2048 bytes",
            lambda: read(folder / "magika" / "models" / "standard_v3_3" / "model.onnx"),
            lambda graph: _fed(graph, _files(6 * LINES)), top,
        ),
        Model(
            "silero-vad", "Silero VAD (silero-vad), 16 kHz",
            lambda: read(folder / "silero_vad" / "data" / "silero_vad_16k_op15.onnx"),
            lambda graph: _fed(graph, _sounds(data, LINES)), top,
        ),
    ]  # fmt: skip
    return found + [_subject(name, data, work) for name in ("minilm", "resnet8", "dscnn")]


def _subject(name: str, data: Path, work: Path) -> Model:
    """A model of the vision benchmark."""
    held: list[Any] = []

    def subject() -> Any:
        from subjects import SUBJECTS

        if not held:
            held.append(SUBJECTS[name](data, work))
        return held[0]

    def inputs(graph: Graph) -> list[Feeds]:
        parts = subject().calibration, subject().test
        limits = (4 * LINES, 2 * LINES)
        return [
            {key: array[i : i + 1] for key, array in part.items()}
            for part, limit in zip(parts, limits, strict=True)
            for i in range(min(limit, len(next(iter(part.values())))))
        ]

    about = {"minilm": "all-MiniLM-L6-v2, 128 tokens", "resnet8": "MLPerf Tiny ResNet-8",
             "dscnn": "MLPerf Tiny DS-CNN"}  # fmt: skip

    def decide(made: Feeds) -> NDArray[Any]:
        first = _first(made)
        return first if name == "minilm" else first.argmax(-1)

    return Model(name, about[name], lambda: subject().graph, inputs, decide, 4)


def _input(path: Path) -> str:
    import onnx

    return str(onnx.load(path, load_external_data=False).graph.input[0].name)


def _first(made: Feeds) -> NDArray[Any]:
    return next(iter(made.values()))


def _fed(graph: Graph, arrays: Any) -> list[Feeds]:
    (name,) = graph.inputs
    info = graph.info(name)
    return [{name: np.asarray(array, info.dtype).reshape(info.shape)} for array in arrays]


# --- pictures of text ------------------------------------------------------------------------


def _text(rng: np.random.Generator, words: int) -> str:
    start = int(rng.integers(0, len(_WORDS) - words))
    return " ".join(_WORDS[start : start + words])


def _drawn(width: int, height: int, texts: list[tuple[int, int, int, str]], shade: int) -> Any:
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.new("RGB", (width, height), (shade, shade, min(255, shade + 6)))
    draw = ImageDraw.Draw(picture)
    for x, y, size, text in texts:
        draw.text((x, y), text, fill=(20, 24, 40), font=ImageFont.load_default(size))
    return picture


def _line(i: int, graph: Graph, turned: bool) -> NDArray[np.float32]:
    """A line of text as PP-OCR takes it: BGR from -1 to 1."""
    rng = np.random.default_rng(i)
    _, _, height, width = graph.info(graph.inputs[0]).shape
    size = int(rng.integers(24, 34))
    shade = int(rng.integers(180, 250))
    picture = _drawn(width, height, [(4, 6, size, _text(rng, 3))], shade)
    if turned and i % 2:
        picture = picture.rotate(180)
    pixels = np.asarray(picture, np.float32)[:, :, ::-1].transpose(2, 0, 1)
    noise = rng.normal(0, 4, pixels.shape)
    return ((pixels + noise) / 127.5 - 1).astype(np.float32)


def _page(i: int, graph: Graph) -> NDArray[np.float32]:
    """Several lines of text as PP-OCR's detection takes them."""
    rng = np.random.default_rng(1000 + i)
    _, _, height, width = graph.info(graph.inputs[0]).shape
    texts = [
        (
            int(rng.integers(4, 120)),
            y,
            int(rng.integers(14, 30)),
            _text(rng, int(rng.integers(2, 7))),
        )
        for y in range(10, height - 40, int(rng.integers(36, 70)))
    ]
    pixels = np.asarray(_drawn(width, height, texts, int(rng.integers(170, 250))), np.float32)
    scaled = (pixels / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    return scaled.transpose(2, 0, 1).astype(np.float32)


def _mosaics(data: Path, n: int) -> list[NDArray[np.float32]]:
    """Four pictures of CIFAR-10 enlarged side by side, RGB from 0 to 1."""
    from PIL import Image

    with tarfile.open(data / "cifar10_test_dev" / "cifar10_test_jpg.tar") as tar:
        members = [m for m in tar.getmembers() if m.isfile()]
        chosen = members[:: len(members) // (4 * n)][: 4 * n]
        tiles = [
            Image.open(io.BytesIO(tar.extractfile(m).read())).convert("RGB").resize((160, 160))  # type: ignore[union-attr]
            for m in chosen
        ]
    found = []
    for i in range(n):
        a, b, c, d = (np.asarray(tile, np.float32) / 255 for tile in tiles[4 * i : 4 * i + 4])
        whole = np.concatenate([np.concatenate([a, b], 1), np.concatenate([c, d], 1)], 0)
        found.append(whole.transpose(2, 0, 1))
    return found


# --- sounds and files ------------------------------------------------------------------------


def _sounds(data: Path, n: int) -> list[NDArray[np.float32]]:
    """Windows of 43844 numbers at 22050 a second: speech, with chords over every second one."""
    rate, length = 22050, 43844
    speech = []
    for path in sorted((data / "speech_wavs").glob("*.wav")):
        with wave.open(str(path)) as file:
            raw = np.frombuffer(file.readframes(file.getnframes()), np.int16)
            have = file.getframerate()
        x = raw.astype(np.float32) / 32768
        speech.append(np.interp(np.arange(0, len(x) - 1, have / rate), np.arange(len(x)), x))
    whole = np.tile(np.concatenate(speech), 2 + n * length // sum(map(len, speech)))
    time = np.arange(length) / rate
    found = []
    for i in range(n):
        rng = np.random.default_rng(i)
        window = whole[i * length : (i + 1) * length].copy()
        if i % 2:
            for note in rng.integers(45, 80, 3):
                pitch = 440 * 2 ** ((int(note) - 69) / 12)
                fade = np.exp(-time * rng.uniform(0.5, 3))
                tones = sum(np.sin(2 * np.pi * pitch * k * time) / k for k in range(1, 5))
                window = window * 0.3 + 0.1 * fade * tones
        found.append(window.astype(np.float32))
    return found


def _files(n: int) -> list[NDArray[np.int64]]:
    """Beginnings and ends of files as Magika takes them: numbers of bytes, 256 where none is."""
    places = [ROOT, Path(np.__file__).parent]
    suffixes = (
        "py",
        "md",
        "toml",
        "json",
        "txt",
        "c",
        "h",
        "so",
        "png",
        "yml",
        "css",
        "html",
        "pyi",
    )
    by_kind = [sorted(p for place in places for p in place.rglob(f"*.{s}") if p.is_file())[:60]
               for s in suffixes]  # fmt: skip
    found: list[NDArray[np.int64]] = []
    for row in range(60):
        for paths in by_kind:
            if row >= len(paths) or paths[row].stat().st_size < 64:
                continue
            raw = paths[row].read_bytes()
            begin, end = raw[:4096].lstrip()[:1024], raw[-4096:].rstrip()[-1024:]
            filled = np.full(2048, 256)
            filled[: len(begin)] = list(begin)
            filled[2048 - len(end) :] = list(end)
            found.append(filled)
    return found[:n]
