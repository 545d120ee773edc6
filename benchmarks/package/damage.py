"""Damage packages by chance, check each, and count what is found:

    python benchmarks/package/damage.py PACKAGE [PACKAGE ...] [--number 200]

The kinds of damage are those of tests/packaging/damages.py. Damage is found if the check fails and
its first fault names the file that was damaged. Packages are copied; they are not changed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from tests.packaging.damages import damaged  # noqa: E402


def main() -> None:
    """Print a table for each package."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("packages", nargs="+", type=Path)
    parser.add_argument("--number", type=int, default=200)
    parser.add_argument("--seed", type=int, default=17)
    chosen = parser.parse_args()
    missed = 0
    for path in chosen.packages:
        with tempfile.TemporaryDirectory(prefix="edgeq-") as name:
            found = damaged(path, Path(name), chosen.number, chosen.seed)
        named = sum(one.named for one in found)
        print(f"\n{path.name}: {named} of {len(found)} damages found and named\n")
        print("| damage | found | first fault of one of them |\n| --- | ---: | --- |")
        for kind in dict.fromkeys(one.damage.name for one in found):
            rows = [one for one in found if one.damage.name == kind]
            count = sum(one.named for one in rows)
            print(f"| {kind} | {count} of {len(rows)} | {str(rows[-1].fault)[:150]} |")
        for one in found:
            if not one.named:
                print(f"MISSED: {one.damage.name}, {one.place}: {one.fault}")
        missed += len(found) - named
    if missed:
        raise SystemExit(f"{missed} damages were not found")


if __name__ == "__main__":
    main()
