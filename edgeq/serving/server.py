"""Starts a server and shuts it down in order: running answers are finished first."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from edgeq.core.errors import EdgeqError, UsageError, require
from edgeq.core.memory import return_large_blocks
from edgeq.core.progress import Progress
from edgeq.importers import load
from edgeq.model.kv_bits import KvBits
from edgeq.model.model import Model
from edgeq.serving.settings import ServerSettings

GRACE_S = 2
"""Seconds that are left after `ServerSettings.drain_s` to send the ends of answers."""
HEADERS_S = 30.0
"""Seconds within which a client must send the headers of a request."""
START_S = 30.0
"""Seconds that a server may take until it listens."""
Source = str | Path | Model


class Server:
    """Serves models with the OpenAI API, and a chat page, from a thread.

    `edgeq.serve` does the same in the calling thread until it is interrupted.

    Args:
        models: paths of models (``NAME=PATH`` names the model; otherwise the file name does),
            opened models, or pairs of a name and one of them. Requests that name no model use the
            first.
        settings: address, limits and defaults.
        draft: a small model, or its path, that drafts tokens for all of the models. It must have
            the same tokenizer as they; the answers stay the same. See `Draft`.
        context: context of every slot, in tokens; limited by what each model supports.
        threads, kv_bits, backend, mmap: as for `Engine`, for every slot.
        progress: called while models are opened.

    Raises:
        MissingDependencyError: the extra "serve" is not installed.
        FormatError: a model cannot be opened.
        UsageError: the address is in use, two models have the same name, or the draft model has
            another tokenizer.

    Example:
        >>> with edgeq.Server("model.edgeq", edgeq.ServerSettings(port=0)) as server:
        ...     address = server.url
        >>> address.startswith("http://127.0.0.1:")
        True
    """

    def __init__(
        self,
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
    ) -> None:
        require("serve", ("starlette", "uvicorn"), "to serve models")
        from concurrent.futures import ThreadPoolExecutor

        import uvicorn
        from uvicorn.protocols.http.auto import AutoHTTPProtocol

        from edgeq.serving.app import application
        from edgeq.serving.prefix_cache import SnapshotStore
        from edgeq.serving.served import ServedModel, named_models, open_models
        from edgeq.serving.service import Service

        self.settings = settings or ServerSettings()
        if draft is not None and self.settings.lookup:
            raise UsageError(
                "prompt lookup and a draft model cannot be used together; use one of them"
            )
        listed: Any = models if isinstance(models, list) else [models]
        sources = named_models(listed)
        self._socket = _listen(self.settings)
        pool = ThreadPoolExecutor(
            max_workers=self.settings.parallel * len(sources), thread_name_prefix="edgeq-answer"
        )
        snapshots = SnapshotStore(self.settings.prefix_bytes)
        served: dict[str, ServedModel] = {}
        try:
            helper = load(draft) if isinstance(draft, str | Path) else draft
            for name, model in open_models(sources, progress).items():
                served[name] = ServedModel(
                    name, model, self.settings, pool, snapshots, draft=helper,
                    context=context, n_threads=threads, kv_bits=kv_bits, backend=backend, mmap=mmap,
                )  # fmt: skip
        except BaseException:
            self._socket.close()
            for one in served.values():
                one.close()
            raise
        self.service = Service(self.settings, served, pool)
        config = uvicorn.Config(
            application(self.service),
            http=_impatient(AutoHTTPProtocol),
            log_config=None,
            access_log=False,
            lifespan="on",
            ws="none",
            server_header=False,
            timeout_graceful_shutdown=round(self.settings.drain_s) + GRACE_S,
        )
        service, drain_s = self.service, self.settings.drain_s

        class DrainedServer(uvicorn.Server):  # type: ignore[misc]
            async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
                service.end_by(time.monotonic() + drain_s)
                await super().shutdown(sockets)

        self._server = DrainedServer(config)
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """The URL of the server, such as ``http://127.0.0.1:8080``."""
        host, port = self._socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def run(self) -> None:
        """Serve until SIGINT or SIGTERM; running answers are finished first."""

        def ended(signum: int, frame: FrameType | None) -> None:
            """Ignore the signals that uvicorn raises again after it has shut down."""

        return_large_blocks()
        before = {one: signal.signal(one, ended) for one in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._server.run(sockets=[self._socket])
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)
            self._release()

    def start(self) -> None:
        """Serve from a thread, and return once the server listens.

        Raises:
            EdgeqError: the server did not start.
        """
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}, name="edgeq-serve",
            daemon=True,
        )  # fmt: skip
        self._thread.start()
        tick = threading.Event()
        waited = 0.0
        while not self._server.started:
            if not self._thread.is_alive() or waited > START_S:
                raise EdgeqError("the server did not start; its log says why")
            tick.wait(0.01)
            waited += 0.01

    def close(self) -> None:
        """Shut down: refuse new requests, finish running answers, and release the engines."""
        self.stop()
        if self._thread is not None:
            self._thread.join()
        self._release()

    def stop(self) -> None:
        """Ask the server to shut down, from any thread; `run` returns when it has done so."""
        self._server.should_exit = True

    def _release(self) -> None:
        self.service.close()
        self._socket.close()

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


def _impatient(protocol: Any) -> Any:
    """An HTTP protocol that closes a connection whose client takes too long to send headers.

    Args:
        protocol: uvicorn's protocol, which waits for them without a limit.
    """

    class Impatient(protocol):  # type: ignore[misc]
        _limit: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self._set_limit()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._set_limit()

        def connection_lost(self, exc: Exception | None) -> None:
            self._clear_limit()
            super().connection_lost(exc)

        def _set_limit(self) -> None:
            """Begin to wait for headers, unless a request is answered at this time."""
            if self.cycle is not None and not self.cycle.response_complete:
                self._clear_limit()
            elif self._limit is None:
                self._limit = self.loop.call_later(HEADERS_S, self.transport.close)

        def _clear_limit(self) -> None:
            if self._limit is not None:
                self._limit.cancel()
                self._limit = None

    return Impatient


def _listen(settings: ServerSettings) -> socket.socket:
    """Open the listening socket, so that an address in use fails before models are opened.

    Raises:
        UsageError: the server cannot listen on the address.
    """
    try:
        kind, _, _, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        made = socket.socket(kind, socket.SOCK_STREAM)
    except OSError as err:
        raise UsageError(f"the address {settings.host} cannot be used: {err.strerror}") from err
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(128)
    except OSError as err:
        made.close()
        raise UsageError(
            f"cannot listen on {settings.host} port {settings.port}: {err.strerror}; choose "
            "another --port, or 0 for any free port"
        ) from err
    return made


def log_to(write: Callable[[str], None], level: int = logging.INFO) -> None:
    """Pass each line of the server's log to a function.

    Args:
        write: called with each line.
        level: lowest level of `logging` to log.
    """

    class LogLines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            write(self.format(record))

    log = logging.getLogger("edgeq.serving")
    handler = LogLines()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(level)
