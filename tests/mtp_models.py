"""Tiny models with a multi-token-prediction head."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from edgeq.formats.tensor import FloatTensor, Tensor
from edgeq.model.block import MTP_EMBEDDING, MTP_EMBEDDING_NORM
from edgeq.model.model import Model
from edgeq.model.mtp import mtp_linears, needed_mtp, stored_name
from tests.families import quantized, random_model, rounded, tiny_config


def with_head(model: Model, seed: int = 5) -> Model:
    """A float model with a head of random weights."""
    rng = np.random.default_rng(seed)
    attention = next(b for b in model.config.blocks if b.mixer == "attention" and not b.window)
    config = replace(model.config, mtp=attention)
    tensors: dict[str, Tensor] = dict(model.tensors)
    for name, shape in needed_mtp(config):
        values = rng.normal(size=shape) / math.sqrt(shape[-1])
        if len(shape) == 1:
            values = 1 - config.norm_offset + 0.2 * rng.normal(size=shape)
        tensors[name] = FloatTensor("float32", values.astype(np.float32))
    return replace(model, config=config, tensors=tensors)


def guessable(model: Model, share: float = 0.4) -> Model:
    """A model with a head that often guesses right.

    What layers add to the residual stream is small, so that the next token depends mostly on the
    last one; and the head passes on the embedding of the token that it is given.
    """
    model = with_head(model)
    tensors = dict(model.tensors)
    for name, tensor in tensors.items():
        factor = share if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
        if name.endswith(("out_proj.weight", "fc_hidden.weight")):
            factor = share / 2
        if factor != 1:
            tensors[name] = _float(tensor.numpy() * factor)
    hidden = model.config.hidden
    table = tensors["model.embed_tokens.weight"].numpy()
    tensors["model.embed_tokens.weight"] = _float(table * math.sqrt(hidden))
    tensors[stored_name(MTP_EMBEDDING)] = _float(np.eye(hidden))
    tensors[stored_name(MTP_EMBEDDING_NORM)] = _float(np.full(hidden, 1 - model.config.norm_offset))
    tensors["mtp.norm.weight"] = tensors["model.norm.weight"]
    return replace(model, tensors=tensors)


def quantized_with_head(model: Model, scheme: str) -> Model:
    """The same model with every matrix rounded to nearest, those of the head too."""
    tensors = dict(quantized(model, scheme).tensors)
    for name, _ in mtp_linears(model.config):
        tensors[name] = rounded(model.tensors[name].numpy(), scheme)
    return replace(model, tensors=tensors)


def tiny(family: str = "qwen3_5", scheme: str | None = "w8-g32", **over: Any) -> Model:
    """A model of a family whose head often guesses right."""
    config = tiny_config(family, **{"context": 1024, "eos": (), "tied": False, **over})
    model = guessable(random_model(config, 1))
    return model if scheme is None else quantized_with_head(model, scheme)


def _float(values: Any) -> FloatTensor:
    return FloatTensor("float32", np.ascontiguousarray(values, np.float32))
