"""Names in a program: identifiers, each of one thing."""

from __future__ import annotations

import re
from typing import Any

_RESERVED = {"any", "bool", "program", "func", "tensor", "list", "dict", "tuple", "true", "false",
             "string", "state", "bf16", "fp16", "fp32", "fp64", "int8", "int16", "int32", "int64",
             "uint8", "uint16", "uint32", "uint64"}  # fmt: skip


class Names:
    """Identifiers, which are all that MIL takes for a name; each is given once."""

    def __init__(self) -> None:
        self._taken = set(_RESERVED)

    def new(self, name: str) -> str:
        """An identifier like a name, for an input or output; see `make_distinct`."""
        base = re.sub(r"\W", "_", name, flags=re.ASCII)
        if not base or base[0].isdigit() or base[0] == "_":
            base = f"x{base}"
        found, n = base, 1
        while found in self._taken:
            found, n = f"{base}_{n}_", n + 1
        self._taken.add(found)
        return found

    def inner(self, name: str) -> str:
        """The same for what lies between; never like coremltools' own names, such as add_1."""
        return self.new(f"{name}_") if re.search(r"_\d+$", name) else self.new(name)


def make_distinct(function: Any, ends: set[str], names: Names) -> None:
    """Rename what coremltools happened to name as an input or output."""
    for op in function.operations:
        for var in op.outputs:
            if var.name in ends and var not in function.outputs:
                var.set_name(names.inner(var.name))
                if len(op.outputs) == 1:
                    op.name = var.name
