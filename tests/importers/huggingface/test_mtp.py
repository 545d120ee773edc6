"""Multi-token-prediction heads of checkpoints, against their modules in PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeq.core.errors import FormatError
from edgeq.importers import load
from edgeq.model.mtp import PREFIX, mtp_model, without_mtp
from edgeq.model.reference import Reference
from tests.importers.huggingface.test_settings import (
    TOKENS,
    checkpoint,
    edit_tensors,
    theirs,
)

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
qwen = pytest.importorskip("transformers.models.qwen3_5.modeling_qwen3_5")


class Head(torch.nn.Module):  # type: ignore[misc]
    """The head as vLLM's qwen3_5_mtp.py states it, of the layers that Transformers has."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        norm = {"eps": config.rms_norm_eps}
        self.pre_fc_norm_embedding = qwen.Qwen3_5RMSNorm(config.hidden_size, **norm)
        self.pre_fc_norm_hidden = qwen.Qwen3_5RMSNorm(config.hidden_size, **norm)
        self.fc = torch.nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        attends = config.layer_types.index("full_attention")
        self.layers = torch.nn.ModuleList([qwen.Qwen3_5DecoderLayer(config, attends)])
        self.norm = qwen.Qwen3_5RMSNorm(config.hidden_size, **norm)
        self.rotary = qwen.Qwen3_5TextRotaryEmbedding(config)

    def forward(self, embeddings: Any, states: Any) -> Any:
        embeddings = self.pre_fc_norm_embedding(embeddings)
        x = self.fc(torch.cat([embeddings, self.pre_fc_norm_hidden(states)], dim=-1))
        length = x.shape[1]
        positions = torch.arange(length)[None]
        mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
        x = self.layers[0](
            x, position_embeddings=self.rotary(x, positions), attention_mask=mask,
            position_ids=positions,
        )  # fmt: skip
        x = x[0] if isinstance(x, tuple) else x
        return self.norm(x)


def head_of(folder: Path) -> Head:
    """A random head, whose tensors are put into the checkpoint."""
    config = transformers.AutoConfig.from_pretrained(folder)
    config._attn_implementation = "eager"
    torch.manual_seed(1)
    head = Head(config).eval()
    with torch.no_grad():
        for weight in head.parameters():
            size = 0.2 if weight.ndim == 1 else 1.3 / weight.shape[-1] ** 0.5
            weight.copy_(size * torch.randn_like(weight))
    stored = {PREFIX + name: weight.detach().numpy() for name, weight in head.named_parameters()}
    edit_tensors(folder, lambda tensors: tensors.update(stored))
    return head


@pytest.mark.parametrize("tied", [True, False])
def test_guesses_are_those_of_the_modules(tmp_path: Path, tied: bool) -> None:
    folder = checkpoint(tmp_path, "qwen3_5_text", tie_word_embeddings=tied)
    head = head_of(folder)
    model = load(folder)
    assert model.config.mtp == model.config.blocks[1]
    assert "left_out" not in model.provenance
    outer = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor(TOKENS[None])
    with torch.no_grad():
        states = outer.model(ids).last_hidden_state[:, :-1]
        embeddings = outer.get_input_embeddings()(ids)[:, 1:]
        want = outer.lm_head(head(embeddings, states))[0].numpy()
    got = Reference(mtp_model(model)).forward(TOKENS[1:], states=states[0].numpy())
    np.testing.assert_allclose(got, want, atol=2e-4 * np.abs(want).max())
    logits = Reference(model).forward(TOKENS)
    np.testing.assert_allclose(logits, theirs(folder), atol=2e-4 * np.abs(logits).max())
    assert set(without_mtp(model).tensors) == {n for n in model.tensors if n[:4] != PREFIX}


def test_the_embedding_comes_before_the_state(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "qwen3_5_text")
    head_of(folder)
    model = load(folder)
    stored = np.concatenate(
        [model.tensors[f"mtp.fc_{part}.weight"].numpy() for part in ("embedding", "hidden")], axis=1
    )

    def check(tensors: dict[str, NDArray[Any]]) -> None:
        np.testing.assert_array_equal(stored, tensors["mtp.fc.weight"])

    edit_tensors(folder, check)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop("mtp.norm.weight"),
        lambda tensors: tensors.pop("mtp.layers.0.mlp.up_proj.weight"),
        lambda tensors: tensors.update({"mtp.layers.1.mlp.up_proj.weight": np.ones((4, 4))}),
        lambda tensors: tensors.update({"mtp.fc.weight": tensors["mtp.fc.weight"].astype(np.int8)}),
    ],
)
def test_heads_that_edgeq_does_not_compute_are_left_out(tmp_path: Path, change: Any) -> None:
    folder = checkpoint(tmp_path, "qwen3_5_text")
    head_of(folder)
    edit_tensors(folder, change)
    model = load(folder)
    assert model.config.mtp is None
    (text,) = model.provenance["left_out"]
    assert "of the multi-token-prediction head, which only guesses tokens ahead" in text


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("mtp.fc.weight", (32, 32), r"mtp\.fc\.weight has shape \[32, 32\]; .* \[32, 64\]"),
        ("mtp.norm.weight", (31,), r"mtp\.norm\.weight has shape \[31\]"),
        ("mtp.layers.0.self_attn.q_proj.weight", (64, 32), r"q_proj\.weight has shape \[64, 32\]"),
    ],
)
def test_heads_of_other_sizes_are_refused(
    tmp_path: Path, name: str, shape: tuple[int, ...], words: str
) -> None:
    folder = checkpoint(tmp_path, "qwen3_5_text")
    head_of(folder)
    edit_tensors(folder, lambda tensors: tensors.update({name: np.ones(shape, np.float32)}))
    with pytest.raises(FormatError, match=words):
        load(folder)
