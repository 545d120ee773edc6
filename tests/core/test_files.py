"""Files and folders that are exchanged in one step."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from edgeq.core.files import exchange


def test_two_folders_are_exchanged_or_nothing_is_changed(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    done = exchange(tmp_path / "one", tmp_path / "other")
    assert done == ((tmp_path / "one/file").read_text() == "other")
    assert done == ((tmp_path / "other/file").read_text() == "one")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems need not have the function")
def test_a_path_that_is_absent_is_named(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    if not exchange(tmp_path / "one", tmp_path / "one"):
        pytest.skip("this file system cannot exchange names")
    with pytest.raises(FileNotFoundError, match="other"):
        exchange(tmp_path / "one", tmp_path / "other")
    assert (tmp_path / "one").is_dir()
