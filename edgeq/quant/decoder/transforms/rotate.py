"""Rotations that spread outliers over all columns, folded exactly into the weights.

    rotate-values   rotates the values of each key/value head by an orthogonal R [D, D]: the rows of
                    v by R', and the columns of o that multiply them by R. Exact for every family
                    whose attention has no gate on its output, between the two.
    rotate          rotates the residual stream by R [hidden, hidden]. The weights of norms are
                    multiplied into the matrices after them, because a norm without weights commutes
                    with R; the columns of those matrices are rotated by R, the rows of o and down
                    by R', and the rows of the embedding by R.

`rotate` needs a model whose norms are all before attention and feed-forward, because the weights of
a norm after them would be between two rotations. It also needs a head that is not tied, because a
tied head cannot contain the weights of the last norm, unless these are all equal.

R is a Hadamard matrix with random signs if the size is a power of two, else a random orthogonal
matrix. It is the same for the same size.

Source: Ashkboos et al. 2024, "QuaRot" (arXiv:2404.00456), sections 3 and 4; the values' rotation
is R2 of Liu et al. 2024, "SpinQuant" (arXiv:2405.16406).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import UnsupportedError
from edgeq.core.progress import Progress
from edgeq.formats.schemes import Scheme
from edgeq.formats.tensor import FloatTensor, Tensor
from edgeq.model.model import Model
from edgeq.model.recording import linear_groups
from edgeq.quant.decoder.calibrate import CalibrationText
from edgeq.quant.decoder.layerwise import check_layerwise
from edgeq.quant.decoder.transforms.fold import Lazy, Scaled
from edgeq.quant.kernels.products import product

Matrix = NDArray[np.float64]
SEED = 0x5EED


def orthogonal(size: int) -> Matrix:
    """A fixed orthogonal matrix [size, size]: Hadamard with random signs, or a random matrix."""
    rng = np.random.default_rng([SEED, size])
    if size & (size - 1):
        q, r = np.linalg.qr(rng.normal(size=(size, size)))
        # rounded, because the last digits of LAPACK's results differ between machines
        return np.asarray(np.round(q * np.sign(np.diag(r)), 9))
    h = np.ones((1, 1))
    while h.shape[0] < size:
        h = np.block([[h, h], [h, -h]])
    return np.asarray(h * rng.choice([-1.0, 1.0], size) / np.sqrt(size))


@dataclass(frozen=True, eq=False)
class Rotated(Lazy):
    """A matrix whose columns are rotated in blocks when it is read.

    Args:
        data: [N, K].
        rotation: [B, B] with B dividing K; each run of B columns is multiplied by it.
    """

    rotation: Matrix

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows ``start:stop`` as float32 (a copy)."""
        w = self.data.rows(start, stop).astype(np.float64)
        blocks = product(w.reshape(-1, self.rotation.shape[0]), self.rotation.T)
        return blocks.reshape(w.shape).astype(np.float32)


@dataclass(frozen=True, eq=False)
class RotatedRows(Lazy):
    """A matrix or bias whose rows are rotated in blocks when it is read.

    Args:
        data: [N, K] or [N].
        rotation: [B, B] with B dividing N; each run of B rows is multiplied by its transpose.
    """

    rotation: Matrix

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows ``start:stop`` as float32 (a copy); reads the blocks that contain them."""
        size = self.rotation.shape[0]
        stop = min(stop, self.shape[0])
        parts = []
        for first in range(start // size * size, stop, size):
            a, b = max(start, first), min(stop, first + size)
            block = self.data.rows(first, first + size).astype(np.float64)
            mixed = product(self.rotation[:, a - first : b - first].T, block.reshape(size, -1).T)
            parts.append(mixed.reshape(b - a, *block.shape[1:]))
        return np.concatenate(parts).astype(np.float32)


def rotate_values(
    model: Model,
    calibration: CalibrationText,
    schemes: Mapping[str, Scheme],
    progress: Progress | None = None,
) -> Model:
    """Rotate the values of every key/value head.

    Args:
        model: the float model.
        calibration, schemes, progress: ignored, because the rotation does not depend on data.

    Raises:
        UnsupportedError: there is no attention without a gate on its output.
    """
    del calibration, schemes, progress
    check_layerwise(model.config, "rotate-values")
    if not any(b.mixer == "attention" and not b.output_gate for b in model.config.blocks):
        raise UnsupportedError(
            f"rotate-values cannot be folded into {model.config.family}: a gate stands between its "
            "values and their output projection, or it has no attention; leave rotate-values out"
        )
    r = orthogonal(model.config.head_dim)
    tensors = dict(model.tensors)
    for group in linear_groups(model.config):
        block = model.config.blocks[group.layer] if group.kind == "attn_out" else None
        if block is None or block.mixer != "attention" or block.output_gate:
            continue
        assert group.source is not None  # v
        _rotate_rows(tensors, group.source, r)
        for name in group.linears:
            tensors[name] = Rotated(tensors[name], r)
    return replace(model, tensors=tensors)


def rotate(
    model: Model,
    calibration: CalibrationText,
    schemes: Mapping[str, Scheme],
    progress: Progress | None = None,
) -> Model:
    """Rotate the residual stream.

    Args:
        model: the float model.
        calibration, schemes, progress: ignored, because the rotation does not depend on data.

    Raises:
        UnsupportedError: the model has norms after attention, or a tied head after a norm with
            weights.
    """
    del calibration, schemes, progress
    config = model.config
    check_layerwise(config, "rotate")
    if config.experts is not None:
        raise UnsupportedError(
            f"rotate cannot be folded into {config.family}: it leaves experts as they are, and "
            "these would read a rotated residual stream; use rotate-values"
        )
    if any(block.norm_after for block in config.blocks):
        raise UnsupportedError(
            f"rotate cannot be folded into {config.family}, because its norms after attention "
            "would be between two rotations; use rotate-values"
        )
    last = model.tensors["model.norm.weight"].numpy() + config.norm_offset
    if config.tied and np.ptp(last):
        raise UnsupportedError(
            "rotate multiplies the last norm's weights into the head, and this model's head is "
            "also its embedding, which must not have them; use rotate-values"
        )
    r = orthogonal(config.hidden)
    tensors = dict(model.tensors)
    for group in linear_groups(config):
        if group.kind in ("attn_out", "mlp_out"):
            for name in group.linears:
                _rotate_rows(tensors, name, r)
        elif group.kind != "head" or not config.tied:
            assert group.source is not None  # every layer has norms before and none after
            _absorb(tensors, group.source, group.linears, config.norm_offset, r)
    table = "model.embed_tokens.weight"
    tensors[table] = Rotated(tensors[table], r)
    return replace(model, tensors=tensors)


def _rotate_rows(tensors: dict[str, Tensor], weight: str, r: Matrix) -> None:
    """Rotate the rows of a matrix and of its bias."""
    for name in (weight, weight.removesuffix("weight") + "bias"):
        if name in tensors:
            tensors[name] = RotatedRows(tensors[name], r)


def _absorb(
    tensors: dict[str, Tensor], norm: str, matrices: Sequence[str], offset: float, r: Matrix
) -> None:
    """Multiply a norm's weights into the matrices after it, and rotate their columns."""
    weight = tensors[norm].numpy().astype(np.float64) + offset
    for name in matrices:
        tensors[name] = Rotated(Scaled(tensors[name], None, weight), r)
    tensors[norm] = FloatTensor("float32", np.full(weight.shape, 1 - offset, np.float32))
