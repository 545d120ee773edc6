"""Signatures with Ed25519: who made a package, and that nobody changed it."""

from __future__ import annotations

import shutil
import sys
from functools import partial
from pathlib import Path

import pytest

from edgeq.core.errors import MissingDependencyError, UsageError
from edgeq.packaging.build import package
from edgeq.packaging.verify import verify_package
from tests.packaging.damages import sealed_again


def pem(path: Path, seed: int) -> Path:
    """A key pair as OpenSSL writes it: ``path`` and ``path.pub``."""
    pytest.importorskip("cryptography")
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.from_private_bytes(bytes([seed] * 32))
    path.write_bytes(
        key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
    )
    public = key.public_key().public_bytes(
        form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo
    )
    path.with_suffix(".pub").write_bytes(public)
    return path


@pytest.fixture(scope="module")
def signed_made(chat_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("signed")
    pem(folder / "key.pem", 1)
    package(chat_artifact, "rpi", folder / "out", context=128, sign=folder / "key.pem")
    return folder


@pytest.fixture
def signed(signed_made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(signed_made, tmp_path / "signed"))


def test_a_signed_package_verifies_with_its_key_alone(signed: Path, tmp_path: Path) -> None:
    report = verify_package(signed / "out", verify_key=signed / "key.pub", run=False)
    assert report.passed
    assert report.signed_by == verify_package(signed / "out", run=False).signed_by
    assert verify_package(signed / "out", verify_key=signed / "key.pem", run=False).passed
    other = pem(tmp_path / "other.pem", 2).with_suffix(".pub")
    wrong = verify_package(signed / "out", verify_key=other, run=False)
    assert "was signed with the key" in str(wrong.fault)
    assert wrong.place == "manifest.sig"


def test_a_forged_package_is_found_by_its_signature(signed: Path) -> None:
    sealed_again(signed / "out", **{"README.md": b"forged"})
    report = verify_package(signed / "out", run=False)
    assert report.place == "manifest.sig"
    assert "is not the signature of manifest.json" in str(report.fault)
    (signed / "out/manifest.sig").unlink()
    assert verify_package(signed / "out", run=False).passed  # nothing says who made it
    report = verify_package(signed / "out", verify_key=signed / "key.pub", run=False)
    assert "not signed" in str(report.fault)


def test_every_changed_bit_of_a_signature_is_found(signed: Path) -> None:
    place = signed / "out/manifest.sig"
    right = place.read_bytes()
    for at in range(0, len(right), 3):
        place.write_bytes(right[:at] + bytes([right[at] ^ (1 << at % 8)]) + right[at + 1 :])
        report = verify_package(signed / "out", run=False)
        assert report.place == "manifest.sig", at
    for text in (b"", right[:-1], right + b"\n", right.upper()):
        place.write_bytes(text)
        assert verify_package(signed / "out", run=False).place == "manifest.sig"


def test_the_same_key_gives_the_same_bytes(
    signed: Path, chat_artifact: Path, tmp_path: Path
) -> None:
    package(chat_artifact, "rpi", tmp_path / "out", context=128, sign=signed / "key.pem")
    for name in ("manifest.sig", "manifest.json"):
        assert (tmp_path / "out" / name).read_bytes() == (signed / "out" / name).read_bytes()


def test_keys_that_cannot_sign_are_refused_before_any_work(
    chat_artifact: Path, signed: Path, tmp_path: Path
) -> None:
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    (tmp_path / "text").write_text("no key")
    for name, make, password in (
        ("other", partial(ec.generate_private_key, ec.SECP256R1()), form.NoEncryption()),
        ("locked", ed25519.Ed25519PrivateKey.generate, form.BestAvailableEncryption(b"secret")),
    ):
        raw = make().private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, password)
        (tmp_path / name).write_bytes(raw)
    for key, words in (
        (tmp_path / "none", "cannot be read"),
        (tmp_path / "text", "not a private key"),
        (signed / "key.pub", "not a private key"),
        (tmp_path / "other", "is not an Ed25519 key"),
        (tmp_path / "locked", "protected by a password"),
    ):
        with pytest.raises(UsageError, match=words):
            package(chat_artifact, "rpi", tmp_path / "out", sign=key)
    with pytest.raises(UsageError, match="not a public key"):
        verify_package(signed / "out", verify_key=tmp_path / "text")
    assert not (tmp_path / "out").exists()


def test_the_missing_package_is_named_before_any_work(
    chat_artifact: Path, rpi: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(MissingDependencyError, match=r"edgeq\[sign\]"):
        package(chat_artifact, "rpi", tmp_path / "out", sign=tmp_path / "key")
    (rpi / "manifest.sig").write_text("a\nb\n")
    with pytest.raises(MissingDependencyError, match=r"edgeq\[sign\]"):
        verify_package(rpi)
