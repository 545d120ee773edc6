"""``manifest.json``: the list of everything that a package holds, in a canonical text.

    manifest    2                               version of the format
    digest      SHA-256 of this text without the line of the digest itself
    name, platform, kind ("language model" or "graph"), edgeq (the version that built the package)
    model       family, parameters, source and its SHA-256, license, base model; for a graph its
                inputs and outputs
    variants    a list: one for each runtime and recipe of the weights, see `ModelVariant`
    tiers       a list: among which the code chooses by free memory, see `edgeq.packaging.tiers`
    versions    versions of the libraries that were used to build the package
    files       path -> sha256, bytes, blocks, and "executable" for files that may be executed

`SCHEMA` is a JSON schema of it, which each package contains. The text is JSON with sorted keys and
one space of indentation. A manifest whose bytes are not exactly the text that its content gives is
damaged. Nothing in it depends on the time or the folder of the build.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edgeq.core.errors import FormatError
from edgeq.core.files import is_inside
from edgeq.packaging.blocks import MOST, FileBlock
from edgeq.packaging.checked import (
    CONTEXT,
    LIST,
    OBJECT,
    OBJECTS,
    TEXT,
    TEXTS,
    checked_fields,
)
from edgeq.packaging.tiers import Tier, check_tiers

NAME = "manifest.json"
SCHEMA = "manifest.schema.json"
VERSION = 2
MOST_BYTES = 64 << 20
"""Longer manifests are refused."""
_HASH = frozenset("0123456789abcdef")


@dataclass(frozen=True)
class Entry:
    """A file of a package.

    Args:
        sha256: SHA-256 of the content, in hexadecimal.
        nbytes: size in bytes.
        executable: whether the file may be executed.
        blocks: the blocks that the file is cut into, see `edgeq.packaging.blocks`.
    """

    sha256: str
    nbytes: int
    executable: bool = False
    blocks: tuple[FileBlock, ...] = ()


@dataclass(frozen=True)
class ModelVariant:
    """A model in one form, for one runtime.

    Args:
        id: identifier within the package, such as "litertlm".
        form: identifier of the form in the table of platforms; several variants have the same form
            if the package holds the weights in several recipes.
        title: name of the runtime.
        target: the target of `edgeq.convert` that the form was converted to, or "edgeq".
        entry: path of the model's file or folder.
        files: paths of all files that this form needs on the device.
        scheme: the scheme of most weights.
        why: the reasons for this form, in sentences.
        requires: lowest supported versions: "os", "runtime".
        devices: the devices that the form is for, in words.
        context: number of tokens that the form is built for; None for a graph.
        memory: expected memory for each context length: "context", "weights_bytes",
            "cache_bytes", "other_bytes", "total_bytes".
        speed: expected speed: "device", "decode_tokens_per_s", "prefill_tokens_per_s", "fits".
        assumptions: the assumptions behind memory and speed.
        certificate, golden: paths of the certificate and of the golden results.
    """

    id: str
    form: str
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
        """Read a variant from its JSON object.

        Raises:
            FormatError: a field is missing, unknown or of another type.
        """
        values = checked_fields(data, "a variant", _VARIANT_KINDS)
        for path in (values["entry"], values["certificate"], values["golden"], *values["files"]):
            check_path(path)
        return cls(**values)


_VARIANT_KINDS = {
    "id": TEXT,
    "form": TEXT,
    "title": TEXT,
    "target": TEXT,
    "entry": TEXT,
    "files": TEXTS,
    "scheme": TEXT,
    "why": TEXTS,
    "requires": OBJECT,
    "devices": TEXT,
    "certificate": TEXT,
    "golden": TEXT,
    "context": CONTEXT,
    "memory": OBJECTS,
    "speed": OBJECTS,
    "assumptions": TEXTS,
}
"""The fields of a variant."""


@dataclass(frozen=True)
class Manifest:
    """The content of ``manifest.json``.

    Args:
        name: name of the package.
        platform: "ios", "android", "rpi" or "ort-mobile".
        kind: "language model" or "graph".
        edgeq: version of edgeq that built the package.
        model: description of the model.
        variants: the forms of the model, the recommended one first.
        tiers: the ways to run them, for each form from the most memory to the least.
        versions: versions of the libraries that were used, by name.
        files: every file but the manifest and its signature, by path.
    """

    name: str
    platform: str
    kind: str
    edgeq: str
    model: Mapping[str, Any]
    variants: tuple[ModelVariant, ...]
    tiers: tuple[Tier, ...]
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
            "tiers": [asdict(tier) for tier in self.tiers],
            "versions": dict(self.versions),
            "files": {path: _entry_dict(entry) for path, entry in self.files.items()},
        }
        return _text(about | {"digest": hashlib.sha256(_text(about)).hexdigest()})

    @property
    def digest(self) -> str:
        """SHA-256 that identifies this version of the package, in hexadecimal."""
        return str(json.loads(self.to_bytes())["digest"])

    @classmethod
    def from_bytes(cls, raw: bytes) -> Manifest:
        """Read and check ``manifest.json``.

        Raises:
            FormatError: the manifest is damaged, was edited, or has a later version of the format;
                the message says which.
        """
        try:
            data = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
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
            raise FormatError(f"{NAME} holds text that JSON cannot represent: {err}") from err
        if stated != actual or text != raw:
            raise FormatError(
                f"{NAME} was changed after the package was built: the digest of its content is not "
                "the digest that it states"
            )
        del data["manifest"]
        data = checked_fields(data, NAME, _MANIFEST_KINDS)
        variants = tuple(map(ModelVariant.from_dict, data.pop("variants")))
        tiers = tuple(map(Tier.from_dict, data.pop("tiers")))
        files = {path: _entry(path, entry) for path, entry in data.pop("files").items()}
        _check_names(files)
        made = cls(variants=variants, tiers=tiers, files=files, **data)
        if not variants:
            raise FormatError(f"{NAME} has no variants")
        for variant in variants:
            for path in (variant.certificate, variant.golden, *variant.files):
                if path not in files:
                    raise FormatError(
                        f"{NAME}: the variant {variant.id} names the file {path}, which is not in "
                        "the list of files"
                    )
            entry = variant.entry
            if not any(file == entry or file.startswith(f"{entry}/") for file in variant.files):
                raise FormatError(
                    f"{NAME}: no file of the variant {variant.id} is or lies in its entry {entry}"
                )
        made.check_tiers()
        if made.to_bytes() != raw:
            raise FormatError(
                f"{NAME} is not the text that its content gives: the entry of a file has a field "
                "that says nothing"
            )
        return made

    def tiers_of(self, form: str) -> list[Tier]:
        """The tiers of a form, from the most memory to the least."""
        ids = {variant.id for variant in self.variants if variant.form == form}
        return [tier for tier in self.tiers if tier.variant in ids]

    def variant(self, name: str) -> ModelVariant:
        """The variant with an identifier."""
        return next(variant for variant in self.variants if variant.id == name)

    def check_tiers(self) -> None:
        """Check that the tiers agree with the variants.

        Raises:
            FormatError: they do not; see `edgeq.packaging.tiers.check_tiers`.
        """
        try:
            planned = {
                variant.id: {
                    row["context"] or None: int(row["total_bytes"]) for row in variant.memory
                }
                for variant in self.variants
            }
        except (LookupError, TypeError, ValueError) as err:
            raise FormatError(f"{NAME}: the memory of a variant cannot be read: {err!r}") from err
        try:
            check_tiers(
                self.tiers,
                {variant.id: variant.form for variant in self.variants},
                {variant.id: variant.entry for variant in self.variants},
                planned,
            )
        except FormatError as err:
            raise FormatError(f"{NAME}: {err}") from err


_MANIFEST_KINDS = {
    "name": TEXT,
    "platform": TEXT,
    "kind": TEXT,
    "edgeq": TEXT,
    "model": OBJECT,
    "variants": LIST,
    "tiers": LIST,
    "versions": OBJECT,
    "files": OBJECT,
}
"""The fields of a manifest beside its version and digest."""


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a package.

    Args:
        folder: folder of the package.

    Raises:
        FormatError: the folder has no manifest, or the manifest is damaged.
    """
    path = folder / NAME
    try:
        if path.is_symlink() or not path.is_file():
            raise FormatError(f"{folder} is not an edgeq package: it has no {NAME}")
        if path.stat().st_size > MOST_BYTES:
            raise FormatError(f"{path} is larger than a manifest may be, {MOST_BYTES >> 20} MiB")
        raw = path.read_bytes()
    except OSError as err:
        raise FormatError(f"{path} cannot be read: {err.strerror or err}") from err
    return Manifest.from_bytes(raw)


