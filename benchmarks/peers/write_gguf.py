"""Write a packed edgeq model as a GGUF file of the same integers, every matrix Q4_0.

    python write_gguf.py model.edgeq model.gguf

Q4_0 is symmetric INT4 in groups of 32 with float16 scales, which is what ``w4-g32`` is: nothing
is requantized, so both runtimes multiply by the very same numbers. Needs the gguf package.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from numpy.typing import NDArray

from edgeq import artifact
from edgeq.model import ModelConfig
from edgeq.reference import rope_frequencies
from edgeq.schemes import parse_scheme
from edgeq.tensor import QuantTensor

NAMES = {
    "model.embed_tokens": "token_embd",
    "lm_head": "output",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
ROWS = 1 << 14
FAMILIES = ("llama", "qwen2")


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor."""
    stem, _, kind = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{NAMES[part]}.{kind}"
    return f"{NAMES[stem]}.{kind}"


def interleaved(rows: int, head_dim: int) -> NDArray[np.int64]:
    """Where the rows of q and k go: llama.cpp rotates neighbours, not halves, in this family."""
    order = np.arange(rows).reshape(-1, 2, head_dim // 2)
    return order.swapaxes(1, 2).reshape(-1)


def q4_0(tensor: QuantTensor, order: NDArray[np.int64] | None) -> NDArray[np.uint8]:
    """Blocks of 18 bytes: a float16 scale, then 16 bytes with k and k + 16 in low and high bits."""
    n, k = tensor.shape
    out = np.empty((n, k // 32, 18), np.uint8)
    for start in range(0, n, ROWS):
        stop = min(start + ROWS, n)
        codes = tensor.codes(start, stop).reshape(stop - start, k // 32, 2, 16)
        scales, _ = tensor.row_params(start, stop)
        out[start:stop, :, :2] = scales.astype(np.float16)[..., None].view(np.uint8)
        out[start:stop, :, 2:] = codes[:, :, 0] | (codes[:, :, 1] << np.uint8(4))
    return (out if order is None else out[order]).reshape(n, -1)


def write(source: Path, target: Path) -> None:
    """Write ``target`` from ``source``, in one piece or not at all."""
    model = artifact.load(source)
    c = model.config
    if c.family not in FAMILIES or c.norm_offset or c.qk_norm or c.post_norms:
        raise SystemExit(f"{source}: only the families {', '.join(FAMILIES)} are known here")
    temporary = target.with_name(f".{target.name}.tmp")
    writer = GGUFWriter(temporary, c.family)
    _metadata(writer, c)
    for name, tensor in model.tensors.items():
        if isinstance(tensor, QuantTensor):
            if tensor.scheme != parse_scheme("w4-g32"):
                raise SystemExit(f"{name} is {tensor.scheme}; only w4-g32 is the same as Q4_0")
            turned = c.family == "llama" and ("q_proj" in name or "k_proj" in name)
            order = interleaved(tensor.shape[0], c.head_dim) if turned else None
            blocks = q4_0(tensor, order)
            writer.add_tensor(gguf_name(name), blocks, raw_dtype=GGMLQuantizationType.Q4_0)
        else:
            writer.add_tensor(gguf_name(name), tensor.numpy())
    if c.rope_scaling is not None:
        plain = c.rope_theta ** -(np.arange(0, c.rope_dim, 2) / c.rope_dim)
        factors: Any = plain / rope_frequencies(c, False)
        writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _metadata(writer: GGUFWriter, c: ModelConfig) -> None:
    writer.add_context_length(c.context)
    writer.add_embedding_length(c.hidden)
    writer.add_block_count(c.layers)
    writer.add_feed_forward_length(c.ffn)
    writer.add_head_count(c.heads)
    writer.add_head_count_kv(c.kv_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_rope_dimension_count(c.rope_dim)
    writer.add_vocab_size(c.vocab)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(2)  # mostly Q4_0


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
