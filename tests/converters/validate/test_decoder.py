"""What validation compares, what it says, and what it lets pass."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeq.converters import TARGETS, Options, StoredWeight, target_named, target_of
from edgeq.converters.encoding import levels, spread
from edgeq.converters.gguf.decoder import GgufDecoderTarget
from edgeq.converters.runners import DecoderRunner
from edgeq.converters.target import DecoderTarget, GraphTarget, ProfilerTarget
from edgeq.converters.validate import validate
from edgeq.converters.validate.bisect import described
from edgeq.converters.validate.integers import compare_integers, quantized
from edgeq.converters.validate.logits import Continued, Decoding, continue_prompt
from edgeq.converters.validate.prompts import prompts
from edgeq.core.errors import FormatError, UsageError
from edgeq.formats.spill import Spill
from edgeq.importers import load
from edgeq.importers.gguf.file import open_gguf
from edgeq.model.model import Model
from edgeq.model.reference import Reference
from tests import families
from tests.families import random_model, tiny_config
from tests.paths import DEMO

gguf = GgufDecoderTarget()

FLOAT = random_model(tiny_config("mistral", hidden=64, head_dim=16, window=None))
MODEL = families.quantized(FLOAT, "w4-g32")
NAME = "model.layers.1.self_attn.o_proj.weight"


def all_of(model: Model, pieces: int = 1) -> list[StoredWeight]:
    """What a faithful file would give."""
    found = []
    for name, tensor in quantized(model).items():
        n = tensor.shape[0]
        for rows in np.array_split(np.arange(n), pieces):
            a, b = int(rows[0]), int(rows[-1]) + 1
            found.append(StoredWeight(name, *levels(tensor, a, b), first=a))
    return found


Change = Callable[[StoredWeight], StoredWeight | None]


def changed(change: Change, name: str = NAME) -> list[StoredWeight]:
    made = ((change(s) if s.name == name else s) for s in all_of(MODEL))
    return [s for s in made if s is not None]


def faults(stored: Iterable[StoredWeight], model: Model = MODEL) -> list[str]:
    kept = list(stored)
    equal, found = compare_integers(model, lambda: kept)
    assert {f.name for f in found} >= {name for name, same in equal.items() if not same}
    return [str(f) for f in found]


@pytest.mark.parametrize("scheme", ["w4-g32", "w4-g32-asym", "w3-g16", "w8-channel"])
@pytest.mark.parametrize("pieces", [1, 3])
def test_equal_integers(scheme: str, pieces: int) -> None:
    model = families.quantized(random_model(tiny_config("phi3")), scheme)
    assert not faults(all_of(model, pieces), model)


def test_a_longer_group_may_be_held_as_shorter_ones() -> None:
    model = families.quantized(random_model(tiny_config("llama", hidden=128)), "w4-g64", "w8-g128")
    short = [
        replace(
            s,
            scales=spread(s.scales, s.levels.shape[1], model.tensors[s.name].scheme.group_size, 16),
        )
        for s in all_of(model)
    ]
    assert not faults(short, model)
    short[3].scales[7, 2] *= 2
    assert faults(short, model)[0].startswith(f"{short[3].name}, row 7, group 2: 1 of ")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: replace(s, levels=s.levels.T.copy()), "the matrix is transposed"),
        (lambda s: replace(s, levels=-s.levels), "other sign"),
        (lambda s: replace(s, levels=s.levels + np.int16(1)), r"\+1 off: another zero point"),
        (lambda s: replace(s, levels=s.levels[::-1].copy()), "rows are the right ones in another"),
        (lambda s: replace(s, scales=s.scales * 2), "every scale is 2 times"),
        (lambda s: replace(s, scales=np.roll(s.scales, 1, 0)), "shifted by one row"),
        (lambda s: replace(s, levels=s.levels[:, :-1]), r"is \[64, 63\] in the file"),
        (lambda s: replace(s, levels=s.levels[:9], scales=s.scales[:9]), "9 of 64 rows are in"),
        (lambda s: None, "0 of 64 rows are in the file"),
    ],
)
def test_differences_in_words(change: Change, words: str) -> None:
    found = faults(changed(change))
    assert len(found) == 1
    assert found[0].startswith(NAME)
    assert re.search(words, found[0])


def test_one_integer_is_enough() -> None:
    def one(s: StoredWeight) -> StoredWeight:
        codes = s.levels.copy()
        codes[41, 40] ^= 1
        return replace(s, levels=codes)

    (said,) = faults(changed(one))
    assert said.startswith(f"{NAME}, row 41, group 1: 1 of 4096 integers differ")


def test_matrices_that_nobody_asked_for() -> None:
    codes, scales = np.zeros((1, 32), np.int16), np.ones((1, 1), np.float32)
    extra = StoredWeight("model.layers.9.q", codes, scales)
    (said,) = faults([*all_of(MODEL), extra])
    assert said == "model.layers.9.q: is no quantized matrix of the source"


def test_steps_in_words() -> None:
    assert described("layers.3.k_rope") == "the rotary positions of the keys in layer 3"
    assert described("logits") == "the head"


def test_prompts_are_real_text_of_three_lengths() -> None:
    model = load(DEMO)
    short, chat, long = prompts(model, 400)
    assert len(short) < len(chat) < 22
    assert len(long) == 150
    assert short[0] == model.config.bos
    assert all(0 <= t < model.config.vocab for p in (short, chat, long) for t in p)
    assert [len(p) for p in prompts(model, 9)] == [len(short), 9, 9]
    assert max(len(p) for p in prompts(model, 1)) == 1


def test_without_a_tokenizer_prompts_are_ids() -> None:
    found = prompts(MODEL, 400)
    assert [len(p) for p in found] == [6, 21, 150]
    assert all(0 <= t < MODEL.config.vocab for p in found for t in p)
    assert found == prompts(MODEL, 400)
    broken = replace(MODEL, files={"tokenizer.json": b"{"})
    with pytest.raises(FormatError, match="is not readable"):
        prompts(broken, 9)


def test_files_are_known_by_their_names(tmp_path: Path) -> None:
    for name in ("a.onnx", "a.tflite", "a.litertlm", "a.gguf", "a.mlpackage", "a.xyz"):
        (tmp_path / name).touch()
    found = [target_of(p) for p in sorted(tmp_path.glob("a.[!x]*"))]
    assert found == ["gguf", "litertlm", "coreml", "ort", "tflite"]
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "model.onnx").touch()
    assert target_of(tmp_path / "folder") == "ort"
    (tmp_path / "folder" / "genai_config.json").touch()
    assert target_of(tmp_path / "folder") == "genai"
    for name in ("a.xyz", "nothing.gguf"):
        with pytest.raises(FormatError):
            target_of(tmp_path / name)


def test_every_row_of_the_table_makes_its_parts() -> None:
    for name, row in TARGETS.items():
        for make, kind in (
            (row.decoder, DecoderTarget), (row.graph, GraphTarget), (row.profiler, ProfilerTarget),
        ):  # fmt: skip
            if make is not None:
                made = make()
                assert kind in type(made).__mro__, name
                assert made is make()  # imported and made once
        assert bool(row.graph) == bool(row.graph_outputs), name
        assert set(row.graph_outputs) <= set(row.suffixes), name
        assert not row.output or row.output in row.suffixes, name
    with pytest.raises(UsageError, match="unknown target 'gguff'; did you mean 'gguf'"):
        target_named("gguff")


@pytest.fixture
def made(tmp_path: Path) -> Path:
    gguf.write(MODEL, tmp_path / "m.gguf", Options(context=40))
    return tmp_path / "m.gguf"


def test_prompts_fit_the_file(made: Path) -> None:
    """The file has room for fewer tokens than the model."""
    report = validate(made, MODEL, "gguf", threads=1, steps=10)
    assert max(map(len, report.decoder.prompts)) == 30
    with pytest.raises(UsageError, match="40 steps and a prompt do not fit in 40 tokens"):
        validate(made, MODEL, "gguf", threads=1, steps=40)
    with pytest.raises(UsageError, match="decode at least 2"):
        validate(made, MODEL, "gguf", threads=1, steps=1)


class NoNumbers:
    """A runner whose logits are NaN from the second call on."""

    runtime, precision, context = "none", "float32", 64

    def __init__(self, model: Model) -> None:
        self._reference, self._calls = Reference(model), 0

    def reset(self) -> None:
        self._calls = 0

    def close(self) -> None:
        pass

    def forward(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        self._calls += 1
        found = self._reference.forward(tokens)
        return found if self._calls < 2 else np.full_like(found, np.nan)


def test_logits_that_are_no_numbers_are_past_every_bound() -> None:
    decoding = Decoding(FLOAT, keep=True)
    with Spill() as spill:
        runner = cast(DecoderRunner, NoNumbers(FLOAT))
        decoding.compare(continue_prompt(runner, [1, 2, 3], 2, spill, lambda n: None))
    assert np.isnan(decoding.max)
    assert np.isnan(decoding.kl).any()


def test_the_target_is_closed_before_the_reference_begins(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the two never take memory together."""
    is_open = 0
    frugal, compare = GgufDecoderTarget.open_frugal, Decoding.compare

    def counted(self: GgufDecoderTarget, path: Path, *, threads: int | None = None) -> object:
        nonlocal is_open
        runner = frugal(self, path, threads=threads)
        close = runner.close

        def closed() -> None:
            nonlocal is_open
            is_open -= 1
            close()

        is_open += 1
        monkeypatch.setattr(runner, "close", closed)
        return runner

    def alone(self: Decoding, continued: Continued) -> None:
        assert not is_open
        compare(self, continued)

    monkeypatch.setattr(GgufDecoderTarget, "open_frugal", counted)
    monkeypatch.setattr(Decoding, "compare", alone)
    report = validate(made, MODEL, "gguf", threads=1, steps=2)
    assert report.passed, report.explain()
    assert is_open == 0


