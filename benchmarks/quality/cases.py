"""Every way of quantizing that is compared, read off the package's own tables."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from edgeq.formats.schemes import parse_scheme
from edgeq.quant.decoder.transforms import TRANSFORMS
from edgeq.quant.presets import presets_for
from edgeq.quant.recipe import Recipe
from edgeq.quant.rounders.rounding import METHODS
from edgeq.quant.rules import Rule
from edgeq.quant.training import TRAINING_METHODS as TRAINING

SCHEMES = {4: "w4-g32", 3: "w3-g32", 2: "w2-g16-asym"}
"""Bits -> the scheme that methods are compared with."""
BEST = "gptq"
"""The rounding that transforms, targets and training are combined with."""
TARGETS = {4: (4.5, 5.5), 3: (3.5,), 2: (2.5,)}
"""Bits -> bits per weight for mixed schemes; those of a Q5_0 model too."""
PALETTE_METHODS = ("mse", "imatrix")
LEAN = "mlp.(gate|up)_proj"
"""Matrices that get groups of 64 in the lean rows: their padding counted, no model has more than
4.6 or 3.6 bits per weight then, and none takes more bytes than llama.cpp's 4.5 bit types."""
STEPS = {"stories260K": 1000, "babyllama105": 600, "demo": 300}
"""Model -> steps of training."""
BATCH = 4
"""Windows a step."""
LAYER_STEPS = {"steps": 300, "learning_rate": 0.02}
"""Of learned rounding, for each layer."""
THOROUGH = "stories260K"
"""The model that every training method is tried on; the others get distillation alone."""
BITS = {"demo": (4,)}
"""Models that are not measured with all numbers of bits."""


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Args:
        label: what was done.
        bits: of the matrices; which naive rounding it is compared with.
        recipe: how.
        like: bits are chosen for every tensor so that all take no more bytes than with this
            recipe; None leaves them as they are.
    """

    label: str
    bits: int
    recipe: Recipe
    like: Recipe | None = None

    @property
    def key(self) -> str:
        """What the row is known by."""
        return f"{self.bits} {self.label}"

    @property
    def trains(self) -> bool:
        """Whether it learns from the training windows, of which those of calibration are few."""
        chosen = self.recipe.training
        return chosen is not None and chosen["method"] != "adaround"


def training(method: str, model: str) -> dict[str, Any]:
    """Options of a training method for a model."""
    steps = LAYER_STEPS if method == "adaround" else {"steps": STEPS[model]}
    return {"method": method, "batch": BATCH, **steps}


def cases(model: str) -> Iterator[Case]:
    """All rows for a model: by bits, those that train last."""
    yield Case("rtn", 8, Recipe.named("w8-channel"))
    for name, preset in presets_for("decoder").items():
        if "activations" in preset:
            yield Case(name, 8, Recipe.named(name))
    chosen = BITS.get(model, tuple(SCHEMES))
    for bits in chosen:
        yield from _rounded(bits)
    for bits in chosen:
        yield from _trained(bits, model)


def _rounded(bits: int) -> Iterator[Case]:
    plain, palette = Recipe.named(SCHEMES[bits]), Recipe.named(f"w{bits}-g32-palette")
    for method in METHODS:
        yield Case(method, bits, replace(plain, method=method))
    for method in PALETTE_METHODS:
        yield Case(f"palette, {method}", bits, replace(palette, method=method))
    crossed = {"options": {"use_quantized_inputs": True}}
    yield Case(f"{BEST}, crossed", bits, replace(plain, method=BEST, **crossed))
    yield Case(f"palette, {BEST}, crossed", bits, replace(palette, method=BEST, **crossed))
    best = replace(plain, method=BEST)
    for transform in TRANSFORMS:
        yield Case(f"{transform} + {BEST}", bits, replace(best, transforms=(transform,)))
    mixed = replace(plain, method=BEST, **crossed)
    yield Case(f"mixed bits + {BEST}, crossed, as many bytes", bits, mixed, like=plain)
    yield Case(
        f"mixed bits + palette, {BEST}, crossed, as many bytes", bits,
        replace(palette, method=BEST, **crossed), like=palette,
    )  # fmt: skip
    for bpw in TARGETS[bits]:
        aimed = replace(mixed, target={"bpw": bpw})
        yield Case(f"mixed bits + {BEST}, crossed, {bpw:g} bpw", bits, aimed)


def _trained(bits: int, model: str) -> Iterator[Case]:
    best = replace(Recipe.named(SCHEMES[bits]), method=BEST)
    for method in TRAINING:
        if method == "distill" or (model == THOROUGH and bits > 2):
            yield Case(method, bits, replace(best, training=training(method, model)))
    if bits == 2:
        return
    distill = training("distill", model)
    lean = Rule(LEAN, parse_scheme(f"w{bits}-g64"))
    yield Case("distill, lean", bits, replace(best, rules=(lean, *best.rules), training=distill))
    bpw = TARGETS[bits][0]
    mixed = replace(best, target={"bpw": bpw}, training=distill)
    yield Case(f"distill, mixed bits, {bpw:g} bpw", bits, mixed)
    palette = replace(
        Recipe.named(f"w{bits}-g32-palette"), method=BEST, options={"use_quantized_inputs": True}
    )
    palette = replace(palette, training=distill)
    yield Case("distill, palette", bits, palette)
    rules = (Rule(LEAN, parse_scheme(f"w{bits}-g64-palette")), *palette.rules)
    yield Case("distill, palette, lean", bits, replace(palette, rules=rules))
    plain = Recipe.named(f"w{bits}-g32-palette")
    yield Case("distill, palette, mixed bits, as many bytes", bits, palette, like=plain)
    lean_too = replace(plain, rules=rules)
    yield Case("distill, palette, mixed bits, as many bytes as lean", bits, palette, like=lean_too)
