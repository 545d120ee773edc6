"""Quantize a decoder: from a checkpoint, a recipe and optional calibration data to an artifact.

step                                                       module
check the data, transform, choose bits, measure ranges     calibration_data, prepare, bit_search
round and write every tensor                               round_model: data_free, calibrated
keep finished layers until the artifact is whole           finished_layers
train the written tensors                                  edgeq.quant.training
compare the written model with the source                  quality_report
rename the temporary file to the output                    edgeq.model.artifact
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgeq._version import __version__
from edgeq.core.cpu import available_cores
from edgeq.core.errors import UsageError, require, unknown
from edgeq.core.files import check_target
from edgeq.core.memory import peak_rss_bytes, rss_bytes
from edgeq.core.progress import Progress
from edgeq.formats.mapped_file import release
from edgeq.formats.schemes import QuantScheme, Scheme
from edgeq.formats.tensor import FloatTensor, QuantTensor, Tensor
from edgeq.model.artifact import ArtifactWriter
from edgeq.model.artifact_layout import TensorLayout
from edgeq.model.model import Model
from edgeq.model.mtp import PREFIX, without_mtp
from edgeq.quant.decoder.bit_search import stored
from edgeq.quant.decoder.budget import Budget, check_limits, check_replay, make_budget
from edgeq.quant.decoder.calibrate import CalibrationStats, CalibrationText
from edgeq.quant.decoder.calibrated import Ratios, tensor_sqnr
from edgeq.quant.decoder.calibration_data import NO_TEXT, CalibrationData
from edgeq.quant.decoder.data_free import Importance, round_data_free
from edgeq.quant.decoder.finished_layers import FinishedLayers, run_key
from edgeq.quant.decoder.layerwise import beside_stream, check_layerwise
from edgeq.quant.decoder.prepare import Prepared, prepare
from edgeq.quant.decoder.quality_report import HeldOut, QualityReport, card_bytes, measure
from edgeq.quant.decoder.round_model import round_model
from edgeq.quant.decoder.sensitivity import Sensitivity
from edgeq.quant.decoder.source import BackgroundDigest, quantized_types, refuse_quantized
from edgeq.quant.kernels.library import load_kernels
from edgeq.quant.kernels.parallel import thread_limit
from edgeq.quant.recipe import Recipe
from edgeq.quant.rounders.rounding import METHODS
from edgeq.quant.summary import QuantizationSummary

_WIDEST_SQNR = -9999.99
"""A number whose text is at least as long as that of any ratio with two decimals."""
OwnText = Callable[[Model, int | None, Progress | None], CalibrationText]
"""(model, most bytes of memory, progress) -> a calibration text that is sampled from the model, see
`edgeq.calibration_text.own_calibration`."""


@dataclass(frozen=True)
class TensorSummary:
    """A tensor of the artifact.

    Args:
        name: name of the tensor.
        scheme: scheme in which it is stored.
        shape: logical shape.
        nbytes: stored bytes.
        sqnr_db: SQNR in dB; None if the tensor is floating point or exact.
    """

    name: str
    scheme: Scheme
    shape: tuple[int, ...]
    nbytes: int
    sqnr_db: float | None


@dataclass(frozen=True)
class Summary(QuantizationSummary):
    """The result of quantizing a language model: tensors, quality, sizes and times.

    Args:
        tensors: all tensors, in file order.
        recipe: the recipe as it was applied, with the rules that were chosen for a target.
        target: how bits were chosen for a target, see `about` of
            `edgeq.quant.decoder.bit_search.SearchResult`.
        requantized: type -> number of the source's weights that were quantized already. The
            quality report then compares with these rounded weights.
        quality: the quality report.
        file_bytes: size of the artifact.
        source_bytes: bytes of the source's tensors.
        source_sha256: SHA-256 of the source; None for a model in memory of unknown origin.
        seconds: wall-clock time, including the quality report.
        card_seconds: wall-clock time of the quality report.
        cpu_seconds: processor time of all threads.
        threads: number of threads.
        continued_layers: number of layers that an interrupted run had rounded already.
        peak_rss_bytes: peak resident memory of the process; None if unknown.
    """

    tensors: tuple[TensorSummary, ...]
    recipe: Recipe
    target: Mapping[str, Any] | None
    requantized: Mapping[str, int]
    quality: QualityReport
    file_bytes: int
    source_bytes: int
    source_sha256: str | None
    seconds: float
    card_seconds: float
    cpu_seconds: float
    threads: int
    continued_layers: int
    peak_rss_bytes: int | None

    @property
    def bpw(self) -> float:
        """Stored bits per weight over all tensors, including scales, padding and vectors."""
        weights = sum(int(np.prod(t.shape)) for t in self.tensors)
        return 8 * sum(t.nbytes for t in self.tensors) / weights

    def to_dict(self) -> dict[str, Any]:
        """The summary as a dictionary for JSON."""
        return {
            "recipe": self.recipe.to_dict(),
            "source_sha256": self.source_sha256,
            "source_bytes": self.source_bytes,
            "file_bytes": self.file_bytes,
            "bpw": self.bpw,
            "seconds": self.seconds,
            "card_seconds": self.card_seconds,
            "cpu_seconds": self.cpu_seconds,
            "threads": self.threads,
            "continued_layers": self.continued_layers,
            "peak_rss_bytes": self.peak_rss_bytes,
            "quality": self.quality.to_dict(),
            "target": self.target,
            "requantized": dict(self.requantized),
            "tensors": [
                vars(t) | {"scheme": str(t.scheme), "shape": list(t.shape)} for t in self.tensors
            ],
        }

    def __repr__(self) -> str:
        evaluation = self.quality.evaluation
        kl = (
            f", KL {evaluation.kl_mean:.4g}"
            if evaluation and evaluation.kl_mean is not None
            else ""
        )
        return (
            f"<Summary {len(self.tensors)} tensors, {self.file_bytes} bytes, "
            f"{self.bpw:.2f} bits per weight{kl}>"
        )


def require_packages(recipe: Recipe) -> None:
    """Refuse a recipe that needs a package which is not installed.

    Raises:
        MissingDependencyError: the recipe trains, and PyTorch is not installed.
    """
    if recipe.training:
        require("train", ("torch",), "to train quantized weights")


def quantize_model(
    base: Model,
    out: str | Path,
    recipe: Recipe,
    *,
    requantize: bool = False,
    calibration: CalibrationText | None = None,
    own_text: OwnText | None = None,
    stats: CalibrationStats | None = None,
    sensitivity: Sensitivity | None = None,
    card: HeldOut | str = NO_TEXT,
    max_ram: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Quantize a language model to an artifact, as `edgeq.quantize` does.

    The arguments and errors are those of `edgeq.quantize`, but the recipe must be complete.
    ``own_text`` makes a calibration text if the recipe needs one and none is given.
    """
    started, cpu_started = time.perf_counter(), time.process_time()
    if recipe.graph is not None:
        raise UsageError(
            "this recipe is for graphs; load one for decoders, as with Recipe.from_options(preset)"
        )
    if recipe.method not in METHODS:
        raise UsageError(unknown("method", recipe.method, METHODS))
    data = CalibrationData(calibration, stats, sensitivity, card)
    if own_text is None:
        data.check(recipe)
    check_limits(threads, max_ram)
    require_packages(recipe)
    check_target(Path(out))
    origin = base.origin
    base.validate()
    if recipe.needs - {"training"}:
        check_layerwise(
            base.config, f"what the recipe asks for ({', '.join(sorted(recipe.needs))})"
        )
    base = _without_changed_head(base, recipe)
    if not requantize:
        refuse_quantized(base, str(origin.path) if origin else "the model")
    if own_text is not None:
        if data.lacks(recipe) and not recipe.training:  # training needs far more text
            with thread_limit(threads):
                calibration = own_text(base, max_ram, progress)
            data = replace(data, text=calibration)
        data.check(recipe)
    if calibration is not None and recipe.needs:
        check_replay(base.config, calibration, recipe, max_ram)
    digest = BackgroundDigest(origin) if origin else None
    prepared = prepare(base, recipe, data, progress, Path(out).absolute().parent)
    model, recipe, schemes = prepared.model, prepared.recipe, prepared.schemes
    tensors = {name: model.tensors[name] for name in schemes}
    load_kernels()  # so that the budget counts the memory of compiled code
    budget = make_budget([t.shape for t in tensors.values()], threads or available_cores(), max_ram)
    if isinstance(card, HeldOut):
        card = _card(base, card, max_ram)
    requantized = quantized_types(base)
    provenance: dict[str, Any] = {
        "source": origin.name if origin else base.provenance.get("source"),
        "source_sha256": "0" * 64 if origin else base.provenance.get("source_sha256"),
        "edgeq_version": __version__,
        "recipe": recipe.to_dict(),
        **{key: base.provenance[key] for key in ("left_out",) if key in base.provenance},
        **prepared.provenance,
    }
    if requantized:
        provenance["requantized"] = requantized
    layouts = {name: TensorLayout(schemes[name], tuple(t.shape)) for name, t in tensors.items()}
    quantized = [name for name, scheme in schemes.items() if isinstance(scheme, QuantScheme)]
    announced = {
        "sqnr_db": dict.fromkeys(quantized, _WIDEST_SQNR),
        "quality": _widest_report(model, card, prepared).to_dict(),
    }
    with (
        FinishedLayers(Path(out), _key(prepared, data, digest)) as finished,
        thread_limit(budget.threads),
        ArtifactWriter(
            out, model.config, layouts, model.files, provenance | announced, finished.folder
        ) as writer,
    ):
        ratios = _round(prepared, data, budget, writer, finished, progress)
        card_started = time.perf_counter()
        quality = QualityReport(card) if isinstance(card, str) else measure(
            writer.written(), base, card, inputs=prepared.inputs, progress=progress
        )  # fmt: skip
        card_seconds = time.perf_counter() - card_started
        if digest:
            provenance["source_sha256"] = digest.result()
        provenance["sqnr_db"] = {name: ratios[name] for name in quantized}
        file_bytes = writer.commit(provenance | {"quality": quality.to_dict()})
    rows = (
        TensorSummary(name, layout.scheme, layout.shape, layout.nbytes, ratios.get(name))
        for name, layout in layouts.items()
    )
    return Summary(
        tensors=tuple(rows),
        recipe=recipe,
        target=prepared.provenance.get("target"),
        requantized=requantized,
        quality=quality,
        file_bytes=file_bytes,
        source_bytes=sum(base.tensors[name].nbytes for name in stored(base)),
        source_sha256=provenance["source_sha256"],
        seconds=time.perf_counter() - started,
        card_seconds=card_seconds,
        cpu_seconds=time.process_time() - cpu_started,
        threads=budget.threads,
        continued_layers=finished.taken,
        peak_rss_bytes=peak_rss_bytes(),
    )


