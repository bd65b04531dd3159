"""A plain PyTorch training loop of a Llama-style model: what Raytron's step is measured against. No parallelism, no Ray."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raytron.config import RunConfig


class Block(nn.Module):
    def __init__(self, hidden: int, heads: int, kv_heads: int, ffn: int):
        super().__init__()
        self.heads, self.kv_heads, self.width = heads, kv_heads, hidden // heads
        self.norm_1, self.norm_2 = nn.RMSNorm(hidden, 1e-5), nn.RMSNorm(hidden, 1e-5)
        self.q = nn.Linear(hidden, hidden, bias=False)
        self.kv = nn.Linear(hidden, 2 * kv_heads * self.width, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.up = nn.Linear(hidden, 2 * ffn, bias=False)
        self.down = nn.Linear(ffn, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        y = self.norm_1(x)
        q = self.q(y).view(batch, length, -1, self.width).transpose(1, 2)
        k, v = self.kv(y).view(batch, length, -1, 2, self.width).transpose(1, 2).unbind(3)
        mixed = F.scaled_dot_product_attention(
            rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True, enable_gqa=self.heads != self.kv_heads
        )
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, -1))
        gate, up = self.up(self.norm_2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class PlainLlama(nn.Module):
    def __init__(self, config: RunConfig):
        super().__init__()
        m = config.model
        self.embed = nn.Embedding(m.vocab, m.hidden)
        self.blocks = nn.ModuleList(Block(m.hidden, m.heads, m.num_kv_heads, m.ffn) for _ in range(m.layers))
        self.norm = nn.RMSNorm(m.hidden, 1e-5)
        self.head = nn.Linear(m.hidden, m.vocab, bias=False)
        steps = torch.arange(0, m.dim_per_head, 2) / m.dim_per_head
        angles = torch.arange(config.sequence_length)[:, None] * m.rope_theta**-steps
        self.cos, self.sin = angles.cos(), angles.sin()

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class PlainLoop:
    """The usual loop: forward, backward, clip, AdamW; micro-batches summed in `.grad`."""

    def __init__(self, config: RunConfig):
        self.config = config
        self.model = PlainLlama(config)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.lr.peak, fused=True)

    def step(self, tokens: Tensor, labels: Tensor) -> float:
        size, total = self.config.micro_batch_size, 0.0
        count = len(tokens) // size
        for part, answers in zip(tokens.split(size), labels.split(size), strict=True):
            loss = self.model(part, answers) / count
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total
