"""``manifest.json``: everything that a package holds, in one form of bytes.

    manifest    1                               version of this form
    digest      SHA-256 of this text without the line of the digest itself
    name, platform, kind ("language model" or "graph"), edgeq (the version that made it)
    model       family, parameters, source and its digest, license, base model; of a graph its ends
    variants    a list: one for each runtime or class of devices, see `ModelVariant`
    versions    libraries that took part
    files       path -> sha256, bytes, blocks, and "executable" where it is

JSON with sorted keys, one space of indentation and no other freedom: a manifest that is not the
text which its content gives is damaged. Nothing in it depends on the time or the place of building.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from edgeq.core.errors import FormatError
from edgeq.core.files import is_inside
from edgeq.packaging.blocks import MOST, FileBlock

NAME = "manifest.json"
VERSION = 1
MOST_BYTES = 64 << 20
"""A longer manifest is not read."""
MOST_CONTEXT = 1 << 24
"""A form for more tokens is not read."""
_HASH = frozenset("0123456789abcdef")


@dataclass(frozen=True)
class Entry:
    """A file of a package.

    Args:
        sha256: of its content, in hexadecimal.
        nbytes: its size.
        executable: whether it may be executed.
        blocks: its parts, see `edgeq.packaging.blocks`.
    """

    sha256: str
    nbytes: int
    executable: bool = False
    blocks: tuple[FileBlock, ...] = ()


@dataclass(frozen=True)
class ModelVariant:
    """A model in one form, for one runtime.

    Args:
        id: name within the package, such as "litertlm".
        title: name of the runtime.
        target: what it was converted to: a target of `edgeq.convert`, or "edgeq".
        entry: path of the model's file or folder.
        files: paths of all files that this form needs on the device.
        scheme: how most weights are held.
        why: why this form was chosen, in sentences.
        requires: least versions: "os", "runtime".
        devices: which devices it is for, in words.
        context: tokens that it is built for; None for a graph.
        memory: need of memory for each context: "context", "weights_bytes", "cache_bytes",
            "other_bytes", "total_bytes".
        speed: expected speed: "device", "decode_tokens_per_s", "prefill_tokens_per_s", "fits".
        assumptions: what memory and speed take for granted.
        certificate, golden: paths of the certificate and of the golden results.
    """

    id: str
    title: str
    target: str
    entry: str
    files: tuple[str, ...]
    scheme: str
    why: tuple[str, ...]
    requires: Mapping[str, str]
    devices: str
    certificate: str
    golden: str
    context: int | None = None
    memory: tuple[Mapping[str, Any], ...] = ()
    speed: tuple[Mapping[str, Any], ...] = ()
    assumptions: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, data: Any) -> ModelVariant:
        """A variant as JSON holds it.

        Raises:
            FormatError: a field is missing, unknown or of another type.
        """
        names = {one.name for one in fields(cls)}
        if not isinstance(data, dict) or set(data) != names:
            raise FormatError(f"a variant must have the fields {', '.join(sorted(names))}")
        texts = ("id", "title", "target", "entry", "scheme", "devices", "certificate", "golden")
        lists = ("files", "why", "memory", "speed", "assumptions")
        known = (
            all(isinstance(data[name], str) for name in texts)
            and all(isinstance(data[name], list) for name in lists)
            and all(isinstance(x, str) for n in ("files", "why", "assumptions") for x in data[n])
            and all(isinstance(x, dict) for n in ("memory", "speed") for x in data[n])
            and isinstance(data["requires"], dict)
            and (data["context"] is None or type(data["context"]) is int)
            and (data["context"] is None or 0 < data["context"] <= MOST_CONTEXT)
        )
        if not known:
            raise FormatError(f"the variant {data['id']!r} has a field of a wrong type or size")
        for path in (data["entry"], data["certificate"], data["golden"], *data["files"]):
            check_path(path)
        values: dict[str, Any] = {n: tuple(v) if n in lists else v for n, v in data.items()}
        return cls(**values)


@dataclass(frozen=True)
class Manifest:
    """What a package is and holds.

    Args:
        name: of the package.
        platform: "ios", "android", "rpi" or "ort-mobile".
        kind: "language model" or "graph".
        edgeq: version that made it.
        model: facts about the model.
        variants: its forms, the one to begin with first.
        versions: libraries that took part, by name.
        files: every file but the manifest and its signature, by path.
    """

    name: str
    platform: str
    kind: str
    edgeq: str
    model: Mapping[str, Any]
    variants: tuple[ModelVariant, ...]
    versions: Mapping[str, str]
    files: Mapping[str, Entry] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """The text of ``manifest.json``."""
        about: dict[str, Any] = {
            "manifest": VERSION,
            "name": self.name,
            "platform": self.platform,
            "kind": self.kind,
            "edgeq": self.edgeq,
            "model": dict(self.model),
            "variants": [asdict(variant) for variant in self.variants],
            "versions": dict(self.versions),
            "files": {path: _entry_dict(entry) for path, entry in self.files.items()},
        }
        return _text(about | {"digest": hashlib.sha256(_text(about)).hexdigest()})

    @property
    def digest(self) -> str:
        """SHA-256 by which this version of the package is known, in hexadecimal."""
        return str(json.loads(self.to_bytes())["digest"])

    @classmethod
    def from_bytes(cls, raw: bytes) -> Manifest:
        """Read and check ``manifest.json``.

        Raises:
            FormatError: it is damaged or was edited, or is of a later version; says what is wrong.
        """
        try:
            data = json.loads(raw.decode("utf-8"))
        except (ValueError, RecursionError) as err:
            raise FormatError(f"{NAME} is not JSON: {err}") from err
        if not isinstance(data, dict) or type(data.get("manifest")) is not int:
            raise FormatError(f"{NAME} is not the manifest of an edgeq package")
        if data["manifest"] != VERSION:
            raise FormatError(
                f"{NAME} is of version {data['manifest']}; this edgeq reads version {VERSION}"
            )
        stated = data.pop("digest", None)
        try:
            actual = hashlib.sha256(_text(data)).hexdigest()
            text = _text(data | {"digest": stated})
        except (ValueError, RecursionError) as err:  # half a surrogate pair, nesting
            raise FormatError(f"{NAME} holds what no manifest does: {err}") from err
        if stated != actual or text != raw:
            raise FormatError(
                f"{NAME} was changed after the package was made: its content does not have the "
                "digest that it states"
            )
        del data["manifest"]
        if set(data) != {one.name for one in fields(cls)}:
            raise FormatError(f"{NAME} has other fields than a manifest of version {VERSION}")
        for name, kind in (
            ("name", str), ("platform", str), ("kind", str), ("edgeq", str), ("model", dict),
            ("variants", list), ("versions", dict), ("files", dict),
        ):  # fmt: skip
            if not isinstance(data[name], kind):
                raise FormatError(f"{NAME}: {name} is not a {kind.__name__}")
        variants = tuple(map(ModelVariant.from_dict, data.pop("variants")))
        files = {path: _entry(path, entry) for path, entry in data.pop("files").items()}
        made = cls(variants=variants, files=files, **data)
        if not variants:
            raise FormatError(f"{NAME} has no variants")
        for variant in variants:
            for path in (variant.certificate, variant.golden, *variant.files):
                if path not in files:
                    raise FormatError(f"{NAME}: the variant {variant.id} names {path}, no file")
            entry = variant.entry
            if not any(file == entry or file.startswith(f"{entry}/") for file in variant.files):
                raise FormatError(
                    f"{NAME}: no file of the variant {variant.id} is or lies in its entry {entry}"
                )
        return made


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a package.

    Raises:
        FormatError: there is none, or it is damaged.
    """
    path = folder / NAME
    try:
        if path.is_symlink() or not path.is_file():
            raise FormatError(f"{folder} is not an edgeq package: it has no {NAME}")
        if path.stat().st_size > MOST_BYTES:
            raise FormatError(f"{path} is longer than {MOST_BYTES >> 20} MiB")
        raw = path.read_bytes()
    except OSError as err:
        raise FormatError(f"{path} cannot be read: {err.strerror or err}") from err
    return Manifest.from_bytes(raw)


