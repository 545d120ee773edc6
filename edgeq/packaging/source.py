"""The source of a package: a language model with its integers, or a quantized graph."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from edgeq.calibration_text import own_calibration
from edgeq.converters.options import Options
from edgeq.converters.targets import target_named
from edgeq.core.errors import SchemeError, UnsupportedError, UsageError
from edgeq.core.hashing import file_sha256
from edgeq.core.progress import Progress
from edgeq.graph.feeds import Feeds
from edgeq.graph.ir import Graph, QuantWeight
from edgeq.importers import load
from edgeq.importers.tokenizer.chat_templates import chat_templates
from edgeq.model.artifact import save
from edgeq.model.model import Model
from edgeq.packaging.labels import is_label, labels_in, read_labels
from edgeq.packaging.license import License, license_in, license_of
from edgeq.packaging.platforms import NEAREST
from edgeq.packaging.prompts import start_ids
from edgeq.quant.decoder.quantize import quantize_model
from edgeq.quant.decoder.repack import repack
from edgeq.quant.graph.images import META, Preprocess
from edgeq.quant.graph.quantize import quantize_graph
from edgeq.quant.graph.samples import Samples, open_samples, samples_of
from edgeq.quant.recipe import Recipe

SAMPLES = 256
"""Most samples of calibration data from which the ranges of activations are measured."""


@dataclass(frozen=True)
class Held:
    """An artifact: a language model with quantized weights.

    Args:
        path: path of the artifact.
        model: the opened artifact.
        why: a sentence that says how the weights were quantized.
    """

    path: Path
    model: Model
    why: str


@dataclass
class ModelSource:
    """A language model to package.

    Args:
        source: a model, or the path of one.
        folder: folder for temporary artifacts.
        preset: recipe for float weights, or to quantize integer weights again. None quantizes float
            weights by the default recipe and keeps integers.
        threads, max_ram, progress: as for `edgeq.quantize`.
        exact: refuse targets that cannot represent the integers, instead of rounding them again.
    """

    source: Model | str | Path
    folder: Path
    preset: str | None = None
    threads: int | None = None
    max_ram: int | None = None
    progress: Progress | None = None
    exact: bool = False
    _held: dict[str, Held] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.opened = self.source if isinstance(self.source, Model) else load(self.source)
        if "tokenizer.json" not in self.opened.files:
            raise UsageError(
                "the model has no tokenizer.json, and an app needs one; put it into the model's "
                "folder"
            )

    @property
    def path(self) -> Path | None:
        """Path that the model was opened from; None if it has none."""
        return self.opened.origin.path if self.opened.origin else None

    @property
    def license(self) -> License:
        """The license that the files of the model state."""
        return license_of(self.path) if self.path else License()

    def own(self) -> Held:
        """The model with its own integers; a float model is quantized by the preset first."""
        if "own" not in self._held:
            self._held["own"] = self._made()
        return self._held["own"]

    def held_for(self, target: str, options: Options) -> Held:
        """The model with integers that a target can represent.

        Raises:
            UnsupportedError, SchemeError: the target can represent neither the model's own integers
                nor those of the scheme `NEAREST`, or not the own ones and ``exact`` is set.
        """
        own = self.own()
        row = target_named(target).decoder_target()
        try:
            row.check(own.model, options)
        except (UnsupportedError, SchemeError) as err:
            if self.exact:
                raise
            if "nearest" not in self._held:
                self._held["nearest"] = self._rounded(
                    self.folder / "nearest.edgeq", NEAREST, own.model,
                    f"The weights are quantized again, to {NEAREST}: {_sentence(err)}",
                )  # fmt: skip
            row.check(self._held["nearest"].model, options)
            return self._held["nearest"]
        return own

    def _made(self) -> Held:
        path, model = self.folder / "own.edgeq", self.opened
        if self.preset is not None:
            why = f"The weights are quantized by the recipe {self.preset}, which was given."
            return self._rounded(path, self.preset, model, why)
        if model.is_float:
            why = "The weights are quantized by the default recipe (4.75 bits per weight, GPTQ)."
            return self._rounded(path, None, model, why)
        formats = model.kept().get("formats")
        if self.path is not None and self.path.suffix == ".edgeq" and self.path.is_file():
            shutil.copyfile(self.path, path)
            why = "The artifact is packaged unchanged."
        elif formats:
            repack(model, path, progress=self.progress)
            why = f"The integers of the {', '.join(formats)} file are kept, and nothing is rounded."
        else:
            save(model, path)
            why = "The integers of the model are kept, and nothing is rounded."
        return Held(path, load(path), why)

    def _rounded(self, path: Path, preset: str | None, model: Model, why: str) -> Held:
        recipe = Recipe.from_options(preset=preset, source="decoder")
        quantize_model(
            model, path, recipe,
            requantize=not model.is_float, own_text=own_calibration, threads=self.threads,
            max_ram=self.max_ram, progress=self.progress,
        )  # fmt: skip
        return Held(path, load(path), why)


@dataclass
class GraphSource:
    """A graph to package.

    Args:
        source: a graph, or the path of one.
        data: real inputs: samples, a list of samples, or a path; None if there are none.
        shapes: shapes of inputs whose sizes the file does not fix.
        preset: recipe for a float graph. None means w8a8-static with data and w8-channel without.
        dequantize: convert the integer weights of a .tflite file to float first.
        labels: the names of the classes, or a file with one name per line. None means those in the
            metadata of the graph.
        threads, progress: as for `edgeq.quantize`.
    """

    source: Graph | str | Path
    data: Samples | Iterable[Feeds] | str | Path | None = None
    shapes: Mapping[str, tuple[int, ...]] | None = None
    preset: str | None = None
    dequantize: bool = False
    labels: Sequence[str] | str | Path | None = None
    threads: int | None = None
    progress: Progress | None = None
    why: str = field(default="", init=False)

    def __post_init__(self) -> None:
        if isinstance(self.source, Graph):
            graph = self.source
        else:
            from edgeq.graph.files import read

            graph = read(self.source, shapes=self.shapes, dequantize=self.dequantize)
        self.opened = graph
        self.names = self._names(graph)
        self.samples = self._samples(graph)

    @cached_property
    def graph(self) -> Graph:
        """The quantized graph. A float graph is quantized at the first access."""
        return self._quantized(self.opened)

    @property
    def path(self) -> Path | None:
        """Path that the graph was read from; None for a graph that was given as an object."""
        return None if isinstance(self.source, Graph) else Path(self.source)

    @property
    def license(self) -> License:
        """The license that the graph's metadata or the files beside it state."""
        beside = license_of(self.path) if self.path else License()
        return license_in(self.opened.meta, beside)

    @property
    def sha256(self) -> str | None:
        """SHA-256 of the file, in hexadecimal; None without a file."""
        return file_sha256(self.path) if self.path else None

    def _names(self, graph: Graph) -> tuple[str, ...] | None:
        if self.labels is None:
            return labels_in(graph.meta)
        if isinstance(self.labels, str | Path):
            return read_labels(self.labels)
        names = tuple(self.labels) if isinstance(self.labels, Sequence) else ()
        if not names or not all(map(is_label, names)):
            raise UsageError(
                f"labels is {str(self.labels)[:60]!r}; give a file with a name on each line, or a "
                "list of printable names of one line each"
            )
        return names

    def _samples(self, graph: Graph) -> Samples | None:
        if self.data is None or isinstance(self.data, Samples):
            return self.data
        if isinstance(self.data, str | Path):
            return open_samples(str(self.data), graph, limit=SAMPLES)
        return samples_of(graph, list(self.data))

    def _quantized(self, graph: Graph) -> Graph:
        if any(isinstance(constant, QuantWeight) for constant in graph.constants.values()):
            if self.preset is not None:
                raise UsageError(
                    "the graph is quantized already; leave out the preset, or give the float file"
                )
            self.why = "The integers of the quantized file are kept, and nothing is rounded."
            return graph
        preset = self.preset or ("w8a8-static" if self.samples is not None else "w8-channel")
        self.why = f"The float graph is quantized by the recipe {preset}" + (
            "." if self.preset else
            ": weights and activations of 8 bits, ranges measured on the samples given."
            if self.samples is not None else
            ": weights of 8 bits and float activations, as no samples were given to measure the "
            "ranges of activations on (--data)."
        )  # fmt: skip
        recipe = Recipe.from_options(preset=preset, source="graph")
        summary = quantize_graph(
            graph, recipe, self.samples, threads=self.threads or 1, progress=self.progress
        )
        return summary.graph


