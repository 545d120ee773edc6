"""Ways to damage a package, each drawn by chance, and the file that a report of it must name."""

from __future__ import annotations

import json
import os
import random
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeq.packaging import signing, tree
from edgeq.packaging.manifest import Manifest, read_manifest
from tests.packaging.test_manifest import resealed

MANIFEST = "manifest.json"
OUTSIDE = "outside"
"""A file beside the package that some damages make."""


def files(folder: Path) -> list[str]:
    return list(tree.files_in(folder))


def some(folder: Path, rng: random.Random) -> str:
    """A file of the package, the manifest among them."""
    return rng.choice([*files(folder), MANIFEST])


def flip_a_bit(folder: Path, rng: random.Random) -> str:
    name = some(folder, rng)
    data = bytearray((folder / name).read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    (folder / name).write_bytes(bytes(data))
    return name


def cut_a_file(folder: Path, rng: random.Random) -> str:
    name = some(folder, rng)
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: rng.randrange(len(data))])
    return name


def empty_a_file(folder: Path, rng: random.Random) -> str:
    name = some(folder, rng)
    (folder / name).write_bytes(b"")
    return name


def lengthen_a_file(folder: Path, rng: random.Random) -> str:
    name = some(folder, rng)
    with (folder / name).open("ab") as file:
        file.write(rng.randbytes(rng.randint(1, 9)))
    return name


def remove_a_file(folder: Path, rng: random.Random) -> str:
    name = rng.choice(files(folder))
    (folder / name).unlink()
    return name


def add_a_file(folder: Path, rng: random.Random) -> str:
    name = f"{rng.choice(['', 'model/', 'golden/', 'new/'])}extra{rng.randrange(100)}.bin"
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(rng.randbytes(rng.choice([0, rng.randrange(50)])))
    return name


def add_an_empty_folder(folder: Path, rng: random.Random) -> str:
    name = f"{rng.choice(['', 'golden/', 'certificates/'])}extra{rng.randrange(100)}"
    (folder / name).mkdir(parents=True)
    return name


def add_a_hard_link(folder: Path, rng: random.Random) -> str:
    name = f"golden/extra{rng.randrange(100)}.bin"
    os.link(folder / rng.choice(files(folder)), folder / name)
    return name


def exchange_two_files(folder: Path, rng: random.Random) -> str:
    a, b = sorted(rng.sample(files(folder), 2))
    while (folder / a).read_bytes() == (folder / b).read_bytes():
        a, b = sorted(rng.sample(files(folder), 2))
    kept = (folder / a).read_bytes()
    (folder / a).write_bytes((folder / b).read_bytes())
    (folder / b).write_bytes(kept)
    return a


def rename_a_file(folder: Path, rng: random.Random) -> str:
    name = rng.choice(files(folder))
    (folder / name).rename(folder / f"{name}.old")
    return name


def change_the_case_of_a_name(folder: Path, rng: random.Random) -> str:
    name = rng.choice(files(folder))
    (folder / name).rename((folder / name).with_name((folder / name).name.swapcase()))
    return name


def write_a_name_in_other_letters(folder: Path, rng: random.Random) -> str:
    """One letter becomes its full-width form, which Unicode's normalization NFKC takes back."""
    name = rng.choice(files(folder))
    place = folder / name
    wide = "".join(chr(ord(c) + 0xFEE0) if c == "." else c for c in place.name)
    place.rename(place.with_name(wide if wide != place.name else f"{place.name}\u0301"))
    return name


def change_a_mode(folder: Path, rng: random.Random) -> str:
    name = rng.choice(files(folder))
    (folder / name).chmod((folder / name).stat().st_mode ^ 0o111)
    return name


def let_a_file_run_as_its_owner(folder: Path, rng: random.Random) -> str:
    name = rng.choice(files(folder))
    (folder / name).chmod((folder / name).stat().st_mode | stat.S_ISUID)
    return name


def link_a_file(folder: Path, rng: random.Random) -> str:
    name = rng.choice(files(folder))
    outside = folder.parent / OUTSIDE
    shutil.move(folder / name, outside)
    (folder / name).symlink_to(outside)
    return name


def put_a_pipe_in_place_of_a_file(folder: Path, rng: random.Random) -> str:
    name = rng.choice(files(folder))
    (folder / name).unlink()
    os.mkfifo(folder / name)
    return name


def edit_the_manifest(folder: Path, rng: random.Random) -> str:
    data = json.loads((folder / MANIFEST).read_text("utf-8"))
    key = rng.choice(["name", "edgeq", "platform", "versions", "model"])
    data[key] = {"new": "x"} if isinstance(data[key], dict) else f"{data[key]}x"
    text = json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    (folder / MANIFEST).write_text(text, "utf-8")
    return MANIFEST


