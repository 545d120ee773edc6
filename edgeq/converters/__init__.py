"""Conversion: the same integers in every mobile runtime's own format.

    targets        the table of targets: one row for each
    target         what a target is made of: `Target`, `DecoderTarget`, `GraphTarget`
    runners        a converted model in its own runtime
    convert        from a model or a graph to a target's file, validated, complete or not at all
    validate/      whether a file computes what its source does
    certificate    what was written, by what, and what validation measured, as JSON
    encoding       which integer type of a target holds a tensor's integers exactly
    ort/ tflite/ coreml/ gguf/    the targets

To add a target, see ``docs/extending.md``. Names that the table of targets does not need are
loaded when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeq.converters.target import DecoderTarget, GraphTarget, Target
from edgeq.converters.targets import (
    TARGETS,
    graph_target,
    open_graph,
    register,
    require_target,
    target_named,
    target_of,
)
from edgeq.core.exports import lazy_exports

if TYPE_CHECKING:
    from edgeq.converters.options import Options
    from edgeq.converters.runners import DecoderRunner, GraphRunner
    from edgeq.converters.stored import StoredWeight

__all__ = [
    "TARGETS", "DecoderRunner", "DecoderTarget", "GraphRunner", "GraphTarget", "Options",
    "StoredWeight", "Target", "graph_target", "open_graph", "register", "require_target",
    "target_named", "target_of",
]  # fmt: skip

__getattr__ = lazy_exports(
    __name__,
    {
        "edgeq.converters.options": ("Options",),
        "edgeq.converters.runners": ("DecoderRunner", "GraphRunner"),
        "edgeq.converters.stored": ("StoredWeight",),
    },
)