def _without_changed_head(base: Model, recipe: Recipe) -> Model:
    """The model without a multi-token-prediction head that its recipe does not keep sound."""
    kind = "training" if recipe.training else "rotate" if "rotate" in recipe.transforms else None
    if base.config.mtp is None or kind is None:
        return base
    count = sum(name.startswith(PREFIX) for name in base.tensors)
    text = f"{count} tensors of the multi-token-prediction head, whose states {kind} changes"
    left_out = [*base.provenance.get("left_out", ()), text]
    model = without_mtp(base)
    provenance = {**base.provenance, "left_out": left_out}
    changed = replace(model, provenance=provenance)
    return changed if base.origin is None else changed.opened_from(base.origin.path)


def _key(prepared: Prepared, data: CalibrationData, digest: BackgroundDigest | None) -> str | None:
    """What decides the integers of a run that can be continued; None for other runs."""
    if digest is None or not prepared.calibrated or prepared.tensors is not None:
        return None
    facts = {
        "source": digest.result(), "version": __version__, "recipe": prepared.recipe.to_dict(),
    }  # fmt: skip
    return run_key(facts, data.needed_text.windows)


NO_NEXT_TOKEN = (
    "the model sees what comes after a token and predicts no next one; `edgeq embed MODEL --base "
    "FLOAT` compares its vectors"
)
"""Why a model of embeddings has no quality card."""


