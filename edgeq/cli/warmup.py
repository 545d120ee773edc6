"""``edgeq warmup``: compile the kernels ahead of time."""

from __future__ import annotations

from edgeq.cli import render
from edgeq.cli.options import command


@command("warmup", "Compile the kernels for this CPU ahead of time.")
def warmup() -> None:
    """Compile the kernels for this CPU, so that the first run starts quickly.

    Compiled kernels are cached on disk; running warmup again only loads them.
    """
    from edgeq.runtime import kernels

    with render.progress("Compiling kernels") as bar:
        seconds = kernels.warmup(bar)
    rows = [[name, f"{taken:.2f}"] for name, taken in seconds.items()]
    rows.append(["total", f"{sum(seconds.values()):.2f}"])
    render.write(render.aligned(["kernel", "seconds"], rows, "lr") + "\n")


def compile_first(backend: str) -> None:
    """Compile or load the decoder before anything is timed, with a progress bar if it takes long.

    Args:
        backend: backend of the engine; only "numba" compiles.
    """
    if backend != "numba":
        return
    from edgeq.runtime import kernels

    with render.progress("Compiling kernels for this CPU (first run only)"):
        kernels.decoder()
        kernels.pool_functions()
