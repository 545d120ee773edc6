"""A whole model in training: fake-quantized matrices, float vectors, and what is left alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.formats.schemes import QuantScheme, Scheme
from edgeq.formats.tensor import FloatTensor, QuantTensor, Tensor
from edgeq.model.model import Model
from edgeq.quant.training.fake import FakeQuant


def float_weights(model: Model) -> dict[str, Any]:
    """Every tensor of a model as a float32 torch tensor."""
    import torch

    return {name: torch.from_numpy(t.numpy()) for name, t in model.tensors.items()}


class Student:
    """A model whose weights are trained through their rounding.

    Args:
        model: the float model.
        schemes: for every tensor: quantized matrices are trained, vectors kept in float32 too;
            all else is held fixed, rounded to its float type.
        start: the quantized matrices to begin with.
    """

    def __init__(
        self, model: Model, schemes: Mapping[str, Scheme], start: Mapping[str, QuantTensor]
    ) -> None:
        import torch

        self.matrices: dict[str, FakeQuant] = {}
        self.vectors: dict[str, Any] = {}
        self.fixed: dict[str, Any] = {}
        for name, tensor in model.tensors.items():
            scheme = schemes[name]
            values = tensor.numpy()
            if isinstance(scheme, QuantScheme):
                self.matrices[name] = FakeQuant(values, start[name])
                continue
            weight = torch.from_numpy(values)
            if values.ndim == 1 and scheme.dtype == "float32":
                self.vectors[name] = weight.requires_grad_()
            else:
                self.fixed[name] = weight.to(getattr(torch, scheme.dtype)).float()

    def parameters(self) -> dict[str, list[Any]]:
        """What is trained, by kind: the attributes of `FakeQuant`, and "vector"."""
        kinds: dict[str, list[Any]] = {"vector": list(self.vectors.values())}
        for matrix in self.matrices.values():
            for kind, parameter in matrix.parameters().items():
                kinds.setdefault(kind, []).append(parameter)
        return kinds

    def weights(self) -> dict[str, Any]:
        """Every tensor as it will be stored, differentiable."""
        rounded = {name: matrix.weight() for name, matrix in self.matrices.items()}
        return self.fixed | self.vectors | rounded

    def tensors(self) -> dict[str, Tensor]:
        """What was trained, ready to be written."""
        out: dict[str, Tensor] = {name: m.tensor() for name, m in self.matrices.items()}
        for name, vector in self.vectors.items():
            values: NDArray[np.float32] = vector.detach().numpy().copy()
            out[name] = FloatTensor("float32", values)
        return out
