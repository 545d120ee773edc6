"""llama2.c checkpoints (``.bin``, float32) with the tokenizer in the same folder.

    legacy     7 x int32: hidden, ffn, layers, heads, kv_heads, vocab, context
               a negative vocab: the head is a matrix of its own
    version 1  "ak42", int32 1, the same 7 (vocab positive), uint8 tied, zeros up to byte 256

Then the matrices, each for all layers in turn; the legacy order and version 1's differ (norms
first there). q and k are in interleaved rotary order and are brought to half-split lazily.

Source: https://github.com/karpathy/llama2.c (export.py, run.c, tokenizer.py)
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

from edgeq.core.errors import FormatError, UnsupportedError
from edgeq.formats.mapped_file import MappedFile
from edgeq.formats.tensor import FloatTensor, Tensor
from edgeq.importers.lazy import half_split
from edgeq.importers.tokenizer.sentencepiece_model import tokenizer_files
from edgeq.importers.tokenizer.tokenizer_json import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    Vocabulary,
    files,
    sentencepiece_bpe,
)
from edgeq.model.block import BlockSpec
from edgeq.model.config import ModelConfig
from edgeq.model.model import Model
from edgeq.model.rope_spec import RopeSpec

MAGIC = b"24ka"
"""0x616b3432 ("ak42") as it lies in the file."""
_HEADER = struct.Struct("<7i")
_V1_BYTES = 256
_ENDS = (2, 1)
"""EOS, and BOS: the mark between training stories, where run.c stops."""


def is_llama2c(path: Path) -> bool:
    """Whether a file looks like one, from its header and length alone."""
    with path.open("rb") as file:
        head = file.read(36)
    if head[:4] == MAGIC:
        return True
    return len(head) >= _HEADER.size and _plan_legacy(head, path.stat().st_size) is not None


def load(path: str | Path, *, headers_only: bool = False) -> Model:
    """Open a checkpoint, and ``tokenizer.bin``, ``tok<vocab>.bin`` or ``.model`` next to it.

    Args:
        path: the file.
        headers_only: leave the tokenizer unread.

    Raises:
        FormatError: the file is truncated or its header is impossible.
        UnsupportedError: a version other than the legacy one and 1 (2 is quantized already).
    """
    path = Path(path)
    try:
        mapping = MappedFile(path)
    except OSError as err:
        raise FormatError(f"{path} cannot be read: {err.strerror or err}") from err
    head = mapping.bytes(0, min(_V1_BYTES, mapping.size))
    if head[:4] == MAGIC:
        config, start, layout = _plan_v1(path, head)
    else:
        legacy = _plan_legacy(head, mapping.size)
        if legacy is None:
            raise FormatError(
                f"{path} is not a llama2.c checkpoint, or is truncated: its {mapping.size} bytes "
                "do not fit its header; fetch it again"
            )
        config, start, layout = legacy
    total = start + 4 * sum(math.prod(shape) for _, shape in layout)
    if mapping.size != total:
        raise FormatError(
            f"{path} has {mapping.size} bytes, its header asks for {total}; fetch it again"
        )
    tensors: dict[str, Tensor] = {}
    for name, shape in layout:
        array = mapping.array("<f4", shape, start)
        start += array.nbytes
        if name.startswith("freq_"):  # rotary tables, computed anew
            continue
        if "{}" not in name:
            tensors[name] = FloatTensor("float32", array)
            continue
        heads = {"q_proj": config.heads, "k_proj": config.kv_heads}.get(name.split(".")[-2])
        for i in range(config.layers):
            tensor: Tensor = FloatTensor("float32", array[i])
            tensors[name.format(i)] = half_split(tensor, heads) if heads else tensor
    files = {} if headers_only else _tokenizer(path, config.vocab)
    model = Model(config, tensors, files, {"source": path.name})
    model.validate()
    return model


Layout = list[tuple[str, tuple[int, ...]]]


def _config(head: bytes, tied: bool | None) -> ModelConfig | None:
    hidden, ffn, layers, heads, kv_heads, vocab, context = _HEADER.unpack(head)
    if tied is None:
        tied, vocab = vocab > 0, abs(vocab)
    sizes = (hidden, ffn, layers, heads, kv_heads, vocab, context)
    if min(sizes) < 1 or max(sizes) > 1 << 24 or layers > 4096:
        return None
    if hidden % heads or heads % kv_heads or (hidden // heads) % 2:
        return None
    return ModelConfig(
        family="llama",
        hidden=hidden,
        ffn=ffn,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=hidden // heads,
        vocab=vocab,
        context=context,
        blocks=(BlockSpec(rope=RopeSpec(10000.0, hidden // heads)),) * layers,
        norm_eps=1e-5,
        tied=tied,
        bos=1,
        eos=_ENDS,
    )


def _names(config: ModelConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    layers, hidden, ffn = config.layers, config.hidden, config.ffn
    kv = config.kv_heads * config.head_dim
    p = "model.layers.{}."
    return {
        "embed": ("model.embed_tokens.weight", (config.vocab, hidden)),
        "attn_norm": (p + "input_layernorm.weight", (layers, hidden)),
        "q": (p + "self_attn.q_proj.weight", (layers, hidden, hidden)),
        "k": (p + "self_attn.k_proj.weight", (layers, kv, hidden)),
        "v": (p + "self_attn.v_proj.weight", (layers, kv, hidden)),
        "o": (p + "self_attn.o_proj.weight", (layers, hidden, hidden)),
        "ffn_norm": (p + "post_attention_layernorm.weight", (layers, hidden)),
        "w1": (p + "mlp.gate_proj.weight", (layers, ffn, hidden)),
        "w2": (p + "mlp.down_proj.weight", (layers, hidden, ffn)),
        "w3": (p + "mlp.up_proj.weight", (layers, ffn, hidden)),
        "norm": ("model.norm.weight", (hidden,)),
        "freq": ("freq_cos_sin", (2, config.context, config.head_dim // 2)),
        "head": ("lm_head.weight", (config.vocab, hidden)),
    }


def _layout(config: ModelConfig, order: str) -> Layout:
    names = _names(config)
    return [names[key] for key in order.split() if key != "head" or not config.tied]


def _plan_legacy(head: bytes, size: int) -> tuple[ModelConfig, int, Layout] | None:
    """Config, first byte and layout if a legacy header fits a file of ``size`` bytes."""
    if len(head) < _HEADER.size:
        return None
    config = _config(head[: _HEADER.size], None)
    if config is None:
        return None
    layout = _layout(config, "embed attn_norm q k v o ffn_norm w1 w2 w3 norm freq head")
    fits = size == _HEADER.size + 4 * sum(math.prod(shape) for _, shape in layout)
    return (config, _HEADER.size, layout) if fits else None


def _plan_v1(path: Path, head: bytes) -> tuple[ModelConfig, int, Layout]:
    if len(head) < _V1_BYTES:
        raise FormatError(f"{path} is truncated: {len(head)} bytes; fetch it again")
    version = struct.unpack("<i", head[4:8])[0]
    if version != 1:
        raise UnsupportedError(
            f"{path} is a llama2.c checkpoint of version {version}; edgeq reads the legacy one and "
            "1, both float32 (2 is quantized already: start from the float checkpoint)"
        )
    config = _config(head[8 : 8 + _HEADER.size], bool(head[8 + _HEADER.size]))
    if config is None:
        raise FormatError(f"{path}: the header's sizes are impossible; fetch it again")
    return config, _V1_BYTES, _layout(config, "attn_norm ffn_norm norm embed q k v o w1 w2 w3 head")


def _tokenizer(path: Path, vocab: int) -> dict[str, bytes]:
    """Files of the tokenizer next to the checkpoint, if its vocabulary has the same size."""
    stems = ("tokenizer", f"tok{vocab}")
    for file in (path.parent / f"{stem}.{kind}" for stem in stems for kind in ("model", "bin")):
        if not file.is_file() or file == path:
            continue
        if file.suffix == ".bin":
            return _tokenizer_bin(file, vocab)
        ends = {"generation_config.json": json.dumps({"eos_token_id": _ENDS}).encode()}
        return tokenizer_files(file) | ends
    return {}


def _tokenizer_bin(path: Path, vocab: int) -> dict[str, bytes]:
    """llama2.c's own form: int32 longest, then per token float32 score, int32 length, bytes."""
    data = path.read_bytes()
    tokens, scores, at = [], [], 4
    try:
        while at < len(data):
            score, size = struct.unpack_from("<fi", data, at)
            if not 0 <= size <= len(data) - at - 8:
                raise FormatError(f"{path} is truncated or damaged at byte {at}")
            tokens.append(data[at + 8 : at + 8 + size].decode())
            scores.append(score)
            at += 8 + size
    except (struct.error, UnicodeDecodeError) as err:
        raise FormatError(f"{path} is not a llama2.c tokenizer, or is damaged") from err
    if len(tokens) != vocab:
        raise FormatError(
            f"{path} holds {len(tokens)} tokens, the checkpoint beside it {vocab}; "
            "put the right tokenizer there"
        )
    # export.py wrote spaces for ▁ and framed BOS and EOS in newlines
    tokens = [token.replace(" ", SPACE) for token in tokens]
    tokens[:3] = ["<unk>", "<s>", "</s>"]
    bytes_ = {f"<0x{byte:02X}>" for byte in range(256)}
    kinds = [BYTE if token in bytes_ else NORMAL for token in tokens]
    kinds[:3] = [UNKNOWN, CONTROL, CONTROL]
    vocabulary = Vocabulary(tokens, kinds, bos=1, eos=2, unk=0, add_bos=True)
    return files(sentencepiece_bpe(vocabulary, scores), vocabulary, ends=_ENDS)
