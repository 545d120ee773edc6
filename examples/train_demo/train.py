"""Train the small story-telling model of `edgeq demo` on a CPU.

Writes a Hugging Face checkpoint (Llama architecture, tied embeddings, bfloat16), the tokenizer
and the held-out stories. The folder is usable from the first minutes on and improves.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from stories import BOS, EOS, load_stories, packed, train_tokenizer
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, scaled_dot_product_attention, silu

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 2048,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "dtype": "bfloat16",
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
HELDOUT_BYTES = 40_000  # of held-out text written beside the model


class Attention(nn.Module):  # type: ignore[misc]
    """Grouped-query attention with rotary positions."""

    def __init__(self) -> None:
        super().__init__()
        hidden, self.dim = CONFIG["hidden_size"], CONFIG["head_dim"]
        q, kv = (CONFIG[k] * self.dim for k in ("num_attention_heads", "num_key_value_heads"))
        self.q_proj = nn.Linear(hidden, q, bias=False)
        self.k_proj = nn.Linear(hidden, kv, bias=False)
        self.v_proj = nn.Linear(hidden, kv, bias=False)
        self.o_proj = nn.Linear(q, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: [batch, time, hidden]; cos, sin: [time, head_dim]."""
        q, k, v = (
            p(x).unflatten(-1, (-1, self.dim)).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )

        def rotate(t: Tensor) -> Tensor:
            a, b = t.chunk(2, -1)
            return t * cos + torch.cat((-b, a), -1) * sin

        groups = q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(groups, 1) for t in (rotate(k), v))
        y = scaled_dot_product_attention(rotate(q), k, v, is_causal=True)
        return cast(Tensor, self.o_proj(y.transpose(1, 2).flatten(2)))


class MLP(nn.Module):  # type: ignore[misc]
    """The gated feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        hidden, ffn = CONFIG["hidden_size"], CONFIG["intermediate_size"]
        self.gate_proj = nn.Linear(hidden, ffn, bias=False)
        self.up_proj = nn.Linear(hidden, ffn, bias=False)
        self.down_proj = nn.Linear(ffn, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, time, hidden]."""
        return cast(Tensor, self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x)))