def test_a_norm_that_is_no_number_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    gguf.write(FLOAT, path, Options())
    entry = open_gguf(path).tensors["output_norm.weight"]
    data = np.memmap(path, np.uint8, "r+")
    data[entry.start : entry.start + 4] = np.frombuffer(np.float32("nan").tobytes(), np.uint8)
    report = validate(path, FLOAT, "gguf", threads=1, steps=2)
    assert not report.passed
    assert "output_norm.weight: 1 of 64 values differ, the first at [0]: nan" in report.explain()
    assert report.runtime == ""


def test_a_vocabulary_that_is_another(made: Path) -> None:
    config = replace(MODEL.config, vocab=77)
    other = families.quantized(random_model(config), "w4-g32")
    report = validate(made, other, "gguf", threads=1, steps=2)
    assert not report.passed
    assert "is [101, 64] in the file, [77, 64] in the source" in report.explain()


def test_another_model_s_file_fails(made: Path) -> None:
    other = families.quantized(random_model(MODEL.config, seed=1), "w4-g32")
    report = validate(made, other, "gguf", threads=1, steps=2)
    assert not report.passed
    matrices = {f.name for f in report.decoder.tensor_faults} & set(report.integers)
    assert len(matrices) == len(report.integers)
    assert f"and {len(report.decoder.tensor_faults) - 5} tensors more" in report.explain()