def repeat_a_key_of_the_manifest(folder: Path, rng: random.Random) -> str:
    text = (folder / MANIFEST).read_text("utf-8")
    lines = text.splitlines(keepends=True)
    at = rng.choice([i for i, line in enumerate(lines) if line.startswith(' "platform"')])
    lines.insert(at, ' "platform": "other",\n')
    (folder / MANIFEST).write_text("".join(lines), "utf-8")
    return MANIFEST


def _resealed_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> str:
    data = json.loads((folder / MANIFEST).read_text("utf-8"))
    change(data)
    (folder / MANIFEST).write_bytes(resealed(data))
    return MANIFEST


def put_nan_into_the_manifest(folder: Path, rng: random.Random) -> str:
    number = rng.choice([float("nan"), float("inf"), -float("inf")])
    return _resealed_manifest(folder, lambda data: data["model"].update(parameters=number))


def name_a_file_outside(folder: Path, rng: random.Random) -> str:
    path = rng.choice(["../outside", "/etc/passwd", "model/../../outside", "model\\outside"])

    def change(data: dict[str, Any]) -> None:
        data["files"][path] = {"sha256": "0" * 64, "bytes": 0}

    return _resealed_manifest(folder, change)


def name_a_file_twice_in_other_case(folder: Path, rng: random.Random) -> str:
    def change(data: dict[str, Any]) -> None:
        name = rng.choice(list(data["files"]))
        data["files"][name.swapcase()] = data["files"][name]

    return _resealed_manifest(folder, change)


def name_what_no_package_has(folder: Path, rng: random.Random) -> str:
    """A platform, a kind, a name or a form that edgeq does not have, or a control character."""
    key = rng.choice(["platform", "kind", "name", "edgeq", "form", "target"])

    def change(data: dict[str, Any]) -> None:
        inner = data["variants"][0] if key in ("form", "target") else data
        inner[key] = "\x1b[31mnone"

    return _resealed_manifest(folder, change)


def say_nothing_in_an_entry(folder: Path, rng: random.Random) -> str:
    def change(data: dict[str, Any]) -> None:
        entry = data["files"][rng.choice(list(data["files"]))]
        entry["executable"] = rng.choice([0, "yes", None, False])

    return _resealed_manifest(folder, change)


def sealed_again(folder: Path, **changes: bytes) -> None:
    """Change files and make the manifest and the certificates agree, as a forger would."""
    for name, content in changes.items():
        (folder / name).write_bytes(content)
    data = json.loads((folder / MANIFEST).read_text("utf-8"))
    for variant in data["variants"]:
        place = folder / variant["certificate"]
        certificate = json.loads(place.read_text("utf-8"))
        for name in certificate["files"]:
            entry = tree.entry_of(folder / name)
            certificate["files"][name] = {"nbytes": entry.nbytes, "sha256": entry.sha256}
        place.write_text(json.dumps(certificate, indent=1, sort_keys=True) + "\n", "utf-8")
    made = read_manifest(folder)
    fresh = Manifest(**{**vars(made), "files": tree.entries_of(folder)})
    (folder / MANIFEST).write_bytes(fresh.to_bytes())


def edited(folder: Path, name: str, change: Callable[[Any], None]) -> bytes:
    """The content of a JSON file after a change."""
    data = json.loads((folder / name).read_text("utf-8"))
    change(data)
    return json.dumps(data).encode()


def exchange_two_tokens(folder: Path, rng: random.Random) -> str:
    """In the tokenizer, and everything is hashed again."""

    def change(data: Any) -> None:
        vocab = data["model"]["vocab"]
        letters = [token for token in vocab if len(token) == 1 and token.isalpha()]
        a, b = rng.sample([c for c in letters if c in "etaoinsrhl"], 2)
        vocab[a], vocab[b] = vocab[b], vocab[a]

    name = "tokenizer/tokenizer.json"
    sealed_again(folder, **{name: edited(folder, name, change)})
    return "tokenizer"


def change_the_template(folder: Path, rng: random.Random) -> str:
    """The chat template, and everything is hashed again."""
    word = rng.choice(["!", " please", "<|end|>"])

    def change(data: Any) -> None:
        data["chat_template"] += word

    name = "tokenizer/tokenizer_config.json"
    sealed_again(folder, **{name: edited(folder, name, change)})
    return "tokenizer"


