"""Experts of a ``config.json``: how many there are, and which layers have them."""

from __future__ import annotations

from edgeq.core.errors import FormatError, UnsupportedError
from edgeq.importers.huggingface.values import Values
from edgeq.importers.unread import shown
from edgeq.model.block import ExpertsSpec

HARMLESS = ("output_router_logits", "router_aux_loss_coef")
"""Keys of training: what a model's loss adds so that experts are used alike."""


def read_experts(values: Values, count: int, ffn: int, **how: object) -> ExpertsSpec:
    """The experts of a layer; the number that a token goes through is ``num_experts_per_tok``.

    Args:
        values: the configuration.
        count: how many there are.
        ffn: the width of an expert.
        how: further fields of `ExpertsSpec`.

    Raises:
        FormatError: a token goes through more experts than there are.
    """
    values.read.update(HARMLESS)
    chosen = values.count("num_experts_per_tok")
    if chosen > count:
        raise FormatError(
            f"{values.path}: num_experts_per_tok is {chosen}; it must be at most {count}, the "
            "number of experts"
        )
    fields: dict[str, object] = {"count": count, "chosen": chosen, "ffn": ffn, **how}
    return ExpertsSpec(**fields)  # type: ignore[arg-type]  # it checks its values


def count_of(values: Values, *keys: str) -> int:
    """The number of experts, which may stand under several keys that must agree.

    Raises:
        UnsupportedError: two keys say different numbers.
    """
    stated = {key: values.raw[key] for key in keys if values.raw.get(key) is not None}
    values.read.update(keys)
    if len(set(map(str, stated.values()))) > 1:
        raise UnsupportedError(
            f"{values.path}: "
            + " and ".join(f"{key} is {shown(value)}" for key, value in stated.items())
            + ", which contradict each other; keep the one the model was trained with"
        )
    return values.count(next(iter(stated), keys[0]))
