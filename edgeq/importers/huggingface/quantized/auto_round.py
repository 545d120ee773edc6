"""AutoRound's own ``quantization_config``: GPTQ's or AWQ's layout, as its packing_format says.

``auto_round:auto_gptq`` stores ``zero_point - 1`` as version 1 of GPTQ, ``auto_round`` and
``auto_round:gptqmodel`` store the zero point, and ``auto_round:auto_awq`` is AWQ's gemm layout.

Source: AutoRound auto_round/export/export_to_autoround/export.py, inference/backend.py.
"""

from __future__ import annotations

from typing import Any

from edgeq.core.errors import UnsupportedError
from edgeq.importers import unread
from edgeq.importers.huggingface.quantized.awq import Awq
from edgeq.importers.huggingface.quantized.gptq import BITS, Gptq
from edgeq.importers.huggingface.quantized.layout import Layout, Settings

_PACKINGS = (
    "auto_round:auto_gptq", "auto_round:gptqmodel", "auto_round:auto_awq", "auto_round",
    "auto_round:gptq", "auto_round:awq",
)  # fmt: skip


def read_auto_round(settings: Settings) -> Layout:
    """Read the settings of AutoRound.

    Raises:
        FormatError, UnsupportedError: a setting is damaged, or may change the arithmetic.
    """
    fix = "export it with AutoRound's format auto_round:auto_gptq"
    packing = settings.one_of("packing_format", _PACKINGS, "auto_round:auto_gptq", fix)
    settings.one_of("data_type", ("int", "int_sym", "int_asym"), "int", fix)
    if (bits := settings.get("act_bits", 16)) not in (16, 32):
        raise UnsupportedError(
            f"{settings.where}: act_bits is {unread.shown(bits)}; edgeq keeps weights alone, so "
            "export with act_bits 16"
        )
    bits = settings.whole("bits", BITS if "awq" not in packing else (4,))
    group_size = settings.whole("group_size")
    symmetric = settings.flag("sym", True)
    settings.only_off("super_bits", "super_group_size", "rotation_config", "transform_config")
    overrides = {}
    for name, value in settings.mapping("extra_config").items():
        own = Settings(f"{settings.where} extra_config {name}", value)
        if own.get("bits", bits) in (16, 32):
            continue  # a float layer: stored as such
        overrides[name] = _override(own, name)
    settings.ignore(
        "autoround_version", "backend", "batch_size", "block_name_to_quantize", "dataset",
        "enable_quanted_input", "enable_minmax_tuning", "gradient_accumulate_steps", "iters",
        "low_gpu_mem_usage", "lr", "minmax_lr", "modules_to_not_convert", "nsamples", "seqlen",
        "quant_lm_head", "scale_dtype", "to_quant_block_names", "enable_norm_bias_tuning",
        "act_data_type", "act_dynamic", "act_group_size", "act_sym", "amp", "enable_alg_ext",
        "enable_torch_compile", "not_use_best_mse", "dynamic_max_gap", "sampler", "seed",
        "static_kv_dtype", "static_attention_dtype", "damp_percent", "desc_act", "true_sequential",
        "lm_head",
        "enable_deterministic_algorithms", "momentum", "model_free", "disable_opt_rtn",
    )  # fmt: skip
    settings.check_all_read()
    if "awq" in packing:
        if any(v.get("bits", 4) != 4 or v.get("group_size", group_size) != group_size
               for v in overrides.values()):  # fmt: skip
            raise UnsupportedError(
                f"{settings.where}: extra_config gives layers of auto_awq other sizes; {fix}"
            )
        return Awq(group_size)
    subtracted = packing in ("auto_round:auto_gptq", "auto_round:gptq")
    return Gptq(bits, group_size, symmetric, subtracted, overrides)


def _override(own: Settings, name: str) -> dict[str, Any]:
    if any(letter in name for letter in "*+?[](){}|^$\\"):
        raise UnsupportedError(
            f"{own.where} is a pattern; edgeq reads names of layers: write them out"
        )
    values: dict[str, Any] = {}
    if own.get("bits") is not None:
        values["bits"] = own.whole("bits", BITS)
    if own.get("group_size") is not None:
        values["group_size"] = own.whole("group_size")
    if own.get("sym") is not None:
        values["sym"] = own.flag("sym", True)
    own.one_of("data_type", ("int", "int_sym", "int_asym"), "int", "use int")
    own.ignore(
        "act_bits", "act_data_type", "act_dynamic", "act_group_size", "act_sym", "scale_dtype",
        "in_blocks",
    )  # fmt: skip
    own.check_all_read()
    return values
