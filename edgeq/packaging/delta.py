"""Deltas: the update from one version of a package to the next, with the blocks that are new.

A delta is one file:

    8 bytes                     "edgeqdlt"
    8 bytes, little-endian      length of the header
    header, JSON                from, to (digests of the manifests), blocks: ["sha256 bytes", ...],
                                signature (bytes of manifest.sig), manifest (length)
    the new manifest.json, the new manifest.sig, then the blocks' bytes, in that order

The manifests of both versions list the blocks of all files; `edgeq.packaging.blocks` cuts files so
that unchanged tensors have the same blocks in both. Every block and every file is checked by its
SHA-256 while the new package is assembled. The package is published by one rename, or, in the place
of the old version, by exchanging the two in one step where the system can (Linux, macOS). An update
that is interrupted leaves the old version or the new one.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from edgeq.converters.atomic_output import publish, staging
from edgeq.core.errors import FormatError, UsageError
from edgeq.core.files import check_target, write_whole
from edgeq.core.progress import Progress
from edgeq.packaging import manifest, tree
from edgeq.packaging.blocks import FileBlock
from edgeq.packaging.layout import check_output, refuse_inside
from edgeq.packaging.manifest import Manifest, read_manifest

MAGIC = b"edgeqdlt"
MOST_HEADER = 64 << 20


@dataclass(frozen=True)
class Delta:
    """A delta that was written or applied.

    Args:
        path: the delta, or the package that it was applied to.
        nbytes: size of the delta in bytes.
        whole: size of the new version of the package in bytes.
        blocks: number of blocks in the delta, and number of blocks in the new version.
        seconds: wall-clock time.
    """

    path: Path
    nbytes: int
    whole: int
    blocks: tuple[int, int]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The delta as ``--format json`` prints it."""
        return {
            "path": str(self.path),
            "nbytes": self.nbytes,
            "whole_bytes": self.whole,
            "blocks": self.blocks[0],
            "of_blocks": self.blocks[1],
            "seconds": round(self.seconds, 3),
        }


