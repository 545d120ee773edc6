"""Experts of a layer that a checkpoint holds in single tensors, one matrix for each expert.

    {experts}.gate_up_proj        [E, 2 * ffn, hidden]    an expert's gate, then its up
    {experts}.down_proj           [E, hidden, ffn]

That is how Transformers 5 holds the experts of a mixture, and saves them where it is not asked for
the original names. gpt-oss has the transposed matrices, with the rows of gate and up in turn, and
biases:

    {experts}.gate_up_proj        [E, hidden, 2 * ffn]
    {experts}.gate_up_proj_bias   [E, 2 * ffn]
    {experts}.down_proj           [E, ffn, hidden]
    {experts}.down_proj_bias      [E, hidden]

or, in place of the matrices, their MXFP4 (`quantized.mxfp4`), which are not transposed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from edgeq.core.errors import FormatError
from edgeq.formats.tensor import FloatTensor, Tensor
from edgeq.importers.huggingface.checkpoint import Checkpoint
from edgeq.importers.huggingface.family import Family
from edgeq.importers.huggingface.quantized.mxfp4 import Mxfp4, stacked_matrix
from edgeq.model.block import DOWN_PROJ, GATE_PROJ, UP_PROJ, expert_part, tensor_name
from edgeq.model.config import ModelConfig

_GATE_UP, _DOWN = "gate_up_proj", "down_proj"
_BLOCKS, _SCALES, _BIAS = "_blocks", "_scales", "_bias"
_PLACES = {GATE_PROJ: (_GATE_UP, 0, 2), UP_PROJ: (_GATE_UP, 1, 2), DOWN_PROJ: (_DOWN, 0, 1)}
"""Part of an expert -> the tensor that holds it, which part of that it is, and of how many."""


@dataclass(frozen=True)
class StackedPart:
    """A matrix or bias of an expert in a tensor of all experts.

    Args:
        stored: name of the tensor, without an ending.
        expert, count: which of how many experts.
        part, parts: which of how many parts the tensor holds of each.
        shape: of the matrix or bias.
        form: "rows", or "columns" for transposed matrices whose parts take turns.
    """

    stored: str
    expert: int
    count: int
    part: int
    parts: int
    shape: tuple[int, ...]
    form: Literal["rows", "columns"]

    def read(self, checkpoint: Checkpoint) -> Tensor:
        """The matrix or bias; a view of the file.

        Raises:
            FormatError: the tensor is missing or has another shape.
        """
        high = self.parts * self.shape[0]
        if len(self.shape) == 1:
            return self._rows(self._float(checkpoint, self.stored + _BIAS, (self.count, high)))
        if self.form == "columns" and self.stored + _BLOCKS in checkpoint:
            return self._quantized(checkpoint)
        if self.form == "rows":
            return self._rows(
                self._float(checkpoint, self.stored, (self.count, high, self.shape[1]))
            )
        whole = self._float(checkpoint, self.stored, (self.count, self.shape[1], high))
        return self._rows(FloatTensor(whole.dtype, whole.data.swapaxes(1, 2)))

    def _rows(self, whole: FloatTensor) -> FloatTensor:
        """This part's rows of [E, rows of all parts, ...]."""
        own, n = whole.data[self.expert], self.shape[0]
        first, step = (self.part, self.parts) if self.form == "columns" else (self.part * n, 1)
        return FloatTensor(whole.dtype, own[first::step][:n])

    def _float(self, checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> FloatTensor:
        tensor = checkpoint.tensor(name)
        if not isinstance(tensor, FloatTensor) or tensor.shape != shape:
            raise FormatError(
                f"tensor {name} has shape {list(tensor.shape)}; config.json says {list(shape)}"
            )
        return tensor

    def _quantized(self, checkpoint: Checkpoint) -> Tensor:
        n, k = self.shape
        if not isinstance(checkpoint.layout, Mxfp4):
            raise FormatError(
                f"the experts of {checkpoint.folder} are MXFP4 ({self.stored}{_BLOCKS}), and "
                'config.json has no quantization_config that says how; put {"quant_method": '
                '"mxfp4"} there'
            )
        blocks = checkpoint.part(self.stored + _BLOCKS, "U8")
        scales = checkpoint.part(self.stored + _SCALES, "U8")
        whole = stacked_matrix(blocks, scales, (self.count, self.parts * n, k))
        first = self.expert * self.parts * n
        own = whole.part(first, first + self.parts * n)
        if self.parts == 1:
            return own
        order = np.arange(self.part, self.parts * n, self.parts)
        return replace(own, shape=(n, k), nbytes=own.nbytes // self.parts, order=order)


def stacked_parts(
    config: ModelConfig, family: Family, checkpoint: Checkpoint
) -> dict[str, StackedPart]:
    """The matrices and biases of experts that a checkpoint holds in tensors of all: name -> part.

    Args:
        config: of the model.
        family: whose experts are stored so always, or where the checkpoint has such a tensor.
        checkpoint: its names decide.
    """
    parts: dict[str, StackedPart] = {}
    for i, block in enumerate(config.blocks):
        experts = block.experts
        if experts is None:
            continue
        stored = family.stored_name(tensor_name(i, expert_part(0, DOWN_PROJ)))
        module = stored.rpartition(".experts.")[0] + ".experts"
        if not family.transposed_experts and f"{module}.{_GATE_UP}" not in checkpoint:
            continue
        form: Literal["rows", "columns"] = "columns" if family.transposed_experts else "rows"
        for e in range(experts.count):
            for name, (tensor, part, of) in _PLACES.items():
                wide = name == DOWN_PROJ
                shape = (config.hidden, experts.ffn) if wide else (experts.ffn, config.hidden)
                ours = tensor_name(i, expert_part(e, name))
                one = StackedPart(f"{module}.{tensor}", e, experts.count, part, of, shape, form)
                parts[ours] = one
                if experts.biases:
                    parts[ours.removesuffix("weight") + "bias"] = replace(one, shape=shape[:1])
    return parts
