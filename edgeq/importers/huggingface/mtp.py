"""The multi-token-prediction head of a checkpoint: its tensors "mtp.*".

A head of one layer is read, as `edgeq.model.mtp` describes it. Whatever else is there is left out,
and said to be: the head takes no part in an answer.

Source: qwen3_5_mtp.py of vLLM for the names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from edgeq.core.errors import FormatError
from edgeq.formats.tensor import FloatTensor, Tensor
from edgeq.importers.huggingface.checkpoint import Checkpoint
from edgeq.importers.huggingface.family import Family
from edgeq.importers.lazy import GatheredRows, by_head_order
from edgeq.model.block import MTP_EMBEDDING, MTP_STATE, BlockSpec
from edgeq.model.config import ModelConfig
from edgeq.model.mtp import PREFIX, needed_mtp, stored_name

_JOIN = f"{PREFIX}fc.weight"


@dataclass(frozen=True)
class Head:
    """A head that was read.

    Args:
        block: its layer.
        tensors: by the names that a model has them under.
    """

    block: BlockSpec
    tensors: Mapping[str, Tensor]


def read_mtp(checkpoint: Checkpoint, config: ModelConfig, family: Family) -> Head | None:
    """The head of a checkpoint; None if it has none, or one that edgeq does not compute.

    Args:
        checkpoint: the checkpoint.
        config: of the model.
        family: of the model.

    Raises:
        FormatError: a tensor of the head has another shape than the configuration says.
    """
    attention = next((b for b in config.blocks if b.mixer == "attention" and not b.window), None)
    if attention is None or _JOIN not in checkpoint:
        return None
    sizes = dict(needed_mtp(replace(config, mtp=attention)))
    split = {stored_name(MTP_EMBEDDING): 0, stored_name(MTP_STATE): 1}
    fused = {
        f"{PREFIX}layers.0.{part}.weight": (f"{PREFIX}layers.0.{whole}.weight", number, len(parts))
        for whole, parts in family.fused_by_head.items()
        for number, part in enumerate(parts)
    }
    names = {fused[name][0] if name in fused else name for name in sizes if name not in split}
    if any(checkpoint.type_of(name) not in ("F32", "F16", "BF16") for name in (*names, _JOIN)):
        return None  # quantized, or not all there
    if any(name.startswith(f"{PREFIX}layers.1.") for name in checkpoint.names()):
        return None
    tensors: dict[str, Tensor] = {}
    for name, shape in sizes.items():
        if name in split:
            tensors[name] = _half(checkpoint.tensor(_JOIN), split[name], config.hidden)
        elif name in fused:
            stored, number, count = fused[name]
            order = by_head_order(shape[0], config.heads, number, count)
            whole = checkpoint.tensor(stored)
            _check(stored, whole.shape, (count * shape[0], *shape[1:]))
            assert isinstance(whole, FloatTensor)  # by its type
            tensors[name] = GatheredRows(whole, order)
        else:
            tensor = checkpoint.tensor(name)
            _check(name, tensor.shape, shape)
            assert isinstance(tensor, FloatTensor)  # by its type
            tensors[name] = tensor
    return Head(attention, tensors)


def _half(tensor: object, number: int, hidden: int) -> FloatTensor:
    """The columns of the embedding, which come first, or those of the state."""
    assert isinstance(tensor, FloatTensor)  # by its type
    _check(_JOIN, tensor.shape, (hidden, 2 * hidden))
    columns = tensor.data[:, number * hidden : (number + 1) * hidden]
    return FloatTensor(tensor.dtype, np.ascontiguousarray(columns))


def _check(name: str, got: tuple[int, ...], want: tuple[int, ...]) -> None:
    if tuple(got) != want:
        raise FormatError(f"tensor {name} has shape {list(got)}; the config says {list(want)}")
