"""Options of conversions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Options:
    """Options of a conversion; each target documents those that it supports.

    Args:
        context: length of the KV cache, in tokens; None takes the model's own, at most 4096, or
            1280 for LiteRT.
        kv: data type of the KV cache in the converted model; None takes the target's default.
        compute: "float" multiplies dequantized weights in floating point, which is exact;
            "int8" rounds activations to 8 bits, as the target's fast kernels do. None takes the
            target's default.
        prefill: lengths of the prefill signatures or functions, where a target fixes them.
        extra: options that only this target has, and all options of graphs.
    """

    context: int | None = None
    kv: Literal["float32", "float16", "int8"] | None = None
    compute: Literal["float", "int8"] | None = None
    prefill: tuple[int, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The options, ready for JSON."""
        return {
            "context": self.context,
            "kv": self.kv,
            "compute": self.compute,
            "prefill": list(self.prefill),
            **dict(self.extra),
        }


@dataclass(frozen=True)
class WrittenWith:
    """How a converted file was written, as the file itself records it.

    Args:
        options: the options that write the same file again.
        version: version of edgeq that wrote it.
    """

    options: Options
    version: str