def need_float_ends(graph: Graph, language: str) -> None:
    """Refuse a graph with inputs or outputs of a type that a platform's glue code does not support.

    Args:
        graph: the graph to package.
        language: the language of the glue code, for the message.

    Raises:
        UnsupportedError: an input or output is not float32.
    """
    for name in (*graph.inputs, *graph.outputs):
        if (kind := graph.info(name).dtype) != "float32":
            raise UnsupportedError(
                f"the {language} code of packages supports only float32 inputs and outputs, and "
                f"{name!r} is {kind}; package the graph for ort-mobile, or convert it with edgeq "
                "convert"
            )


def describe_model(source: ModelSource, held: Model, name: str) -> dict[str, Any]:
    """The description of a language model for the manifest."""
    config = held.config
    origin = source.opened.origin
    return {
        "name": name,
        "family": config.family,
        "parameters": sum(n * k for _, (n, k) in config.linears()),
        "vocabulary": config.vocab,
        "longest_context": config.context,
        "chat": bool(chat_templates(source.opened.files)),
        "start_tokens": start_ids(source.opened.files),
        "source": source.opened.provenance.get("source") or (origin.name if origin else None),
        "source_sha256": source.opened.provenance.get("source_sha256")
        or (origin.sha256 if origin else None),
    }


def describe_graph(source: GraphSource, name: str) -> dict[str, Any]:
    """The description of a graph for the manifest."""
    graph = source.graph

    def ends(names: Iterable[str]) -> list[dict[str, Any]]:
        infos = [(name, graph.info(name)) for name in names]
        return [{"name": n, "shape": list(i.shape), "dtype": i.dtype} for n, i in infos]

    return {
        "name": name,
        "operators": len(graph.nodes),
        "inputs": ends(graph.inputs),
        "outputs": ends(graph.outputs),
        "labels": list(source.names) if source.names else None,
        "preprocess": asdict(Preprocess.from_meta(graph.meta)) if META in graph.meta else None,
        "source": source.path.name if source.path else graph.name,
        "source_sha256": source.sha256,
    }


def _sentence(err: Exception) -> str:
    return str(err).partition(";")[0].rstrip(".") + "."
