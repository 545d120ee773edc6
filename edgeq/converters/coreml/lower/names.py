"""Unique identifiers as names in a program."""

from __future__ import annotations

import hashlib
import re
from typing import Any

import numpy as np

_RESERVED = {"any", "bool", "program", "func", "tensor", "list", "dict", "tuple", "true", "false",
             "string", "state", "bf16", "fp16", "fp32", "fp64", "int8", "int16", "int32", "int64",
             "uint8", "uint16", "uint32", "uint64"}  # fmt: skip


class Names:
    """Makes unique identifiers, which MIL requires as names."""

    def __init__(self) -> None:
        self._taken = set(_RESERVED)

    def new(self, name: str) -> str:
        """Make an identifier like a name, for an input or output; see `make_distinct`."""
        base = re.sub(r"\W", "_", name, flags=re.ASCII)
        if not base or base[0].isdigit() or base[0] == "_":
            base = f"x{base}"
        found, n = base, 1
        while found in self._taken:
            found, n = f"{base}_{n}_", n + 1
        self._taken.add(found)
        return found

    def inner(self, name: str) -> str:
        """The same for inner values; never like coremltools' own names, such as add_1."""
        return self.new(f"{name}_") if re.search(r"_\d+$", name) else self.new(name)


def make_distinct(function: Any, ends: set[str], names: Names) -> None:
    """Rename operators that coremltools named like an input or output."""
    for op in function.operations:
        for var in op.outputs:
            if var.name in ends and var not in function.outputs:
                var.set_name(names.inner(var.name))
                if len(op.outputs) == 1:
                    op.name = var.name


def shorten(function: Any, ends: set[str], own_names: set[str], names: Names) -> dict[str, str]:
    """Merge equal constants, and give all but inputs and outputs short names.

    In a small network constants of one number, which every operator has some of, and names would
    be half of the program.

    Args:
        function: coremltools'.
        ends: names of inputs and outputs.
        own_names: names that operators keep.
        names: those that are taken.

    Returns:
        Old name of a value or constant -> its name now.
    """
    merged = _merge(function)
    renamed: dict[str, str] = {}
    for op in function.operations:
        for var in op.outputs:
            if var.name in ends:
                continue
            short = renamed[var.name] = names.new(f"v{len(renamed)}")
            if len(op.outputs) == 1 and var.name not in own_names:
                op.name = short
            var.set_name(short)
    return renamed | {old: renamed.get(new, new) for old, new in merged.items()}


def _merge(function: Any) -> dict[str, str]:
    """Remove constants equal to an earlier one; returns removed name -> name of the earlier one."""
    first: dict[tuple[str, str, tuple[int, ...], bytes], Any] = {}
    merged: dict[str, str] = {}
    for op in list(function.operations):
        if op.op_type != "const" or op.outputs[0] in function.outputs:
            continue
        (var,) = op.outputs
        if all(user.op_type.startswith("constexpr_") for user in var.child_ops):
            continue  # it becomes a part of those
        # zeros of another shape or type have the same bytes, and are another constant
        array = np.asarray(var.val)
        raw = var.val.encode() if isinstance(var.val, str) else array.tobytes()
        key = (str(var.dtype), str(array.dtype), array.shape, hashlib.sha256(raw).digest())
        same = first.setdefault(key, var)
        if same is not var:
            merged[var.name] = same.name
            function.replace_uses_of_var_after_op(anchor_op=op, old_var=var, new_var=same)
            function.remove_ops([op])
    return merged
