"""A GGUF file's tokenizer by llama.cpp's rules."""

from __future__ import annotations

from typing import Any

import pytest

from edgeq.importers.gguf.tokenizer import tokenizer_files
from edgeq.runtime.tokenizer import Tokenizer


def vocabulary(extra: dict[str, int], name: str = "", **keys: Any) -> dict[str, Any]:
    """Metadata of a SentencePiece vocabulary with further tokens: text -> type."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "H", "i", "▁H"]
    kinds = [2, 3, 3, *[6] * 256, *[1] * 4, *extra.values()]
    tokens += extra
    return {
        "general.name": name,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": [-float(i) for i in range(len(tokens))],
        **{f"tokenizer.ggml.{key}": value for key, value in keys.items()},
    }


@pytest.mark.parametrize(
    ("extra", "keys", "ends"),
    [
        ({}, {}, {"</s>"}),
        ({"<|end|>": 3, "<|endoftext|>": 3}, {"eos_token_id": 264}, {"</s>", "<|end|>",
                                                                    "<|endoftext|>"}),
        ({"<eos>": 3, "<end_of_turn>": 3}, {"eos_token_id": 264}, {"</s>", "<eos>",
                                                                  "<end_of_turn>"}),
        ({"<|end_of_text|>": 3, "<|eom_id|>": 3, "<|eot_id|>": 1}, {"eos_token_id": 265},
         {"</s>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"}),
        ({"x": 3, "y": 3, "z": 1}, {"eot_token_id": 263, "eom_token_id": 264,
                                   "fim_sep_token_id": 265}, {"</s>", "x", "y", "z"}),
        ({"<reponame>": 3, "<|file_sep|>": 4}, {}, {"</s>", "<reponame>", "<|file_sep|>"}),
        ({"<PAD>": 3, "x": 3}, {"fim_pad_token_id": 264}, {"</s>", "x"}),
        ({"<|end|>": 3, "<|return|>": 3, "<|call|>": 3}, {}, {"</s>", "<|return|>", "<|call|>"}),
        ({"<|tool_response>": 3}, {"eos_token_id": 263}, {"<|tool_response>"}),
    ],
)  # fmt: skip
def test_every_end_token_of_llama_cpp(
    extra: dict[str, int], keys: dict[str, Any], ends: set[str]
) -> None:
    metadata = vocabulary(extra, **keys)
    tokenizer = Tokenizer(tokenizer_files(metadata)[0])
    tokens = metadata["tokenizer.ggml.tokens"]
    assert {tokens[i] for i in tokenizer.eos_ids} == ends
    for text in ends:  # whatever their types, they are read where they are written out
        if text not in ("x", "y", "z"):
            assert tokenizer.encode(f"Hi{text}")[-1] == tokens.index(text)


@pytest.mark.parametrize(("name", "taken"), [("Phi-3-mini", True), ("my phi3", True), ("x", False)])
def test_phi3_s_tokens_take_whitespace_along(name: str, taken: bool) -> None:
    extra = {"<|endoftext|>": 3, "<|user|>": 3, "<|end|>": 3, "<tool>": 4}
    metadata = vocabulary(extra, name, add_bos_token=False)
    tokenizer, tokens = Tokenizer(tokenizer_files(metadata)[0]), metadata["tokenizer.ggml.tokens"]
    user, end, hi = (tokens.index(t) for t in ("<|user|>", "<|end|>", "▁H"))
    ids = tokenizer.encode("<|user|>\n\nHi<|end|> \n")
    assert (ids == [user, hi, tokens.index("i"), end]) == taken
    assert len(tokenizer.encode("<|endoftext|>\n")) > 1  # it leaves what follows alone
    assert (len(tokenizer.encode("<tool> \n ")) == 1) == taken


def test_eos_after_a_text_and_spaces_in_it() -> None:
    """llama.cpp puts EOS where it is told to, and removes no spaces of SentencePiece's."""
    metadata = vocabulary({}, add_eos_token=True, remove_extra_whitespaces=True)
    tokenizer, tokens = Tokenizer(tokenizer_files(metadata)[0]), metadata["tokenizer.ggml.tokens"]
    ids = tokenizer.encode("Hi  ")
    assert (ids[0], ids[-1]) == (1, 2)
    assert ids[1:-1] == [tokens.index(t) for t in ("▁H", "i", "▁", "▁")]
    assert tokenizer.encode("Hi", add_eos=False)[-1] != 2


def test_tokens_without_text() -> None:
    metadata = vocabulary({"": 1})
    assert Tokenizer(tokenizer_files(metadata)[0]).encode("Hi")[0] == 1
