"""Choose the sizes of the chunks in which a model is quantized, within a memory limit.

resident = memory of the process before the work
         + FIXED                      stacks, the buffer of the hash, the header
         + RELEASE_EVERY              source pages that were read since the last release
         + threads * weights per chunk * BYTES_PER_WEIGHT
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from edgeq.core.errors import DoesNotFitError, UsageError
from edgeq.core.memory import rss_bytes
from edgeq.formats.packing import TILE
from edgeq.model.config import ModelConfig
from edgeq.model.recording import linear_groups
from edgeq.quant.decoder.calibrate import CalibrationText
from edgeq.quant.decoder.quality_report import logits_bytes
from edgeq.quant.decoder.replayed_model import KEEP_BYTES, KEPT_LOGITS, TOGETHER
from edgeq.quant.recipe import Recipe
from edgeq.quant.rounders.gptq import ROWS
from edgeq.quant.rounders.hessian import EXACT_K

BYTES_PER_WEIGHT = 28
"""Bytes per weight of a chunk: source, float32, scaled values, integers, codes, packed codes."""
CHUNK_WEIGHTS = 1 << 17
"""Weights per chunk of a thread, chosen so that its float32 buffers stay in the L2 cache."""
FIXED = 16 << 20
TRAINED_BYTES = 24
"""Bytes per weight that is trained, including the weight of the teacher."""
FACTOR_COPIES = 2
"""Number of K x K matrices in memory while second moments are factored, as measured."""
RELEASE_EVERY = 64 << 20
"""Bytes that are read from the source before its pages are released."""


@dataclass(frozen=True)
class Budget:
    """Sizes that keep within the memory limit.

    Args:
        threads: number of threads.
        chunk_weights: most weights of a chunk; a chunk has at least 16 rows.
        release_every: bytes that are read from the source between two releases of its pages.
    """

    threads: int
    chunk_weights: int
    release_every: int

    def rows(self, shape: Sequence[int]) -> int:
        """Number of rows per chunk for a tensor of this shape: a multiple of 16."""
        return max(TILE, self.chunk_weights // max(math.prod(shape[1:]), 1) // TILE * TILE)


def make_budget(shapes: Iterable[Sequence[int]], threads: int, max_ram: int | None) -> Budget:
    """Choose the largest sizes that fit: first with smaller chunks, then with fewer threads.

    Args:
        shapes: shapes of all tensors; the widest row determines the smallest chunk.
        threads: preferred number of threads.
        max_ram: most bytes of the process; None for no limit.

    Raises:
        DoesNotFitError: even the smallest chunks on one thread need more.
        UsageError: threads or max_ram is not positive.
    """
    check_limits(threads, max_ram)
    if max_ram is None:
        return Budget(threads, CHUNK_WEIGHTS, RELEASE_EVERY)
    least = TILE * max((math.prod(shape[1:]) for shape in shapes), default=1)
    resident = (rss_bytes() or 0) + FIXED
    need = 0
    for workers in range(threads, 0, -1):
        for halvings in range(8):
            chunk = max(CHUNK_WEIGHTS >> halvings, least)
            release = RELEASE_EVERY >> halvings
            need = resident + release + workers * chunk * BYTES_PER_WEIGHT
            if need <= max_ram:
                return Budget(workers, chunk, release)
    raise DoesNotFitError(
        f"max_ram of {max_ram / 1e6:.0f} MB is too little: the smallest chunks on one thread need "
        f"{need / 1e6:.0f} MB, of which {resident / 1e6:.0f} MB are in use before any weight is "
        "read; allow more"
    )


def check_limits(threads: int | None, max_ram: int | None) -> None:
    """Refuse limits that are not positive.

    Raises:
        UsageError: threads or max_ram is not positive.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"threads is {threads}; use at least 1")
    if max_ram is not None and max_ram < 1:
        raise UsageError(f"max_ram is {max_ram} bytes; use a positive number")


def check_replay(
    config: ModelConfig, calibration: CalibrationText, recipe: Recipe, max_ram: int | None
) -> None:
    """Refuse a calibration that would need more memory than the limit.

    Args:
        config: config of the model.
        calibration: the windows.
        recipe: the recipe, which says whether the float model is replayed too and whether weights
            are trained.
        max_ram: most bytes of the process; None for no limit.

    Raises:
        DoesNotFitError: the limit is too low; the message says how much is needed.
    """
    if max_ram is None:
        return
    need = replay_bytes(
        config, calibration, quantized_inputs=bool(recipe.options.get("use_quantized_inputs"))
    )
    what = "a layer, its inputs and their moments"
    kept = min(KEPT_LOGITS, 4 * calibration.n_tokens * config.vocab)
    if recipe.target and (logits := logits_bytes(config, calibration.context) + kept) > need:
        need, what = logits, "comparing the outputs of two models"
    if recipe.training:
        weights = sum(n * k for _, (n, k) in config.linears())
        need, what = max(need, TRAINED_BYTES * weights), "training all weights at once"
    need += rss_bytes() or 0
    if need > max_ram:
        raise DoesNotFitError(
            f"max_ram of {max_ram / 1e6:.0f} MB is too little: {what} takes about "
            f"{need / 1e6:.0f} MB; allow more, use fewer windows (--calib-windows), or a recipe "
            "that needs no text, such as w4-g32-mse"
        )


def replay_bytes(
    config: ModelConfig, calibration: CalibrationText, *, quantized_inputs: bool
) -> int:
    """Most bytes that are needed while the matrices of a group are rounded with their inputs."""
    models = 2 if quantized_inputs else 1
    inner = config.mix_width
    shapes = dict(config.linears())
    groups = {
        tuple(shapes[name] for name in group.linears)
        for group in linear_groups(config)
        if group.kind != "head"
    }
    # hidden states at both ends of a residual branch
    hidden = 4 * calibration.n_tokens * config.hidden * (models + 1)
    together = 4 * min(TOGETHER, calibration.n_tokens) * 3 * config.ffn
    kept = min(4 * calibration.n_tokens * max(inner, config.ffn), KEEP_BYTES) * models
    if config.experts is not None:  # their weights, inputs, and the sum of their outputs
        kept += 4 * calibration.n_tokens * (config.experts.count + 2 * config.hidden) * models
    return hidden + kept + together + max(_group_bytes(group, models) for group in groups)


def _group_bytes(shapes: tuple[tuple[int, int], ...], models: int) -> int:
    """Bytes of the weights [N, K] of one group, and of the work on its largest matrix.

    First the second moments are factored while the cross moments are in memory; then the rows are
    rounded.
    """
    largest, k = max(shapes)
    weights, matrix = 4 * sum(n for n, _ in shapes) * k * models, 4 * largest * k
    factor = FACTOR_COPIES * (8 if k <= EXACT_K else 4)
    factored = (4 * models + factor) * k * k + 2 * matrix
    rounded = (4 + factor) * k * k + 3 * matrix + 4 * 4 * min(largest, ROWS) * k
    return weights + max(factored, rounded)
