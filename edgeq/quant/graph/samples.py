"""Samples of a graph's inputs: for calibration, and with labels for evaluation.

    a folder of images          all in one folder, or one folder for each class, which gives labels
    a folder of .npy or .npz    one file for each sample
    .npz                        arrays named like the inputs, with samples along the first axis, and
                                optionally labels as the array "labels"
    .npy                        the same for a graph with one input
    .txt, .jsonl                sentences, which need a tokenizer
    script.py:function          a generator of samples: an array, or arrays by input, or a pair of
                                either and the label

Arrays are not preprocessed; only the order of their axes is changed if ``layout`` says so.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import EdgeqError, FormatError, UsageError
from edgeq.graph.feeds import Feeds
from edgeq.graph.ir import Graph, Info
from edgeq.quant.graph import images
from edgeq.quant.graph.images import Preprocess
from edgeq.quant.graph.sentences import Sentences, read_lines

LABELS = ("labels", "label", "y", "targets")
"""Names that the array of labels may have in an .npz file."""
LEAST = 8
"""Fewest samples from which ranges are measured."""
KINDS = (
    "a folder of images, .npy or .npz files, an .npz or .npy file, a .txt or .jsonl file of "
    "sentences with a tokenizer, or script.py:function"
)


@dataclass(frozen=True)
class _Item:
    """One sample: its name, its arrays by input, and its label."""

    name: str
    feeds: Feeds
    label: int | None = None


@dataclass(frozen=True, eq=False)
class Samples:
    """Samples of a graph's inputs, which can be iterated over more than once.

    Args:
        source: where the samples come from, for messages.
        make: starts an iteration over the samples.
        inputs: name of an input -> its shape and type.
        preprocess: the preprocessing of images; for arrays, only the layout.
        limit: most samples of an iteration; None for all.
        classes: names of the classes, if the samples have labels.
        channels_last: whether the arrays have their channels last and must be transposed.
        pictures: whether the samples come from images.
    """

    source: str
    make: Callable[[], Iterable[_Item]]
    inputs: Mapping[str, Info]
    preprocess: Preprocess = field(default_factory=Preprocess)
    limit: int | None = None
    classes: tuple[str, ...] = ()
    channels_last: bool = False
    pictures: bool = False

    def __iter__(self) -> Iterator[Feeds]:
        """Iterate over the samples. Every sample is checked.

        Raises:
            FormatError: a sample lacks an input, has another shape or type, or is not finite; the
                message names the sample.
            UsageError: there are no samples.
        """
        return (item.feeds for item in self._items())

    def pairs(self) -> Iterator[tuple[Feeds, int]]:
        """Iterate over the samples with their labels.

        Raises:
            UsageError: a sample has no label, or there are no samples.
        """
        for item in self._items():
            if item.label is None:
                raise UsageError(
                    f"the sample {item.name} of {self.source} has no label; give a folder for "
                    'each class, an .npz file with an array "labels", or a function that yields '
                    "(sample, label)"
                )
            yield item.feeds, item.label

    def first(self, n: int) -> Samples:
        """The same samples, of which an iteration gives at most the first ``n``."""
        return replace(self, limit=n if self.limit is None else min(n, self.limit))

    def count(self) -> int:
        """Read and check all samples, and return their number."""
        return sum(1 for _ in self)

    def _items(self) -> Iterator[_Item]:
        empty = True
        for item in islice(iter(self.make()), self.limit):
            empty = False
            yield replace(item, feeds=self._checked(item))
        if empty:
            raise UsageError(f"{self.source} contains no samples; give {KINDS}")

    def _checked(self, item: _Item) -> Feeds:
        missing = [name for name in self.inputs if name not in item.feeds]
        if missing:
            got = ", ".join(item.feeds) or "none"
            raise FormatError(
                f"the sample {item.name} of {self.source} lacks the input {missing[0]!r} "
                f"(it has {got}; the graph takes {', '.join(self.inputs)})"
            )
        where = f"the sample {item.name} of {self.source}"
        return {
            name: _fitted(item.feeds[name], name, info, self.channels_last, where)
            for name, info in self.inputs.items()
        }


def open_samples(
    source: str | Path,
    graph: Graph,
    *,
    preprocess: Preprocess | None = None,
    tokenizer: str | Path | None = None,
    limit: int | None = None,
) -> Samples:
    """Open samples for a graph.

    Args:
        source: a file, a folder or ``script.py:function``, see the module.
        graph: the graph whose inputs the samples are for.
        preprocess: how images become inputs, and the layout of arrays.
        tokenizer: ``tokenizer.json`` or its folder, for sentences.
        limit: most samples. If the number of samples is known beforehand, they are evenly spaced.

    Raises:
        FormatError: a file cannot be read.
        UsageError: there are no samples, or none that fit the graph.
    """
    preprocess = preprocess or Preprocess()
    inputs = {name: graph.info(name) for name in graph.inputs}
    if not inputs:
        raise UsageError(f"the graph {graph.name} has no inputs that samples could be for")
    text, path = str(source), Path(source)
    turned = preprocess.layout == "nhwc"
    script, colon, function = text.rpartition(":")
    if colon and script.endswith(".py"):
        loader = _loader(Path(script), function)
        return Samples(
            text, lambda: _from_loader(loader, text, inputs), inputs, preprocess, limit,
            channels_last=turned,
        )  # fmt: skip
    if not path.exists():
        raise UsageError(f"there are no samples at {text}; give {KINDS}")
    if path.suffix in (".txt", ".jsonl") and path.is_file():
        if tokenizer is None:
            raise UsageError(
                f"{text} contains sentences, which need a tokenizer: give it with "
                "--tokenizer tokenizer.json"
            )
        encode, lines = Sentences(tokenizer, graph).encode, read_lines(path)
        entries: Sequence[Any] = [(f"line {i}", line) for i, line in enumerate(lines, 1)]
        read = lambda entry: _Item(entry[0], encode(entry[1]))  # noqa: E731
        return Samples(text, _spread(entries, read, limit), inputs, preprocess, limit)
    if path.is_dir():
        return _folder(path, inputs, preprocess, limit)
    if path.suffix in (".npz", ".npy"):
        entries = _rows(_arrays(path, inputs), inputs, text)
        classes = tuple(
            str(i) for i in range(1 + max((item[2] or 0 for item in entries), default=0))
        )
        labeled = bool(entries) and entries[0][2] is not None
        read = lambda entry: _Item(entry[0], entry[1](), entry[2])  # noqa: E731
        return Samples(
            text, _spread(entries, read, limit), inputs, preprocess, limit,
            classes if labeled else (), turned,
        )  # fmt: skip
    raise UsageError(f"{text} is not a source of samples; give {KINDS}")


def samples_of(
    graph: Graph, feeds: Sequence[Mapping[str, NDArray[Any]]], labels: Sequence[int] | None = None
) -> Samples:
    """Make samples of arrays in memory.

    Args:
        graph: the graph whose inputs the samples are for.
        feeds: one mapping of input names to arrays for each sample.
        labels: one label for each sample; None for no labels.

    Raises:
        UsageError: the numbers of labels and samples differ.
    """
    if labels is not None and len(labels) != len(feeds):
        raise UsageError(
            f"there are {len(labels)} labels for {len(feeds)} samples; give one label per sample"
        )

    def made() -> Iterator[_Item]:
        for i, one in enumerate(feeds):
            yield _Item(str(i), dict(one), None if labels is None else int(labels[i]))

    return Samples("the samples given", made, {name: graph.info(name) for name in graph.inputs})


def _spread(
    items: Sequence[Any], read: Callable[[Any], _Item], limit: int | None
) -> Callable[[], Iterable[_Item]]:
    """A function that iterates over items, or over ``limit`` of them, evenly spaced."""
    chosen = items
    if limit is not None and limit < len(items):
        chosen = [items[i * len(items) // limit] for i in range(limit)]
    return lambda: map(read, chosen)


def _folder(
    folder: Path, inputs: Mapping[str, Info], preprocess: Preprocess, limit: int | None
) -> Samples:
    arrays = sorted(p for p in folder.iterdir() if p.suffix in (".npy", ".npz"))
    if arrays:
        read = lambda path: _Item(path.name, _alone(path, inputs))  # noqa: E731
        return Samples(
            str(folder), _spread(arrays, read, limit), inputs, preprocess, limit,
            channels_last=preprocess.layout == "nhwc",
        )  # fmt: skip
    classes = tuple(p.name for p in sorted(folder.iterdir()) if p.is_dir() and _pictures(p))
    files = [(p, i) for i, name in enumerate(classes) for p in _pictures(folder / name)]
    pictures: list[tuple[Path, int | None]] = (
        [*files] if files else [(p, None) for p in _pictures(folder)]
    )
    if not pictures:
        raise UsageError(f"the folder {folder} contains no samples; give {KINDS}")
    if len(inputs) != 1:
        raise UsageError(
            f"images need a graph with one input, and this one has {', '.join(inputs)}; give "
            "arrays as .npz"
        )
    ((name, info),) = inputs.items()
    fitting = preprocess.for_pictures(name, info.shape)

    def picture(entry: tuple[Path, int | None]) -> _Item:
        path, label = entry
        return _Item(str(path.relative_to(folder)), {name: fitting.read(path, info.shape)}, label)

    samples = Samples(
        str(folder), _spread(pictures, picture, limit), inputs, fitting, limit, classes,
        pictures=True,
    )  # fmt: skip
    return samples if info.shape[0] == 1 else _refuse_batch(name, info)


def _refuse_batch(name: str, info: Info) -> Samples:
    raise UsageError(
        f"the input {name!r} takes batches of {info.shape[0]} images; give --shape "
        f"{name}=1,{','.join(map(str, info.shape[1:]))}"
    )


def _pictures(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in images.SUFFIXES)


def _arrays(path: Path, inputs: Mapping[str, Info]) -> Feeds:
    """The arrays of a file by input, and the labels as "labels"."""
    try:
        loaded = np.load(path, allow_pickle=False)
        arrays = dict(loaded) if path.suffix == ".npz" else {"": loaded}
    except Exception as err:  # a damaged archive raises nearly anything
        why = "it does not hold arrays of numbers" if "pickle" in str(err) else err
        raise FormatError(f"{path} cannot be read as arrays: {why}") from err
    labels = next((arrays.pop(name) for name in LABELS if name in arrays.keys() - inputs), None)
    if len(inputs) == 1 and len(arrays) == 1:
        arrays = dict(zip(inputs, arrays.values(), strict=True))
    if labels is not None and "labels" not in arrays:
        arrays["labels"] = labels
    return arrays


def _alone(path: Path, inputs: Mapping[str, Info]) -> Feeds:
    return {name: array for name, array in _arrays(path, inputs).items() if name in inputs}


def _rows(
    arrays: Feeds, inputs: Mapping[str, Info], source: str
) -> list[tuple[str, Callable[[], Feeds], int | None]]:
    """Split arrays along their first axis into samples: their name, arrays and label."""
    missing = [name for name in inputs if name not in arrays]
    if missing:
        raise FormatError(
            f"{source} has no array {missing[0]!r}; it holds {', '.join(arrays) or 'nothing'}, and "
            f"the graph takes {', '.join(inputs)}"
        )
    steps, counts = {}, {}
    for name, info in inputs.items():
        array = arrays[name]
        if array.ndim == 0:
            raise FormatError(
                f"the array {name!r} of {source} is a single number; give one row for each sample"
            )
        # a row is a sample of a batch, or a whole batch
        steps[name] = 1 if array.ndim == len(info.shape) + 1 else max(info.shape[:1] or (1,))
        counts[name] = len(array) // steps[name]
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {n}" for name, n in counts.items())
        raise FormatError(f"the arrays of {source} hold different numbers of samples: {listed}")
    n = min(counts.values())
    labels = arrays.get("labels")
    if labels is not None:
        labels = np.asarray(labels).reshape(-1)
        if labels.size != n or labels.dtype.kind not in "iu":
            raise FormatError(
                f"the labels of {source} are {labels.dtype} [{labels.size}]; expected {n} "
                "integers, one per sample"
            )

    def cut(i: int) -> Callable[[], Feeds]:
        return lambda: {
            name: arrays[name][i * step : (i + 1) * step]
            if arrays[name].ndim == len(inputs[name].shape)
            else arrays[name][i]
            for name, step in steps.items()
        }

    return [(str(i), cut(i), None if labels is None else int(labels[i])) for i in range(n)]


def _loader(script: Path, function: str) -> Callable[[], Iterable[Any]]:
    """Load the function of a script."""
    if not script.is_file():
        raise UsageError(f"the script {script} does not exist; write script.py:function")
    module = types.ModuleType(f"edgeq_samples_{script.stem}")
    module.__file__ = str(script)
    try:
        # run without the import system, which would leave compiled code in the script's folder
        exec(compile(script.read_bytes(), script, "exec"), vars(module))
    except Exception as err:
        raise UsageError(f"the script {script} failed: {type(err).__name__}: {err}") from err
    loader = getattr(module, function, None)
    if not callable(loader):
        names = [name for name, value in vars(module).items() if inspect.isfunction(value)]
        raise UsageError(
            f"the script {script} has no function {function!r}; use one of {', '.join(names)}"
        )
    return loader  # type: ignore[no-any-return]


def _from_loader(
    loader: Callable[[], Iterable[Any]], source: str, inputs: Mapping[str, Info]
) -> Iterator[_Item]:
    try:
        for i, given in enumerate(loader()):
            label = None
            if isinstance(given, tuple) and len(given) == 2:
                given, label = given[0], _number(given[1], source)
            if isinstance(given, Mapping):
                feeds = {str(name): np.asarray(array) for name, array in given.items()}
            elif len(inputs) == 1:
                feeds = {next(iter(inputs)): np.asarray(given)}
            else:
                raise FormatError(
                    f"{source} yields arrays, and the graph has the inputs {', '.join(inputs)}; "
                    "yield a dictionary of arrays by input"
                )
            yield _Item(str(i), feeds, label)
    except EdgeqError:
        raise
    except Exception as err:
        raise UsageError(f"{source} failed: {type(err).__name__}: {err}") from err


def _number(label: Any, source: str) -> int:
    """The number of a class that a function gives with a sample."""
    if not np.issubdtype(np.asarray(label).dtype, np.integer) or np.size(label) != 1:
        raise FormatError(
            f"{source} yields the label {label!r} with a sample; give the number of the class"
        )
    return int(np.reshape(label, ()))


def _fitted(
    x: NDArray[Any], name: str, info: Info, channels_last: bool, where: str
) -> NDArray[Any]:
    """Bring a sample's array to the input's shape and type."""
    want = np.dtype(info.dtype)
    if x.dtype.kind not in "fiub" or (x.dtype.kind == "f") != (want.kind == "f"):
        raise FormatError(
            f"{where} has {x.dtype} for the input {name!r}, which takes {want}; arrays are not "
            "preprocessed: convert them to the model's range and type first"
        )
    if x.ndim == len(info.shape) - 1 and info.shape[0] == 1:
        x = x[None]
    shape, turned = x.shape, x
    if channels_last and x.ndim >= 3:
        turned = np.moveaxis(x, -1, 1)
    if turned.shape != info.shape:
        raise FormatError(
            f"{where} has the shape {list(shape)} for the input {name!r}, which takes "
            f"{list(info.shape)}" + _mend(shape, info.shape, channels_last)
        )
    if want.kind == "f" and not np.isfinite(turned).all():
        raise FormatError(f"{where} holds NaN or infinity for the input {name!r}; leave it out")
    if want.kind in "iu" and turned.size:
        limits = np.iinfo(want)
        if turned.min() < limits.min or turned.max() > limits.max:
            raise FormatError(
                f"{where} holds numbers for the input {name!r} that {want} cannot represent; use "
                f"{limits.min} to {limits.max}"
            )
    return np.asarray(turned, want, order="C")


def _mend(shape: Sequence[int], want: Sequence[int], channels_last: bool) -> str:
    """The end of an error message: how to make an array fit."""
    if len(shape) == len(want) and len(want) >= 3:
        first = (want[0], *want[2:], want[1])
        if not channels_last and tuple(shape) == first:
            return "; its channels are last and those of the graph first: use --layout nhwc"
        if channels_last and tuple(shape) == tuple(want):
            return "; its channels are first, as those of the graph: leave out --layout nhwc"
    if list(shape[1:]) == list(want[1:]):
        return "; only the size of the batch differs: give one sample at a time"
    return "; give arrays of that shape"
