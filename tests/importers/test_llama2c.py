"""llama2.c checkpoints: real ones, and ones written here by the format's description."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from edgeq.core.errors import FormatError, UnsupportedError
from edgeq.importers import load
from edgeq.runtime.tokenizer import Tokenizer
from tests.conftest import need, small_checkpoint

HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, VOCAB, CONTEXT = 12, 20, 2, 2, 1, 11, 9
DIM = HIDDEN // HEADS


def parts(tied: bool) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {
        "embed": (VOCAB, HIDDEN),
        "attn_norm": (LAYERS, HIDDEN),
        "q": (LAYERS, HIDDEN, HIDDEN),
        "k": (LAYERS, KV_HEADS * DIM, HIDDEN),
        "v": (LAYERS, KV_HEADS * DIM, HIDDEN),
        "o": (LAYERS, HIDDEN, HIDDEN),
        "ffn_norm": (LAYERS, HIDDEN),
        "w1": (LAYERS, FFN, HIDDEN),
        "w2": (LAYERS, HIDDEN, FFN),
        "w3": (LAYERS, FFN, HIDDEN),
        "norm": (HIDDEN,),
        "freq": (2, CONTEXT, DIM // 2),
    }
    if not tied:
        shapes["head"] = (VOCAB, HIDDEN)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write(path: Path, tied: bool, version: int = 0) -> dict[str, np.ndarray]:
    arrays = parts(tied)
    sizes = (HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, VOCAB, CONTEXT)
    if version:
        head = struct.pack("<Ii7iB", 0x616B3432, version, *sizes, tied).ljust(256, b"\0")
        order = ["attn_norm", "ffn_norm", "norm", "embed", "q", "k", "v", "o", "w1", "w2", "w3"]
        order += [] if tied else ["head"]
    else:
        head = struct.pack("<7i", *sizes[:5], VOCAB if tied else -VOCAB, CONTEXT)
        order = list(arrays)
    path.write_bytes(head + b"".join(arrays[name].tobytes() for name in order))
    return arrays


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("version", [0, 1])
def test_layout(tmp_path: Path, tied: bool, version: int) -> None:
    path = tmp_path / "model.bin"
    arrays = write(path, tied, version)
    model = load(path)
    config = model.config
    assert (config.hidden, config.ffn, config.layers, config.vocab) == (HIDDEN, FFN, LAYERS, VOCAB)
    assert (config.heads, config.kv_heads, config.head_dim) == (HEADS, KV_HEADS, DIM)
    assert (config.context, config.tied, config.family) == (CONTEXT, tied, "llama")
    assert ("lm_head.weight" in model.tensors) is not tied
    for i in range(LAYERS):
        p = f"model.layers.{i}."
        for ours, theirs in {
            "self_attn.v_proj": "v", "self_attn.o_proj": "o", "mlp.gate_proj": "w1",
            "mlp.down_proj": "w2", "mlp.up_proj": "w3", "input_layernorm": "attn_norm",
            "post_attention_layernorm": "ffn_norm",
        }.items():  # fmt: skip
            got = model.tensors[f"{p}{ours}.weight"].numpy()
            np.testing.assert_array_equal(got, arrays[theirs][i])
        # neighbors (2j, 2j+1) of a head go to (j, j + D/2)
        for name, heads in (("q", HEADS), ("k", KV_HEADS)):
            rows = arrays[name][i].reshape(heads, DIM // 2, 2, HIDDEN)
            want = rows.transpose(0, 2, 1, 3).reshape(heads * DIM, HIDDEN)
            got = model.tensors[f"{p}self_attn.{name}_proj.weight"].numpy()
            np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(model.tensors["model.norm.weight"].numpy(), arrays["norm"])
    if not tied:
        np.testing.assert_array_equal(model.tensors["lm_head.weight"].numpy(), arrays["head"])


@pytest.mark.parametrize("name", ["stories260K.bin", "stories260K_v1.bin"])
def test_the_same_model_in_three_formats(name: str) -> None:
    ours = load(need(f"data/stories260k/{name}"))
    other = load(need("models/stories260K"))
    assert set(ours.tensors) == set(other.tensors)
    for tensor, values in other.tensors.items():
        np.testing.assert_array_equal(ours.tensors[tensor].numpy(), values.numpy(), err_msg=tensor)


def test_tokenizer_bin_equals_the_published_tokenizer() -> None:
    """tok512.bin lies beside the checkpoint; the Hugging Face folder has the same as JSON."""
    ours = Tokenizer(load(need("data/stories260k/stories260K.bin")).files)
    other = Tokenizer(load(need("models/stories260K")).files)
    assert ours.eos_ids == (2, 1)
    for text in ("Once upon a time", " Lily's  ball.\n\nThe é€😀 end", "", "<s>Tim"):
        ids = ours.encode(text)
        assert ids == other.encode(text)
        assert ours.decode(ids) == other.decode(ids)
    assert ours.decode(ours.encode(" Lily's  ball.\n\né€😀")) == " Lily's  ball.\n\né€😀"


def test_babyllama_with_its_sentencepiece_model() -> None:
    model = load(need("data/babyllama105/model5000.bin"))
    assert model.config.vocab == 105
    tokenizer = Tokenizer(model.files)
    vocab = need("data/babyllama105/tok105.vocab").read_text("utf-8").splitlines()
    pieces = [line.split("\t")[0] for line in vocab]
    text = "Once upon a time, Tim met Sue."
    ids = tokenizer.encode(text)
    assert ids == [1, *(pieces.index(c) for c in "▁" + text.replace(" ", "▁"))]
    assert tokenizer.decode(ids) == text
    # this model's normalizer squeezes spaces, and has no bytes to fall back on
    assert tokenizer.encode("  a   b ") == tokenizer.encode("a b")
    assert tokenizer.encode("a☃b")[3] == 0


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    write(path, True)
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    with pytest.raises(FormatError, match="is no known format; give a Hugging Face folder"):
        load(path)
    from edgeq.importers import llama2c

    with pytest.raises(FormatError, match=r"or is truncated: its .* bytes do not fit its header"):
        llama2c.load(path)
    write(path, True, version=1)
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    with pytest.raises(FormatError, match=r"has \d+ bytes, its header asks for \d+"):
        load(path)
    path.write_bytes(whole[:100])
    with pytest.raises(FormatError, match="truncated: 100 bytes"):
        load(path)
    path.write_bytes(whole[:8] + struct.pack("<7i", 0, 1, 1, 1, 1, 1, 1) + whole[36:])
    with pytest.raises(FormatError, match="header's sizes are impossible"):
        load(path)
    path.write_bytes(whole[:4] + struct.pack("<i", 2) + whole[8:])
    with pytest.raises(UnsupportedError, match=r"version 2; edgeq reads .* start from the float"):
        load(path)


def test_a_tokenizer_of_another_size(tmp_path: Path) -> None:
    write(tmp_path / "model.bin", True)
    token = struct.pack("<fi", 0.0, 1) + b"a"
    (tmp_path / "tokenizer.bin").write_bytes(struct.pack("<i", 1) + token * 3)
    with pytest.raises(FormatError, match="holds 3 tokens, the checkpoint beside it 11"):
        load(tmp_path / "model.bin")
    (tmp_path / "tokenizer.bin").write_bytes(struct.pack("<i", 1) + token[:-1])
    with pytest.raises(FormatError, match="truncated or damaged at byte 4"):
        load(tmp_path / "model.bin")
    (tmp_path / "tokenizer.bin").unlink()
    assert load(tmp_path / "model.bin").files == {}


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes((value & 127 | 128,))
        value >>= 7
    return out + bytes((value,))


def field(number: int, value: bytes | int) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def sentencepiece(pieces: list[tuple[str, float, int]], model_type: int = 2) -> bytes:
    out = b""
    for text, score, kind in pieces:
        body = field(1, text.encode()) + varint(2 << 3 | 5) + struct.pack("<f", score)
        out += field(1, body + field(3, kind))
    # bos_id is off: -1 in 64 bits
    return out + field(2, field(3, model_type) + field(41, 2**64 - 1)) + field(3, field(4, 0))


PIECES = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), ("▁", -1.0, 1), ("a", -2.0, 1),
          ("b", -3.0, 1), ("ab", -4.0, 1), ("▁ab", -5.0, 1)]  # fmt: skip


def test_huggingface_folder_with_only_a_sentencepiece_model(tmp_path: Path) -> None:
    source = small_checkpoint()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(source / name)
    path = tmp_path / "tokenizer.model"
    path.write_bytes(sentencepiece(PIECES))
    tokenizer = Tokenizer(load(tmp_path).files)
    assert tokenizer.bos is None
    assert tokenizer.encode("ab b") == [7, 3, 5]
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|end|>", "added_tokens_decoder": {
            "2": {"content": "</s>", "special": True},
            "8": {"content": "<|end|>", "special": True},
            "9": {"content": "<tool>", "special": False}}})
    )  # fmt: skip
    tokenizer = Tokenizer(load(tmp_path).files)
    assert tokenizer.encode("ab<|end|><tool>") == [7, 8, 9]
    assert tokenizer.decode([7, 8, 9]) == "ab <tool>"  # as the tokenizers library writes it
    assert tokenizer.eos_ids == (8,)
    path.write_bytes(sentencepiece(PIECES, model_type=1))
    with pytest.raises(UnsupportedError, match=r"type 1 \(1 unigram.*edgeq reads BPE"):
        load(tmp_path)
    path.write_bytes(sentencepiece(PIECES)[:-3])
    with pytest.raises(FormatError, match="is not a SentencePiece model, or is damaged"):
        load(tmp_path)
    path.write_bytes(b"")
    with pytest.raises(FormatError, match="holds no pieces"):
        load(tmp_path)


def test_llama_2_sentencepiece_equals_its_gguf() -> None:
    """The same vocabulary from a protocol buffer and from a GGUF file encodes alike."""
    from edgeq.importers.gguf.file import open_gguf
    from edgeq.importers.gguf.tokenizer import tokenizer_files as from_gguf
    from edgeq.importers.tokenizer.sentencepiece_model import tokenizer_files

    gguf = open_gguf(need("data/tokenizers/ggml-vocab-llama-spm.gguf"))
    one = Tokenizer(tokenizer_files(need("data/tokenizers/llama2-tokenizer.model")))
    two = Tokenizer(from_gguf(gguf.metadata)[0])
    text = "Äpfel, 😀 and\n\n 3.14   spaces ½"
    assert one.encode(text) == two.encode(text)
    assert one.decode(one.encode(text)) == text
