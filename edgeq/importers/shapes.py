"""Shapes of well-known models, and random weights in those shapes: speed without a download.

Speed, size and memory depend on a model's shape and not on what it has learned, so a random
model in the packed layout answers "how fast would it be here" in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import DoesNotFitError, UnsupportedError, unknown
from edgeq.core.memory import available_bytes, huge_buffer
from edgeq.core.progress import Progress
from edgeq.formats.packing import LANE, TILE, pack, round_up
from edgeq.formats.schemes import K_BLOCK, QuantScheme, Scheme
from edgeq.formats.tensor import (
    FloatTensor,
    QuantTensor,
    Tensor,
    float32_to_bf16,
    part_nbytes,
    part_shapes,
)
from edgeq.importers.huggingface.config import model_config
from edgeq.importers.huggingface.families import FAMILIES
from edgeq.importers.huggingface.family import Family
from edgeq.importers.huggingface.values import Values
from edgeq.model.artifact_layout import TensorLayout
from edgeq.model.config import ModelConfig
from edgeq.model.model import Model

_PIECE = 1 << 20
"""Random bytes generated at a time."""
_LINE = 64
"""Bytes of a cache line."""


def _config(family: Family, name: str) -> ModelConfig:
    return model_config(family, Values(Path(name), family.shapes[name], family.defaults))


SHAPES: dict[str, ModelConfig] = {
    name: _config(family, name) for family in FAMILIES.values() for name in family.shapes
}
"""Name -> shape, of the published models that the families' files list."""


def shape(name: str) -> ModelConfig:
    """The shape of a known model.

    Args:
        name: one of `SHAPES`, in any case.

    Raises:
        UnsupportedError: there is no such name; lists the known ones.
    """
    try:
        return SHAPES[name.strip().lower()]
    except KeyError:
        raise UnsupportedError(unknown("shape", name, SHAPES)) from None


def parameters(config: ModelConfig) -> int:
    """How many weights a model of this shape has, biases aside."""
    return sum(math.prod(shape) for _, shape in (*config.linears(), *config.floats()))


def biases(config: ModelConfig) -> list[tuple[str, tuple[int]]]:
    """Names and shapes of the biases that every model of a shape's family has."""
    family = FAMILIES[config.family]
    if family.biases == "attention_bias" and family.defaults.get("attention_bias"):
        return list(config.biases())
    always = family.biases == "qkv"
    return [(name, size) for name, size in config.biases() if always and "o_proj" not in name]


