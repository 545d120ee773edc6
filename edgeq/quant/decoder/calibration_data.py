"""The data that a recipe uses: a text, or statistics and sensitivities measured on a text."""

from __future__ import annotations

from dataclasses import dataclass

from edgeq.core.errors import UsageError
from edgeq.quant.decoder.calibrate import CalibrationStats, CalibrationText
from edgeq.quant.decoder.quality_report import HeldOut
from edgeq.quant.decoder.sensitivity import Sensitivity
from edgeq.quant.recipe import Recipe

NO_TEXT = "no text was given to measure on"


@dataclass(frozen=True)
class CalibrationData:
    """The data for calibration, and the text for measuring the quality.

    Args:
        text: windows of the calibration text.
        stats: statistics of the inputs of the source's matrices.
        sensitivity: losses of the source's matrices.
        held_out: the text on which the quality is measured, or the reason why it is not measured.
    """

    text: CalibrationText | None = None
    stats: CalibrationStats | None = None
    sensitivity: Sensitivity | None = None
    held_out: HeldOut | str = NO_TEXT

    @property
    def needed_text(self) -> CalibrationText:
        """The windows, for a recipe that needs them; `check` refuses one without a text."""
        assert self.text is not None
        return self.text

    def lacks(self, recipe: Recipe) -> list[str]:
        """The names of the data that a recipe needs and that is missing."""
        if self.text is not None:
            return []
        given: set[str] = set()
        if self.stats is not None and not recipe.transforms:
            given |= {"importance", "ranges"}
        if self.sensitivity is not None:
            given.add("target")
        return sorted(recipe.needs - given)

    def check(self, recipe: Recipe) -> None:
        """Refuse a recipe whose data is missing, and measuring on the calibration text.

        Raises:
            UsageError: data is missing, or the held-out text is the calibration text.
        """
        if lacking := self.lacks(recipe):
            raise UsageError(_lacking(recipe, lacking[0], self.stats is not None))
        if (
            self.text is not None
            and isinstance(self.held_out, HeldOut)
            and self.held_out.cut.text_sha256 == self.text.text_sha256 != ""
        ):
            raise UsageError(
                f"quality cannot be measured on {self.held_out.name}, which is also the "
                "calibration text; give another --eval-text, or --no-card"
            )


def _lacking(recipe: Recipe, need: str, have_stats: bool) -> str:
    what = {
        "importance": f"the method {recipe.method}",
        "hessian": f"the method {recipe.method}",
        "ranges": "static activations",
        "transforms": f"the transform {(*recipe.transforms, '')[0]}",
        "target": "the choice of bits for a target",
        "training": "training",
    }[need]
    why = " itself, not only its statistics" if have_stats else ""
    return (
        f"{what} needs a calibration text{why}; give a text of the kind that the model is for: "
        "--calib TEXT"
    )