def package_delta(
    old: str | Path,
    new: str | Path,
    out: str | Path,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> Delta:
    """Write the delta that updates one version of a package to another.

    Args:
        old: folder of the version that the device has.
        new: folder of the version that the device is updated to.
        out: the file to write.
        force: replace an existing file.
        progress: called with what is done, how far, and of how much.

    Raises:
        FormatError: one of the packages is damaged; the message says how.
        UsageError: the packages are for different platforms, or ``out`` exists already, lies in
            one of the packages, or its parent folder does not exist.

    Example:
        >>> a = edgeq.package("model.edgeq", "rpi", "version-1")
        >>> b = edgeq.package("model.edgeq", "rpi", "version-2", context=64)
        >>> edgeq.package_delta("version-1", "version-2", "update").nbytes < b.nbytes
        True
    """
    started = time.perf_counter()
    place = Path(out)
    if place.exists() and not force:
        raise UsageError(
            f"{place} already exists; give another --output, or --force to overwrite it"
        )
    check_target(place)
    for folder in (old, new):
        refuse_inside(
            place, Path(folder), "a package that is compared; give an output outside of it"
        )
    before, after = (_whole(Path(folder), progress) for folder in (old, new))
    if before.platform != after.platform:
        raise UsageError(
            f"{old} is for {before.platform} and {new} for {after.platform}; give two versions of "
            "one package"
        )
    held = {block.sha256 for entry in before.files.values() for block in entry.blocks}
    missing: dict[str, tuple[FileBlock, Path, int]] = {}
    count = 0
    for name, entry in after.files.items():
        at = 0
        for block in entry.blocks:
            count += 1
            if block.sha256 not in held:
                missing.setdefault(block.sha256, (block, Path(new) / name, at))
            at += block.nbytes
    raw = (Path(new) / manifest.NAME).read_bytes()
    signature = Path(new) / tree.SIGNATURE
    signed = signature.read_bytes() if signature.exists() else b""
    header = {
        "from": before.digest,
        "to": after.digest,
        "manifest": len(raw),
        "signature": len(signed),
        "blocks": [f"{sha} {block.nbytes}" for sha, (block, _, _) in missing.items()],
    }
    text = json.dumps(header, sort_keys=True).encode()

    def pieces() -> Iterator[bytes]:
        yield from (MAGIC, len(text).to_bytes(8, "little"), text, raw, signed)
        for done, (block, path, at) in enumerate(missing.values()):
            if progress:
                progress("writing blocks", done, len(missing))
            yield _read(path, at, block.nbytes)

    write_whole(place, pieces(), "the delta")
    whole = sum(entry.nbytes for entry in after.files.values())
    return Delta(
        place, place.stat().st_size, whole, (len(missing), count), time.perf_counter() - started
    )


def apply_delta(
    old: str | Path,
    delta: str | Path,
    out: str | Path,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> Delta:
    """Assemble the next version of a package from the version on the device and a delta.

    Args:
        old: folder of the version on the device.
        delta: the file that `package_delta` wrote.
        out: folder of the new version; with ``force`` it may be ``old`` itself.
        force: replace an existing package.
        progress: called with what is done, how far, and of how much.

    Raises:
        FormatError: the package or the delta is damaged, or the delta is for another version.
        UsageError: ``out`` exists already, lies in ``old``, its parent folder does not exist, or it
            is a folder with other files than those of a package.

    Example:
        >>> a = edgeq.package("model.edgeq", "rpi", "have")
        >>> b = edgeq.package("model.edgeq", "rpi", "want", context=64)
        >>> made = edgeq.package_delta("have", "want", "have-to-want")
        >>> done = edgeq.apply_delta("have", "have-to-want", "rebuilt")
        >>> edgeq.verify_package("rebuilt").manifest.digest == b.manifest.digest
        True
    """
    started = time.perf_counter()
    folder, path, place = Path(old), Path(delta), Path(out)
    check_output(place, force)
    if place.resolve() != folder.resolve():
        refuse_inside(place, folder, "the package that is updated; give an output outside of it")
    before = _whole(folder, progress)
    try:
        with path.open("rb") as file:
            header, after, raw, signed = _opened(path, file, before)
            fresh = _fresh(path, header, file.tell())
            _apply(folder, place, before, after, (raw, signed), (file, fresh), force, progress)
    except OSError as err:
        raise FormatError(f"{path} cannot be read: {err.strerror or err}") from err
    whole = sum(entry.nbytes for entry in after.files.values())
    count = sum(len(entry.blocks) for entry in after.files.values())
    return Delta(
        place, path.stat().st_size, whole, (len(fresh), count), time.perf_counter() - started
    )


def _apply(
    folder: Path,
    place: Path,
    before: Manifest,
    after: Manifest,
    texts: tuple[bytes, bytes],
    blocks: tuple[BinaryIO, dict[str, int]],
    force: bool,
    progress: Progress | None,
) -> None:
    held: dict[str, tuple[Path, int]] = {}
    for name, entry in before.files.items():
        at = 0
        for block in entry.blocks:
            held.setdefault(block.sha256, (folder / name, at))
            at += block.nbytes
    file, fresh = blocks

    def content(block: FileBlock) -> bytes:
        if block.sha256 in fresh:
            file.seek(fresh[block.sha256])
            raw = file.read(block.nbytes)
        elif block.sha256 in held:
            raw = _read(*held[block.sha256], block.nbytes)
        else:
            raise FormatError(
                f"the block {block.sha256[:12]}... is neither in the package nor in the delta"
            )
        if hashlib.sha256(raw).hexdigest() != block.sha256:
            raise FormatError(f"the block {block.sha256[:12]}... is damaged: its SHA-256 differs")
        return raw

    with staging(place) as staged:
        root = staged / "written" / place.name
        root.mkdir(parents=True)
        for done, (name, entry) in enumerate(after.files.items()):
            if progress:
                progress("putting files together", done, len(after.files))
            target = root / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("xb") as written:
                for block in entry.blocks:
                    written.write(content(block))
            target.chmod(0o755 if entry.executable else 0o644)
        (root / manifest.NAME).write_bytes(texts[0])
        if texts[1]:
            (root / tree.SIGNATURE).write_bytes(texts[1])
        if different := tree.first_difference(root, after):
            raise FormatError(f"the package that the delta gives is damaged: {different[1]}")
        publish(root.parent, place, staged, force)


def _whole(folder: Path, progress: Progress | None) -> Manifest:
    """Read the manifest of a package and check all of its files.

    Raises:
        FormatError: a file differs from the manifest; the message names the first.
    """
    made = read_manifest(folder)
    if different := tree.first_difference(folder, made, progress):
        raise FormatError(f"{folder} is damaged: {different[1]}")
    return made


def _opened(
    path: Path, file: BinaryIO, before: Manifest
) -> tuple[dict[str, Any], Manifest, bytes, bytes]:
    """Read and check the header, the manifest, and the bytes of the manifest and the signature."""
    if file.read(len(MAGIC)) != MAGIC:
        raise FormatError(f"{path} is not a delta of edgeq packages")
    length = int.from_bytes(file.read(8), "little")
    size = path.stat().st_size
    if not 0 < length <= min(MOST_HEADER, size):
        raise FormatError(
            f"{path} is damaged: its header has the length {length}, and the file {size} bytes"
        )
    try:
        header = json.loads(file.read(length))
        lengths = header["manifest"], header["signature"]
        sources = header["from"], header["to"]
    except (ValueError, KeyError, TypeError, RecursionError) as err:
        raise FormatError(f"{path} is damaged: its header cannot be read: {err!r}") from err
    if not all(type(n) is int and 0 <= n <= min(manifest.MOST_BYTES, size) for n in lengths):
        raise FormatError(f"{path} is damaged: its header has impossible lengths")
    if sources[0] != before.digest:
        raise FormatError(
            f"{path} is for another version: it goes from {str(sources[0])[:12]}..., and the "
            f"package is {before.digest[:12]}..."
        )
    raw, signed = file.read(lengths[0]), file.read(lengths[1])
    after = Manifest.from_bytes(raw)
    if after.digest != sources[1]:
        raise FormatError(f"{path} is damaged: its manifest is not the one that it names")
    return header, after, raw, signed


def _fresh(path: Path, header: dict[str, Any], at: int) -> dict[str, int]:
    """SHA-256 of each block in the delta -> the position of the block in the file."""
    found = {}
    listed = header.get("blocks")
    for text in listed if isinstance(listed, list) else [listed]:
        try:
            block = manifest.block_of(text)
        except FormatError as err:
            raise FormatError(f"{path} is damaged: {err}") from err
        found[block.sha256] = at
        at += block.nbytes
    if at != path.stat().st_size:
        raise FormatError(
            f"{path} is damaged: its blocks end at byte {at}, the file at {path.stat().st_size}"
        )
    return found


def _read(path: Path, at: int, nbytes: int) -> bytes:
    with path.open("rb") as file:
        file.seek(at)
        return file.read(nbytes)
