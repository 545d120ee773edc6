"""Saved sequences, reuse of prompts, caches that are rings, and weights copied to memory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeq.cli.app import main
from edgeq.core.errors import EdgeqError, FormatError, UsageError
from edgeq.formats.packing import TILE
from edgeq.formats.safetensors_file import open_safetensors
from edgeq.model import artifact
from edgeq.model.memory_layout import BATCH, center_span
from edgeq.model.model import Model
from edgeq.runtime import layer_cache
from edgeq.runtime.compiled import CompiledBackend
from edgeq.runtime.engine import Engine
from edgeq.runtime.kv_state import fingerprint, layer_parts
from edgeq.runtime.lookup import MAX_DRAFT
from edgeq.runtime.thread_pool import ThreadPool
from edgeq.runtime.weights import WeightArena
from tests.conftest import small_checkpoint
from tests.families import quantized, random_model, tiny_config

IDS = np.random.default_rng(7).integers(3, 101, 1000)
WINDOW = 112
RING = WINDOW + BATCH + TILE
"""Positions a layer with that window keeps: whole chunks as it is, so that none is to spare."""


def model_of(family: str, seed: int = 0, **over: Any) -> Model:
    over = {"context": 2048} | over
    if family in ("gemma3", "mistral"):
        over = {"window": WINDOW} | over
    return quantized(random_model(tiny_config(family, **over), seed), "w4-g32")


def all_logits(model: Model, ids: Any = IDS, **options: Any) -> NDArray[np.float32]:
    with Engine(model, **options) as engine:
        return engine.forward(ids, all_logits=True)


def assert_same_logits(got: NDArray[np.float32], want: NDArray[np.float32], *, exact: bool) -> None:
    """Compare the logits of two runs over the same tokens.

    The compiled backend sums in one order whatever the batch, so its logits are the same bits. The
    order of a BLAS library depends on the processor, the threads and the matrix's height: a sum
    that lies next to a rounding boundary of the cache may then be stored one step off, which moves
    the logits that read it. What a wrong position or a lost token gives is off by about their
    standard deviation.
    """
    if exact:
        np.testing.assert_array_equal(got, want)
        return
    difference = np.abs(got - want)
    assert np.median(difference) < 1e-2 * want.std()
    assert difference.max() < 0.2 * want.std()


class Counted:
    """Counts the tokens a backend is given, and passes them on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tokens = 0
        run = CompiledBackend.forward

        def forward(backend: CompiledBackend, ids: Any, position: int, outputs: int) -> Any:
            self.tokens += len(ids)
            return run(backend, ids, position, outputs)

        monkeypatch.setattr(CompiledBackend, "forward", forward)


