"""Small tokenizers of many shapes, trained on the hard texts, and models that carry them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    processors,
    trainers,
)
from tokenizers import pre_tokenizers as cuts

from edgeq.converters.validate.hard_strings import hard_strings
from edgeq.importers.tokenizer.tokenizer_json import PRE_TOKENIZERS
from edgeq.model.model import Model
from tests.families import random_model, tiny_config

CONFIG = {"bos_token": "<s>", "eos_token": "</s>"}


@cache
def byte_level(
    pre: str = "gpt-2", normalizer: str = "", prefix_space: bool = False, vocab: int = 700
) -> str:
    """A byte-level BPE tokenizer.json, cut as ``pre`` says."""
    how = PRE_TOKENIZERS[pre]
    made = Tokenizer(models.BPE(ignore_merges=how.whole_words))
    if normalizer:
        made.normalizer = getattr(normalizers, normalizer)()
    made.pre_tokenizer = cuts.Sequence(
        [
            *(cuts.Split(Regex(split), "isolated") for split in how.splits),
            cuts.ByteLevel(add_prefix_space=prefix_space, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=special, show_progress=False,
        initial_alphabet=cuts.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator(hard_strings(), trainer)
    made.add_tokens([AddedToken("<tool>", normalized=False)])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
    )
    return str(made.to_str())


@cache
def sentencepiece(scheme: str | None = None) -> str:
    """A byte-fallback tokenizer.json: a space before each text, or Metaspace's scheme."""
    raw = [f"<0x{byte:02X}>" for byte in range(256)]
    words = ["▁", "a", "b", "H", "i", "e", "l", "o", "▁H", "▁a", "▁b", "▁Hi", "ll", "▁He", "▁Hell"]
    vocab = {piece: i for i, piece in enumerate(["<unk>", "<s>", "</s>", *raw, *words])}
    merges = [("▁", "H"), ("▁", "a"), ("▁", "b"), ("▁H", "i"), ("l", "l"), ("▁H", "e"),
              ("▁He", "ll")]  # fmt: skip
    made = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if scheme is None:
        made.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        made.pre_tokenizer = cuts.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    made.add_special_tokens(["<unk>", "<s>", "</s>", "<|user|>"])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return str(made.to_str())


def edited(document: str, **values: Any) -> str:
    """A tokenizer.json with other values."""
    return json.dumps(json.loads(document) | values)


def flagged(document: str, content: str, **flags: bool) -> str:
    """A tokenizer.json in which an added token has other flags."""
    found = json.loads(document)
    for token in found["added_tokens"]:
        if token["content"] == content:
            token |= flags
    return json.dumps(found)


def model_of(
    document: str, config: Mapping[str, Any] | None = None, family: str = "llama", **over: Any
) -> Model:
    """A tiny model with random weights that carries a tokenizer."""
    rows = Tokenizer.from_str(document).get_vocab_size()
    made = tiny_config(family, vocab=-(-rows // 32) * 32, **over)
    files = {
        "tokenizer.json": document.encode(),
        "tokenizer_config.json": json.dumps(CONFIG if config is None else config).encode(),
    }
    return replace(random_model(made), files=files)
