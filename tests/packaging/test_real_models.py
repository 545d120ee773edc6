"""Packages of published models: a chat model, a keyword spotter and a detector."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeq.packaging.build import package
from edgeq.packaging.verify import verify_package
from tests.conftest import need
from tests.packaging.conftest import need_runtimes
from tests.packaging.twice import built_twice
from tests.real_models import SMOLLM2, YOLOV8N, real_model

PLATFORMS = ("rpi", "ort-mobile", "android", "ios")


KEYWORDS = "data/mlperf_tiny_ic_kws/kws_ref_model_float32.tflite"
SHAPE = (1, 3, 320, 320)


def features() -> NDArray[np.float32]:
    """Features as the benchmark's are: 8 bits of MFCC with this scale and zero point."""
    rng = np.random.default_rng(1)
    levels = rng.normal(83, 12, (32, 1, 1, 49, 10)).clip(-128, 127).round()
    return (0.5847029 * (levels - 83)).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("platform", PLATFORMS)
def test_mlperf_tiny_keyword_spotter(platform: str, tmp_path: Path) -> None:
    need_runtimes(platform)
    source = need(KEYWORDS)
    feeds = [{"input_1": x} for x in features()]
    made = package(source, platform, tmp_path / "out", dequantize=True, data=feeds)
    assert made.manifest.variants[0].scheme == "int8"
    assert made.nbytes < 300_000
    report = verify_package(tmp_path / "out")
    assert report.passed, report.fault
    assert not report.not_run


@pytest.mark.slow
@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_detector(platform: str, tmp_path: Path) -> None:
    need_runtimes(platform)
    source = real_model(YOLOV8N)
    made = package(source, platform, tmp_path / "out", shapes={"images": SHAPE})
    assert all(variant.scheme == "int8" for variant in made.manifest.variants)
    report = verify_package(tmp_path / "out")
    assert report.passed, report.fault
    assert not report.not_run


@pytest.mark.heavy
@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_chat_model(platform: str, tmp_path: Path) -> None:
    need_runtimes(platform)
    made = package(real_model(SMOLLM2), platform, tmp_path / "out", context=512)
    assert made.manifest.model["license"] == "apache-2.0"
    assert made.manifest.model["chat"] is True
    # onnxruntime, LiteRT and Core ML have no minimum for each group, which Q4_1 has
    kept = platform == "rpi"
    assert all(("kept" in variant.why[-1]) == kept for variant in made.manifest.variants)
    report = verify_package(tmp_path / "out")
    assert report.passed, report.fault
    assert not report.not_run


@pytest.mark.heavy
@pytest.mark.parametrize("platform", PLATFORMS)
def test_graphs_are_the_same_bytes_elsewhere_and_on_another_day(
    platform: str, tmp_path: Path
) -> None:
    need_runtimes(platform)
    np.savez(tmp_path / "features.npz", input_1=features()[:, 0])
    options = ["--dequantize", "--data", str(tmp_path / "features.npz")]
    (tmp_path / "keywords").mkdir()
    built_twice(need(KEYWORDS), platform, options, tmp_path / "keywords")
    (tmp_path / "detector").mkdir()
    shape = ["--shape", f"images={','.join(map(str, SHAPE))}"]
    built_twice(real_model(YOLOV8N), platform, shape, tmp_path / "detector")


@pytest.mark.heavy
def test_a_chat_model_is_the_same_bytes_elsewhere_and_on_another_day(tmp_path: Path) -> None:
    """For a Pi alone, as the other platforms take minutes and the small models try them."""
    built_twice(real_model(SMOLLM2), "rpi", ["--ctx-size", "512"], tmp_path)