def check_path(path: Any) -> str:
    """Check the path of a file in a package.

    Returns:
        the path.

    Raises:
        FormatError: the value is not a path, or the path leads out of the package.
    """
    if is_inside(path):
        return str(path)
    raise FormatError(f"{NAME} names {path!r}, which is not a path within the package")


def _check_names(files: Iterable[str]) -> None:
    """Refuse files that are one file on macOS or Windows.

    Raises:
        FormatError: two paths differ only in upper and lower case or in Unicode normalization.
    """
    seen: dict[str, str] = {}
    for path in files:
        other = seen.setdefault(unicodedata.normalize("NFC", path).casefold(), path)
        if other != path:
            raise FormatError(
                f"{NAME} names {other!r} and {path!r}, which are one file on systems that do not "
                "distinguish upper and lower case or that normalize Unicode"
            )


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a number of JSON")


def _text(data: Mapping[str, Any]) -> bytes:
    """The canonical text of a document."""
    return (json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _entry_dict(entry: Entry) -> dict[str, Any]:
    found: dict[str, Any] = {"sha256": entry.sha256, "bytes": entry.nbytes}
    if entry.executable:
        found["executable"] = True
    if len(entry.blocks) > 1:  # a single block is the whole file
        found["blocks"] = [f"{block.sha256} {block.nbytes}" for block in entry.blocks]
    return found


def _entry(path: str, data: Any) -> Entry:
    check_path(path)
    allowed = {"sha256", "bytes", "executable", "blocks"}
    if not isinstance(data, dict) or not {"sha256", "bytes"} <= set(data) <= allowed:
        raise FormatError(f"{NAME}: the entry of {path} has other fields than {sorted(allowed)}")
    sha, size, listed = data["sha256"], data["bytes"], data.get("blocks")
    if not _is_hash(sha) or type(size) is not int or size < 0:
        raise FormatError(f"{NAME}: the entry of {path} has no valid SHA-256 or size")
    blocks: tuple[FileBlock, ...] = ()
    if listed is None:
        if size > MOST:
            raise FormatError(
                f"{NAME}: {path} has {size} bytes in one block; a block has at most {MOST}"
            )
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
    """Read a block as manifests and deltas write it: its SHA-256 and its size in bytes.

    Raises:
        FormatError: the text is not a block, or the block is longer than any block may be.
    """
    sha, _, size = str(text).partition(" ")
    digits = size.isascii() and size.isdigit() and len(size) <= len(str(MOST))
    if not _is_hash(sha) or not digits or not 0 < int(size) <= MOST:
        raise FormatError(
            f"{str(text)[:100]!r} is not a block: a SHA-256 and a size of 1 to {MOST} bytes"
        )
    return FileBlock(sha, int(size))


def _is_hash(text: Any) -> bool:
    return isinstance(text, str) and len(text) == 64 and set(text) <= _HASH
