"""Write a packed edgeq model as a GGUF file of the same integers, every matrix Q4_0.

    python write_gguf.py model.edgeq model.gguf

Q4_0 is symmetric INT4 in groups of 32 with float16 scales, which is what ``w4-g32`` is: nothing
is requantized, so both runtimes multiply by the very same numbers. The tokenizer is left out:
the benchmarks feed tokens.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from edgeq.converters import Options
from edgeq.converters.atomic_output import staging
from edgeq.converters.gguf.decoder import GgufDecoderTarget
from edgeq.formats.schemes import parse_scheme
from edgeq.formats.tensor import QuantTensor
from edgeq.model import artifact


def write(source: Path, target: Path) -> None:
    """Write ``target`` from ``source``, in one piece or not at all."""
    model = replace(artifact.load(source), files={})
    for name, tensor in model.tensors.items():
        if isinstance(tensor, QuantTensor) and tensor.scheme != parse_scheme("w4-g32"):
            raise SystemExit(f"{name} is {tensor.scheme}; only w4-g32 is the same as Q4_0")
    options = Options()
    GgufDecoderTarget().check(model, options)
    with staging(target) as room:
        GgufDecoderTarget().write(model, room / target.name, options)
        (room / target.name).replace(target)


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
