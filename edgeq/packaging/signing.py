"""Signatures of manifests with Ed25519, so that only who has the key can make a package.

``manifest.sig`` has two lines: the public key and the signature of ``manifest.json``'s bytes, both
in hexadecimal. It shows who signed; whether that is who should have is asked with the public key
that the reader has from elsewhere.

Keys are files as OpenSSL writes them::

    openssl genpkey -algorithm ed25519 -out key.pem
    openssl pkey -in key.pem -pubout -out key.pub

Source: RFC 8032 (Ed25519).
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from edgeq.core.errors import FormatError, UsageError, require
from edgeq.packaging import manifest
from edgeq.packaging.tree import SIGNATURE

_MOST = 1 << 16
_MAKE = "make one with: openssl genpkey -algorithm ed25519 -out key.pem"


def need() -> None:
    """Refuse, before any work, where the package that signs is not installed.

    Raises:
        MissingDependencyError: it is not.
    """
    require("sign", ["cryptography"], "to sign packages and to check signatures")


def read_private_key(path: str | Path) -> Any:
    """A private key from a PEM file.

    Raises:
        UsageError: there is no such file, or it holds another kind of key, or a password is needed.
        MissingDependencyError: the package that signs is not installed.
    """
    need()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(_content(path), None)
    except TypeError as err:  # a password is needed
        raise UsageError(
            f"{path} is protected by a password; write it without one: "
            f"openssl pkey -in {shlex.quote(str(path))} -out plain.pem"
        ) from err
    except (ValueError, UnsupportedAlgorithm) as err:
        raise UsageError(f"{path} is not a private key: {err}; {_MAKE}") from err
    if not isinstance(key, Ed25519PrivateKey):
        raise UsageError(f"{path} is a key of another kind than Ed25519; {_MAKE}")
    return key


def read_public_key(path: str | Path) -> str:
    """A public key from a PEM file, in hexadecimal; a private one gives its public part.

    Raises:
        UsageError: there is no such file, or it holds another kind of key.
        MissingDependencyError: the package that checks signatures is not installed.
    """
    need()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    raw = _content(path)
    if b"PRIVATE" in raw:
        return public_hex(read_private_key(path))
    try:
        key = load_pem_public_key(raw)
    except (ValueError, TypeError, UnsupportedAlgorithm) as err:
        raise UsageError(f"{path} is not a public key: {err}") from err
    if not isinstance(key, Ed25519PublicKey):
        raise UsageError(f"{path} is a key of another kind than Ed25519")
    found: str = key.public_bytes_raw().hex()
    return found


def public_hex(key: Any) -> str:
    """The public part of a private key, in hexadecimal."""
    found: str = key.public_key().public_bytes_raw().hex()
    return found


def sign(folder: Path, key: Any) -> str:
    """Sign the manifest of a package.

    Args:
        folder: of the package, with its manifest.
        key: of `read_private_key`.

    Returns:
        the public key, in hexadecimal.
    """
    signature = key.sign((folder / manifest.NAME).read_bytes())
    public = public_hex(key)
    (folder / SIGNATURE).write_bytes(f"{public}\n{signature.hex()}\n".encode())
    return public


def signer(folder: Path) -> str | None:
    """Who signed a package: a public key in hexadecimal; None if nobody did.

    Raises:
        FormatError: the signature is damaged, or is not of this manifest.
        MissingDependencyError: the package that checks signatures is not installed.
    """
    place = folder / SIGNATURE
    if not place.exists() and not place.is_symlink():
        return None
    need()
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        if place.is_symlink() or place.stat().st_size > _MOST:
            raise FormatError(f"{SIGNATURE} is not a signature")
        raw = place.read_bytes()
        public, signature, rest = raw.decode("ascii").split("\n")
        if rest or raw != f"{public}\n{signature}\n".encode() or raw != raw.lower():
            raise FormatError(f"{SIGNATURE} is not a signature: it has other lines than two")
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public))
        key.verify(bytes.fromhex(signature), (folder / manifest.NAME).read_bytes())
    except InvalidSignature as err:
        raise FormatError(
            f"{SIGNATURE} is not the signature of {manifest.NAME}: one of the two was changed"
        ) from err
    except (ValueError, UnicodeDecodeError) as err:
        raise FormatError(f"{SIGNATURE} is not a signature: {err}") from err
    except OSError as err:
        raise FormatError(f"{SIGNATURE} cannot be read: {err.strerror or err}") from err
    return public


def _content(path: str | Path) -> bytes:
    place = Path(path)
    try:
        if place.stat().st_size > _MOST:
            raise UsageError(f"{place} is too long for a key")
        return place.read_bytes()
    except OSError as err:
        raise UsageError(f"the key {place} cannot be read: {err.strerror or err}") from err
