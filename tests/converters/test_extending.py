"""A target that is added from outside, by the steps of docs/extending.md and public names alone.

`NpzTarget` writes a language model as one NumPy .npz file, which NumPy reads and runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import edgeq
from edgeq.converters import (
    TARGETS,
    DecoderTarget,
    Options,
    StoredWeight,
    Target,
    register,
    target_of,
)
from edgeq.converters.convert import convert
from edgeq.converters.encoding import group_size, levels, spread
from edgeq.converters.options import WrittenWith
from edgeq.converters.runners import DecoderRunner, Past, Precision, Trace, pieces
from edgeq.converters.size import Size
from edgeq.converters.stored import StoredConstant
from edgeq.converters.validate import validate
from edgeq.converters.validate.kernels import Kernels
from edgeq.core.errors import EdgeqError, FormatError, UnsupportedError, UsageError
from edgeq.core.progress import Progress
from edgeq.formats.tensor import FloatTensor, QuantTensor
from edgeq.model.config import ModelConfig
from edgeq.model.model import Model
from edgeq.model.reference import Reference
from edgeq.model.trace import TracedReference
from tests.families import quantized, random_model, tiny_config

# --- the target, as somebody else's package would have it -------------------------------------


class NpzTarget(DecoderTarget):
    """Language models as .npz files: integers and scales of each matrix, all else as float32."""

    def check(self, model: Model, options: Options) -> None:
        if replace(options, context=None) != Options():
            raise UsageError("npz has no options but context")
        for name, _ in model.config.linears():
            tensor = model.tensors[name]
            if isinstance(tensor, QuantTensor) and not tensor.scheme.symmetric:
                raise UnsupportedError(f"npz has no zero points, and {name} has them")

    def write(
        self, model: Model, out: Path, options: Options, progress: Progress | None = None
    ) -> None:
        arrays: dict[str, NDArray[Any]] = {}
        for done, (name, tensor) in enumerate(model.tensors.items()):
            if isinstance(tensor, QuantTensor):
                arrays[f"{name}|levels"], arrays[f"{name}|scales"], _ = levels(tensor)
            else:
                arrays[name] = tensor.numpy()
            if progress:
                progress(name, done + 1, len(model.tensors))
        about = {
            "config": model.config.to_dict(),
            "context": options.context or model.config.context,
            "edgeq": edgeq.__version__,
        }
        np.savez(out, about=np.frombuffer(json.dumps(about).encode(), np.uint8), **arrays)

    def sizes(self, model: Model, options: Options) -> Iterator[Size]:
        for name, (n, k) in model.config.linears():
            tensor = model.tensors[name]
            packed = isinstance(tensor, QuantTensor)
            yield Size(name, tensor, 16 if packed else None, n * k * (2 if packed else 4))

    def open_runner(self, path: Path, *, threads: int | None = None) -> DecoderRunner:
        return NpzRunner(path)

    def read_weights(self, path: Path) -> Iterator[StoredWeight]:
        _, arrays = read(path)
        for key, codes in arrays.items():
            name, _, part = key.partition("|")
            if part == "levels":
                yield StoredWeight(name, codes, arrays[f"{name}|scales"])

    def read_constants(self, path: Path) -> Iterator[StoredConstant]:
        _, arrays = read(path)
        for key, values in arrays.items():
            yield StoredConstant(key.partition("|")[0], values)

    def read_options(self, path: Path) -> WrittenWith:
        about, _ = read(path)
        return WrittenWith(Options(context=about["context"]), about["edgeq"])

    @contextmanager
    def tracer(self, path: Path) -> Iterator[Trace]:
        model = read_model(path)

        def trace(tokens: Sequence[int], past: Past = ()) -> dict[str, NDArray[np.float32]]:
            reference = TracedReference(model)
            for piece in pieces(past):
                reference.trace(piece)
            return reference.trace(tokens)

        yield trace

    def kernels(self, path: Path, model: Model) -> Kernels:
        return Kernels()  # float32, which rounds no activations

    def versions(self) -> dict[str, str]:
        return {"numpy": np.__version__}


class NpzRunner:
    """A .npz file, run by NumPy."""

    precision: Precision = "float32"
    runtime = f"NumPy {np.__version__}"

    def __init__(self, path: Path) -> None:
        model = read_model(path)
        self.config: ModelConfig | None = model.config
        self.context = int(read(path)[0]["context"])
        self._reference = Reference(model)
        self.reset()

    def reset(self) -> None:
        self._cache = self._reference.new_cache()

    def forward(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        return self._reference.forward(tokens, self._cache)

    def close(self) -> None:
        self.reset()


def read(path: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        return json.loads(arrays.pop("about").tobytes()), arrays
    except (OSError, ValueError, KeyError) as err:
        raise FormatError(f"{path} is not an .npz file that edgeq wrote: {err}") from err


def read_model(path: Path) -> Model:
    """The model with dequantized weights."""
    about, arrays = read(path)
    tensors = {}
    for key, values in arrays.items():
        name, _, part = key.partition("|")
        if part == "levels":
            scales = arrays[f"{name}|scales"]
            k = values.shape[1]
            values = values * spread(scales, k, group_size(k, scales.shape[1]), 1)
        if part != "scales":
            tensors[name] = FloatTensor("float32", values.astype(np.float32))
    return Model(ModelConfig.from_dict(about["config"]), tensors)


ROW = Target(
    name="npz",
    title="NumPy",
    description="an .npz file",
    suffixes=(".npz",),
    output=".npz",
    packages=("numpy",),
    decoder=NpzTarget,
)

# --- and what edgeq then does with it ----------------------------------------------------------


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    register(ROW)
    yield
    del TARGETS["npz"]


@pytest.fixture
def model() -> Model:
    return quantized(random_model(tiny_config("llama", context=400)), "w4-g32")


def test_a_model_is_converted_validated_and_certified(model: Model, tmp_path: Path) -> None:
    done = convert(model, "npz", tmp_path / "model.npz", steps=4)
    certificate = done.certificate
    assert certificate is not None
    assert certificate["passed"]
    assert certificate["runtime"] == f"NumPy {np.__version__}"
    n = sum(isinstance(model.tensors[name], QuantTensor) for name, _ in model.config.linears())
    assert certificate["integers_equal"] == f"{n} of {n}"
    assert certificate["greedy_tokens"]["equal"] == certificate["greedy_tokens"]["compared"]
    assert set(certificate["files"]) == {"model.npz"}
    assert json.loads((tmp_path / "model.npz.certificate.json").read_text()) == certificate
    assert target_of(done.path) == "npz"
    assert validate(done.path, model, steps=2).passed


def test_its_runner_gives_the_reference_s_logits(model: Model, tmp_path: Path) -> None:
    path = convert(model, "npz", tmp_path / "model.npz", validate=False).path
    runner = TARGETS["npz"].decoder_target().open_runner(path)
    prompt = np.array([3, 14, 15, 9, 26])
    np.testing.assert_allclose(
        runner.forward(prompt), Reference(model).forward(prompt), rtol=1e-4, atol=1e-4
    )


def test_a_wrong_integer_a_wrong_scale_and_another_file_are_refused(
    model: Model, tmp_path: Path
) -> None:
    path = convert(model, "npz", tmp_path / "model.npz", validate=False).path
    about, arrays = read(path)
    for part in ("levels", "scales"):
        wrong = {key: values.copy() for key, values in arrays.items()}
        wrong[f"model.layers.0.mlp.up_proj.weight|{part}"][2, 1] += 1
        raw = np.frombuffer(json.dumps(about).encode(), np.uint8)
        np.savez(tmp_path / "wrong.npz", about=raw, **wrong)
        report = validate(tmp_path / "wrong.npz", model)
        assert not report.passed
        assert not report.integers["model.layers.0.mlp.up_proj.weight"]
        assert "row 2" in report.explain()
    (tmp_path / "other.npz").write_bytes(b"PK")
    with pytest.raises(FormatError, match=r"is not an \.npz file that edgeq wrote"):
        validate(tmp_path / "other.npz", model)


def test_what_it_lacks_is_refused_before_any_work(model: Model, tmp_path: Path) -> None:
    other = quantized(random_model(tiny_config("llama")), "w4-g32-asym")
    cases: list[tuple[Model, str, dict[str, Any], str]] = [
        (other, "m.npz", {}, "npz has no zero points"),
        (model, "m.bin", {}, r"NumPy output must end in \.npz"),
        (model, "m.npz", {"options": Options(kv="int8")}, "npz has no options but context"),
        (model, "m.npz", {"max_ram": 1 << 40}, "--max-ram does not work for npz"),
    ]
    for source, name, more, words in cases:
        with pytest.raises(EdgeqError, match=words):
            convert(source, "npz", tmp_path / name, **more)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match="unknown target of a graph 'npz'"):
        convert(_graph(), "npz", tmp_path / "g.npz")
    with pytest.raises(UsageError, match="there is a target npz already"):
        register(ROW)


def test_a_row_says_all_that_is_known_of_a_target() -> None:
    assert asdict(ROW)["packages"] == ("numpy",)
    with pytest.raises(UsageError, match="the target mute takes no language models"):
        Target("mute", "Mute", "nothing").decoder_target()


def _graph() -> Any:
    from tests.graph_made import cnn

    return cnn()