def change_the_weights(folder: Path, rng: random.Random) -> str:
    """A part of the model's file is written backwards, and everything is hashed again."""
    variant = read_manifest(folder).variants[0]
    name = max(variant.files, key=lambda file: (folder / file).stat().st_size)
    data = bytearray((folder / name).read_bytes())
    start, part = len(data) * 2 // 5, len(data) // 5
    start += rng.randrange(len(data) // 20)
    data[start : start + part] = bytes(reversed(data[start : start + part]))
    sealed_again(folder, **{name: bytes(data)})
    return variant.entry


def hash_a_changed_file_again(folder: Path, rng: random.Random) -> str:
    """A file is changed and the manifest agrees with it; only a signature can show that."""
    name = rng.choice(files(folder))
    with (folder / name).open("ab") as file:
        file.write(b"#")
    made = read_manifest(folder)
    fresh = Manifest(**{**vars(made), "files": tree.entries_of(folder)})
    (folder / MANIFEST).write_bytes(fresh.to_bytes())
    return tree.SIGNATURE


def sign_with_another_key(folder: Path, rng: random.Random) -> str:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    signing.sign(folder, Ed25519PrivateKey.from_private_bytes(rng.randbytes(32)))
    return tree.SIGNATURE


def change_the_signature(folder: Path, rng: random.Random) -> str:
    data = bytearray((folder / tree.SIGNATURE).read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    (folder / tree.SIGNATURE).write_bytes(bytes(data))
    return tree.SIGNATURE


def remove_the_signature(folder: Path, rng: random.Random) -> str:
    (folder / tree.SIGNATURE).unlink()
    if rng.random() < 0.5:
        os.mkfifo(folder / tree.SIGNATURE)
    return tree.SIGNATURE


@dataclass(frozen=True)
class Damage:
    """A way to damage a package.

    Args:
        apply: damages the package in a folder, and gives the path that the report must name.
        signed: whether the package is signed, and checked with the key that signed it.
        golden: whether only the golden tests show it.
        text: whether only packages of language models can have it.
    """

    apply: Callable[[Path, random.Random], str]
    signed: bool = False
    golden: bool = False
    text: bool = False

    @property
    def name(self) -> str:
        """In words."""
        return self.apply.__name__.replace("_", " ")


DAMAGES = (
    Damage(flip_a_bit), Damage(flip_a_bit, signed=True), Damage(flip_a_bit),
    Damage(cut_a_file), Damage(empty_a_file), Damage(lengthen_a_file), Damage(remove_a_file),
    Damage(add_a_file), Damage(add_an_empty_folder), Damage(add_a_hard_link),
    Damage(exchange_two_files), Damage(rename_a_file), Damage(change_the_case_of_a_name),
    Damage(write_a_name_in_other_letters), Damage(change_a_mode),
    Damage(let_a_file_run_as_its_owner), Damage(link_a_file),
    Damage(put_a_pipe_in_place_of_a_file), Damage(edit_the_manifest),
    Damage(repeat_a_key_of_the_manifest), Damage(put_nan_into_the_manifest),
    Damage(name_a_file_outside), Damage(name_a_file_twice_in_other_case),
    Damage(say_nothing_in_an_entry), Damage(name_what_no_package_has),
    Damage(exchange_two_tokens, text=True), Damage(change_the_template, text=True),
    Damage(change_the_weights, golden=True),
    Damage(hash_a_changed_file_again, signed=True), Damage(sign_with_another_key, signed=True),
    Damage(change_the_signature, signed=True), Damage(remove_the_signature, signed=True),
)  # fmt: skip


@dataclass(frozen=True)
class Found:
    """A damage and what the check of the package says.

    Args:
        damage: the kind.
        place: what must be named.
        fault: the first fault that the check names; None if it passed.
        named: whether the fault names the place.
    """

    damage: Damage
    place: str
    fault: str | None
    named: bool


def damaged(made: Path, scratch: Path, number: int = 200, seed: int = 17) -> list[Found]:
    """Damage copies of a package by chance, one after the other, and check each.

    Args:
        made: the package, which is not changed.
        scratch: an empty folder.
        number: of damages.
        seed: of what is drawn.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from edgeq.packaging.verify import verify_package

    rng = random.Random(seed)
    key = Ed25519PrivateKey.from_private_bytes(rng.randbytes(32))
    public = scratch / "key.pub"
    pem, subject = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(key.public_key().public_bytes(pem, subject))
    manifest = read_manifest(made)
    kinds = [
        damage for damage in DAMAGES
        if not damage.text or (manifest.kind != "graph" and (
            damage.apply is not change_the_template or manifest.model["chat"]))
    ]  # fmt: skip
    found = []
    for i in range(number):
        damage = kinds[i % len(kinds)]
        folder = Path(shutil.copytree(made, scratch / "copy"))
        (folder / tree.SIGNATURE).unlink(missing_ok=True)
        if damage.signed:
            signing.sign(folder, key)
        place = damage.apply(folder, rng)
        report = verify_package(
            folder, run=damage.golden, verify_key=public if damage.signed else None
        )
        named = not report.passed and (report.place == place or place in str(report.fault))
        found.append(Found(damage, place, report.fault, named))
        shutil.rmtree(folder)
        (scratch / OUTSIDE).unlink(missing_ok=True)
    return found
