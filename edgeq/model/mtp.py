"""The multi-token-prediction (MTP) head: a layer that guesses the token after the next.

From the state h of a position, the final norm that the model's own head reads, and the token that
follows there, it guesses the token after that one:

    x = fc [norm_e(embedding of the token); norm_h(h)]
    x = one layer with attention over the positions before
    logits = head of norm(x)

Embedding and head are the model's. To guess further, the head takes its own norm(x) as the state
of the next position.

Tensors of a model, in which fc lies as two matrices, for the embedding and for the state:

    mtp.fc_{embedding,hidden}.weight               [hidden, hidden]
    mtp.pre_fc_norm_{embedding,hidden}.weight      [hidden]
    mtp.layers.0.PART.weight                       as of a layer of the model
    mtp.norm.weight                                [hidden]

`mtp_model` makes a model of them that engines run, whose names begin with "model.".

Source: Gloeckle et al. 2024 (arXiv:2404.19737); DeepSeek-V3 (arXiv:2412.19437), section 2.2;
qwen3_next_mtp.py and qwen3_5_mtp.py of vLLM, by which the embedding comes first and the state is
that after the final norm. Transformers leaves the head out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from edgeq.model.config import ModelConfig

if TYPE_CHECKING:
    from edgeq.model.model import Model

PREFIX = "mtp."
_OWN = "model."
_SHARED = ("model.embed_tokens.", "lm_head.")


def mtp_config(config: ModelConfig) -> ModelConfig:
    """The hyperparameters of the head of a model that has one."""
    assert config.mtp is not None
    return replace(config, blocks=(config.mtp,), mtp=None, is_mtp=True)


def stored_name(name: str) -> str:
    """The name in the model of one of the head's tensors.

    Example:
        >>> from edgeq.model.mtp import stored_name
        >>> stored_name("model.layers.0.mlp.up_proj.weight"), stored_name("lm_head.weight")
        ('mtp.layers.0.mlp.up_proj.weight', 'lm_head.weight')
    """
    return name if name.startswith(_SHARED) else PREFIX + name.removeprefix(_OWN)


def mtp_linears(config: ModelConfig) -> Iterator[tuple[str, tuple[int, int]]]:
    """Names and shapes of the matrices that a model has for its head alone."""
    if config.mtp is not None:
        for name, shape in mtp_config(config).linears():
            if not name.startswith(_SHARED):
                yield stored_name(name), shape


def needed_mtp(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of all tensors that a model must have for its head alone."""
    yield from mtp_linears(config)
    if config.mtp is not None:
        for name, shape in mtp_config(config).floats():
            yield stored_name(name), shape


def mtp_biases(config: ModelConfig) -> Iterator[tuple[str, tuple[int]]]:
    """Names and shapes of the biases that the head may have."""
    if config.mtp is not None:
        for name, shape in mtp_config(config).biases():
            yield stored_name(name), shape


def mtp_model(model: Model) -> Model:
    """The head of a model that has one, as a model that shares its tensors."""
    config = mtp_config(model.config)
    names = [name for name, _ in (*config.linears(), *config.floats(), *config.biases())]
    found = {name: model.tensors.get(stored_name(name)) for name in names}
    return replace(
        model, config=config, tensors={n: t for n, t in found.items() if t is not None}, files={}
    )


def without_mtp(model: Model) -> Model:
    """The model without its head, if it has one."""
    if model.config.mtp is None:
        return model
    tensors = {name: t for name, t in model.tensors.items() if not name.startswith(PREFIX)}
    config = replace(model.config, mtp=None)
    if model.origin is None:
        return replace(model, config=config, tensors=tensors)
    return replace(model, config=config, tensors=tensors).opened_from(model.origin.path)
