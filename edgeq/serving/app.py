"""The ASGI application of the server, on Starlette: routes, API keys and limits."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from edgeq._version import __version__
from edgeq.serving import answers, metrics, openapi, responses
from edgeq.serving.embeddings import embedding_call
from edgeq.serving.failures import ApiError, shutting_down
from edgeq.serving.fields import read_json
from edgeq.serving.phone import phone_addresses
from edgeq.serving.requests import Call, chat_call, chosen_model, completion_call, read_for_model
from edgeq.serving.reranking import rerank_call
from edgeq.serving.service import Service
from edgeq.serving.token_requests import DETOKENIZE, TOKENIZE, detokenized, tokenized

LOG = logging.getLogger("edgeq.serving")
BODY_S = 30.0
"""Seconds within which a client must send the whole body of a request."""
DISCARD_S = 10.0
DISCARD_BYTES = 64 << 20
"""How long, and how much, the server reads on of the body of a refused request."""
GONE = 499
"""Status under which requests are counted whose client disconnected, as in nginx."""
OPEN_PATHS = frozenset(("/", "/health"))
"""Paths that need no API key. The chat page asks the user for the key and holds no secrets."""
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}
_PAGE_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/chat.css": ("chat.css", "text/css; charset=utf-8"),
    **{
        f"/{name}.js": (f"{name}.js", "text/javascript; charset=utf-8")
        for name in ("api", "chat", "drawers", "markdown", "measures")
    },
}

Endpoint = Callable[[Request], Coroutine[Any, Any, ASGIApp]]


class EventStream:
    """A response of server-sent events that closes its source when the client disconnects."""

    def __init__(self, events: AsyncIterator[bytes]) -> None:
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until they end or the client disconnects."""
        begun = False

        async def pump() -> None:
            nonlocal begun
            headers = [
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"cache-control", b"no-store"),
                (b"x-accel-buffering", b"no"),
            ]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            begun = True
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            await unless_gone(receive, pump())
        except ClientDisconnect:
            pass
        except asyncio.CancelledError:  # by the end of the server
            if not begun:
                raise
            last = answers.sse(shutting_down().body())
            await send({"type": "http.response.body", "body": last, "more_body": False})


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Any]) -> Any:
    """Await a coroutine, and cancel it if the client disconnects first.

    Returns:
        the result of the coroutine.

    Raises:
        ClientDisconnect: the client disconnected; the coroutine was canceled and has ended.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        for one in (task, watch):
            one.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


class WatchedBody:
    """The body of a request, of which a refusal may leave a part unread.

    A client may read the refusal only after it has sent the whole body. If the server closed the
    connection before that, the client would get no refusal but a reset connection.

    Args:
        receive: the function that receives the body.
        request: the request.
    """

    def __init__(self, receive: Receive, request: Request) -> None:
        self._receive = receive
        self.done = request.headers.get("expect", "").lower() == "100-continue"

    async def receive(self) -> Any:
        """Receive a message, and note the end of the body."""
        message = await self._receive()
        self.done = not message.get("more_body", False)
        return message

    async def discard(self) -> None:
        """Read the rest of the body, within limits of time and size.

        A client that waits for leave to send the body gets none.
        """
        rest = DISCARD_BYTES
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DISCARD_S):
                while not self.done and rest > 0:
                    rest -= len((await self.receive()).get("body", b""))


class Guard:
    """Middleware that checks the Host header and the API key, and logs the status of a request.

    Args:
        app: the application that answers the request.
        service: the service with the settings of the server.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer it with an error."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), GONE
        body = WatchedBody(receive, Request(scope))

        async def watched(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if status >= 400 and status != 408:  # whose rest is late
                    await body.discard()
            await send(message)

        try:
            refused = self._refused(Request(scope))
            await (refused or self._app)(scope, body.receive, watched)
        except asyncio.CancelledError:  # by the end of the server
            if status == GONE:
                body.done = True  # there is no time for it
                await failure(shutting_down())(scope, receive, watched)
        finally:
            path = scope["path"]
            self._service.metrics.requests[known_path(path), status] += 1
            LOG.info(
                "%s %s %s %.3f s", scope["method"], path.encode("unicode_escape").decode("ascii"),
                "client left" if status == GONE else status, time.perf_counter() - started,
            )  # fmt: skip

    def _refused(self, request: Request) -> Response | None:
        settings = self._service.settings
        if not settings.serves_host(request.headers.get("host")):
            return failure(
                ApiError(
                    403,
                    "wrong_host",
                    "this server accepts only localhost in the Host header; start it with --host "
                    "to accept other names",
                )
            )
        if settings.api_key is None or request.url.path in _open_paths():
            return None
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        given = key.strip().encode("utf-8", "surrogateescape")
        same = hmac.compare_digest(given, settings.api_key.encode())
        if kind.lower() == "bearer" and same:
            return None
        return failure(
            ApiError(
                401,
                "invalid_api_key",
                "this server needs its API key: send the header Authorization: Bearer KEY",
                headers={"WWW-Authenticate": "Bearer"},
            )
        )


def _open_paths() -> frozenset[str]:
    return OPEN_PATHS | frozenset(_PAGE_FILES)


def known_path(path: str) -> str:
    """The path under which a request is counted; all unknown paths are counted as one."""
    if path.startswith("/v1/models/"):
        return "/v1/models/{model}"
    return path if path in openapi.PATHS or path in _PAGE_FILES else "other"


def failure(error: ApiError) -> JSONResponse:
    """The HTTP response for an error."""
    return JSONResponse(error.body(), error.status, headers=error.headers)


async def body_of(request: Request, most: int) -> dict[str, Any]:
    """Read the JSON object in the body of a request.

    Args:
        request: the request.
        most: most bytes of the body.

    Raises:
        ApiError: the body is too large, arrives too late, or is not a JSON object.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(
            415,
            "unsupported_media_type",
            f"the Content-Type of the body is {kind[:60] or 'missing'}; send JSON with the header "
            "Content-Type: application/json",
        )
    declared = request.headers.get("content-length", "")
    raw = bytearray()
    too_long = ApiError(413, "body_too_large", f"the body has more than {most} bytes; send less")
    if declared.isdigit() and int(declared[:20]) > most:
        raise too_long
    try:
        async with asyncio.timeout(BODY_S):
            async for piece in request.stream():
                raw += piece
                if len(raw) > most:
                    raise too_long
    except TimeoutError as err:
        raise ApiError(
            408, "body_timeout", f"the body took more than {BODY_S:g} s; send it faster"
        ) from err
    return read_json(bytes(raw))


def endpoints(service: Service) -> dict[str, tuple[str, Endpoint]]:
    """Path -> HTTP method and function of every endpoint."""

    async def generate(
        request: Request,
        make: Callable[..., Call],
        whole: Callable[[Call, answers.Generate], Coroutine[Any, Any, dict[str, Any]]],
        stream: Callable[[Call, answers.Generate], AsyncIterator[bytes]],
    ) -> ASGIApp:
        body = await body_of(request, service.settings.body_bytes)
        # in a thread, because templates and long prompts take time
        call = await asyncio.to_thread(make, body, service.models, service.settings)
        service.log_prompt(call)

        def start(number: int) -> answers.Events:
            return service.generate(call, number)

        if not call.stream:
            return JSONResponse(await unless_gone(request.receive, whole(call, start)))
        events = stream(call, start)
        # nothing is sent before a slot is free, so that a full queue gives an HTTP status
        first = await unless_gone(request.receive, anext(events))  # type: ignore[arg-type]

        async def rest() -> AsyncIterator[bytes]:
            try:
                yield first
                async for event in answers.with_errors(events):
                    yield event
            finally:
                await events.aclose()  # type: ignore[attr-defined]

        return EventStream(rest())

    async def chat(request: Request) -> ASGIApp:
        return await generate(request, chat_call, answers.chat, answers.chat_stream)

    async def completion(request: Request) -> ASGIApp:
        return await generate(
            request, completion_call, answers.completion, answers.completion_stream
        )

    async def response(request: Request) -> ASGIApp:
        return await generate(
            request, responses.response_call, responses.response, responses.response_stream
        )

    async def embeddings(request: Request) -> Response:
        body = await body_of(request, service.settings.body_bytes)
        call = await asyncio.to_thread(embedding_call, body, service.models)
        vectors = await unless_gone(request.receive, service.embed(call))
        return JSONResponse(await asyncio.to_thread(call.answer, vectors))

    async def rerank(request: Request) -> Response:
        body = await body_of(request, service.settings.body_bytes)
        call = await asyncio.to_thread(rerank_call, body, service.models)
        scores = await unless_gone(request.receive, service.rerank(call))
        return JSONResponse(call.answer(scores))

    async def models(request: Request) -> Response:
        listed = [one.described() for one in service.models.values()]
        return JSONResponse({"object": "list", "data": listed})

    async def model(request: Request) -> Response:
        return JSONResponse(chosen_model(service.models, request.path_params["model"]).described())

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def props(request: Request) -> Response:
        return JSONResponse(
            {
                "version": __version__,
                "models": [one.facts() for one in service.models.values()],
                "default_generation_settings": service.defaults(),
                "live": service.live(),
            },
            headers={"Cache-Control": "no-store"},
        )

    async def prometheus(request: Request) -> Response:
        return Response(service.prometheus(), media_type=metrics.CONTENT_TYPE)

    async def tokenize(request: Request) -> Response:
        body = await body_of(request, service.settings.body_bytes)
        values, served = read_for_model(body, TOKENIZE, service.models)
        return JSONResponse(await asyncio.to_thread(tokenized, values, served))

    async def detokenize(request: Request) -> Response:
        body = await body_of(request, service.settings.body_bytes)
        values, served = read_for_model(body, DETOKENIZE, service.models)
        return JSONResponse(await asyncio.to_thread(detokenized, values, served))

    async def document(request: Request) -> Response:
        return JSONResponse(openapi.document(bool(service.settings.api_key)))

    async def card(request: Request) -> Response:
        served = chosen_model(service.models, request.path_params["model"])
        return JSONResponse(await asyncio.to_thread(service.card, served))

    async def phone(request: Request) -> Response:
        port = request.scope["server"][1]
        host = request.headers.get("host")
        found = await asyncio.to_thread(phone_addresses, service.settings, port, host)
        return JSONResponse(found, headers={"Cache-Control": "no-store"})

    return {
        "/health": ("GET", health),
        "/phone": ("GET", phone),
        "/metrics": ("GET", prometheus),
        "/props": ("GET", props),
        "/openapi.json": ("GET", document),
        "/v1/models": ("GET", models),
        "/v1/models/{model}/card": ("GET", card),
        "/v1/models/{model}": ("GET", model),
        "/v1/chat/completions": ("POST", chat),
        "/v1/completions": ("POST", completion),
        "/v1/responses": ("POST", response),
        "/v1/embeddings": ("POST", embeddings),
        "/v1/rerank": ("POST", rerank),
        "/tokenize": ("POST", tokenize),
        "/detokenize": ("POST", detokenize),
    }


def page_file(name: str) -> Endpoint:
    """The endpoint that serves a file of the chat page."""
    file, kind = _PAGE_FILES[name]
    raw = (resources.files("edgeq.serving") / "page" / file).read_bytes()

    async def send(request: Request) -> Response:
        return Response(raw, media_type=kind, headers=_PAGE_HEADERS)

    return send


def application(service: Service) -> Starlette:
    """The server as an ASGI application; it closes the service when it shuts down."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        # in a thread, because answers that were canceled still need the event loop
        await asyncio.to_thread(service.close)

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return failure(error)

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        status = error.status_code
        code = {404: "unknown_url", 405: "method_not_allowed"}.get(status, "http_error")
        message = f"{request.method} {request.url.path[:100]}: {error.detail}; see /openapi.json"
        return failure(ApiError(status, code, message, headers=dict(error.headers or {})))

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=GONE)  # nobody reads it

    async def broken(request: Request, error: Exception) -> Response:
        LOG.error("answering failed", exc_info=error)
        return failure(ApiError(500, "internal_error", "the server failed; see its log"))

    routes = [
        # names of models may hold slashes
        Route(path.replace("{model}", "{model:path}"), endpoint, methods=[method])
        for path, (method, endpoint) in endpoints(service).items()
    ]
    routes += [Route(path, page_file(path)) for path in _PAGE_FILES]
    middleware = [Middleware(Guard, service=service)]
    if service.settings.cors_origins:
        middleware.insert(  # outermost, so that pages can read errors too
            0,
            Middleware(
                CORSMiddleware,
                allow_origins=list(service.settings.cors_origins),
                allow_methods=["GET", "POST"],
                allow_headers=["*"],  # OpenAI's client for browsers sends several of its own
                expose_headers=["Retry-After"],
            ),
        )
    handlers: Mapping[Any, Any] = {
        ApiError: refused, HTTPException: http_error, ClientDisconnect: gone, Exception: broken,
    }  # fmt: skip
    return Starlette(
        routes=routes, middleware=middleware, exception_handlers=handlers, lifespan=lifespan
    )