def random_model(
    config: ModelConfig,
    schemes: Callable[[str, Sequence[int]], Scheme],
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Model:
    """A model of random weights, made in the packed layout without ever being float.

    Args:
        config: the shape.
        schemes: tensor name and shape -> its scheme, as `Recipe.scheme_for` says it.
        seed: the same seed gives the same weights.
        progress: called with each tensor's name, how many are done, and of how many.

    Returns:
        A model without tokenizer; activations stay of order one through its layers.

    Raises:
        DoesNotFitError: the weights take more memory than programs can still have.
    """
    rng = np.random.Generator(np.random.SFC64(seed))
    linears = list(config.linears())
    need = sum(TensorLayout(schemes(name, shape), shape).nbytes for name, shape in linears)
    free = available_bytes()
    if free is not None and need > free:
        raise DoesNotFitError(
            f"random weights of this shape take {need / 1e9:.1f} GB of memory and "
            f"{free / 1e9:.1f} GB are free; choose a smaller shape or fewer bits (--preset), or "
            "plan for it without weights (edgeq plan --shape)"
        )
    pool = _Pool(sum(_pool_bytes(schemes(name, shape), shape) for name, shape in linears))
    tensors: dict[str, Tensor] = {}
    for done, (name, (n, k)) in enumerate(linears):
        scheme = schemes(name, (n, k))
        if isinstance(scheme, QuantScheme):
            tensors[name] = random_tensor(rng, scheme, n, k, pool)
        else:
            tensors[name] = _float(rng.standard_normal((n, k), np.float32) / k**0.5, scheme.dtype)
        if progress:
            progress(name, done + 1, len(linears))
    for name, size in config.norms():
        # all norms scale by one
        tensors[name] = FloatTensor("float32", np.full(size, 1.0 - config.norm_offset, np.float32))
    for name, size in config.layer_scales():
        tensors[name] = FloatTensor("float32", np.ones(size, np.float32))
    for name, (channels, _, taps) in config.convolutions():
        weights = rng.standard_normal((channels, 1, taps), np.float32) / taps**0.5
        tensors[name] = FloatTensor("float32", weights)
    for name, length in config.delta_vectors():
        # all decays near a half, and norms that scale by one
        value = 1.0 if name.endswith("weight") else 0.0
        tensors[name] = FloatTensor("float32", np.full(length, value, np.float32))
    for name, count in (*config.choice_biases(), *config.sinks()):
        tensors[name] = FloatTensor("float32", np.zeros(count, np.float32))
    for name, size in (*config.expert_biases(), *biases(config)):
        tensors[name] = FloatTensor("float32", rng.standard_normal(size, np.float32) / 8)
    return Model(config, tensors, provenance={"source": "random weights", "seed": seed})


def _float(values: NDArray[np.float32], dtype: str) -> FloatTensor:
    if dtype == "bfloat16":
        return FloatTensor("bfloat16", float32_to_bf16(values))
    if dtype == "float16":
        return FloatTensor("float16", values.astype(np.float16))
    return FloatTensor("float32", values.astype(np.float32))


def random_tensor(
    rng: np.random.Generator,
    scheme: QuantScheme,
    n: int,
    k: int,
    pool: _Pool | None = None,
) -> QuantTensor:
    """A random quantized matrix [N, K] whose product with unit noise is of order one.

    Codes are uniform. Scales are one of eight values within a factor of two, so that a kernel
    that mixes them up is found out, and exact in bfloat16 and float16. Memory comes from the
    pool, or is the tensor's own.
    """
    parts = part_shapes(scheme, (n, k))
    palette = None
    spread = (scheme.n_codes**2 - 1) / 12  # variance of uniform codes
    if scheme.codebook:
        palette = np.round(np.linspace(-127, 127, scheme.n_codes)).astype(np.int8)
        spread = float(palette.astype(np.float64).var())
    _, scales_shape = parts["scales"]
    base = 2.0 ** round(math.log2(0.7 / math.sqrt(k * spread)))
    pool = pool or _Pool(_pool_bytes(scheme, (n, k)))
    scales = pool.take(scales_shape, np.float16)
    scales[...] = base * (1 + rng.integers(0, 8, scales_shape, np.uint8) / 8)
    scales[-1, :, n - (round_up(n, TILE) - TILE) :] = 0
    zeros = None if scheme.symmetric else np.full(scales_shape, scheme.mid, np.uint8)
    _, packed_shape = parts["packed"]
    packed = pool.take(packed_shape, np.uint8)
    flat = packed.reshape(-1)
    for start in range(0, flat.size, _PIECE):
        stop = min(start + _PIECE, flat.size)
        flat[start:stop] = np.frombuffer(rng.bytes(stop - start), np.uint8)
    _clear_padding(packed, scheme, n, k)
    return QuantTensor(scheme, (n, k), packed, scales, zeros, palette)


class _Pool:
    """Memory for a whole model, as a mapped artifact's is: one run of cache lines after another."""

    def __init__(self, nbytes: int) -> None:
        self._rest = huge_buffer(nbytes)

    def take(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """An array that begins a cache line: the engine uses it in place."""
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        if round_up(nbytes, _LINE) > self._rest.size:  # a tensor on its own
            self._rest = huge_buffer(round_up(nbytes, _LINE))
        part, self._rest = self._rest[:nbytes], self._rest[round_up(nbytes, _LINE) :]
        array: NDArray[Any] = part.view(dtype).reshape(shape)
        return array


def _pool_bytes(scheme: Scheme, shape: tuple[int, int]) -> int:
    """Bytes a tensor takes of the pool."""
    if not isinstance(scheme, QuantScheme):
        return 0
    return sum(round_up(nbytes, _LINE) for nbytes in part_nbytes(scheme, shape))


def _clear_padding(packed: NDArray[np.uint8], scheme: QuantScheme, n: int, k: int) -> None:
    """Give rows past N and columns past K the code in the middle, as quantizers do, in place."""
    middle = pack(np.full((TILE, K_BLOCK), scheme.mid, np.uint8), scheme.bits)[0, 0]
    whole, rest = divmod(k, K_BLOCK)
    if rest:
        inside = np.zeros((TILE, K_BLOCK), np.uint8)
        inside[:, :rest] = scheme.n_codes - 1
        mask = pack(inside, scheme.bits)[0, 0]
        packed[:, whole] = (packed[:, whole] & mask) | (middle & ~mask)
    packed[:, whole + bool(rest) :] = middle
    last = packed[-1].reshape(-1, scheme.bits, TILE, LANE)
    rows = n - (len(packed) - 1) * TILE
    last[:, :, rows:] = middle.reshape(scheme.bits, TILE, LANE)[:, rows:]
