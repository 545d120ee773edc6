"""Small folders of sentence models as Sentence Transformers writes them, and their states."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from safetensors.numpy import save_file

TEXTS = (
    "The sun is warm.",
    "Once upon a time there was a little dog who ran in the park with his red ball.",
    "naïve café — 東京",
)
SPECIAL = ("<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>")


def write_tokenizer(folder: Path, template: str = "$A <eos>") -> None:
    """A byte-level tokenizer whose post-processor frames a text as the template says."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(SPECIAL), show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    library.train_from_iterator(["yes no " * 9, *TEXTS * 3], trainer)
    named = [(word, library.token_to_id(word)) for word in SPECIAL]
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single=template, special_tokens=named
    )
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>",
                    "eos_token": "<eos>", "padding_side": "left"})
    )  # fmt: skip


def write_modules(
    folder: Path,
    pooling: Mapping[str, Any],
    dense: Sequence[tuple[int, int, bool, str]] = (),
    *,
    normalize: bool = True,
    prompts: Mapping[str, Any] | None = None,
    transformer: Mapping[str, Any] | None = None,
) -> list[tuple[NDArray[np.float32], NDArray[np.float32] | None, str]]:
    """modules.json and the folders of modules; dense layers of (in, out, bias, activation).

    Returns:
        the weight, bias and activation of each dense layer.
    """
    generator = np.random.default_rng(7)
    listed, made = [("Transformer", "")], []
    names = ["Pooling", *["Dense"] * len(dense), *["Normalize"] * normalize]
    for number, kind in enumerate(names, 1):
        listed.append((kind, f"{number}_{kind}"))
        (folder / f"{number}_{kind}").mkdir()
    for number, (inside, out, bias, activation) in enumerate(dense, 2):
        weight = generator.normal(0, inside**-0.5, (out, inside)).astype(np.float32)
        tensors = {"linear.weight": weight}
        if bias:
            tensors["linear.bias"] = generator.normal(0, 0.1, out).astype(np.float32)
        at = folder / f"{number}_Dense"
        save_file(tensors, at / "model.safetensors")
        about = {"in_features": inside, "out_features": out, "bias": bias,
                 "activation_function": activation}  # fmt: skip
        (at / "config.json").write_text(json.dumps(about))
        made.append((weight, tensors.get("linear.bias"), activation))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    kinds = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(listed)
    ]
    (folder / "modules.json").write_text(json.dumps(kinds))
    if prompts is not None:
        (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    if transformer is not None:
        (folder / "sentence_bert_config.json").write_text(json.dumps(transformer))
    return made


def theirs(folder: Path, ids: Sequence[int]) -> NDArray[np.float32]:
    """Hidden states [T, hidden] of tokens, as Transformers computes them in float32."""
    import torch
    import transformers

    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return np.asarray(model(torch.tensor([list(ids)])).last_hidden_state[0].numpy())
