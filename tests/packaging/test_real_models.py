"""Packages of published models: a chat model, a keyword spotter and a detector."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgeq.packaging.build import package
from edgeq.packaging.verify import verify_package
from tests.conftest import need
from tests.packaging.conftest import need_runtimes
from tests.real_models import SMOLLM2, YOLOV8N, real_model

PLATFORMS = ("rpi", "ort-mobile", "android", "ios")


@pytest.mark.slow
@pytest.mark.parametrize("platform", PLATFORMS)
def test_mlperf_tiny_keyword_spotter(platform: str, tmp_path: Path) -> None:
    need_runtimes(platform)
    source = need("data/mlperf_tiny_ic_kws/kws_ref_model_float32.tflite")
    # features of 0 to 255, as the benchmark's are: 8 bits of MFCC with this scale and zero point
    rng = np.random.default_rng(1)
    levels = rng.normal(83, 12, (32, 1, 1, 49, 10)).clip(-128, 127).round()
    feeds = [{"input_1": (0.5847029 * (x - 83)).astype(np.float32)} for x in levels]
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
    shape = (1, 3, 320, 320)
    made = package(source, platform, tmp_path / "out", shapes={"images": shape})
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
