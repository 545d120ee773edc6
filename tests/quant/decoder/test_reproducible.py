"""One artifact, byte for byte, whatever the threads, the BLAS and the instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgeq.core.cpu import this_cpu
from tests.paths import ROOT

RECIPES = (
    "w4-g32", "palette3", "w4-g32-imatrix", "palette4-gptq", "w3-awq-gptq", "4.75bpw", "2.75bpw",
)  # fmt: skip
MODELS = ("llama", "gemma3", "olmo2")
ENVIRONMENTS: dict[str, dict[str, str]] = {
    "plain": {},
    "two BLAS threads, Haswell": {"OMP_NUM_THREADS": "2", "OPENBLAS_CORETYPE": "Haswell"},
    "SkylakeX": {"OPENBLAS_CORETYPE": "SkylakeX"},
    "Zen": {"OMP_NUM_THREADS": "4", "OPENBLAS_CORETYPE": "Zen"},
    "avx2": {"EDGEQ_KERNEL": "avx2", "NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR"},
    "generic": {"EDGEQ_KERNEL": "generic"},
}
SCRIPT = """
import hashlib, sys
from pathlib import Path
import numpy as np
from edgeq import quantize
from edgeq.calibration_text import own_calibration
from edgeq.quant.decoder.calibrate import cut_windows
from edgeq.quant.decoder.quality_report import HeldOut
from tests.families import random_model, tiny_config

folder, recipes, models, threads = sys.argv[1], *(part.split(",") for part in sys.argv[2:])
for family in models:
    model = random_model(tiny_config(family))
    tokens = np.random.default_rng(1).integers(0, model.config.vocab, 400)
    text = cut_windows(tokens[:300], context=40)
    print(family, "own", own_calibration(model).sha256)
    card = HeldOut("a text", cut_windows(tokens[300:], context=40))
    for recipe in recipes:
        for count in threads:
            out = Path(folder) / "model.edgeq"
            out.unlink(missing_ok=True)
            quantize(model, out, recipe, calibration=text, card=card, threads=int(count))
            print(family, recipe, hashlib.sha256(out.read_bytes()).hexdigest())
"""


def digests(folder: Path, settings: dict[str, str], threads: str) -> set[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("EDGEQ_KERNEL")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **settings}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(folder), ",".join(RECIPES),
         ",".join(MODELS), threads],
        env=environment, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines())


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    found = digests(tmp_path_factory.mktemp("plain"), {}, "1")
    assert len(found) == (len(RECIPES) + 1) * len(MODELS)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("plain", "avx2") else pytest.mark.heavy)
        for name in ENVIRONMENTS
    ],
)
@pytest.mark.skipif(this_cpu().arch != "x86_64", reason="the settings are those of x86-64")
def test_the_same_bytes(name: str, wanted: set[str], tmp_path: Path) -> None:
    assert digests(tmp_path, ENVIRONMENTS[name], "1,2,4" if name == "plain" else "2") == wanted
