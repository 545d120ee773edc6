"""Ed25519 signatures of manifests, which show who built a package.

``manifest.sig`` has two lines: the public key and the signature of the bytes of ``manifest.json``,
both in hexadecimal. The signature shows which key signed the package. Whether that is the right
key is decided by comparison with a public key that the user has from another source.

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
    """Check that the Python package that signs is installed, before any work starts.

    Raises:
        MissingDependencyError: it is not installed.
    """
    require("sign", ["cryptography"], "to sign packages and to check signatures")


def read_private_key(path: str | Path) -> Any:
    """Read a private key from a PEM file.

    Raises:
        UsageError: the file does not exist, is not an Ed25519 private key, or needs a password.
        MissingDependencyError: the Python package that signs is not installed.
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
        raise UsageError(f"{path} is not an Ed25519 key; {_MAKE}")
    return key


def read_public_key(path: str | Path) -> str:
    """Read a public key from a PEM file; of a private key, the public part.

    Returns:
        the key in hexadecimal.

    Raises:
        UsageError: the file does not exist, or is not an Ed25519 key.
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
        raise UsageError(f"{path} is not an Ed25519 key; give the public key of a package's signer")
    found: str = key.public_bytes_raw().hex()
    return found


def public_hex(key: Any) -> str:
    """The public part of a private key, in hexadecimal."""
    found: str = key.public_key().public_bytes_raw().hex()
    return found


def sign(folder: Path, key: Any) -> str:
    """Sign the manifest of a package.

    Args:
        folder: folder of the package, with its manifest.
        key: the key that `read_private_key` read.

    Returns:
        the public key, in hexadecimal.
    """
    signature = key.sign((folder / manifest.NAME).read_bytes())
    public = public_hex(key)
    (folder / SIGNATURE).write_bytes(f"{public}\n{signature.hex()}\n".encode())
    return public


def signer(folder: Path) -> str | None:
    """The public key, in hexadecimal, that signed a package; None if it is not signed.

    Raises:
        FormatError: the signature is damaged, or does not belong to this manifest.
        MissingDependencyError: the package that checks signatures is not installed.
    """
    place = folder / SIGNATURE
    if not place.exists() and not place.is_symlink():
        return None
    need()
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        if place.is_symlink() or not place.is_file() or place.stat().st_size > _MOST:
            raise FormatError(
                f"{SIGNATURE} is not a signature: it is a link, not a file, or larger than {_MOST} "
                "bytes"
            )
        raw = place.read_bytes()
        public, signature, rest = raw.decode("ascii").split("\n")
        if rest or raw != f"{public}\n{signature}\n".encode() or raw != raw.lower():
            raise FormatError(
                f"{SIGNATURE} is not a signature: it does not have exactly two lines of lower-case "
                "hexadecimal digits"
            )
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
            raise UsageError(f"{place} is too large for a key: it has more than {_MOST} bytes")
        return place.read_bytes()
    except OSError as err:
        raise UsageError(f"the key {place} cannot be read: {err.strerror or err}") from err
