"""The model: hyperparameters, named tensors, tokenizer files and where they came from.

Tensor names are Hugging Face's for the Llama family; every supported family is brought to them
by its importer (Phi-3's fused projections are split, GGUF's names mapped):

    model.embed_tokens.weight                     [V, hidden]
    model.layers.{i}.input_layernorm.weight       [hidden]        if norm_before
    model.layers.{i}.self_attn.{q,k,v}_proj.weight  [H*D | Hkv*D, hidden]   (.bias optional)
    model.layers.{i}.self_attn.{q,k}_norm.weight  [D], or with qk_norm "all" [H*D | Hkv*D]
    model.layers.{i}.self_attn.g_proj.weight      [H*D, hidden]   of an output gate
    model.layers.{i}.self_attn.o_proj.weight      [hidden, H*D]   (.bias optional)
    model.layers.{i}.self_attn.sinks              [H]            of attention with sinks
    model.layers.{i}.conv.{b,c,x}_proj.weight     [hidden, hidden]  of a short convolution, in place
    model.layers.{i}.conv.conv.weight             [hidden, 1, taps] of all parts of self_attn
    model.layers.{i}.conv.out_proj.weight         [hidden, hidden]
    model.layers.{i}.linear_attn.in_proj_{qkv,z}.weight  [channels | values, hidden]  of a gated
    model.layers.{i}.linear_attn.in_proj_{b,a}.weight    [value heads, hidden]        delta net, in
    model.layers.{i}.linear_attn.conv1d.weight    [channels, 1, taps]                 place of all
    model.layers.{i}.linear_attn.{A_log,dt_bias}  [value heads]                       parts of
    model.layers.{i}.linear_attn.norm.weight      [value_dim]                         self_attn
    model.layers.{i}.linear_attn.out_proj.weight  [hidden, values]
    model.layers.{i}.post_attention_layernorm.weight    [hidden]  see `edgeq.model.block`
    model.layers.{i}.pre_feedforward_layernorm.weight   [hidden]  if norm_before and norm_after
    model.layers.{i}.post_feedforward_layernorm.weight  [hidden]  if norm_after
    model.layers.{i}.mlp.{gate,up}_proj.weight    [ffn, hidden]
    model.layers.{i}.mlp.down_proj.weight         [hidden, ffn]
    model.layers.{i}.mlp.router.weight            [E, hidden]    of experts, in place of gate, up
    model.layers.{i}.mlp.experts.{e}.{gate,up}_proj.weight  [ffn, hidden]   and down; all with
    model.layers.{i}.mlp.experts.{e}.down_proj.weight       [hidden, ffn]   .bias, or none
    model.layers.{i}.mlp.experts.bias             [E]            to choose experts by, or absent
    model.norm.weight                             [hidden]
    lm_head.weight                                [V, hidden]    absent if tied
    mtp.*                                         see `edgeq.model.mtp`
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgeq.core.errors import FormatError, check_type
from edgeq.formats.kept import KeptTensor, Take, packed
from edgeq.formats.tensor import QuantTensor, Tensor
from edgeq.model.config import ModelConfig
from edgeq.model.mtp import mtp_biases, needed_mtp
from edgeq.model.origin import Origin


@dataclass(frozen=True, eq=False)
class Model:
    """A decoder and everything that is needed to run it.

    Args:
        config: hyperparameters.
        tensors: name -> tensor, often lazy views of a memory-mapped file.
        files: tokenizer and chat files by their Hugging Face name ("tokenizer.json",
            "tokenizer_config.json", "chat_template.jinja", "generation_config.json").
        provenance: where it came from: source name, sha256, recipe, per-tensor errors.

    Attributes:
        origin: the file or folder it was opened from. A model put together in memory has none, and
            neither has a copy by `dataclasses.replace`, whose tensors may be others.
    """

    config: ModelConfig
    tensors: Mapping[str, Tensor]
    files: Mapping[str, bytes] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    origin: Origin | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        check_type("config", self.config, ModelConfig)
        check_type("tensors", self.tensors, Mapping)
        check_type("files", self.files, Mapping)
        check_type("provenance", self.provenance, Mapping)

    def __repr__(self) -> str:
        config = self.config
        weights = sum(math.prod(tensor.shape) for tensor in self.tensors.values())
        return (
            f"<Model {config.family}, {config.layers} layers, {weights / 1e6:.1f} million weights, "
            f"{self.nbytes / 1e6:.1f} MB>"
        )

    def opened_from(self, path: str | Path) -> Model:
        """The same model with its origin."""
        model = replace(self)
        object.__setattr__(model, "origin", Origin(Path(path)))
        return model

    def kept(self) -> dict[str, Any]:
        """What is recorded of the tensors whose integers are another program's; empty if none are.

        "formats" lists those of the source, "tensors" has the type of each in it, by name.
        """
        kept = {n: t for n, t in self.tensors.items() if isinstance(t, KeptTensor)}
        if not kept:
            return dict(self.provenance.get("kept", {}))
        return {
            "formats": sorted({t.source_format for t in kept.values()}),
            "tensors": {name: t.source_type for name, t in kept.items()},
        }

    def integers(self) -> dict[str, Any] | None:
        """Where the integers come from, in numbers; None where all weights are floating point.

        "kept" counts the tensors whose integers are another program's, by their type there,
        "formats" lists the formats they come from, and "rounded" counts those that edgeq has
        rounded, by scheme.
        """
        record = self.kept()
        kept: Mapping[str, str] = record.get("tensors", {})
        rounded = Counter(
            str(tensor.scheme)
            for name, tensor in self.tensors.items()
            if isinstance(tensor, QuantTensor) and name not in kept
        )
        if not kept and not rounded:
            return None
        return {
            "kept": dict(Counter(kept.values()).most_common()),
            "formats": list(record.get("formats", ())),
            "rounded": dict(rounded.most_common()),
        }

    def packed(self, take: Take = np.empty) -> Model:
        """The model with every kept tensor of its file packed.

        Float tensors stay views of the file. The provenance says which tensors were kept.

        Args:
            take: allocates the arrays, given their shape and dtype.
        """
        return self.replaced(lambda t: packed(t, take) if isinstance(t, KeptTensor) else t)

    def replaced(self, replacement: Callable[[Tensor], Tensor]) -> Model:
        """The same model with other tensors of the same values; its provenance says which of the
        old ones were kept.

        Args:
            replacement: gives the new tensor for each of the old ones. A tensor under two names is
                replaced once.
        """
        old = dict(self.tensors)
        distinct = {id(tensor): tensor for tensor in old.values()}
        new = {key: replacement(tensor) for key, tensor in distinct.items()}
        if all(new[key] is tensor for key, tensor in distinct.items()):
            return self
        kept = self.kept()
        model = replace(
            self,
            tensors={name: new[id(tensor)] for name, tensor in old.items()},
            provenance=dict(self.provenance) | ({"kept": kept} if kept else {}),
        )
        object.__setattr__(model, "origin", self.origin)
        return model

    @property
    def is_float(self) -> bool:
        """Whether no matrix is quantized."""
        return not any(
            isinstance(tensor, QuantTensor | KeptTensor) for tensor in self.tensors.values()
        )

    def validate(self) -> None:
        """Check that every tensor is there with its shape, and no other.

        Raises:
            FormatError: one is missing, has another shape, or does not belong to the model.
        """
        needed = dict((*self.config.linears(), *self.config.floats(), *needed_mtp(self.config)))
        for name, shape in needed.items():
            if name not in self.tensors:
                raise FormatError(f"tensor {name} is missing from the model")
            self._check_shape(name, shape)
        known = set(needed)
        for name, shape in (*self.config.biases(), *mtp_biases(self.config)):
            if name in self.tensors:
                self._check_shape(name, shape)
                known.add(name)
        embedding, head = self.tensors["model.embed_tokens.weight"], "lm_head.weight"
        if self.config.tied and self.tensors.get(head) is embedding:
            known.add(head)  # one tensor under both its names
        if others := sorted(set(self.tensors) - known):
            raise FormatError(
                f"the model holds {len(others)} tensors that nothing reads, the first is "
                f"{others[0]}; remove them, or give the config that has them"
            )

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        got = tuple(self.tensors[name].shape)
        if got != shape:
            raise FormatError(f"tensor {name} has shape {list(got)}; the config says {list(shape)}")

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        return sum(t.nbytes for t in self.tensors.values())
