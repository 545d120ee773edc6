"""Sweeps: recipes tried on models in parallel, on one or several machines, as tasks of Dask.

A task is one recipe on one model: quantize, measure quality, time it. Tasks are independent, and
their key is a hash of all their settings, so that

- if a worker dies, the scheduler gives its task to another;
- results are kept in the folder as one file a task, and a second run computes only those missing;
- a result exists once, however often its task was started.

Workers read models and texts by the paths they are given: on other machines these must be the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeq.core.errors import EdgeqError, FormatError, MissingDependencyError
from edgeq.core.files import write_whole
from edgeq.core.progress import Progress

if TYPE_CHECKING:
    from edgeq.quant.decoder.sensitivity import Sensitivity

FORMAT_VERSION = 1
TIMED_TOKENS = 64
"""Generated for a timed run."""
TIMED_RUNS = 5
DEATHS = 5
"""Workers that may die while doing a task before it is given up."""


@dataclass(frozen=True)
class Task:
    """A recipe to try on a model.

    Args:
        model: path of the source.
        recipe: as `edgeq.quant.Recipe.to_dict` gives it.
        name: the recipe's name, for tables.
        eval_text: path of the text that the card is measured on; edgeq's own if None.
        calib: path of the text that recipes learn from, if one needs it; edgeq's own if None.
        calib_windows, calib_context: pieces of it, and tokens in each.
        timed: whether generation is timed.
        requantize: go on from weights that are quantized already.
    """

    model: str
    recipe: Mapping[str, Any]
    name: str
    eval_text: str | None = None
    calib: str | None = None
    calib_windows: int = 128
    calib_context: int = 256
    timed: bool = True
    requantize: bool = False

    @property
    def key(self) -> str:
        """A hash of all settings: equal tasks have equal keys."""
        about = asdict(self)
        if not self.requantize:
            del about["requantize"]  # keys of results from before this setting existed
        text = json.dumps(about, sort_keys=True)
        return "edgeq-" + hashlib.sha256(text.encode()).hexdigest()[:24]


@dataclass(frozen=True)
class SweepResult:
    """The result of a task; None means not measured.

    Args:
        key: of the task.
        model, name: the model's and the recipe's.
        nbytes: of the artifact's file.
        bpw: bits per weight of all tensors.
        nll: nats a token on the card's text, of the quantized model.
        base_nll: of the float model.
        kl: mean divergence from the float model, nats a token.
        top1: share of positions with the same likeliest token.
        tokens_per_s: generated, one thread, median of several runs; other tasks may run beside.
        seconds: of quantizing and measuring.
        worker: the address of the worker.
        error: why there are no numbers, if the recipe does not suit the model.
    """

    key: str
    model: str
    name: str
    nbytes: int | None = None
    bpw: float | None = None
    nll: float | None = None
    base_nll: float | None = None
    kl: float | None = None
    top1: float | None = None
    tokens_per_s: float | None = None
    seconds: float | None = None
    worker: str | None = None
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return {"format_version": FORMAT_VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SweepResult:
        """The row that `to_dict` wrote.

        Raises:
            FormatError: it is of another version, or something is missing or of the wrong kind.
        """
        about = dict(data)
        version = about.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise FormatError(f"its format version is {version}, this edgeq reads {FORMAT_VERSION}")
        for name, value in about.items():
            text = name in ("key", "model", "name")
            allowed = str if text or name in ("worker", "error") else int | float
            if not ((value is None and not text) or isinstance(value, allowed)):
                raise FormatError(f"its {name} is {value!r}")
        try:
            return cls(**about)
        except TypeError as err:
            raise FormatError(str(err)) from err


def tasks(
    models: Sequence[str | Path],
    recipes: Sequence[str],
    *,
    eval_text: str | None = None,
    calib: str | None = None,
    calib_windows: int = 128,
    calib_context: int = 256,
    timed: bool = True,
    requantize: bool = False,
) -> list[Task]:
    """Every recipe on every model.

    Args:
        models: paths of sources.
        recipes: presets, schemes, or paths of recipe files (ending in .json or .toml).
        eval_text, calib, calib_windows, calib_context, timed, requantize: of each `Task`.

    Raises:
        EdgeqError: a recipe cannot be read; or a model cannot be read, or is quantized already
            and `requantize` is not given.
    """
    from edgeq.importers import describe
    from edgeq.quant import Recipe
    from edgeq.quant.decoder.source import refuse_quantized

    for model in models:
        if not requantize and Path(model).exists():  # it may be on the workers alone
            refuse_quantized(describe(model), str(model))
    tasks = []
    for name in recipes:
        is_file = name.endswith((".json", ".toml"))
        recipe = Recipe.from_file(name) if is_file else Recipe.from_options(preset=name)
        tasks += [
            Task(str(Path(model).resolve()), recipe.to_dict(), Path(name).stem if is_file else name,
                 _absolute(eval_text), _absolute(calib if recipe.needs else None),
                 calib_windows, calib_context, timed, requantize)
            for model in models
        ]  # fmt: skip
    keys = [task.key for task in tasks]
    return [task for at, task in enumerate(tasks) if task.key not in keys[:at]]


def run_task(task: Task) -> SweepResult:
    """Do one task, in a temporary folder of this machine.

    A recipe that does not suit the model gives a row with the reason; everything else that goes
    wrong is raised.
    """
    from edgeq.calibration_text import calibration, held_out, own_calibration
    from edgeq.core.errors import DoesNotFitError, SchemeError, UnsupportedError
    from edgeq.importers import load
    from edgeq.quant import Recipe, quantize_model

    row = SweepResult(task.key, Path(task.model).name, task.name)
    source = load(task.model)
    windows = None
    if task.calib is not None:
        windows = calibration(source, task.calib, task.calib_windows, task.calib_context)
    with tempfile.TemporaryDirectory(prefix="edgeq-sweep-", dir=_scratch()) as folder:
        out = Path(folder) / "model.edgeq"
        try:
            summary = quantize_model(
                source, out, Recipe.from_dict(task.recipe), calibration=windows,
                own_text=own_calibration, card=held_out(source, task.eval_text),
                requantize=task.requantize, threads=1,
            )  # fmt: skip
        except (SchemeError, UnsupportedError, DoesNotFitError) as err:
            return replace(row, error=str(err))
        evaluation = summary.quality.evaluation
        return replace(
            row,
            nbytes=summary.file_bytes,
            bpw=summary.bpw,
            nll=evaluation.nll_per_token if evaluation else None,
            base_nll=evaluation.base_nll_per_token if evaluation else None,
            kl=evaluation.kl_mean if evaluation else None,
            top1=evaluation.top1_agreement if evaluation else None,
            tokens_per_s=_speed(out) if task.timed else None,
            seconds=summary.seconds,
            worker=_worker_name(),
        )


def _speed(path: Path) -> float:
    """Tokens per second of one thread, the median run."""
    from edgeq.importers import load
    from edgeq.profiling import Workload, measure
    from edgeq.runtime.engine import Engine

    model = load(path)
    workload = Workload(0, min(TIMED_TOKENS, model.config.context), repeats=TIMED_RUNS)
    with Engine(model, context=workload.positions, threads=1) as engine:
        measurement = measure(engine, workload)
    return statistics.median(measurement.samples_ts)


def sweep(
    todo: Sequence[Task],
    folder: str | Path,
    *,
    scheduler: str | None = None,
    workers: int = 2,
    progress: Progress | None = None,
) -> list[SweepResult]:
    """Run the tasks that have no result in the folder yet, and return the row of every task.

    Args:
        todo: see `tasks`.
        folder: where results are kept, one file a task; made if it is not there.
        scheduler: address of a Dask scheduler, such as tcp://host:8786; a cluster of processes on
            this machine if None.
        workers: processes of that cluster.
        progress: called with a task's name, tasks done, and of how many.

    Raises:
        MissingDependencyError: Dask is not installed.
        EdgeqError: the folder cannot be written, no scheduler answers, or a task failed
            otherwise than by not suiting its model; what is done is kept.
    """
    place = Path(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise EdgeqError(f"{place} cannot be made: {err.strerror or err}") from err
    rows = {task.key: row for task in todo if (row := _earlier_result(place, task.key)) is not None}
    names = {task.key: f"{task.name} {Path(task.model).name}" for task in todo}
    left = {task.key: (run_task, task) for task in todo if task.key not in rows}
    for key, row in distribute(left, scheduler=scheduler, workers=workers):
        write_whole(place / f"{key}.json", [json.dumps(row.to_dict(), indent=1).encode()], "a row")
        rows[key] = row
        if progress:
            progress(names[key], len(rows), len(todo))
    return [rows[task.key] for task in todo]


def sweep_sensitivity(
    source: str,
    calib: str,
    calib_windows: int,
    calib_context: int,
    base: str,
    mode: str | None,
    method: str = "mse",
    *,
    scheduler: str | None = None,
    workers: int = 2,
    progress: Progress | None = None,
) -> Sensitivity:
    """`edgeq.quant.decoder.sensitivity.measure_sensitivity`, a task for each layer.

    Args:
        source: path of the float model.
        calib, calib_windows, calib_context: the text, and its pieces.
        base: the scheme whose neighbors are tried, in its text form.
        mode: of `edgeq.quant.decoder.sensitivity.MODES`; the one for the model's size if None. In
        a task
            of one layer, "scaled" measures each of its matrices alone.
        method: of `edgeq.quant.METHODS`.
        scheduler, workers: as for `sweep`.
        progress: called with a layer, layers done, and of how many.
    """
    from edgeq.importers import load

    shapes = dict(load(source).config.linears())
    layers: dict[str, list[str]] = {}
    for name in shapes:
        layer = ".".join(name.split(".")[:3]) if name.startswith("model.layers.") else name
        layers.setdefault(layer, []).append(name)
    text = (str(Path(source).resolve()), str(Path(calib).resolve()), calib_windows, calib_context)
    calls = {
        f"edgeq-sensitivity-{layer}": (_layer_sensitivity, (*text, base, mode, method, names))
        for layer, names in layers.items()
    }
    parts: list[Sensitivity] = []
    for key, part in distribute(calls, scheduler=scheduler, workers=workers):
        parts.append(part)
        if progress:
            progress(key.removeprefix("edgeq-sensitivity-"), len(parts), len(calls))
    losses = {name: loss for part in parts for name, loss in part.losses.items()}
    return replace(parts[0], losses={name: losses[name] for name in shapes})


def _layer_sensitivity(task: tuple[str, str, int, int, str, Any, str, list[str]]) -> Sensitivity:
    from edgeq.calibration_text import calibration
    from edgeq.formats.schemes import QuantScheme, parse_scheme
    from edgeq.importers import load
    from edgeq.quant.decoder.sensitivity import measure_sensitivity

    source, calib, windows, context, base, mode, method, names = task
    scheme = parse_scheme(base)
    assert isinstance(scheme, QuantScheme)
    model = load(source)
    text = calibration(model, calib, windows, context)
    return measure_sensitivity(model, text, scheme, method=method, mode=mode, names=names)


def distribute(
    calls: Mapping[str, tuple[Callable[[Any], Any], Any]],
    *,
    scheduler: str | None = None,
    workers: int = 2,
) -> Iterator[tuple[str, Any]]:
    """Make calls on Dask's workers; results as they come, each once.

    Args:
        calls: key -> function of one argument, and its argument.
        scheduler, workers: as for `sweep`.

    Yields:
        Key and result.

    Raises:
        MissingDependencyError: Dask is not installed.
        EdgeqError: no scheduler answers, or a call took several workers with it.
    """
    if not calls:
        return
    with _client(scheduler, min(workers, len(calls))) as client:
        from distributed import KilledWorker, as_completed

        futures = [
            client.submit(function, argument, key=key, pure=False, retries=0)
            for key, (function, argument) in calls.items()
        ]
        try:
            for future in as_completed(futures, loop=client.loop):
                try:
                    yield future.key, future.result()
                except KilledWorker as err:
                    raise EdgeqError(
                        f"{DEATHS} workers died with one task: it takes more memory than they "
                        "have, or crashes them; give them more, or leave its recipe out"
                    ) from err
        finally:
            client.cancel(futures, force=True)


@contextlib.contextmanager
def _client(scheduler: str | None, workers: int) -> Iterator[Any]:
    try:
        import dask
        from distributed import Client, LocalCluster
    except ImportError as err:
        raise MissingDependencyError("dask", "sweep", "to spread work over processes") from err
    with contextlib.ExitStack() as stack:
        # BLAS and kernels take the threads they are given; workers are processes of one each
        stack.enter_context(dask.config.set({"distributed.scheduler.allowed-failures": DEATHS - 1}))
        if scheduler is None:
            # what workers leave that were killed at their task goes with it
            scratch = stack.enter_context(
                tempfile.TemporaryDirectory(prefix="edgeq-workers-", ignore_cleanup_errors=True)
            )
            cluster = LocalCluster(
                n_workers=workers, threads_per_worker=1, processes=True, dashboard_address=None,
                scheduler_port=0, local_directory=scratch,
                silence_logs=logging.CRITICAL,  # a failure is told by its error
            )  # fmt: skip
            stack.enter_context(contextlib.closing(cluster))
            address: Any = cluster
        else:
            address = scheduler
        try:
            client = Client(address, timeout="10s", set_as_default=False)
        except (OSError, ValueError) as err:
            raise EdgeqError(
                f"no Dask scheduler answers at {scheduler}: {err}; start one with 'dask scheduler' "
                "and workers with 'dask worker tcp://host:8786', or leave --scheduler out"
            ) from err
        stack.enter_context(contextlib.closing(client))
        yield client


def pareto(rows: Iterable[SweepResult]) -> list[SweepResult]:
    """Rows that no other of the same model beats in both size and divergence, by size."""
    measured = [row for row in rows if row.nbytes is not None and row.kl is not None]
    rows = [
        row for row in measured
        if not any(
            other.model == row.model
            and other.nbytes <= row.nbytes and other.kl <= row.kl  # type: ignore[operator]
            and (other.nbytes, other.kl) != (row.nbytes, row.kl)
            for other in measured
        )
    ]  # fmt: skip
    return sorted(rows, key=lambda row: (row.model, row.nbytes))


def _earlier_result(folder: Path, key: str) -> SweepResult | None:
    """A task's row from an earlier run; None if there is none.

    Raises:
        FormatError: the file is damaged.
    """
    path = folder / f"{key}.json"
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_text("utf-8"))
        if data["format_version"] != FORMAT_VERSION:
            return None
        return SweepResult.from_dict(data)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, FormatError) as err:
        raise FormatError(f"{path} is not a sweep result ({err}); delete it") from err


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).resolve())


def _scratch() -> str | None:
    """The folder of the worker this is, or None in a serial run: the system's place."""
    try:
        from distributed import get_worker

        return str(get_worker().local_directory)
    except (ImportError, ValueError):
        return None


def _worker_name() -> str | None:
    """The address of the worker this is, or None in a serial run."""
    try:
        from distributed import get_worker

        return str(get_worker().address)
    except (ImportError, ValueError):
        return None