def _card(base: Model, card: HeldOut, max_ram: int | None) -> HeldOut | str:
    """The text of the quality report, or the reason why there is none."""
    if not base.config.causal:
        return NO_NEXT_TOKEN
    if reads := beside_stream(base.config):
        return (
            f"it is measured layer by layer, which edgeq does not do for such a model: {reads}; "
            "`edgeq perplexity MODEL -f TEXT --kl-base FLOAT` compares the two"
        )
    return _card_that_fits(base, card, max_ram)


def _widest_report(model: Model, card: HeldOut | str, prepared: Prepared) -> QualityReport:
    """A placeholder that takes at least as many bytes of the file as the report will take."""
    if isinstance(card, str):
        return QualityReport(card)
    return QualityReport.widest(model.config, card, prepared.inputs)


def _card_that_fits(base: Model, card: HeldOut, max_ram: int | None) -> HeldOut | str:
    """The text of the quality report, or the reason why there is not enough memory for it."""
    need = card_bytes(base.config, card) + (rss_bytes() or 0)
    if max_ram is None or need <= max_ram:
        return card
    return (
        f"it would take {need / 1e6:.0f} MB of memory, and {max_ram / 1e6:.0f} MB were allowed "
        "(--max-ram)"
    )


def _round(
    prepared: Prepared,
    data: CalibrationData,
    budget: Budget,
    writer: ArtifactWriter,
    finished: FinishedLayers,
    progress: Progress | None,
) -> dict[str, float | None]:
    """Round and write every tensor; returns the SQNR in dB of the quantized tensors."""
    recipe, schemes = prepared.recipe, prepared.schemes

    def data_free(tensors: Mapping[str, Tensor], method: str, importance: Importance) -> Ratios:
        return round_data_free(
            tensors, schemes, method, budget, writer,
            importance={**prepared.importance, **importance}, progress=progress,
        )  # fmt: skip

    if prepared.tensors is not None:
        ratios = _copy(prepared, prepared.tensors, writer, progress)
    else:
        text = data.needed_text if prepared.calibrated else None
        ratios = dict(round_model(
            prepared.model, recipe, schemes, text,
            data_free=data_free, write=writer.write, written=writer.tensor, finished=finished,
            progress=progress,
        ))  # fmt: skip
    if recipe.training:
        ratios |= _train(prepared, data.needed_text, budget, writer, progress)
    return _two_decimals(ratios)


