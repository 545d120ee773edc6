"""Pictures and names in packages of graphs: what the Kotlin code computes, and what is written."""

from __future__ import annotations

import dataclasses
import struct
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeq.core.errors import UsageError
from edgeq.graph.onnx.save import write_onnx
from edgeq.packaging import templates
from edgeq.packaging.build import package
from edgeq.packaging.labels import labels_in, read_labels
from edgeq.packaging.license import License, license_in
from edgeq.packaging.verify import verify_package
from edgeq.quant.graph.images import RESIZES, Preprocess
from tests.graph_made import cnn
from tests.packaging.conftest import Apps, need_runtimes
from tests.packaging.kotlin import compiled, need_kotlin
from tests.real_models import YOLOV8N, real_model

WIDE, TALL = 20, 12
SIZES = [(20, 12), (40, 24), (61, 37), (37, 61), (7, 5), (300, 3)]
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
MAIN = """
package program

import java.io.DataInputStream
import java.io.DataOutputStream
import java.io.File

fun main(arguments: Array<String>) {
    val source = DataInputStream(File(arguments[0]).inputStream().buffered())
    val result = DataOutputStream(File(arguments[1]).outputStream().buffered())
    repeat(source.readInt()) {
        val w = source.readInt()
        val h = source.readInt()
        val pixels = IntArray(w * h) { source.readInt() }
        val inputs = listOf(
            stretch.Picture(pixels, w, h).input(),
            crop.Picture(pixels, w, h).input(),
            pad.Picture(pixels, w, h).input(),
        )
        for (input in inputs) for (value in input) result.writeFloat(value)
    }
    result.close()
}
"""
"""Turns pictures of a file into inputs, by the code of packages for each way to resize."""


@pytest.mark.slow
def test_the_kotlin_code_makes_of_a_picture_what_the_model_was_quantized_with(
    tmp_path: Path,
) -> None:
    """Within one level of a pixel of Pillow, which resizes in steps of whole levels."""
    need_kotlin()
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(5)
    pictures = [rng.integers(0, 256, (h, w, 3), np.uint8) for w, h in SIZES]
    raw = [struct.pack(">i", len(pictures))]
    for number, picture in enumerate(pictures):
        image.fromarray(picture).save(tmp_path / f"{number}.png")
        colors = picture.astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])
        raw += [struct.pack(">ii", *picture.shape[1::-1]), (colors | 0x7F000000).astype(">i4")]
    (tmp_path / "pictures").write_bytes(b"".join(map(bytes, raw)))
    files = [tmp_path / "main.kt"]
    files[0].write_text(MAIN)
    for resize in RESIZES:
        code = templates.filled(
            "android/graph/Picture.kt", width=WIDE, height=TALL, scale=f"{1 / 255:.9g}",
            mean=", ".join(f"{x}f" for x in MEAN), std=", ".join(f"{x}f" for x in STD),
            resize=resize, place="channel * width * height + pixel",
        )  # fmt: skip
        # what needs Android's Bitmap is compiled, with stand-ins for it, by another test
        whole, _, rest = code.partition("/** Pixels with a byte each")
        assert rest, whole
        files.append(tmp_path / f"{resize}.kt")
        files[-1].write_text(f"package {resize}\n\n/** Pixels with a byte each{rest}")
    command = compiled(files, tmp_path / "program.jar")
    subprocess.run(
        [*command, "program.MainKt", tmp_path / "pictures", tmp_path / "inputs"], check=True
    )
    got = np.fromfile(tmp_path / "inputs", ">f4").reshape(len(SIZES), len(RESIZES), 3, TALL, WIDE)
    for number in range(len(SIZES)):
        for way, resize in enumerate(RESIZES):
            told = Preprocess((TALL, WIDE), MEAN, STD, layout="nchw", resize=resize)
            right = told.read(tmp_path / f"{number}.png", (1, 3, TALL, WIDE))[0]
            levels = np.abs(got[number, way] - right) * np.array(STD)[:, None, None] * 255
            assert levels.max() <= 1.01, (SIZES[number], resize)
            assert np.median(levels) < 0.01


def test_names_and_pictures_have_code_where_they_are_known(apps: Apps) -> None:
    android, ios = apps["android graph"], apps["ios graph"]
    for folder in (android, ios):
        assert (folder / "labels/labels.txt").read_text("utf-8") == "cat\ndog\nküken\nfish\nnone\n"
    gradle = (android / "android/build.gradle.kts").read_text("utf-8")
    assert 'sourceSets["main"].assets.srcDir("../labels")' in gradle
    code = (android / "android/src/main/kotlin/edgeq/model/Labels.kt").read_text("utf-8")
    assert 'open("labels.txt")' in code
    assert "GraphModel.labels(context)" in (android / "README.md").read_text("utf-8")
    assert "GraphModel.input(picture)" in (android / "README.md").read_text("utf-8")
    swift = (ios / "Package.swift").read_text("utf-8")
    assert '.copy("labels/labels.txt")' in swift
    assert "GraphModel.labels()" in (ios / "README.md").read_text("utf-8")


def test_labels_and_license_in_the_metadata_of_a_file_are_taken(tmp_path: Path) -> None:
    need_runtimes("rpi")
    graph = cnn()
    meta = {"license": "AGPL-3.0 License", "names": "{0: 'a', 1: 'b c', 2: 'd'}"}
    path = tmp_path / "m.onnx"
    write_onnx(dataclasses.replace(graph, meta={**graph.meta, **meta}), path)
    made = package(path, "rpi", tmp_path / "out").manifest.model
    assert made["labels"] == ["a", "b c", "d"]
    assert (made["license"], made["license_said_by"]) == (
        "AGPL-3.0 License", "the metadata of the model's file",
    )  # fmt: skip
    assert "`labels/labels.txt` has the names" in (tmp_path / "out/README.md").read_text("utf-8")
    assert verify_package(tmp_path / "out").passed
    given = tmp_path / "given.txt"
    given.write_text("x\ny\n\n")
    made = package(path, "rpi", tmp_path / "other", labels=given, license="mit").manifest.model
    assert (made["labels"], made["license"]) == (["x", "y"], "mit")


def test_a_published_detector_says_its_license_and_names() -> None:
    from edgeq.graph.files import read

    meta = read(real_model(YOLOV8N), shapes={"images": (1, 3, 320, 320)}).meta
    assert "AGPL" in str(license_in(meta, License()).license)
    names = labels_in(meta)
    assert names is not None
    assert len(names) == 18


@pytest.mark.parametrize(
    "text",
    ["", "{0: 'a', 2: 'b'}", "{0: 'a', 1: 2}", "[]", "7", "{", "['a\\nb']", "[' ']", "f()",
     "(" * 9999],
)  # fmt: skip
def test_metadata_that_names_nothing_is_left_alone(text: str) -> None:
    assert labels_in({"names": text}) is None


@pytest.mark.parametrize("content", [b"", b"\n\n", b"a\n\nb\n", b"a\x07\n", b"\xff\n"])
def test_files_without_a_name_on_each_line_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_bytes(content)
    with pytest.raises(UsageError):
        read_labels(tmp_path / "labels.txt")


@pytest.mark.parametrize("labels", [7, [], ["a", 7], ["a\nb"], ["a", ""]])
def test_labels_that_are_no_names_are_refused(
    labels: Any, small_graph: Path, tmp_path: Path
) -> None:
    need_runtimes("rpi")
    with pytest.raises(UsageError, match="labels is"):
        package(small_graph, "rpi", tmp_path / "out", labels=labels)
    assert not (tmp_path / "out").exists()
