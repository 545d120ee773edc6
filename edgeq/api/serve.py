"""Serve models over HTTP with OpenAI's interface."""

from __future__ import annotations

from collections.abc import Callable

from edgeq.core.progress import Progress
from edgeq.model.kv_bits import KvBits
from edgeq.serving.server import Server, Source
from edgeq.serving.settings import ServerSettings


def serve(
    models: Source | list[Source | tuple[str, Source]],
    settings: ServerSettings | None = None,
    *,
    draft: Source | None = None,
    context: int | None = None,
    threads: int | None = None,
    kv_bits: KvBits = 8,
    backend: str = "numba",
    mmap: bool | None = None,
    progress: Progress | None = None,
    ready: Callable[[Server], None] | None = None,
) -> None:
    """Serve models until SIGINT or SIGTERM. `Server` serves in the background of other work.

    Clients find OpenAI's interface below ``/v1``, and a chat page at ``/``.

    Args:
        models: as `Server` takes them.
        settings: address, limits, defaults.
        draft: a small model that drafts tokens, as `Server` takes it.
        context: tokens of every slot; a model that supports fewer has its own limit.
        threads, kv_bits, backend, mmap: as `Engine` takes them, for every slot.
        progress: called while models are opened.
        ready: called with the server once all models are opened; `Server.stop` ends it.

    Raises:
        MissingDependencyError: the extra "serve" is not installed.
        FormatError: a model cannot be opened.
        UsageError: the address cannot be had, or two models have one name.

    Example:
        >>> settings = edgeq.ServerSettings(port=0)
        >>> edgeq.serve("model.edgeq", settings, ready=lambda server: server.stop())
    """
    server = Server(
        models, settings, draft=draft, context=context, threads=threads, kv_bits=kv_bits,
        backend=backend, mmap=mmap, progress=progress,
    )  # fmt: skip
    if ready is not None:
        ready(server)
    server.run()