def _two_decimals(ratios: Mapping[str, float | None]) -> dict[str, float | None]:
    return {name: None if db is None else round(db, 2) for name, db in ratios.items()}


def _copy(
    prepared: Prepared,
    tensors: Mapping[str, Tensor],
    writer: ArtifactWriter,
    progress: Progress | None,
) -> dict[str, float | None]:
    """Write tensors that are rounded already; returns the SQNR in dB of the quantized tensors."""
    ratios: dict[str, float | None] = {}
    for done, (name, tensor) in enumerate(tensors.items()):
        if progress:
            progress(f"writing {name}", done, len(tensors))
        assert isinstance(tensor, QuantTensor | FloatTensor)  # the types that rounding gives
        writer.write(name, tensor)
        if isinstance(tensor, QuantTensor):
            ratios[name] = tensor_sqnr(prepared.model.tensors[name], tensor)
        release(tensor)
        release(prepared.model.tensors[name])
    return ratios


def _train(
    prepared: Prepared,
    calibration: CalibrationText,
    budget: Budget,
    writer: ArtifactWriter,
    progress: Progress | None,
) -> dict[str, float | None]:
    """Train the written tensors and write them again; returns the SQNR in dB of each."""
    from edgeq.quant.decoder.calibrated import tensor_sqnr
    from edgeq.quant.training import train

    model, schemes = prepared.model, prepared.schemes
    begun = {name: writer.tensor(name) for name in schemes}
    init = {name: tensor for name, tensor in begun.items() if isinstance(tensor, QuantTensor)}
    trained = train(
        model, schemes, calibration,
        init=init, threads=budget.threads, progress=progress, **(prepared.recipe.training or {}),
    )  # fmt: skip
    ratios = {}
    for name, tensor in trained.items():
        assert isinstance(tensor, QuantTensor | FloatTensor)  # the types of tensors in memory
        writer.rewrite(name, tensor)
        if isinstance(tensor, QuantTensor):
            ratios[name] = tensor_sqnr(model.tensors[name], tensor)
    return ratios