class Block(nn.Module):  # type: ignore[misc]
    """One decoder layer."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(CONFIG["hidden_size"], CONFIG["rms_norm_eps"])
        self.self_attn = Attention()
        self.post_attention_layernorm = nn.RMSNorm(CONFIG["hidden_size"], CONFIG["rms_norm_eps"])
        self.mlp = MLP()


class Llama(nn.Module):  # type: ignore[misc]
    """A decoder whose parameters bear Hugging Face's names, less the `model.` in front."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.embed_tokens = nn.Embedding(CONFIG["vocab_size"], CONFIG["hidden_size"])
        self.layers = nn.ModuleList(Block() for _ in range(CONFIG["num_hidden_layers"]))
        self.norm = nn.RMSNorm(CONFIG["hidden_size"], CONFIG["rms_norm_eps"])
        for name, p in self.named_parameters():
            if p.ndim == 2:
                std = 0.02 if "embed" in name else p.shape[1] ** -0.5
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=std / (2 * len(self.layers)) ** (0.5 * into_residual))
        exponent = torch.arange(0, CONFIG["head_dim"], 2) / CONFIG["head_dim"]
        angle = torch.outer(torch.arange(512.0), CONFIG["rope_theta"] ** -exponent).repeat(1, 2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def drop(self, x: Tensor) -> Tensor:
        """Dropout from one random byte an element (torch's own is slow on a CPU)."""
        if not self.training or not self.dropout:
            return x
        cut = round(self.dropout * 256)
        noise = torch.randint(-(2**63), 2**63 - 1, (x.numel() // 8,)).view(torch.uint8)
        return x * ((noise >= cut).view(x.shape).to(x.dtype) * (256 / (256 - cut)))

    def forward(self, ids: Tensor) -> Tensor:
        """ids: [batch, time] to logits [batch, time, vocab]."""
        cos, sin = (t[: ids.shape[1]].bfloat16() for t in (self.cos, self.sin))
        x = self.drop(self.embed_tokens(ids))
        for layer in self.layers:
            x = x + self.drop(layer.self_attn(layer.input_layernorm(x), cos, sin))
            x = x + self.drop(layer.mlp(layer.post_attention_layernorm(x)))
        return linear(self.norm(x), self.embed_tokens.weight)


class Muon(torch.optim.Optimizer):  # type: ignore[misc]
    """Momentum made orthogonal by Newton-Schulz steps (github.com/KellerJordan/Muon)."""

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    def step(self, closure: Any = None) -> None:
        """One update; matrices of the same shape are handled as one stack."""
        with torch.no_grad():
            for group in self.param_groups:
                shapes: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
                for p in group["params"]:
                    shapes[p.shape].append(p)
                for (rows, columns), same in shapes.items():
                    self._update(same, group["lr"], group["weight_decay"], rows, columns)

    def _update(self, same: list[Tensor], lr: float, decay: float, rows: int, columns: int) -> None:
        grad = torch.stack([p.grad for p in same])
        momentum = self.state[same[0]].setdefault("momentum", torch.zeros_like(grad))
        momentum.lerp_(grad, 0.05)
        x = grad.lerp(momentum, 0.95).bfloat16()
        x = x.mT if rows > columns else x
        x = x / (x.float().norm(dim=(-2, -1), keepdim=True) + 1e-7).bfloat16()
        for _ in range(5):
            a = x @ x.mT
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        x = (x.mT if rows > columns else x).float()
        for p, update in zip(same, x, strict=True):
            p.mul_(1 - lr * decay)
            p.add_(update, alpha=-lr * max(1.0, rows / columns) ** 0.5)


def bits_per_byte(model: Llama, tok: Tokenizer, stories: list[str]) -> float:
    """Mean bits a byte; each story starts at the begin token, its end token is scored too."""
    nats, length = 0.0, CONFIG["max_position_embeddings"]
    for story in stories:
        ids = torch.tensor([0, *tok.encode(story, add_special_tokens=False).ids, 1])
        for at in range(0, len(ids) - 1, length):  # a longer story is scored in pieces
            target = ids[at + 1 : at + 1 + length]
            shown = ids[at : at + len(target)].clone()
            shown[0] = CONFIG["bos_token_id"]
            with torch.no_grad():
                logits = model(shown[None])[0].float()
            nats += cross_entropy(logits, target, reduction="sum").item()
    return nats / math.log(2) / sum(len(s.encode()) for s in stories)


def write(path: Path, content: str | dict[str, Tensor]) -> None:
    """Write a text or a safetensors file so that a reader never sees half of it."""
    part = path.with_name(path.name + ".part")
    if isinstance(content, str):
        part.write_text(content, encoding="utf-8")
    else:
        save_file(content, part, metadata={"format": "pt"})
    part.replace(path)


def main() -> None:
    """Prepare the data, train until the time is up, keep the best checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="directory of the two text files")
    parser.add_argument("--out", type=Path, required=True, help="directory to write the model to")
    parser.add_argument("--minutes", type=float, default=40, help="training time")
    parser.add_argument("--steps", type=int, help="train this many steps, whatever time it takes")
    parser.add_argument("--batch", type=int, default=8, help="windows of 512 tokens a step")
    parser.add_argument("--dropout", type=float, default=0.15)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--compile", action="store_true", help="faster; needs a C++ compiler")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--start", type=Path, help="go on from the model in this directory")
    parser.add_argument("--rate", type=float, default=1.0, help="factor on all learning rates")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)

    train, valid, test = load_stories(args.data)
    tok = train_tokenizer(train, CONFIG["vocab_size"])
    shown: list[str] = []
    for story in test:
        if len("\n\n".join([*shown, story])) < HELDOUT_BYTES:
            shown.append(story)
    tokens = {"bos_token": BOS, "eos_token": EOS, "model_max_length": 512}
    write(args.out / "heldout.txt", "\n\n".join(shown) + "\n")
    write(args.out / "tokenizer.json", tok.to_str(pretty=False))
    write(
        args.out / "tokenizer_config.json",
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "clean_up_tokenization_spaces": False,
                **tokens,
            },
            indent=2,
        )
        + "\n",
    )
    write(args.out / "config.json", json.dumps(CONFIG, indent=2) + "\n")
    write(
        args.out / "generation_config.json",
        json.dumps(
            {
                "bos_token_id": 0,
                "eos_token_id": 1,
                "pad_token_id": 1,
                "do_sample": True,
                "temperature": 0.7,
                "top_p": 0.95,
                "max_length": 512,
            },
            indent=2,
        )
        + "\n",
    )

    model, average = Llama(args.dropout), Llama(0.0).eval()
    if args.start:
        saved = load_file(args.start / "model.safetensors")
        model.load_state_dict({k.removeprefix("model."): v.float() for k, v in saved.items()})
    average.load_state_dict(model.state_dict())

    def loss_of(batch: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch[:, :-1].clamp(min=0))
        return cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten(), ignore_index=-1)

    compiled: Any = torch.compile(loss_of) if args.compile else loss_of
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    muon = Muon(matrices, lr=0.02, weight_decay=0.1)
    adam = torch.optim.AdamW(
        [
            {"params": [model.embed_tokens.weight], "lr": 4e-3, "weight_decay": 0.05},
            {"params": vectors, "lr": 2e-3, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
    )
    groups = [*muon.param_groups, *adam.param_groups]
    for group in groups:
        group["peak"] = group["lr"] * args.rate
    coded = [[*e.ids, 1] for e in tok.encode_batch(train)]
    windows = packed(coded, CONFIG["max_position_embeddings"] + 1, random.Random(args.seed))
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{sum(map(len, coded)):,} training tokens",
        flush=True,
    )

    start, last_save, best, step, seen, progress = time.monotonic(), 0.0, math.inf, 0, 0, 0.0
    kept: dict[str, Tensor] = {}
    while progress < 1:
        elapsed = (time.monotonic() - start) / 60
        progress = min(1.0, (step + 1) / args.steps if args.steps else elapsed / args.minutes)
        scale = min(1.0, (step + 1) / 100) * (0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2)
        for group in groups:
            group["lr"] = group["peak"] * scale
        batch = torch.tensor([next(windows) for _ in range(args.batch)])
        loss = compiled(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in (muon, adam):
            optimizer.step()
            optimizer.zero_grad()
        step, seen = step + 1, seen + int((batch[:, 1:] >= 0).sum())
        with torch.no_grad():
            for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
                slow.lerp_(fast, max(0.01, 1 / step))
        if step % 20 == 0:
            print(
                f"{elapsed:5.1f} min  step {step}  epoch {seen / sum(map(len, coded)):.2f}  "
                f"loss {loss.item():.3f}  {seen / elapsed / 60:.0f} tok/s",
                flush=True,
            )
        if elapsed - last_save > args.minutes / 20 or progress >= 1:
            last_save, score = elapsed, bits_per_byte(average, tok, valid)
            print(f"validation {score:.4f} bits a byte", flush=True)
            if score < best:
                best = score
                kept = {f"model.{k}": v.bfloat16() for k, v in average.state_dict().items()}
                write(args.out / "model.safetensors", kept)
    average.load_state_dict({k.removeprefix("model."): v.float() for k, v in kept.items()})
    print(
        f"held-out {bits_per_byte(average, tok, test):.4f} bits a byte, validation "
        f"{best:.4f}, {step} steps, {seen / sum(map(len, coded)):.1f} epochs",
        flush=True,
    )


if __name__ == "__main__":
    main()
