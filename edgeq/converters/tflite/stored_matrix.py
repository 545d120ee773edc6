"""How a .tflite file holds a weight matrix, and which kernel of LiteRT multiplies by it."""

from __future__ import annotations

from dataclasses import dataclass

from edgeq.converters.encoding import Container, Encoding, encode
from edgeq.core.errors import UnsupportedError
from edgeq.formats.packing import round_up
from edgeq.formats.schemes import GROUP_SIZES
from edgeq.formats.tensor import QuantTensor
from edgeq.model.model import Model

TARGET = "LiteRT"
CONTAINERS: dict[str, tuple[Container, ...]] = {
    "int8": (
        Container(4, groups=(32, 64, 128, 256), channel=True, folds=True),
        Container(8, channel=True, folds=True),
    ),
    "float": (
        Container(4, groups=GROUP_SIZES, channel=True, folds=True),
        Container(8, groups=GROUP_SIZES, channel=True, folds=True),
    ),
}
"""What integers each way of computing can multiply. FULLY_CONNECTED has no groups of 8 bits, and
groups of 16 only in a kernel of reference speed."""
OUTER = ("model.embed_tokens.weight", "lm_head.weight")
"""Embedding and head."""


@dataclass(frozen=True)
class StoredMatrix:
    """A weight matrix [N, K] as the file holds it.

    Args:
        name: of the tensor.
        shape: (N, K), without padding.
        encoding: None if it is floating point.
        in_float: whether its integers are widened and multiplied as floats.
    """

    name: str
    shape: tuple[int, int]
    encoding: Encoding | None
    in_float: bool = False

    @property
    def width(self) -> int:
        """Columns, with those that fill the last group or byte."""
        if self.encoding is None:
            return self.shape[1]
        return round_up(self.shape[1], self.encoding.group_size or (2 if self.bits == 4 else 1))

    @property
    def bits(self) -> int:
        """Bits of each integer; 0 if it is floating point."""
        return 0 if self.encoding is None else self.encoding.bits

    @property
    def groups(self) -> int:
        """Scales a row; 0 if each row has only one."""
        size = self.encoding.group_size if self.encoding else None
        return self.width // size if size else 0


def stored_matrix(model: Model, name: str, compute: str) -> StoredMatrix:
    """How the file holds a matrix.

    Raises:
        UnsupportedError: LiteRT cannot multiply by it as it is.
    """
    tensor = model.tensors[name]
    n, k = tensor.shape
    if not isinstance(tensor, QuantTensor):
        return StoredMatrix(name, (n, k), None)
    if compute == "int8" and only_in_float(name, tensor):
        compute = "float"
    encoding = encode(name, tensor.scheme, k, CONTAINERS[compute], TARGET)
    return StoredMatrix(name, (n, k), encoding, compute == "float")


def multiplies_scales(stored: StoredMatrix) -> bool:
    """Whether the graph multiplies by the scales itself, so that they may have any sign.

    The integer kernels refuse scales that are not positive, and so may the lookup of an embedding,
    which is the kernel's unless there are groups of 8 bits.
    """
    looked_up = stored.name == OUTER[0] and not (stored.groups and stored.bits == 8)
    return stored.in_float and not looked_up


def only_in_float(name: str, tensor: QuantTensor) -> bool:
    """Whether a matrix is an embedding or head that LiteRT has no integer kernel for.

    It is then computed in float, exactly: one such matrix costs some speed, and all of them would
    cost so much that they are refused unless float is asked for.
    """
    if name not in OUTER:
        return False
    try:
        encode(name, tensor.scheme, tensor.shape[1], CONTAINERS["int8"], TARGET)
    except UnsupportedError:
        return True
    return False
