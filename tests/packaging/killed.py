"""Applies a delta in place again and again, killed at another point each time:

    killed.py OLD DELTA FOLDER

FOLDER is made new from OLD each time. A child process applies the delta and kills itself (SIGKILL)
at a certain call to the file system. Prints a JSON object: the number of such calls, at which the
child was killed, and what FOLDER was after each: "old", "new" or what is wrong.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

from edgeq.core.errors import EdgeqError
from edgeq.packaging import tree
from edgeq.packaging.delta import apply_delta
from edgeq.packaging.manifest import read_manifest

CALLS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree")
POINTS = 24


def child(folder: Path, delta: Path, at: int, told: int) -> None:
    """Apply the delta, and stop at a call; tells the number of calls if none is reached."""
    count = 0

    def hook(event: str, _: object) -> None:
        nonlocal count
        if event in CALLS:
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    apply_delta(folder, delta, folder, force=True)
    os.write(told, str(count).encode())


def tried(old: Path, delta: Path, folder: Path, at: int) -> int | None:
    """One try in a child; the number of calls if it was not killed."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(old, folder)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            child(folder, delta, at, writer)
        finally:
            os._exit(0)
    os.close(writer)
    said = os.read(reader, 100)
    os.close(reader)
    os.waitpid(pid, 0)
    return int(said) if said else None


def state(folder: Path, digests: dict[str, str]) -> str:
    """Which version a folder is, or what is wrong with it."""
    try:
        made = read_manifest(folder)
        if different := tree.first_difference(folder, made):
            return different[1]
        return digests[made.digest]
    except (EdgeqError, OSError, KeyError) as err:
        return repr(err)


def main(old: Path, delta: Path, folder: Path) -> None:
    before = read_manifest(old).digest
    calls = tried(old, delta, folder, 0)
    assert calls is not None
    digests = {before: "old", read_manifest(folder).digest: "new"}
    # every call of the last part, in which the new version gets its place, and some of all others
    points = sorted({*range(1, calls, max(1, calls // POINTS)), *range(calls - POINTS, calls + 1)})
    found = []
    for at in points:
        assert tried(old, delta, folder, at) is None, at
        found.append(state(folder, digests))
        for left in folder.parent.glob(f".{folder.name}.*.tmp"):
            shutil.rmtree(left)
    print(json.dumps({"calls": calls, "points": points, "states": found}))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
