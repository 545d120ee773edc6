"""Settings of a model file that no code reads: which of them may be left alone.

A key that the importer does not read is one of three kinds:

1. It is switched off: null, false, zero, empty, or a factor of one. It is left alone, unless its
   name is of what every model here has (rotary positions, gates, norms that come first): a model
   with that switched off is another one.
2. It is a record: who made the model, how it was trained, how text is sampled from it. A list of
   names or a word in the name ("dropout", "version", "train") says so. It is left alone.
3. Anything else may change what the model computes, and is refused by its name and value.

A number, a true flag or an object under an unknown name is of the third kind. A text under an
unknown name is of the third kind only if a word of the name speaks of the arithmetic ("norm",
"rope", "attention"): a note is harmless, `position_embedding_type: "alibi"` is not. The way out is
in the message: a key that has no bearing on the arithmetic can be removed from the file.
"""

from __future__ import annotations

import re
from typing import Any

_MOST_SHOWN = 3
_VALUE_WIDTH = 60


def word_set(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


_FACTOR_WORDS = word_set("factor fraction multiplier pct percent ratio scale scaling")
_RECORD_WORDS = word_set(
    "author batch checkpoint checkpointing comment commit coef created data dataset date "
    "description drop dropout epoch epochs eval finetune finetuned finetuning flash gradient id "
    "init initializer language languages lib library license link loss lr merge merged name note "
    "notes optimizer organization parent path pdrop pretraining repo revision seed "
    "source std step steps tag tags task test tokenizer tp train trained trainer training unsloth "
    "url uuid version wandb year"
)
_DROPOUT_WORDS = frozenset(("drop", "dropout", "pdrop"))
_TOKEN_ID = re.compile(r"(^|_)(token_ids?|token_index|tokens?)$")
_TOKEN_COUNT = re.compile(r"^(n|num)_(.+_)?tokens?$|^(n|num)_experts_per_token$")
"""How many tokens a model adds, or experts it uses for each: such a number is no record."""
_ARITHMETIC_WORDS = word_set(
    "act activation alibi attention attn bias bidirectional bits block blocks cap causal "
    "chunk clamp clip conv decoder depth dim embed embedding embeddings encoder eps epsilon expert "
    "experts ffn forward freq gate gated geglu gelu glu head heads hidden interleave interleaved "
    "kv layer layernorm layers linear logit logits logn lora mask mlp moe mrope mtp mup nope norm "
    "normalization normalize normalized pattern pos "
    "position positional positions prefix proj projection qk qkv quant quantization quantize query "
    "relu residual "
    "rms rmsnorm rope rotary router scale scaled scales scaling silu sink sinks size sliding "
    "softcap softcapping softmax sparse sparsity swiglu swish temperature theta weight weights "
    "window yarn"
)
_ALWAYS_ON = re.compile(
    r"^((use|uses|apply|enable|with|has|is|do)_)?("
    r"(rope|rotary)(_(pos|position|positional))?(_(emb|embed|embedding|embeddings|encoding))?"
    r"|(rope|rotary)_(dim|dims|ndims|size)"
    r"|glu|swiglu|gated|(gated|swiglu|glu)_(act|mlp|ffn|ff)|gated_linear_unit|gated_linear_units"
    r"|rms_?norm|pre_?norm|pre_?ln|norm_first|(layer_?)?norm_before|normalize_before"
    r"|layer_norm_before|causal(_(mask|attention))?|scale_(attn|attention|qk)(_weights)?"
    r")$"
)
"""Names of what every model that is run here has: none of them is harmless at false or zero."""


def is_off(name: str, value: Any) -> bool:
    """Whether a value is the one that switches a setting off: null, false, zero, empty, or 1.

    Example:
        >>> from edgeq.importers.unread import is_off
        >>> is_off("use_qk_norm", False), is_off("use_rotary_embedding", False)
        (True, False)
    """
    if value == 0 and _ALWAYS_ON.match("_".join(_word_list(name))):
        return False
    if _words(name) & _FACTOR_WORDS and isinstance(value, int | float):
        return value is False or (value == 1 and not isinstance(value, bool))
    if isinstance(value, list):
        return all(not part and not isinstance(part, str) for part in value)
    return value is None or value == "" or value == {} or value == 0


def is_record(name: str, value: Any) -> bool:
    """Whether a name, or a text under it, says that it has no part in the arithmetic."""
    words = _words(name)
    if _TOKEN_COUNT.match(name) and not words & _RECORD_WORDS:
        return False
    if words & _DROPOUT_WORDS or _TOKEN_ID.search(name):
        return True
    if words & _ARITHMETIC_WORDS:
        return False
    texts = value if isinstance(value, list) else [value]
    return bool(words & _RECORD_WORDS) or all(isinstance(text, str) for text in texts)


def is_harmless(name: str, value: Any) -> bool:
    """Whether an unread key may be left alone; see the module."""
    return is_off(name, value) or is_record(name, value)


def shown(value: Any) -> str:
    """A value as a message quotes it, cut to a readable length."""
    text = repr(value)
    return text if len(text) <= _VALUE_WIDTH else text[: _VALUE_WIDTH - 4] + " ..."


def listed(names: list[str]) -> str:
    """The first few of some names, and how many more there are."""
    rest = len(names) - _MOST_SHOWN
    return ", ".join(names[:_MOST_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def refusal(offenders: dict[str, Any]) -> str:
    """The message for keys that may change the arithmetic: names, values and what to do."""
    keys = listed([f"{name} is {shown(value)}" for name, value in offenders.items()])
    if len(offenders) == 1:
        return (
            f"{keys}, a setting edgeq does not know that may change what the model computes; "
            "remove it from the file if it does not"
        )
    return (
        f"{keys}: settings edgeq does not know that may change what the model computes; "
        "remove them from the file if they do not"
    )


def _words(name: str) -> frozenset[str]:
    return frozenset(_word_list(name))


def _word_list(name: str) -> list[str]:
    return re.findall(r"[a-z]+|[0-9]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())
