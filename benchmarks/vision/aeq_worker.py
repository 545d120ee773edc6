"""One quantization by ai-edge-quantizer, in a Python of its own as its pins conflict.

    python aeq_worker.py model.tflite out.tflite RECIPE [calibration.npz]

The arrays of the .npz file are named as the signature's inputs, in the file's own layout.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from ai_edge_litert.interpreter import Interpreter
from ai_edge_quantizer import calibrator, quantizer, recipe
from ai_edge_quantizer.utils import qsv_utils


def main(source: str, out: str, kind: str, data: str | None = None) -> None:
    """Quantize and write."""
    made = quantizer.Quantizer(source, getattr(recipe, kind)())
    found = None
    if made.need_calibration:
        signatures = Interpreter(model_path=source).get_signature_list()
        key = next(iter(signatures)) if signatures else None
        arrays = dict(np.load(data))
        rows = range(len(next(iter(arrays.values()))))
        samples = [{name: array[i : i + 1] for name, array in arrays.items()} for i in rows]
        # its own default, a moving average, forgets the first samples and loses 10 dB
        seen = calibrator.Calibrator(source, qsv_update_func=qsv_utils.min_max_update)
        seen.calibrate({key: samples}, made._recipe_manager)
        found = seen.get_model_qsvs()
    result = made.quantize(found, serialize_to_path=None)
    Path(out).write_bytes(result.quantized_model)


if __name__ == "__main__":
    main(*sys.argv[1:])
