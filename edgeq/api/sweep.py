"""Recipes on models in parallel: size, quality and speed of each combination."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgeq.core.errors import UsageError, require
from edgeq.core.progress import Progress
from edgeq.sweeping import SweepResult, tasks
from edgeq.sweeping import sweep as run_tasks


def sweep(
    models: str | Path | Sequence[str | Path],
    recipes: str | Sequence[str],
    out: str | Path,
    *,
    text_file: str | Path | None = None,
    windows: int = 128,
    context: int = 256,
    eval_text: str | Path | None = None,
    speed: bool = True,
    requantize: bool = False,
    scheduler: str | None = None,
    workers: int = 2,
    progress: Progress | None = None,
) -> list[SweepResult]:
    """Quantize each model with each recipe, and compare size, quality and speed.

    Each result is saved when it is ready: an interrupted sweep continues where it stopped, and
    the task of a worker that died is run again.

    Args:
        models: paths of models.
        recipes: presets, schemes or recipe files.
        out: the folder for results; results that it already has are not computed again.
        text_file: the calibration text, for recipes that need one.
        windows, context: of that text, as `calibrate` takes them.
        eval_text: the text that quality is measured on; one that edgeq includes if None.
        speed: also measure speed, while other tasks may be running.
        requantize: accept models whose weights are already quantized.
        scheduler: the address of a Dask scheduler, whose workers find files at the same paths.
        workers: number of processes on this machine without a scheduler.
        progress: called after every task.

    Returns:
        A result for each combination; `edgeq.sweeping.pareto` picks those that no other of the
        same model beats in both size and divergence.

    Raises:
        MissingDependencyError: Dask is not installed.
        EdgeqError: a model or recipe cannot be read, or a task failed.

    Example:
        >>> results = edgeq.sweep("model", ["w4-g32", "w8-g32"], "results", speed=False, workers=1)
        >>> [result.name for result in results], results[0].nbytes < results[1].nbytes
        (['w4-g32', 'w8-g32'], True)
    """
    several = [models] if isinstance(models, str | Path) else list(models)
    if not several:
        raise UsageError("there is no model; give the path of one")
    todo = tasks(
        several,
        [recipes] if isinstance(recipes, str) else recipes,
        eval_text=None if eval_text is None else str(eval_text),
        calib=None if text_file is None else str(text_file),
        calib_windows=windows,
        calib_context=context,
        timed=speed,
        requantize=requantize,
    )
    require("sweep", ("dask", "distributed"), "to spread work over processes")
    if any(task.recipe.get("training") for task in todo):
        require("train", ("torch",), "to train quantized weights")
    return run_tasks(todo, out, scheduler=scheduler, workers=workers, progress=progress)
