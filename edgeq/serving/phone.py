"""QR codes of the addresses at which a phone in the same network reaches the chat page."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from typing import Any

from edgeq.core.errors import MissingDependencyError, require
from edgeq.serving.settings import ServerSettings

_ELSEWHERE = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}
"""Addresses reserved for documentation. A route to them tells which local address leads to other
networks; nothing is sent."""

_EVERYWHERE = {
    "0.0.0.0": (socket.AF_INET,),
    "::": (socket.AF_INET, socket.AF_INET6),
    "": (socket.AF_INET, socket.AF_INET6),
}
"""Wildcard addresses -> the address families that the server listens on."""


def phone_addresses(settings: ServerSettings, port: int, host: str | None) -> dict[str, Any]:
    """Addresses of the page for other machines, each with a QR code.

    Args:
        settings: settings of the server.
        port: port that the server listens on.
        host: header ``Host`` of the request, a name that reaches the server; None without one.

    Returns:
        ``addresses``, each with ``url`` and ``qr`` (a data URI of an SVG, or None), and ``reason``,
        which says why there is no address or no QR code (or None).
    """
    if settings.is_loopback:
        return {
            "addresses": [],
            "reason": "This server answers to this machine only. Start it with --host 0.0.0.0 and "
            "--api-key KEY to let a phone in the same network use it.",
        }
    urls = list(dict.fromkeys(_urls(settings, port, host)))
    try:
        require("serve", ("segno",), "to show an address as a QR code")
    except MissingDependencyError as err:
        return {"addresses": [{"url": url, "qr": None} for url in urls], "reason": str(err)}
    return {"addresses": [{"url": url, "qr": qr_code(url)} for url in urls], "reason": None}


def qr_code(text: str) -> str:
    """A QR code as the data URI of an SVG: black on white, with the margin that readers need."""
    import segno

    code = segno.make(text, micro=False, error="m")
    return str(code.svg_data_uri(scale=6, border=4, dark="#000", light="#fff", xmldecl=False))


def _urls(settings: ServerSettings, port: int, host: str | None) -> Iterable[str]:
    """The name in the Host header, if other machines can use it, and the listening addresses."""
    if host and host.isascii() and not set(host) & set(" /?#@\\<>\"'"):
        name = host.rpartition(":")[0] if ":" in host and not host.endswith("]") else host
        if not _is_local(name.strip("[]")):
            yield f"http://{host}/"
    listened = settings.host
    found = [listened]
    if listened in _EVERYWHERE:
        found = _outward(_EVERYWHERE[listened])
    for address in found:
        shown = f"[{address}]" if ":" in address else address
        yield f"http://{shown}:{port}/"


def _is_local(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name.lower() == "localhost" or name.lower().endswith(".localhost")


def _outward(families: Iterable[socket.AddressFamily]) -> list[str]:
    """The addresses of this machine from which packets to other networks are sent."""
    found = []
    for family in families:
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((_ELSEWHERE[family], 9))  # chooses a route, and sends nothing
                address = probe.getsockname()[0]
        except OSError:  # no such network
            continue
        if not _is_local(address):
            found.append(str(address))
    return found