def check_path(path: Any) -> str:
    """A path of a file within a package.

    Raises:
        FormatError: it is none, or leads out of the package.
    """
    if is_inside(path):
        return str(path)
    raise FormatError(f"{NAME} names {path!r}, which is not a path within the package")


def _text(data: Mapping[str, Any]) -> bytes:
    """The one text of a document."""
    return (json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _entry_dict(entry: Entry) -> dict[str, Any]:
    found: dict[str, Any] = {"sha256": entry.sha256, "bytes": entry.nbytes}
    if entry.executable:
        found["executable"] = True
    if len(entry.blocks) > 1:  # one block is the file itself
        found["blocks"] = [f"{block.sha256} {block.nbytes}" for block in entry.blocks]
    return found


def _entry(path: str, data: Any) -> Entry:
    check_path(path)
    allowed = {"sha256", "bytes", "executable", "blocks"}
    if not isinstance(data, dict) or not {"sha256", "bytes"} <= set(data) <= allowed:
        raise FormatError(f"{NAME}: the entry of {path} has other fields than {sorted(allowed)}")
    sha, size, listed = data["sha256"], data["bytes"], data.get("blocks")
    if not _is_hash(sha) or type(size) is not int or size < 0:
        raise FormatError(f"{NAME}: the entry of {path} has no digest or size")
    blocks: tuple[FileBlock, ...] = ()
    if listed is None:
        if size > MOST:
            raise FormatError(f"{NAME}: {path} has {size} bytes in one block, at most {MOST} are")
        blocks = (FileBlock(sha, size),) if size else ()
    else:
        try:
            blocks = tuple(map(block_of, listed)) if isinstance(listed, list) else ()
        except FormatError as err:
            raise FormatError(f"{NAME}: {path}: {err}") from err
        if len(blocks) < 2 or sum(block.nbytes for block in blocks) != size:
            raise FormatError(f"{NAME}: the blocks of {path} do not add up to its size")
    return Entry(sha, size, data.get("executable") is True, blocks)


def block_of(text: Any) -> FileBlock:
    """A block as manifests and deltas write it: its digest and its size.

    Raises:
        FormatError: it is none, or longer than any block.
    """
    sha, _, size = str(text).partition(" ")
    digits = size.isascii() and size.isdigit() and len(size) <= len(str(MOST))
    if not _is_hash(sha) or not digits or not 0 < int(size) <= MOST:
        raise FormatError(
            f"{str(text)[:100]!r} is not a block, which is a digest and a size of at most {MOST}"
        )
    return FileBlock(sha, int(size))


def _is_hash(text: Any) -> bool:
    return isinstance(text, str) and len(text) == 64 and set(text) <= _HASH
