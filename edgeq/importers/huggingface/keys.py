"""The keys of a ``config.json`` that no reader reads, and the classes it may name.

Keys on one list are harmless, keys on another must have the one value that leaves the arithmetic
alone, and keys on neither are judged by `edgeq.importers.unread`.

Source: the configuration classes of Transformers 5.24 and 4.57, and published checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from edgeq.core.errors import FormatError, UnsupportedError
from edgeq.importers import unread
from edgeq.importers.huggingface.families import FAMILIES
from edgeq.importers.huggingface.family import Family
from edgeq.importers.huggingface.values import check_only

_COMMON = unread.word_set(
    """
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash
    _experts_implementation _experts_implementation_internal _flash_attn_2_enabled
    _flash_attn_version _from_model_config _name_or_path _sliding_window_pattern
    attn_implementation dtype experts_implementation model_type name_or_path torch_dtype
    torchscript transformers_version transformers.js_config use_bfloat16 tf_legacy_loss
    chunk_size_feed_forward finetuning_task gradient_checkpointing id2label label2id num_labels
    problem_type output_attentions output_hidden_states return_dict use_return_dict
    task_specific_params tie_encoder_decoder tie_last_hidden_states tokenizer_class prefix
    use_cache initializer_range initializer_factor pretraining_tp is_decoder is_llama_config
    max_length max_seq_len max_seq_length max_sequence_length model_max_length seq_length
    seq_len n_ctx n_positions original_max_position_embeddings dual_chunk_attention_config
    vision_config audio_config mm_tokens_per_image boi_token_index eoi_token_index
    image_token_index multimodal_projector_bias projector_hidden_act spatial_merge_size
    vision_feature_layer tensor_parallel_size use_flash_attn use_flash_attention
    use_flash_attention_2 use_sdpa vision_soft_tokens_per_image
    """
)
_GENERATION = unread.word_set(
    """
    assistant_confidence_threshold assistant_early_exit assistant_lookbehind bad_words_ids
    begin_suppress_tokens cache_config cache_implementation compile_config constraints
    diversity_penalty do_sample dola_layers early_stopping encoder_no_repeat_ngram_size
    encoder_repetition_penalty epsilon_cutoff eta_cutoff exponential_decay_length_penalty
    force_words_ids forced_bos_token_id forced_eos_token_id guidance_scale length_penalty
    low_memory max_new_tokens max_time min_length min_new_tokens min_p no_repeat_ngram_size
    num_assistant_tokens num_assistant_tokens_schedule num_beam_groups num_beams
    num_return_sequences output_logits output_scores penalty_alpha prompt_lookup_num_tokens
    remove_invalid_values renormalize_logits repetition_penalty return_dict_in_generate
    sequence_bias stop_strings suppress_tokens target_lookbehind temperature token_healing top_k
    top_p typical_p watermarking_config
    """
)
_HARMLESS = _COMMON | _GENERATION

_ONLY: dict[str, tuple[Any, ...]] = {
    "activation": ("swiglu",),
    "add_cross_attention": (False,),
    "alibi": (False,),
    "apply_rope": (True,),
    "attention_bias": (False,),
    "causal": (True,),
    "elementwise_affine": (True,),
    "full_attn_mod": (1,),
    "gated_mlp": (True,),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1,),
    "per_layer_config": ({},),
    "position_embedding_type": ("rope", "rotary"),
    "rms_norm": (True,),
    "rope_interleaved": (False,),
    "rope_type": ("default",),
    "use_bidirectional_attention": (False,),
    "use_gated_mlp": (True,),
    "use_rms_norm": (True,),
    "use_rope": (True,),
}
"""Keys with harmless values alone, where no family reads them. A family gives its own to
`Values.check_only`."""
_SCORE_SCALES = unread.word_set(
    """
    attention_multiplier attention_scale attention_scaling attn_multiplier attn_scale attn_scaling
    qk_scale query_scale scale_qk softmax_scale
    """
)
"""What attention scores are multiplied by in place of the usual 1 / sqrt(head_dim): a factor of one
does not switch it off."""
_NO_SOFTCAP = ("attn_logit_softcapping", "final_logit_softcapping")

_SAME_AS = {
    "activation_function": "hidden_act",
    "d_model": "hidden_size",
    "dim": "hidden_size",
    "ffn_dim": "intermediate_size",
    "ffn_hidden_size": "intermediate_size",
    "hidden_activation": "hidden_act",
    "hidden_dim": "intermediate_size",
    "layer_norm_eps": "rms_norm_eps",
    "layer_norm_epsilon": "rms_norm_eps",
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_heads": "num_attention_heads",
    "n_inner": "intermediate_size",
    "n_kv_heads": "num_key_value_heads",
    "n_layer": "num_hidden_layers",
    "n_layers": "num_hidden_layers",
    "norm_eps": "rms_norm_eps",
    "num_heads": "num_attention_heads",
    "num_layers": "num_hidden_layers",
    "rms_norm_epsilon": "rms_norm_eps",
}
"""Other names of keys that are read; harmless where both hold one value."""


def check_unread(
    path: Path, raw: Mapping[str, Any], read: Collection[str], attn_scale: float | None = None
) -> None:
    """Refuse the keys that no code reads and that may change what the model computes.

    Args:
        path: the file, for messages.
        raw: its keys.
        read: the keys that have been read.
        attn_scale: what attention scores are multiplied by; None if the keys are of no decoder.

    Raises:
        UnsupportedError: names such keys and their values.
    """
    for key in _NO_SOFTCAP:
        if key not in read and raw.get(key) is not None:
            raise UnsupportedError(
                f"{path}: {key} is {unread.shown(raw[key])}, which edgeq cannot run; it runs "
                "models of this type without soft caps (null)"
            )
    offenders = {}
    for key, value in raw.items():
        if key in read or key in _HARMLESS:
            continue
        if key in _ONLY:
            check_only(path, key, value, _ONLY[key])
        elif value is None:
            continue
        elif key in _SCORE_SCALES and value is not False:
            known = isinstance(value, int | float) and attn_scale is not None
            if not (known and math.isclose(value, attn_scale or 0.0, rel_tol=1e-6)):
                offenders[key] = value
        elif key in _SAME_AS and raw.get(_SAME_AS[key]) == value:
            continue
        elif not unread.is_harmless(key, value):
            offenders[key] = value
    if offenders:
        raise UnsupportedError(f"{path}: {unread.refusal(offenders)}")


def check_classes(path: Path, raw: Mapping[str, Any], family: Family, model_type: str) -> None:
    """Check that ``architectures`` and ``auto_map`` name classes whose arithmetic is known.

    A class of another name computes something else (BitNet's checkpoints are of type llama). Where
    a class of another family is named, ``model_type`` decides, as it does in Transformers: what the
    other family has more shows as keys or tensors that nothing reads.

    Raises:
        FormatError: ``architectures`` is not a list of names.
        UnsupportedError: a class is unknown.
    """
    names = raw.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise FormatError(
            f"{path}: architectures is {unread.shown(names)}; it must be a list of class names"
        )
    custom = raw.get("auto_map") or {}
    for key in ("AutoModel", "AutoModelForCausalLM"):
        code = custom.get(key) if isinstance(custom, dict) else None
        if isinstance(code, str):
            names = [*names, code.rsplit(".", 1)[-1]]
    for name in names:
        if not any(name in known.classes for known in FAMILIES.values()):
            raise UnsupportedError(
                f"{path}: the model class is {name!r} and model_type is {model_type!r}; edgeq "
                f"computes a {model_type} model as {family.classes[0]} does, and another "
                "class may compute something else"
            )