# --- rings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gemma3", "mistral"])
@pytest.mark.parametrize("kv_bits", [4, 8, 16])
def test_a_ring_gives_the_bits_of_the_whole_cache(
    family: str, kv_bits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # positions that share a center are lost together: a window that fills whole chunks with them
    span = center_span(kv_bits)
    model = model_of(family, window=RING - BATCH - span)
    ring = all_logits(model, kv_bits=kv_bits, threads=2)
    for threads in (1, 3):
        np.testing.assert_array_equal(all_logits(model, kv_bits=kv_bits, threads=threads), ring)
    with Engine(model, kv_bits=kv_bits, threads=2) as engine:
        cuts = [0, 1, 400, 401, 409, 600, 601, 760, 768, 769, 1000]
        pieces = [engine.forward(IDS[a:b], all_logits=True) for a, b in pairwise(cuts)]
        np.testing.assert_array_equal(np.concatenate(pieces), ring)
        kept = engine.kv_bytes
    plain = all_logits(model, kv_bits=kv_bits, backend="numpy")
    assert np.median(np.abs(ring - plain)) < 1e-2 * plain.std()
    monkeypatch.setattr(layer_cache, "cache_length", lambda block, context, kv_bits: 2048)
    np.testing.assert_array_equal(all_logits(model, kv_bits=kv_bits, threads=2), ring)
    with Engine(model, kv_bits=kv_bits, threads=1) as engine:
        whole = engine.kv_bytes
    windowed, layers = sum(b.window is not None for b in model.config.blocks), model.config.layers
    assert RING % 256 == 0
    assert kept * layers * 2048 == whole * (windowed * RING + (layers - windowed) * 2048)


def test_a_ring_is_never_longer_than_the_context() -> None:
    with (
        Engine(model_of("mistral"), context=200, threads=1) as windowed,
        Engine(model_of("mistral", window=None), context=200, threads=1) as whole,
    ):
        assert windowed.kv_bytes == whole.kv_bytes


def test_what_a_ring_has_forgotten_is_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("gemma3")
    want = all_logits(model, threads=2)
    with Engine(model, threads=2) as engine:
        engine.forward(IDS)
        engine.truncate(1000 - MAX_DRAFT)
        counted = Counted(monkeypatch)
        got = engine.forward(IDS[1000 - MAX_DRAFT : 990], all_logits=True)
        np.testing.assert_array_equal(got, want[1000 - MAX_DRAFT : 990])
        assert counted.tokens == 990 - 1000 + MAX_DRAFT  # taking back a guess costs nothing
        engine.truncate(400)
        assert engine.tokens == IDS[:400].tolist()
        np.testing.assert_array_equal(engine.forward(IDS[400:450]), want[449])
        assert counted.tokens == 54 + 450  # but so far back all is read anew
        np.testing.assert_array_equal(engine.forward(IDS[450:]), want[-1])
        assert counted.tokens == 54 + 1000
        engine.reset()
        np.testing.assert_array_equal(engine.forward(IDS[:9]), want[8])
        assert counted.tokens == 54 + 1009


@pytest.mark.parametrize("short", [0, 1])
def test_how_far_a_ring_can_be_taken_back(short: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("mistral")
    want = all_logits(model, threads=1)
    with Engine(model, threads=1) as engine:
        engine.forward(IDS)
        lost = (1000 - RING + TILE - 1) // TILE * TILE
        keep = lost + WINDOW - 1 - short  # its window begins where the ring does, or just before
        engine.truncate(keep)
        counted = Counted(monkeypatch)
        np.testing.assert_array_equal(engine.forward(IDS[keep:], all_logits=True), want[keep:])
        assert counted.tokens == 1000 - keep + short * keep


def test_an_interrupted_prompt_leaves_the_sequence_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_of("mistral")
    want = all_logits(model, threads=1)
    with Engine(model, threads=1) as engine:
        engine.forward(IDS[:300])
        call, calls = ThreadPool.call, 0

        def interrupted(self: ThreadPool, *work: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == 5:  # by now four batches have gone over the ring's beginning
                raise KeyboardInterrupt
            call(self, *work)

        monkeypatch.setattr(ThreadPool, "call", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.forward(np.full(5 * BATCH, 5))
        assert engine.tokens == IDS[:300].tolist()
        np.testing.assert_array_equal(engine.forward(IDS[300:310]), want[309])


def test_greedy_goes_round_the_ring() -> None:
    with Engine(model_of("gemma3"), threads=2) as engine:
        token = int(engine.forward(IDS[:60]).argmax())
        burst = engine.greedy(token, 700)
        assert engine.tokens == [*IDS[:60].tolist(), token, *burst[:-1]]
        engine.truncate(60)
        step, steps = token, []
        for _ in range(700):
            step = int(engine.forward([step]).argmax())
            steps.append(step)
    assert burst == steps


# --- states -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3", "lfm2", "qwen3_5"])
@pytest.mark.parametrize("kv_bits", [4, 8, 16])
@pytest.mark.parametrize("backend", ["numba", "numpy"])
def test_a_sequence_goes_on_after_loading(
    family: str, kv_bits: Any, backend: str, tmp_path: Path
) -> None:
    model, path = model_of(family), tmp_path / "state"
    options: dict[str, Any] = {"kv_bits": kv_bits, "backend": backend, "threads": 1}
    with Engine(model, **options) as engine:
        engine.forward(IDS[:777])
        size = engine.save_state(path)
        want = engine.forward(IDS[777:830], all_logits=True)
    assert path.stat().st_size == size
    assert list(tmp_path.iterdir()) == [path]
    with Engine(model, **options) as engine:
        engine.forward([9, 8, 7])
        engine.load_state(path)
        assert engine.tokens == IDS[:777].tolist()
        again = engine.forward(IDS[777:830], all_logits=True)
        assert_same_logits(again, want, exact=backend == "numba")
        engine.truncate(770)
        again = engine.forward(IDS[770:830], all_logits=True)[7:]
        assert_same_logits(again, want, exact=backend == "numba")


@pytest.mark.parametrize("kv_bits", [4, 8, 16])
def test_a_state_fits_any_context_threads_and_backend(kv_bits: Any, tmp_path: Path) -> None:
    model = model_of("gemma3")
    saved: dict[str, Path] = {}
    for backend in ("numba", "numpy"):
        saved[backend] = tmp_path / backend
        with Engine(model, kv_bits=kv_bits, backend=backend, threads=2) as engine:
            engine.forward(IDS[:777])
            engine.save_state(saved[backend])
            logits = engine.forward(IDS[777:800], all_logits=True)
            if backend == "numba":
                compiled = logits
    with Engine(model, kv_bits=kv_bits, context=801, threads=3) as engine:
        engine.load_state(saved["numba"])
        np.testing.assert_array_equal(engine.forward(IDS[777:800], all_logits=True), compiled)
    for backend, other in (("numba", "numpy"), ("numpy", "numba")):
        with Engine(model, kv_bits=kv_bits, backend=backend, threads=1) as engine:
            engine.load_state(saved[other])
            logits = engine.forward(IDS[777:800], all_logits=True)
            assert np.median(np.abs(logits - compiled)) < 2e-2 * compiled.std()
            # too far back for what a ring left to save: read anew, and right
            engine.truncate(500)
            logits = engine.forward(IDS[500:800], all_logits=True)[277:]
            assert np.median(np.abs(logits - compiled)) < 2e-2 * compiled.std()


def test_only_used_positions_are_stored(tmp_path: Path) -> None:
    model, path = model_of("gemma3"), tmp_path / "state"
    with Engine(model, threads=1) as engine:
        engine.forward(IDS[:777])
        engine.save_state(path)
    file = open_safetensors(path)
    first = (777 - RING + TILE - 1) // TILE * TILE
    assert json.loads(file.metadata["starts"]) == [first, first, 0]
    for layer, start in enumerate((first, first, 0)):
        for name, (_, shape) in layer_parts(model.config, layer, 8, 777 - start).items():
            assert file.tensors[f"layers.{layer}.{name}"].shape == shape
    file.close()


def test_both_backends_save_the_same_layout(tmp_path: Path) -> None:
    model = model_of("llama")
    files = []
    for backend in ("numba", "numpy"):
        with Engine(model, backend=backend, threads=1) as engine:
            engine.forward(IDS[:100])
            engine.save_state(tmp_path / backend)
        files.append(open_safetensors(tmp_path / backend))
    assert list(files[0].tensors) == list(files[1].tensors)
    assert files[0].metadata == files[1].metadata
    for name in files[0].tensors:
        if name.startswith("layers.0."):  # before the first sum whose order may differ
            a, b = (file.array(name).astype(np.float64) for file in files)
            assert np.mean(np.isclose(a, b, rtol=1e-3)) > 0.99, name


@pytest.fixture
def saved(tmp_path: Path) -> Iterator[tuple[Engine, Path]]:
    """An engine with a short sequence, and its state."""
    with Engine(model_of("llama"), threads=1) as engine:
        engine.forward(IDS[:40])
        engine.save_state(tmp_path / "state")
        yield engine, tmp_path / "state"


def test_other_models_are_distinguished() -> None:
    model = model_of("llama")
    assert fingerprint(model) == fingerprint(model_of("llama"))
    others = [
        model_of("llama", seed=1),
        model_of("llama", context=1024),
        quantized(random_model(tiny_config("llama", context=2048)), "w4-g16"),
        random_model(tiny_config("llama", context=2048)),
        model_of("qwen2"),
    ]
    assert len({fingerprint(m) for m in (model, *others)}) == 1 + len(others)


def test_what_does_not_fit_is_refused(saved: tuple[Engine, Path]) -> None:
    engine, path = saved
    with (
        Engine(model_of("llama", seed=1), threads=1) as other,
        pytest.raises(UsageError, match="state was saved with another model"),
    ):
        other.load_state(path)
    with (
        Engine(engine.model, threads=1, kv_bits=16) as wide,
        pytest.raises(UsageError, match="holds a 8-bit KV cache and the engine's has 16 bits"),
    ):
        wide.load_state(path)
    with Engine(engine.model, threads=1, context=39) as short:
        short.forward(IDS[:5])
        with pytest.raises(
            UsageError, match="40 tokens and the context 39; use a context of at least 40"
        ):
            short.load_state(path)
        assert short.tokens == IDS[:5].tolist()
    engine.reset()
    with pytest.raises(UsageError, match="the sequence is empty"):
        engine.save_state(path)


def test_damage_is_found(saved: tuple[Engine, Path], tmp_path: Path) -> None:
    engine, path = saved
    whole = path.read_bytes()
    rng = np.random.default_rng(3)
    want = engine.forward([5])
    for cut in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(FormatError, match="state is not a complete state file"):
            engine.load_state(path)
    for place in [len(whole) - 1, len(whole) - 5, *rng.integers(0, len(whole), 60).tolist()]:
        broken = bytearray(whole)
        broken[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(broken)
        with pytest.raises((FormatError, UsageError)):
            engine.load_state(path)
    with pytest.raises(FormatError, match="cannot be read: No such file"):
        engine.load_state(tmp_path / "absent")
    artifact.save(engine.model, path)
    with pytest.raises(FormatError, match="is not a saved prompt cache"):
        engine.load_state(path)
    newer = whole.replace(b'"format_version":"1"', b'"format_version":"2"')
    path.write_bytes(newer)
    with pytest.raises(FormatError, match="is a state of format '2' and this edgeq reads 1"):
        engine.load_state(path)
    engine.truncate(40)
    np.testing.assert_array_equal(engine.forward([5]), want)  # nothing of it came in


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_save_leaves_the_old_file(
    saved: tuple[Engine, Path], failure: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, path = saved
    before = path.read_bytes()

    def fail(_: int) -> None:
        raise failure

    monkeypatch.setattr(os, "fsync", fail)
    engine.forward([5])
    with pytest.raises((EdgeqError, KeyboardInterrupt), match=r"No space left|^$"):
        engine.save_state(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(EdgeqError, match="cannot be written: No such file or directory"):
        engine.save_state(path.parent / "absent" / "state")


# --- prompts ----------------------------------------------------------------------------------


def test_reuse_runs_only_what_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine(model_of("llama"), threads=1) as engine:
        counted = Counted(monkeypatch)
        prompt = IDS[:50].tolist()
        first = engine.forward(engine.reuse(prompt))
        assert engine.reuse(prompt) == prompt[-1:]
        np.testing.assert_array_equal(engine.forward(prompt[-1:]), first)
        assert counted.tokens == 51
        assert engine.reuse([*prompt[:30], 3, 4]) == [3, 4]
        assert engine.tokens == prompt[:30]
        assert engine.reuse([]) == []
        assert engine.tokens == []


def test_run_keeps_its_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, cache = str(small_checkpoint()), tmp_path / "cache"
    args = ["run", model, "-n", "12", "--temp", "0", "-t", "1"]
    story = "Once upon a time, there was a little girl named Lily."

    def said(*more: str) -> tuple[str, str]:
        assert main([*args, *more]) == 0
        out = capsys.readouterr()
        return out.out, out.err

    plain, _ = said("-p", story)
    kept = ("--prompt-cache", str(cache))
    first, timing = said("-p", story, *kept)
    assert "reused" not in timing
    state = cache.read_bytes()
    second, timing = said("-p", story, *kept)
    assert "prompt 1 tokens (" in timing
    assert first == second == plain
    assert cache.read_bytes() == state  # the whole prompt was there
    longer, timing = said("-p", story + " She", *kept)
    assert " before it reused)" in timing
    assert longer == said("-p", story + " She")[0]
    assert cache.read_bytes() != state
    grown = cache.stat().st_size
    said("-p", story, *kept, "--prompt-cache-all")
    assert cache.stat().st_size > grown
    assert main([*args, "-p", story, "--prompt-cache-all"]) == 2
    assert "needs --prompt-cache" in capsys.readouterr().err
    cache.write_bytes(state[:-9])
    assert main([*args, "-p", story, *kept]) == 1
    assert "delete it to start again" in capsys.readouterr().err


# --- weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["w4-g32", "w4-g64-asym"])
def test_copied_weights_give_the_same_bits(scheme: str, tmp_path: Path) -> None:
    model = quantized(random_model(tiny_config("qwen2")), scheme)
    artifact.save(model, tmp_path / "model.edgeq")
    mapped = artifact.load(tmp_path / "model.edgeq")
    want = all_logits(mapped, IDS[:40], threads=2)
    np.testing.assert_array_equal(all_logits(mapped, IDS[:40], threads=2, mmap=False), want)
    floats = random_model(tiny_config("qwen2"))
    want = all_logits(floats, IDS[:40], threads=1)
    np.testing.assert_array_equal(all_logits(floats, IDS[:40], threads=1, mmap=False), want)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux tells")
@pytest.mark.parametrize("mmap", [True, False])
def test_huge_pages_are_asked_for(mmap: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.edgeq"
    artifact.save(quantized(random_model(tiny_config("llama")), "w4-g32"), path)
    if not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists():
        pytest.skip("this kernel has none")
    with Engine(artifact.load(path), threads=1, mmap=mmap):
        maps = Path("/proc/self/smaps").read_text()
        flags = maps[maps.index(str(path)) :]
        flags = flags[flags.index("VmFlags:") :].splitlines()[0].split()
        assert ("hg" in flags) == mmap  # copied, the file itself is not read again


def test_an_arena_holds_each_matrix_once() -> None:
    model = quantized(random_model(tiny_config("llama")), "w4-g64-asym")
    arena = WeightArena(model)
    parts = sum(model.tensors[name].nbytes for name, _ in model.config.linears())
    assert parts <= arena.nbytes <= parts + 64 * 4 * len(model.tensors)
    name = "model.layers.0.mlp.up_proj.weight"
    copy: Any = arena.model.tensors[name]
    original: Any = model.tensors[name]
    assert arena.model.tensors[name] is copy
    for part in ("packed", "scales", "zero_points"):
        np.testing.assert_array_equal(getattr(copy, part), getattr(original, part))
        assert getattr(copy, part).ctypes.data % 64 == 0
        assert not np.shares_memory(getattr(copy, part), getattr(original, part))
