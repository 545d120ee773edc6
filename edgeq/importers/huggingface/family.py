"""`Family` describes a family of decoders to the importers; each file of `families/` has one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from edgeq.importers.gguf.architecture import Architecture
from edgeq.importers.huggingface.values import Values
from edgeq.model.block import BlockSpec, of_any_expert
from edgeq.model.config import Activation

COMMON_DEFAULTS: Mapping[str, Any] = {
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
"""What most configuration classes of Transformers assume for keys that are absent."""

ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
"""What the functions are called in a config.json -> what the feed-forward computes."""


@dataclass(frozen=True)
class Shape:
    """Sizes that a configuration states, which its blocks may depend on.

    Args:
        layers: number of layers.
        hidden: width of the residual stream.
        heads: query heads.
        head_dim: values of a head.
        context: the longest sequence the model was made for, in tokens.
    """

    layers: int
    hidden: int
    heads: int
    head_dim: int
    context: int


def sizes(
    hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, vocab: int, context: int,
    **others: Any,
) -> dict[str, Any]:  # fmt: skip
    """The sizes of a published model as the keys of its config.json, with its other keys."""
    return {
        "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab,
        "max_position_embeddings": context, **others,
    }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of decoders, as Transformers defines it.

    Args:
        name: the family; that of its file.
        model_types: the values of ``model_type`` in a config.json.
        classes: the model classes that compute what edgeq computes, as ``architectures`` names
            them; the usual one first.
        blocks: reads what each layer is from a configuration.
        defaults: values of absent keys, as the configuration class of Transformers has them.
        biases: which attention projections have biases: none; q, k and v, always or if
            ``attention_bias`` says so; or all four if it says so.
        activation_key: the key of the feed-forward's activation, or None where it is always SiLU.
        activations: what the values of that key mean for the family.
        norm_eps_key: the key of the epsilon of the RMS norms.
        tied_keys: the keys that say whether the head is the embedding; the first that is there
            goes before the others.
        ffn: reads the width of the feed-forward.
        norm_offset: added to every norm weight.
        scaled_embeddings: embeddings are multiplied by sqrt(hidden).
        numbers: reads the fields of `ModelConfig` that keys of the family alone say, as
            ``residual_scale`` and ``logit_softcap``.
        query_scale_key: the key of the number whose -0.5th power scales attention scores, where
            that is not the size of a head.
        tensors: part of a layer, or a tensor outside them -> its name in the checkpoint, where that
            is not the usual one; without ``.weight``, and "*" for the number of an expert. A
            vector is named with its end, and its name there is a whole one.
        interleaved: rows of q and k lie in the order that rotates neighbors (2j, 2j+1).
        fused: stored tensor -> the parts whose rows it holds, one after the other; those with "*"
            for every expert in turn, in a tensor of one axis more.
        transposed_experts: experts lie in tensors of all experts of a layer, transposed, as
            `stacked_experts` describes. Those of other families may lie so as they are.
        fused_by_head: the same of a tensor whose rows are those of each part for the first head,
            then those of each part for the second, and so on.
        renamed: parts of a layer, with their ends, as Transformers 5 names them where it does not
            save the original names -> as the family names them.
        left_out: beginnings of the names of tensors that take no part in the answer to a text ->
            what they are. How many there are is said in the model's provenance.
        mtp: checkpoints may hold a multi-token-prediction head, `edgeq.model.mtp`, under "mtp.".
        text_config: the decoder of a vision-language model lies in this key of its configuration,
            and its tensors' names begin with `prefix`.
        prefix: see `text_config`.
        gguf: what llama.cpp computes for the family, or None.
        genai: onnxruntime-genai's model type, or None if it has none.
        hub_tag: the tag of such models on the Hugging Face hub; the family's name if "".
        shapes: published models of the family, by the name `edgeq bench --shape` knows them by:
            the keys of their config.json that say their sizes, see `sizes`.
    """

    name: str
    model_types: tuple[str, ...]
    classes: tuple[str, ...]
    blocks: Callable[[Values, Shape], Sequence[BlockSpec]]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    biases: Literal["none", "qkv", "qkv_if_attention_bias", "attention_bias"] = "none"
    activation_key: str | None = "hidden_act"
    activations: Mapping[str, Activation] = field(default_factory=lambda: ACTIVATIONS)
    norm_eps_key: str = "rms_norm_eps"
    tied_keys: tuple[str, ...] = ("tie_word_embeddings",)
    ffn: Callable[[Values], int] = lambda values: values.count("intermediate_size")
    norm_offset: float = 0.0
    scaled_embeddings: bool = False
    numbers: Callable[[Values, Shape], Mapping[str, Any]] = lambda values, shape: {}
    query_scale_key: str | None = None
    tensors: Mapping[str, str] = field(default_factory=dict)
    interleaved: bool = False
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    transposed_experts: bool = False
    fused_by_head: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    mtp: bool = False
    text_config: str | None = None
    prefix: str = ""
    gguf: Architecture | None = None
    genai: str | None = None
    hub_tag: str = ""
    shapes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def stored_name(self, name: str) -> str:
        """A checkpoint's name for one of edgeq's tensors that is stored alone.

        Example:
            >>> from edgeq.importers.huggingface.families import FAMILIES
            >>> FAMILIES["lfm2"].stored_name("model.layers.3.mlp.up_proj.weight")
            'model.layers.3.feed_forward.w3.weight'
        """
        stem, _, end = name.rpartition(".")
        start, part = "", stem
        if stem.startswith("model.layers."):
            *ahead, part = stem.split(".", 3)
            start = ".".join(ahead) + "."
        if (whole := self.tensors.get(f"{part}.{end}")) is not None:
            return start + whole
        part, expert = of_any_expert(part)
        return f"{start}{self.tensors.get(part, part)}.{end}".replace("*", expert)
