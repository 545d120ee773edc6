"""Weights as training sees them: rounded in the forward pass, smooth in the backward one.

A matrix is held as float *latents*, in units of the scale it began with, and a logarithm per scale
of how much that has changed. Each step rounds and clips the latents to levels, as storing them
would, and lets the gradient through the rounding unchanged. So the gradient of a scale is the one
of LSQ: (rounded - exact) inside the range, the outermost level outside it.

Sources: straight-through rounding: Bengio et al. 2013 (arXiv:1308.3432). Learned scales: Esser et
al. 2020, "Learned step size quantization" (arXiv:1902.08153), equation 3; learned zero points:
Bhalgat et al. 2020, "LSQ+" (arXiv:2004.09576), equations 5 and 6.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.formats.tensor import QuantTensor
from edgeq.quant.rounders.qparams import MAX_SCALE, MIN_SCALE, group_view, levels, snap_scales

INSIDE = 0.49
"""How far from its level, in steps, a latent may begin: less than half, so that it rounds to it."""
INSIDE_PALETTE = 0.3
"""The same for a palette, in the distance between its entry's edges. Further in, the first updates
do not undo what GPTQ chose: on babyllama105 at 3 bits that halves the divergence that is left."""


def through(value: Any, smooth: Any) -> Any:
    """Exactly ``value``, with the gradient of ``smooth`` (and of value, if it has one)."""
    return value + (smooth - smooth.detach())


def grouped(w: NDArray[np.float32], start: QuantTensor) -> tuple[Any, Any, Any, Any]:
    """A matrix and the quantized tensor to begin with, cut into groups.

    Args:
        w: float32 [N, K].
        start: the same matrix, rounded.

    Returns:
        Four float32 torch tensors: scales [N, G] (or [1, 1]), snapped if they were not; zero
        points of the same shape; codes [N, G, S]; weights in units of their scale [N, G, S].
    """
    import torch

    scheme = start.scheme
    scales, zeros = start.row_params()
    if scheme.granularity == "tensor":
        scales, zeros = scales[:1], zeros[:1]
    scales = snap_scales(scales)
    codes = group_view(start.codes().astype(np.float32), scheme)
    steps = group_view(np.ascontiguousarray(w, np.float32), scheme) / scales[:, :, None]
    return tuple(torch.from_numpy(np.ascontiguousarray(a, np.float32)) for a in (
        scales, zeros, codes, steps,
    ))  # fmt: skip


class FakeQuant:
    """One matrix, trained through its rounding.

    Args:
        w: the float weights, float32 [N, K].
        start: the same matrix rounded by any method: training begins at its codes and scales,
            and keeps its scheme.

    Attributes:
        latents: weights in steps between levels, by the scales' first values, float32 [N, G, S].
        growth: logarithm of each scale over its first value, float32 [N, G] or [1, 1].
        zeros: zero points float32 of the same shape if asymmetric, else None.
        palette: float32 [2**bits], ascending, in its mean steps, if the scheme has a codebook,
            else None.
    """

    def __init__(self, w: NDArray[np.float32], start: QuantTensor) -> None:
        import torch

        self.scheme, self.shape = start.scheme, start.shape
        self._first, zeros, codes, steps = grouped(w, start)
        self.growth = torch.zeros_like(self._first)
        self.zeros = None if start.zero_points is None else zeros
        self.palette = None
        self._unit = 1.0
        if start.palette is not None:
            palette = torch.from_numpy(start.palette.astype(np.float32))
            table = palette.sort().values
            self._unit = max(float(table[-1] - table[0]) / (len(table) - 1), 1.0)
            self.palette = table / self._unit
            edges = torch.cat([table[:1], _edges(table), table[-1:]])
            rank = torch.searchsorted(table, palette[codes.long()])
            low, high = edges[rank], edges[rank + 1]
            inward = (0.5 - INSIDE_PALETTE) * (high - low)
            steps = torch.clamp(steps, low + inward, high - inward)
        else:
            level = codes - zeros[:, :, None]
            lowest, highest = self._limits(zeros[:, :, None])
            steps = torch.clamp(steps, level - INSIDE, level + INSIDE).clamp(lowest, highest)
        self.latents = steps / self._unit
        for parameter in self.parameters().values():
            parameter.requires_grad_()

    def parameters(self) -> dict[str, Any]:
        """What is trained, by attribute name."""
        names = ("latents", "growth", "zeros", "palette")
        return {n: v for n in names if (v := getattr(self, n)) is not None}

    def weight(self) -> Any:
        """The weights as they will be stored, float32 [N, K], differentiable."""
        scales, level, _, _ = self._rounded()
        return self.flat(level * scales)

    def tensor(self) -> QuantTensor:
        """What `weight` is now, packed."""
        import torch

        with torch.no_grad():
            scales, level, zeros, palette = self._rounded()
            if palette is None:
                codes = level + (self.scheme.mid if zeros is None else zeros)
            else:
                codes = torch.searchsorted(palette, level)
            return QuantTensor.from_codes(
                self.scheme,
                self.flat(codes).numpy().astype(np.uint8),
                scales[:, :, 0].numpy(),
                None if zeros is None else zeros[:, :, 0].numpy().astype(np.uint8),
                None if palette is None else palette.numpy().astype(np.int8),
            )

    def steps(self) -> Any:
        """The weights in units of the scales' first values, float32 [N, G, S]."""
        return self.latents * self._unit

    def settle(self, levels: Any) -> None:
        """Make the weights these levels [N, G, S]."""
        self.latents.data = levels / self._unit

    def neighbors(self) -> tuple[Any, Any, Any]:
        """The levels around each weight, by the scales' first values.

        Returns:
            Scales [N, G, 1], and the next level at or below the weight and the one after it, both
            [N, G, S] and within the range (at its upper end they are the same).
        """
        import torch

        scales, _, zeros, palette = self._rounded()
        steps = self.steps()
        if palette is not None:
            rank = torch.searchsorted(palette, steps, right=True) - 1
            last = palette.numel() - 1
            return scales, palette[rank.clamp(0, last)], palette[(rank + 1).clamp(0, last)]
        lowest, highest = self._limits(zeros)
        below = steps.floor()
        return scales, below.clamp(lowest, highest), (below + 1).clamp(lowest, highest)

    def flat(self, grouped: Any) -> Any:
        """Groups [N, G, S] as a matrix [N, K], without its padding."""
        return grouped.reshape(self.shape[0], -1)[:, : self.shape[1]]

    def _limits(self, zeros: Any) -> tuple[Any, Any]:
        """Lowest and highest level, with zero points [N, G, 1] if asymmetric."""
        if self.zeros is None:
            return levels(self.scheme)
        return -zeros, self.scheme.n_codes - 1 - zeros

    def _rounded(self) -> tuple[Any, Any, Any, Any]:
        """Scales [N, G, 1], levels [N, G, S], zero points [N, G, 1] and palette, as stored."""
        import torch

        smooth = (self._first.abs() * self.growth.exp()).clamp(MIN_SCALE, MAX_SCALE)
        smooth = smooth * self._first.sign()
        snapped = torch.from_numpy(snap_scales(smooth.detach().numpy()))
        scales = through(snapped, smooth)[:, :, None]
        steps = self.steps() * (self._first[:, :, None] / scales)
        if self.palette is not None:
            table = (self.palette * self._unit).clamp(-127, 127)
            table = through(table.detach().round(), table).sort().values
            index = torch.bucketize(steps.detach(), _edges(table.detach()), right=True)
            inside = torch.clamp(steps, table.detach()[0], table.detach()[-1])
            return scales, through(table[index], inside), None, table
        level = through(steps.detach().round(), steps)
        if self.zeros is None:
            return scales, torch.clamp(level, *levels(self.scheme)), None, None
        zeros = self.zeros.clamp(0, self.scheme.n_codes - 1)
        zeros = through(zeros.detach().round(), zeros)[:, :, None]
        level = torch.clamp(level + zeros, 0, self.scheme.n_codes - 1) - zeros
        return scales, level, zeros, None


def _edges(palette: Any) -> Any:
    """Between which values of an ascending palette a weight goes to the other one."""
    return (palette[1:] + palette[:-1]) / 2
