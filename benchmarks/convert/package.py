"""What `edgeq package` costs beside the conversions that it does, and its peak of memory.

    python benchmarks/convert/package.py                      qwen2.5-0.5b for Android
    python benchmarks/convert/package.py --platform ort-mobile --max-ram 2GB

The model has random weights of a known shape and a tokenizer of bytes, as in run.py beside this.
`edgeq convert` is run for each form of the platform, with the same context, and then
`edgeq package`; each is a process of its own. Processor seconds are compared, which other work on
the machine hardly changes. Memory is the most that the process held (VmHWM).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.convert.run import SUFFIX, make_artifact  # noqa: E402


def edgeq(
    *arguments: str,
    cwd: Path,
    before: Sequence[str] = (),
    settings: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Run a command of edgeq; its processor seconds and its peak of memory in bytes.

    Args:
        arguments: of the command.
        cwd: folder that it is run in.
        before: a program that runs the command, with its options.
        settings: further variables of the environment.
    """
    with tempfile.TemporaryFile("w+") as said:
        child = subprocess.Popen(
            [*before, sys.executable, "-m", "edgeq", *arguments], cwd=cwd, stdout=said,
            stderr=said, env={**os.environ, "PYTHONPATH": str(ROOT), **(settings or {})},
        )  # fmt: skip
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        if child.returncode:
            raise SystemExit(f"edgeq {' '.join(arguments)} failed:\n{said.read()[-3000:]}")
    return {"cpu_seconds": usage.ru_utime + usage.ru_stime, "peak": usage.ru_maxrss * 1024}


def measured(artifact: Path, platform: str, context: int, max_ram: str) -> dict[str, Any]:
    """The conversions of a platform's forms, and the package."""
    from edgeq.packaging.platforms import platform_named

    options = ["--ctx-size", str(context), "--max-ram", max_ram]
    found: dict[str, Any] = {"conversions": {}}
    with tempfile.TemporaryDirectory(prefix="edgeq-") as name:
        folder = Path(name)
        for form in platform_named(platform).models:
            out = f"{form.id}{SUFFIX.get(form.target, '')}"
            found["conversions"][form.target] = edgeq(
                "convert", str(artifact), "--to", form.target, "-o", out, *options, cwd=folder
            )
        found["package"] = edgeq(
            "package", str(artifact), "--for", platform, "-o", "package", *options, cwd=folder
        )
    return found


def main() -> None:
    """Print the processor seconds and the peaks."""
    from edgeq.cli.options import ByteSize

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="qwen2.5-0.5b")
    parser.add_argument("--platform", default="android", choices=("android", "ios", "ort-mobile"))
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--max-ram", default="2GB")
    parser.add_argument("--home", type=Path, default=Path.home() / ".cache" / "edgeq-convert")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    options = parser.parse_args()
    options.home.mkdir(parents=True, exist_ok=True)
    artifact = make_artifact(options.shape, options.home)
    found = measured(artifact, options.platform, options.context, options.max_ram)
    if options.format == "json":
        print(json.dumps(found))
        return
    allowed = ByteSize().convert(options.max_ram, None, None)
    total = sum(row["cpu_seconds"] for row in found["conversions"].values())
    print("| command | CPU seconds | peak memory, MB |\n| --- | ---: | ---: |")
    rows = {f"convert --to {name}": row for name, row in found["conversions"].items()}
    for name, row in (*rows.items(), ("package", found["package"])):
        print(f"| {name} | {row['cpu_seconds']:.1f} | {row['peak'] / 1e6:.0f} |")
    peak = found["package"]["peak"]
    print(
        f"\nThe package takes {found['package']['cpu_seconds'] / total:.2f} times the processor "
        f"seconds of its conversions, and {peak / 1e6:.0f} of {allowed / 1e6:.0f} MB."
    )


if __name__ == "__main__":
    main()
