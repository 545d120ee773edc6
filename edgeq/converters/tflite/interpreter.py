"""LiteRT's interpreter, with its refusals as errors of edgeq."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgeq.core.cpu import available_cores
from edgeq.core.errors import FormatError, MissingDependencyError


def interpreter(
    path: Path, *, threads: int | None = None, exact: bool = False, delegate: bool = True
) -> Any:
    """A file in LiteRT, not yet allocated.

    Args:
        path: .tflite file.
        threads: LiteRT's; all cores if None.
        exact: with LiteRT's reference kernels instead of its fast ones.
        delegate: with XNNPACK where it has operators, as LiteRT is by default.

    Raises:
        FormatError: LiteRT refuses it.
        MissingDependencyError: LiteRT is not installed.
    """
    try:
        from ai_edge_litert.interpreter import Interpreter, OpResolverType
    except ImportError as err:
        raise MissingDependencyError("ai_edge_litert", "tflite", "to run .tflite files") from err
    kinds = OpResolverType
    kind = kinds.AUTO if delegate else kinds.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    try:
        return Interpreter(
            model_path=str(path),
            num_threads=threads or available_cores(),
            experimental_op_resolver_type=kinds.BUILTIN_REF if exact else kind,
        )
    except (ValueError, RuntimeError) as err:
        raise FormatError(f"LiteRT cannot load {path}: {err}") from err
