"""Deltas: small, and what they give is the new version byte for byte."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeq.core.errors import EdgeqError, FormatError, UsageError
from edgeq.core.files import exchange
from edgeq.formats.tensor import QuantTensor
from edgeq.importers import load
from edgeq.model.artifact import save
from edgeq.packaging.build import package
from edgeq.packaging.delta import apply_delta, package_delta
from edgeq.packaging.verify import verify_package
from tests.packaging.test_build import contents
from tests.paths import ROOT

TENSOR = "model.layers.2.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def newer(chat_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with one tensor changed."""
    folder = tmp_path_factory.mktemp("newer")
    model = load(chat_artifact)
    tensor = model.tensors[TENSOR]
    assert isinstance(tensor, QuantTensor)
    changed = QuantTensor(
        tensor.scheme, tensor.shape, np.asarray(tensor.packed) ^ np.uint8(0x11), tensor.scales
    )
    tensors = {**model.tensors, TENSOR: changed}
    save(type(model)(model.config, tensors, model.files, model.provenance), folder / "tale.edgeq")
    package(folder / "tale.edgeq", "rpi", folder / "new", context=128)
    return folder / "new"


def test_only_changed_tensors_are_in_a_delta(rpi_made: Path, newer: Path, tmp_path: Path) -> None:
    made = package_delta(rpi_made, newer, tmp_path / "d")
    model = (newer / "model/tale.edgeq").stat().st_size
    assert made.nbytes < 0.5 * model
    done = apply_delta(rpi_made, tmp_path / "d", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(newer)
    assert done.blocks == made.blocks
    assert verify_package(tmp_path / "out").passed


def test_a_package_is_updated_in_its_place(rpi: Path, newer: Path, tmp_path: Path) -> None:
    package_delta(rpi, newer, tmp_path / "d")
    with pytest.raises(UsageError, match="already exists"):
        apply_delta(rpi, tmp_path / "d", rpi)
    apply_delta(rpi, tmp_path / "d", rpi, force=True)
    assert contents(rpi) == contents(newer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d", "rpi"]


def test_a_delta_to_the_same_version_has_no_blocks(rpi_made: Path, tmp_path: Path) -> None:
    assert package_delta(rpi_made, rpi_made, tmp_path / "d").blocks[0] == 0
    apply_delta(rpi_made, tmp_path / "d", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(rpi_made)


def test_any_damage_of_a_delta_is_found_and_leaves_nothing(
    rpi_made: Path, newer: Path, tmp_path: Path
) -> None:
    package_delta(rpi_made, newer, tmp_path / "right")
    right = (tmp_path / "right").read_bytes()
    rng = np.random.default_rng(5)
    for number in range(40):
        data = bytearray(right)
        if number % 4 == 0:
            del data[int(rng.integers(len(data))) :]
        elif number % 4 == 1:
            data += b"x"
        else:
            # half of the bits in the header and the manifest
            limit = len(data) if number % 4 == 2 else 20_000
            data[int(rng.integers(limit))] ^= 1 << int(rng.integers(8))
        (tmp_path / "d").write_bytes(bytes(data))
        with pytest.raises(EdgeqError):
            apply_delta(rpi_made, tmp_path / "d", tmp_path / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["d", "right"]


@pytest.mark.parametrize("blocks", [5, None, [7], ["x 1"], ["0" * 64 + " " + "9" * 5000]])
def test_impossible_blocks_of_a_delta_are_named(
    blocks: Any, rpi_made: Path, newer: Path, tmp_path: Path
) -> None:
    package_delta(rpi_made, newer, tmp_path / "d")
    raw = (tmp_path / "d").read_bytes()
    length = int.from_bytes(raw[8:16], "little")
    header = json.loads(raw[16 : 16 + length]) | {"blocks": blocks}
    text = json.dumps(header).encode()
    (tmp_path / "d").write_bytes(
        raw[:8] + len(text).to_bytes(8, "little") + text + raw[16 + length :]
    )
    with pytest.raises(FormatError, match=r"is damaged.* is not a block"):
        apply_delta(rpi_made, tmp_path / "d", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_outputs_within_the_packages_are_refused(rpi: Path, newer: Path, tmp_path: Path) -> None:
    before = contents(rpi)
    for place in ("manifest.json", "update"):
        for old, new in ((rpi, newer), (newer, rpi)):
            with pytest.raises(UsageError, match=r"lies in .*, a package that is compared"):
                package_delta(old, new, rpi / place, force=True)
    package_delta(rpi, newer, tmp_path / "d")
    with pytest.raises(UsageError, match=r"lies in .*, the package that is updated"):
        apply_delta(rpi, tmp_path / "d", rpi / "golden/new")
    assert contents(rpi) == before


def test_a_delta_on_a_full_disk_leaves_the_old_version(
    rpi: Path, newer: Path, tmp_path: Path
) -> None:
    resource = pytest.importorskip("resource")
    package_delta(rpi, newer, tmp_path / "d")
    before = contents(rpi)
    old_action = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(EdgeqError, match="no room"):
            apply_delta(rpi, tmp_path / "d", rpi, force=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old_action)
    assert contents(rpi) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d", "rpi"]


def test_a_delta_for_another_version_is_refused(rpi: Path, newer: Path, tmp_path: Path) -> None:
    package_delta(newer, rpi, tmp_path / "d")
    before = contents(rpi)
    with pytest.raises(FormatError, match=r"for another version: it goes from .* the package is"):
        apply_delta(rpi, tmp_path / "d", rpi, force=True)
    assert contents(rpi) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d", "rpi"]


@pytest.mark.parametrize("name", ["model/tale.edgeq", "run.sh", "README.md"])
def test_a_damaged_package_is_named_and_left_as_it_is(
    name: str, rpi: Path, newer: Path, tmp_path: Path
) -> None:
    package_delta(rpi, newer, tmp_path / "d")
    with (rpi / name).open("r+b") as file:
        file.seek(100)
        file.write(b"\0")
    before = contents(rpi)
    with pytest.raises(FormatError, match=re.escape(f"is damaged: {name} was changed")):
        apply_delta(rpi, tmp_path / "d", rpi, force=True)
    assert contents(rpi) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d", "rpi"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems are not known to exchange names")
def test_an_update_that_is_killed_leaves_one_version_whole(
    rpi_made: Path, newer: Path, tmp_path: Path
) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()
    if not exchange(tmp_path / "one", tmp_path / "other"):
        pytest.skip("this file system cannot exchange names")
    package_delta(rpi_made, newer, tmp_path / "d")
    command = [sys.executable, "-m", "tests.packaging.killed"]
    command += [str(path) for path in (rpi_made, tmp_path / "d", tmp_path / "work")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["points"]) >= 40
    assert set(found["states"]) == {"old", "new"}


def test_damaged_packages_make_no_delta(rpi: Path, newer: Path, tmp_path: Path) -> None:
    (rpi / "model/tale.edgeq").write_bytes(b"x")
    with pytest.raises(FormatError, match="is damaged"):
        package_delta(rpi, newer, tmp_path / "d")
    with pytest.raises(FormatError, match="is damaged"):
        package_delta(newer, rpi, tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_packages_of_two_platforms_have_no_delta(rpi: Path, rpi_made: Path, tmp_path: Path) -> None:
    from edgeq.packaging.manifest import Manifest, read_manifest

    made = read_manifest(rpi)
    other = Manifest(**{**vars(made), "platform": "android"})
    (rpi / "manifest.json").write_bytes(other.to_bytes())
    with pytest.raises(UsageError, match="is for rpi and"):
        package_delta(rpi_made, rpi, tmp_path / "d")


def test_blocks_in_the_manifest_are_those_of_the_file(rpi_made: Path) -> None:
    data = json.loads((rpi_made / "manifest.json").read_text("utf-8"))
    entry = data["files"]["model/tale.edgeq"]
    sizes = [int(block.split()[1]) for block in entry["blocks"]]
    assert sum(sizes) == entry["bytes"] == (rpi_made / "model/tale.edgeq").stat().st_size
    assert len(sizes) > 5
