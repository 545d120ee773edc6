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
    """Serve models until SIGINT or SIGTERM. To serve in the background, use `Server`.

    OpenAI's interface is below ``/v1``, and a chat page is at ``/``.

    Args:
        models: the models to serve, as for `Server`.
        settings: the address, the limits and the defaults of requests.
        draft: a small model that drafts tokens, as for `Server`.
        context: context of every slot in tokens; a model that supports fewer uses its own limit.
        threads, kv_bits, backend, mmap: as for `Engine`, for every slot.
        progress: called while models are opened.
        ready: called with the server once all models are opened; `Server.stop` ends it.

    Raises:
        MissingDependencyError: the extra "serve" is not installed.
        FormatError: a model cannot be opened.
        UsageError: the address is in use or not allowed, or two models have the same name.

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
