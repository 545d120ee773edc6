"""Memory: of a running 1B-shape model in a process of its own, and of no file."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from edgeq.core.memory import rss_bytes, sparse_zeros
from edgeq.formats.mapped_file import release
from edgeq.formats.schemes import parse_scheme
from edgeq.importers.shapes import SHAPES, random_model
from edgeq.model import artifact
from tests.families import tiny_config

RUN = """
import json, sys, time
start = time.perf_counter()
import edgeq
model = edgeq.load(sys.argv[1])
loaded = time.perf_counter() - start
from edgeq.runtime.engine import Engine
with Engine(model, context=512, threads=2) as engine:
    engine.forward(list(range(3, 40)))
    engine.greedy(5, 8)
    status = open("/proc/self/status").read()
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    print(json.dumps({"peak": peak, "kv": engine.kv_bytes, "load": loaded,
                      "numba": any(m.split(".")[0] == "numba" for m in sys.modules)}))
"""


def test_memory_of_no_file_is_never_given_back() -> None:
    """Pages of a file are read again; these would come back as zeros."""
    config = tiny_config("llama")
    model = random_model(config, lambda name, _: parse_scheme("w4-g32"))
    tensor = model.tensors["model.layers.0.mlp.up_proj.weight"]
    before = tensor.numpy()
    release(tensor)
    assert before.any()
    assert (tensor.numpy() == before).all()


@pytest.mark.heavy
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc/self/status")
def test_a_1b_model_runs_in_its_file_size_and_little_more(tmp_path: Path) -> None:
    path = tmp_path / "model.edgeq"
    embed = {"model.embed_tokens.weight": "w8-channel"}
    model = random_model(
        SHAPES["llama-3.2-1b"], lambda name, _: parse_scheme(embed.get(name, "w4-g32"))
    )
    artifact.save(model, path)
    del model
    for _ in range(2):  # the second run finds compiled code in the cache
        found = json.loads(
            subprocess.run(
                [sys.executable, "-c", RUN, str(path)], check=True, capture_output=True, text=True
            ).stdout
        )
    assert found["peak"] <= path.stat().st_size + found["kv"] + 130e6
    assert found["numba"] is False
    assert found["load"] < 3  # mapped, not read: no figure, but far from reading 0.8 GB slowly


def test_sparse_zeros_take_memory_only_where_they_are_written() -> None:
    before = rss_bytes()
    zeros = sparse_zeros((30, 64, 4096, 4), "float32")  # 120 MiB
    zeros[:, :, 7] = 1
    assert zeros.sum() == 30 * 64 * 4
    now = rss_bytes()
    if before is not None and now is not None:
        assert now - before < 40 << 20
    assert sparse_zeros((0, 4), "int8").shape == (0, 4)


HELD = """
import ctypes, re, sys, tempfile
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
import numpy as np
from edgeq.core.memory import return_large_blocks

if sys.argv[1] == "returned":
    return_large_blocks()
libc, meet = ctypes.CDLL(None), Barrier(4)
libc.fdopen.restype = ctypes.c_void_p


def free_bytes():
    with tempfile.TemporaryFile() as file:
        stream = ctypes.c_void_p(libc.fdopen(ctypes.c_int(file.fileno()), b"w"))
        libc.malloc_info(0, stream)
        libc.fflush(stream)
        file.seek(0)
        last = file.read().decode().rpartition("</heap>")[2]
    return int(re.search(r'total type="rest" count="[0-9]+" size="([0-9]+)"', last)[1])


def work(number):
    np.ones(24 << 20, np.uint8)  # from here on glibc takes such a block from an arena
    meet.wait()
    blocks = [np.ones(20 << 20, np.uint8), np.ones(5 << 20, np.uint8)]
    small = bytearray(100_000)  # behind them
    del blocks
    return small


with ThreadPoolExecutor(4) as pool:
    kept = list(pool.map(work, range(4)))
print(free_bytes())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_large_blocks_go_back_to_the_system() -> None:
    """Those that threads have freed: otherwise their arenas keep them."""
    # Dask leaves MALLOC_TRIM_THRESHOLD_ in the environment, which stops glibc from adapting
    tuned = ("MALLOC_", "GLIBC_TUNABLES")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(tuned)}
    held = {}
    for how in ("kept", "returned"):
        done = subprocess.run(
            [sys.executable, "-c", HELD, how],
            env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        held[how] = int(done.stdout)
    assert held["kept"] > 60 << 20, held
    assert held["returned"] < 16 << 20, held
