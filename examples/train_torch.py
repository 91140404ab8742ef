"""Train a small GPT in torch, byte by byte on cuflash's own source, with attention written out, by cuflash, or with both, one after the other.

Run: python examples/train_torch.py [--attention written-out|cuflash|both] [--steps 200] [--dropout 0.1] [--output losses.png]

Both start from the same parameters and see the same batches. Without dropout their losses are the same to float32's rounding; with it, each draws masks of its own.
On the CPU, cuflash runs on its simulator.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import cuflash.torch
from cuflash.demo.training import own_text

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH = 8


@dataclass(frozen=True)
class Config:
    attention: str
    dropout: float
    block_size: int = 64
    n_layer: int = 2
    n_head: int = 2
    n_embd: int = 64


class CausalSelfAttention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.attn_dropout, self.resid_dropout = nn.Dropout(config.dropout), nn.Dropout(config.dropout)
        self.n_head, self.dropout, self.attention = config.n_head, config.dropout, config.attention
        self.register_buffer("mask", torch.ones(config.block_size, config.block_size, dtype=torch.bool).tril(), persistent=False)

    def forward(self, x: Any) -> Any:
        q, k, v = self.c_attn(x).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)  # (batch, heads, seqlen, head_dim) each
        if self.attention == "cuflash":
            y = cuflash.torch.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=True)
        else:
            scores = (q @ k.mT) / math.sqrt(k.shape[-1])
            scores = scores.masked_fill(~self.mask[: x.shape[1], : x.shape[1]], -math.inf)
            y = self.attn_dropout(scores.softmax(-1)) @ v
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.n_embd
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(width), CausalSelfAttention(config), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(config.dropout))

    def forward(self, x: Any) -> Any:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(256, config.n_embd), nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.Sequential(*(Block(config) for _ in range(config.n_layer)))
        self.ln_f, self.lm_head = nn.LayerNorm(config.n_embd), nn.Linear(config.n_embd, 256, bias=False)

    def forward(self, idx: Any, targets: Any) -> Any:
        """The loss in nats per byte."""
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))
        logits = self.lm_head(self.ln_f(self.blocks(x)))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def train(config: Config, steps: int) -> tuple[list[float], float]:
    """The loss of each step, and at the end that of text held out."""
    torch.manual_seed(0)
    model = GPT(config).to(DEVICE)
    windows, held_out = (torch.from_numpy(x).long().to(DEVICE) for x in own_text().windows(config.block_size + 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.99), weight_decay=0.1)
    order = torch.Generator().manual_seed(1)  # of its own, so that dropout does not decide which batches come
    losses = []
    for step in range(1, steps + 1):
        batch = windows[torch.randint(len(windows), (BATCH,), generator=order).to(DEVICE)]
        loss = model(batch[:, :-1], batch[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % max(1, steps // 5) == 0:
            print(f"  step {step:4}   loss {losses[-1]:.3f}", flush=True)
    model.eval()
    with torch.no_grad():
        final = model(held_out[:32, :-1], held_out[:32, 1:]).item()
    print(f"  held out     {final:.3f}")
    return losses, final


def draw(curves: dict[str, list[float]], dropout: float, path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    styles = ({"linewidth": 4, "color": "silver"}, {"linewidth": 1, "color": "tab:blue"})
    for (name, losses), style in zip(curves.items(), styles, strict=False):
        axes.plot(range(1, len(losses) + 1), losses, label=name, **style)
    axes.set(xlabel="step", ylabel="loss, nats per byte", title=f"A small GPT in torch learns cuflash's source, dropout {dropout:g}")
    axes.legend()
    figure.savefig(path, dpi=110)
    print(f"The losses are in {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small GPT with attention written out, by cuflash, or both.")
    parser.add_argument("--attention", choices=("written-out", "cuflash", "both"), default="both")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--output", help="a picture of the losses")
    options = parser.parse_args()
    kinds = ("written-out", "cuflash") if options.attention == "both" else (options.attention,)
    curves = {}
    for kind in kinds:
        print(f"attention: {kind}")
        curves[kind], _ = train(Config(kind, options.dropout), options.steps)
    if len(curves) == 2:
        difference = max(abs(a - b) for a, b in zip(*curves.values(), strict=True))
        print(f"largest difference between the losses of a step: {difference:.2e}")
    if options.output:
        draw(curves, options.dropout, options.output)


if __name__ == "__main__":
    main()
