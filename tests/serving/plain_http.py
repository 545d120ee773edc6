"""Requests as bytes, so that wrong ones can be sent too."""

from __future__ import annotations

import http.client
import json
import socket
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import edgeq

JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Reply:
    """What a server answered."""

    status: int
    headers: dict[str, str]
    raw: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.raw)

    @property
    def code(self) -> str:
        """The error's code, after a check that it is an error as OpenAI's clients know it."""
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
        return str(error["code"])


def ask(
    server: edgeq.Server,
    path: str,
    body: Any = None,
    *,
    method: str | None = None,
    headers: dict[str, str] | None = None,
) -> Reply:
    """Send a request: a dictionary as JSON, bytes as they are."""
    raw = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
    where = urlsplit(server.url)
    connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=60)
    try:
        sent = {**(JSON if raw is not None else {}), **(headers or {})}
        connection.request(method or ("GET" if raw is None else "POST"), path, raw, sent)
        answer = connection.getresponse()
        named = {name.lower(): value for name, value in answer.getheaders()}
        return Reply(answer.status, named, answer.read())
    finally:
        connection.close()


def begin(
    server: edgeq.Server, path: str, body: dict[str, Any], sent: int | None = None
) -> socket.socket:
    """Send a request and leave the answer unread; the caller closes the socket.

    Args:
        server, path, body: as for `ask`.
        sent: bytes of the body that are sent; all of them if None.
    """
    where = urlsplit(server.url)
    made = socket.create_connection((where.hostname, where.port), timeout=60)
    raw = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    made.sendall(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw[:sent])
    return made


def everything(connection: socket.socket) -> bytes:
    """All that comes until the other side ends the connection."""
    with connection:
        found = b""
        while more := connection.recv(1 << 16):
            found += more
        return found


def metric(server: edgeq.Server, name: str) -> float:
    """A figure of ``/metrics``; labels are part of its name."""
    for line in ask(server, "/metrics").raw.decode().splitlines():
        if line.startswith(name + " "):
            return float(line.rsplit(" ", 1)[1])
    raise KeyError(name)
