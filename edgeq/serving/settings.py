"""The settings and limits of a server."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

from edgeq.core.errors import UsageError, unknown
from edgeq.importers.sentence_modules import POOLINGS
from edgeq.model.memory_layout import MAX_DRAFT, MAX_SEQUENCES
from edgeq.runtime.sampling import SamplingParams

LOOPBACK_NAMES = ("localhost",)


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Settings of a server.

    Args:
        host: address to listen on. Addresses other than loopback addresses need an API key.
        port: TCP port; 0 chooses a free port.
        parallel: number of answers of each model that are generated at the same time.
        queue: number of requests that may wait for a model; more are refused with status 429.
        api_key: key that clients must send as ``Authorization: Bearer KEY``; None for no key.
        insecure: allow an address that other machines can reach without an API key.
        cors_origins: origins whose web pages may call the server; "*" is any origin.
        timeout_s: most seconds of an answer, including the wait in the queue; the answer then ends
            with the tokens that it has.
        body_bytes: most bytes of a request body.
        drain_s: seconds that running answers may take once the server shuts down.
        prefix_bytes: memory limit for the KV caches of earlier conversations of all models
            together; 0 keeps none.
        lookup: number of tokens to draft by prompt lookup; 0 for none.
        mtp: draft with a model's own multi-token-prediction head where it has one.
        pooling: how hidden states become an embedding, "last", "mean" or "cls"; None uses what each
            model's files state.
        params: parameters of sampling for requests that do not set them.
        log_prompts: write prompts and answers to the log.

    Raises:
        UsageError: a value is out of range, or the address needs an API key.

    Example:
        >>> edgeq.ServerSettings(host="0.0.0.0", api_key="a long one").is_loopback
        False
    """

    host: str = "127.0.0.1"
    port: int = 8080
    parallel: int = 2
    queue: int = 32
    api_key: str | None = field(default=None, repr=False)
    insecure: bool = False
    cors_origins: tuple[str, ...] = ()
    timeout_s: float = 600.0
    body_bytes: int = 4 << 20
    drain_s: float = 30.0
    prefix_bytes: int = 256 << 20
    lookup: int = 0
    mtp: bool = True
    pooling: str | None = None
    params: SamplingParams = field(default_factory=SamplingParams)
    log_prompts: bool = False

    def __post_init__(self) -> None:
        ranges = {
            "port": (0, 65535), "parallel": (1, MAX_SEQUENCES), "queue": (0, 10_000),
            "timeout_s": (1, 86_400), "body_bytes": (1024, 1 << 30), "drain_s": (0, 3600),
            "prefix_bytes": (0, 1 << 40), "lookup": (0, MAX_DRAFT),
        }  # fmt: skip
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and low <= value <= high):
                raise UsageError(f"{name} is {value!r}; use {low} to {high}")
        if self.pooling is not None and self.pooling not in POOLINGS:
            raise UsageError(unknown("pooling", self.pooling, POOLINGS))
        if self.api_key is not None and not (
            self.api_key.isascii() and self.api_key.isprintable() and self.api_key.strip()
        ):
            raise UsageError(
                "the API key must have at least one character, and only printable ASCII characters"
            )
        if not self.is_loopback and self.api_key is None and not self.insecure:
            raise UsageError(
                f"the address {self.host} can be reached from other machines, so it needs an API "
                "key: set api_key (--api-key KEY), or listen on 127.0.0.1, or set insecure "
                "(--insecure) to let anybody use the server"
            )

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the address."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host in LOOPBACK_NAMES

    def serves_host(self, header: str | None) -> bool:
        """Whether a request's ``Host`` header names this server.

        Every name is accepted, unless the server listens on a loopback address. Then only loopback
        names are, which refuses web pages of other sites whose DNS name points to this machine
        (DNS rebinding).
        """
        if not self.is_loopback or header is None:
            return True
        name = header.rsplit(":", 1)[0] if not header.endswith("]") else header
        try:
            return ipaddress.ip_address(name.strip("[]")).is_loopback
        except ValueError:
            return name.lower() in LOOPBACK_NAMES
