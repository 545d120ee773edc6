"""The steps of `edgeq.converters.convert.convert` for language models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgeq.converters.options import Options
from edgeq.converters.size import total_bytes, widened
from edgeq.converters.targets import target_named
from edgeq.converters.validate.report import ValidationReport
from edgeq.core.errors import DoesNotFitError, UsageError
from edgeq.core.memory import rss_bytes
from edgeq.core.progress import Progress
from edgeq.importers import load
from edgeq.model.model import Model
from edgeq.model.mtp import without_mtp
from edgeq.quant.presets import FAST


class DecoderConversion:
    """A conversion of a language model.

    Args:
        source: a model, or the path of one.
        target: name of the target.
        options: options of the conversion.
        preset, max_ram, steps, threads, progress, announce: as for `convert`.
        shapes, samples: refused; they are for graphs.

    Raises:
        UsageError: the target takes no language models, or an argument is for graphs.
    """

    def __init__(
        self,
        source: Model | str | Path,
        target: str,
        options: Options,
        *,
        preset: str | None,
        shapes: object,
        samples: object,
        max_ram: int | None,
        steps: int,
        threads: int | None,
        progress: Progress | None,
        announce: Callable[[str], None] | None,
    ) -> None:
        if shapes or samples is not None:
            raise UsageError("shapes and samples are for graphs, and the source is a model")
        self._row = target_named(target)
        self._target = self._row.decoder_target()
        self._source, self._options, self._preset = source, options, preset
        self._max_ram, self._steps, self._threads = max_ram, steps, threads
        self._progress, self._announce = progress, announce
        self._model: Model | None = None

    @property
    def model(self) -> Model:
        """The model, once it is open; tensors whose integers are kept are packed."""
        if self._model is None:
            opened = self._source if isinstance(self._source, Model) else load(self._source)
            self._model = without_mtp(opened).packed()
        return self._model

    def check_name(self, path: Path) -> None:
        """Refuse a file that its runtime would not recognize by its name."""
        self._row.check_output(path, graph=False)

    def prepare(self, folder: Path) -> None:
        """Open the model, quantize it if so asked, and refuse what the target cannot represent."""
        if self._preset is not None:
            from edgeq.quant import Recipe, quantize_model  # most conversions are of an artifact

            packed = folder / "quantized.edgeq"
            recipe = Recipe.from_options(preset=self._preset or FAST)
            source = self._source if isinstance(self._source, Model) else load(self._source)
            quantize_model(
                source, packed, recipe,
                max_ram=self._max_ram, threads=self._threads, progress=self._progress,
            )  # fmt: skip
            self._model = without_mtp(load(packed))
        self.model.validate()
        self._target.check(self.model, self._options)
        if self._max_ram is not None:
            self._check_memory(self._max_ram)
        if self._announce:
            for remark in self.remarks():
                self._announce(remark)

    def remarks(self) -> list[str]:
        """What the conversion will cost: its size and why, and the defaults chosen for it."""
        sizes = list(self._target.sizes(self.model, self._options))
        return [
            f"The output will take about {total_bytes(self.model, sizes) / 2**20:.0f} MiB; the "
            f"source's tensors take {self.model.nbytes / 2**20:.0f} MiB.",
            *widened(self._row.name, sizes),
            *self._target.remarks(self.model, self._options),
        ]

    def _check_memory(self, max_ram: int) -> None:
        need = self._target.memory(self.model, self._options)
        if need is None:
            raise DoesNotFitError(
                f"--max-ram does not work for {self._row.name}: its library decides how much "
                "memory it uses; leave --max-ram out"
            )
        need += rss_bytes() or 0
        if need > max_ram:
            raise DoesNotFitError(
                f"converting to {self._row.name} takes {need / 1e6:.0f} MB of memory, "
                f"{max_ram / 1e6:.0f} MB are allowed; allow {need / 1e6:.0f} MB"
            )

    def write(self, output: Path) -> None:
        """Write the output."""
        self._target.write(self.model, output, self._options, self._progress)

    def validate(self, output: Path) -> ValidationReport:
        """Run the output and compare it with the model."""
        from edgeq.converters.validate.decoder import validate_decoder

        return validate_decoder(
            output, self.model, self._row.name,
            steps=self._steps, threads=self._threads, progress=self._progress,
            announce=self._announce,
        )  # fmt: skip

    def check_written(self, output: Path) -> None:
        """Nothing is known without validation."""

    def source(self) -> Mapping[str, Any]:
        """Name, digest and recipe of the model's own source, and where its integers come from."""
        known = self.model.provenance
        about = {key: known.get(key) for key in ("source", "source_sha256", "recipe")}
        if about["source_sha256"] is None and self.model.origin is not None:
            about["source_sha256"] = self.model.origin.sha256
        return about | {"integers": self.model.integers()}

    def versions(self) -> Mapping[str, str]:
        """The libraries that took part."""
        return self._target.versions()

    def arena_bytes(self) -> int | None:
        """None: the arena of a decoder is not known."""
        return None
