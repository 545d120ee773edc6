"""The bytes of an update in which one layer changed, and what an update does that goes wrong.

    python benchmarks/package/delta.py                         the demo model
    python benchmarks/package/delta.py --model MODEL.gguf --layer 12

The model is packaged for a Raspberry Pi. Then every integer of one layer's weights is changed, and
the model is packaged again. The delta between the two is applied in another place, to the package
itself, to a damaged package and to another version. `--kill` also kills the update at many points.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.package.rebuild import contents  # noqa: E402
from edgeq.core.errors import EdgeqError  # noqa: E402
from edgeq.formats.tensor import QuantTensor  # noqa: E402
from edgeq.importers import load  # noqa: E402
from edgeq.model.artifact import save  # noqa: E402
from edgeq.packaging.build import package  # noqa: E402
from edgeq.packaging.delta import apply_delta, package_delta  # noqa: E402


def changed(artifact: Path, layer: int, out: Path) -> int:
    """Write an artifact with other integers in one layer; the bytes of these integers."""
    model = load(artifact)
    tensors, nbytes = dict(model.tensors), 0
    for name, tensor in model.tensors.items():
        if f".layers.{layer}." in name and isinstance(tensor, QuantTensor):
            packed = np.asarray(tensor.packed)
            tensors[name] = replace(tensor, packed=packed ^ np.uint8(0x11))
            nbytes += packed.nbytes
    if not nbytes:
        raise SystemExit(f"the model has no layer {layer} with integers")
    save(replace(model, tensors=tensors), out)
    return nbytes


def refused(what: str, old: Path, delta: Path) -> None:
    """Apply a delta where it does not belong, and show what is said."""
    before = contents(old)
    try:
        apply_delta(old, delta, old, force=True)
    except EdgeqError as err:
        same = "left as it was" if contents(old) == before else "CHANGED"
        text = str(err).replace(f"{old.parent}/", "")
        print(f"{what}: refused, {same}: {text}")
    else:
        raise SystemExit(f"{what}: was not refused")


def main() -> None:
    """Print what was measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "edgeq" / "demo_model")
    parser.add_argument("--layer", type=int, default=2)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--kill", action="store_true", help="also kill the update at many points")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="edgeq-") as name:
        folder = Path(name)
        old, new, delta = folder / "old", folder / "new", folder / "delta"
        package(chosen.model, "rpi", old, context=chosen.context, name="model")
        artifact = folder / "model.edgeq"
        nbytes = changed(old / "model" / "model.edgeq", chosen.layer, artifact)
        package(artifact, "rpi", new, context=chosen.context, name="model")
        made = package_delta(old, new, delta)
        print(
            f"package of {made.whole:,} bytes, layer of {nbytes:,} bytes of integers: delta of "
            f"{made.nbytes:,} bytes ({100 * made.nbytes / made.whole:.1f} %), {made.blocks[0]} of "
            f"{made.blocks[1]} blocks"
        )
        apply_delta(old, delta, folder / "out")
        assert contents(folder / "out") == contents(new)
        print("applied in another place: equal to the new version, byte for byte")
        if chosen.kill:
            command = [sys.executable, "-m", "tests.packaging.killed", str(old), str(delta)]
            done = subprocess.run(
                [*command, str(folder / "work")], cwd=ROOT, capture_output=True, text=True,
                check=True,
            )  # fmt: skip
            found = json.loads(done.stdout)
            states = {one: found["states"].count(one) for one in sorted(set(found["states"]))}
            print(
                f"killed at {len(found['points'])} of {found['calls']} calls to the file system: "
                + ", ".join(f"{count} times {one}" for one, count in states.items())
            )
        with (folder / "out" / "run.sh").open("a") as file:
            file.write("#")
        refused("another version", folder / "new", delta)
        refused("a damaged version", folder / "out", delta)
        raw = bytearray((old / "model" / "model.edgeq").read_bytes())
        raw[len(raw) // 2] ^= 1
        (old / "model" / "model.edgeq").write_bytes(bytes(raw))
        refused("a damaged old version", old, delta)


if __name__ == "__main__":
    main()
