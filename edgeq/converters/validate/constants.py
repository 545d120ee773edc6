"""Whether a file holds every constant that its source gives: norms, biases, scales, tables, sizes.

The source is converted once more, with the options the file was made with, and both files are read
back constant by constant. Whatever differs is named, so that a damaged file is found wherever the
damage lies, before it is run.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq._version import __version__
from edgeq.converters.stored import StoredConstant
from edgeq.converters.target import DecoderTarget
from edgeq.converters.validate.integers import TensorFault
from edgeq.core.errors import EdgeqError
from edgeq.formats.mapped_file import release
from edgeq.model.model import Model

_PIECE = 1 << 22
"""Bytes compared at once."""
_TABLES = ("cos", "sin")
"""Words in the names of tables that are computed; their last digit may differ between machines."""


_OPERATOR = " (operator)"


def operator(name: str, what: object) -> StoredConstant:
    """An operator of a graph, as what does not change from run to run.

    Args:
        name: of its result.
        what: its type, inputs, outputs and settings, or their bytes.
    """
    raw = what if isinstance(what, bytes) else repr(what).encode()
    return StoredConstant(name + _OPERATOR, np.frombuffer(raw or b"0", np.uint8))


def compare_constants(
    model: Model, module: DecoderTarget, path: Path, known: Iterable[str] = ()
) -> tuple[int, list[TensorFault]]:
    """Compare every constant of a file with those of a new conversion of its source.

    Args:
        model: the source.
        module: the target's.
        path: the file or folder.
        known: tensors that are known to be wrong, and are not reported again.

    Returns:
        how many constants were compared, and what differs.
    """
    written = module.read_options(path)
    with tempfile.TemporaryDirectory(prefix="edgeq-") as folder:
        again = Path(folder) / path.name
        try:
            module.check(model, written.options)
        except EdgeqError as err:
            what = f"cannot be made of this source: {err}"
            return 0, [TensorFault(path.name, None, None, what)]
        module.write(model, again, written.options)
        return _compare(
            module.read_constants(path), module.read_constants(again), tuple(known),
            strict=written.version == __version__,
        )  # fmt: skip


def _compare(
    stored: Iterable[StoredConstant],
    wanted: Iterable[StoredConstant],
    known: tuple[str, ...],
    *,
    strict: bool,
) -> tuple[int, list[TensorFault]]:
    expected = dict(_numbered(wanted))
    same: set[tuple[int, int]] = set()
    faults: dict[str, TensorFault] = {}
    count = 0
    names: set[str] = set()
    for name, constant in _numbered(stored):
        names.add(name)
        right = expected.pop(name, None)
        if name.endswith(_OPERATOR) and not strict:
            continue  # another version may build the graph otherwise
        if right is None:
            # and name what it makes otherwise
            if strict:
                faults[name] = TensorFault(name, None, None, "is no constant of the source")
            continue
        count += 1
        places = (_address(constant.values), _address(right.values))
        if places in same:
            continue
        what = _difference(name, constant.values, right.values)
        release(constant.values)
        release(right.values)
        if what is None:
            same.add(places)
        elif not name.startswith(known or ("\0",)):
            faults[name] = TensorFault(name, None, None, what)
    if strict:
        operators = any(name.endswith(_OPERATOR) for name in names)
        for name in expected:
            if name.endswith(_OPERATOR) and not operators:
                continue  # the target compares none of this file
            faults[name] = TensorFault(name, None, None, "is missing from the file")
    return count, list(faults.values())


def _numbered(constants: Iterable[StoredConstant]) -> Iterator[tuple[str, StoredConstant]]:
    """Constants by name; those of the same name are numbered."""
    seen: Counter[str] = Counter()
    for constant in constants:
        seen[constant.name] += 1
        again = seen[constant.name]
        yield constant.name if again == 1 else f"{constant.name} ({again})", constant


def _address(values: NDArray[Any]) -> int:
    return int(values.__array_interface__["data"][0])


def _difference(name: str, got: NDArray[Any], right: NDArray[Any]) -> str | None:
    """What differs between two constants, in words; None if nothing does."""
    if name.endswith(_OPERATOR):
        same = np.array_equal(got, right)
        return None if same else "has another type, input, shape or setting than in the source"
    if got.dtype != right.dtype or got.shape != right.shape:
        return (
            f"is {got.dtype} {list(got.shape)} in the file, "
            f"{right.dtype} {list(right.shape)} in the source"
        )
    flat, wanted = got.reshape(-1), right.reshape(-1)
    step = max(1, _PIECE // max(1, got.itemsize))
    equal = _nearly if any(word in name for word in _TABLES) else _exactly
    count, first = 0, -1
    for a in range(0, flat.size, step):
        wrong = ~equal(flat[a : a + step], wanted[a : a + step])
        if count == 0 and wrong.any():
            first = a + int(wrong.argmax())
        count += int(wrong.sum())
    if not count:
        return None
    at = ", ".join(str(int(i)) for i in np.unravel_index(first, got.shape or (1,)))
    return (
        f"{count} of {flat.size} values differ, the first at [{at}]: {flat[first]} in the file, "
        f"{wanted[first]} in the source"
    )


def _exactly(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.bool_]:
    """Bit for bit, so that NaN equals itself."""
    if a.dtype.kind != "f":
        return np.asarray(a == b)
    kind = np.dtype(f"u{a.itemsize}")
    return np.asarray(np.ascontiguousarray(a).view(kind) == np.ascontiguousarray(b).view(kind))


def _nearly(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether numbers of at most 1 differ by one unit in the last place at most."""
    if a.dtype.kind != "f":
        return _exactly(a, b)
    with np.errstate(invalid="ignore", over="ignore"):
        return np.asarray(np.abs(a - b) <= np.finfo(a.dtype).eps)
