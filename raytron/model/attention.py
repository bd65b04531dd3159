"""Causal self-attention: multi-head, grouped-query or multi-query; heads cut over tp, the sequence over cp.

Shapes: S tokens on this cp rank (the whole sequence where cp is 1), s its share of them under sequence parallelism,
B micro-batch, D hidden, H_l and KV_l local query and key-value heads, h head_dim.

    x (s,B,D) → q (S,B,H_l,h), k and v (S,B,KV_l,h) → rotate → softmax(q kᵀ / √h) v → (S,B,H_l·h) → (s,B,D)

What a query sees (sliding window, documents, other ranks' keys) is `raytron.parallel.context`'s matter.

Where tp is larger than the number of KV heads, runs of tp / KV ranks hold the same KV head (`Layout.repeat`).
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn

from raytron.config import ModelConfig
from raytron.kernels.tiles import Tile
from raytron.model.build import Builder
from raytron.model.context import Context
from raytron.model.norm import Norm
from raytron.model.rope import rotate
from raytron.parallel.random import keep_mask, key_of, token_rows
from raytron.parallel.tensor import column_linear, row_linear


class Attention(nn.Module):
    """One attention layer of one rank."""

    def __init__(self, build: Builder, name: str, model: ModelConfig):
        super().__init__()
        self.parallel, self.context_parallel = build.parallel, build.context_parallel
        self.model = model
        heads, kv_heads, width = model.heads, model.num_kv_heads, model.dim_per_head
        repeat = max(1, self.parallel.size // kv_heads)
        std = model.init_std
        self.q = build.normal(f"{name}.q.weight", (heads, width, model.hidden), std, dim=0)
        self.kv = build.normal(f"{name}.kv.weight", (kv_heads, 2, width, model.hidden), std, dim=0, repeat=repeat)
        self.out = build.normal(
            f"{name}.out.weight", (model.hidden, heads * width), std / math.sqrt(2 * model.layers), dim=1
        )
        self.q_bias = self.kv_bias = self.out_bias = None
        if model.qkv_bias:
            self.q_bias = build.constant(f"{name}.q.bias", (heads, width), 0.0, dim=0)
            self.kv_bias = build.constant(f"{name}.kv.bias", (kv_heads, 2, width), 0.0, dim=0, repeat=repeat)
        if model.bias:
            partial = self.parallel.sequence_parallel
            self.out_bias = build.constant(f"{name}.out.bias", (model.hidden,), 0.0, partial=partial)
        self.q_norm = self.k_norm = None
        if model.qk_norm:
            cut = self.parallel.size > 1  # each rank normalises its own heads only
            self.q_norm = Norm(build, f"{name}.q_norm", width, "rmsnorm", model.norm_eps, partial=cut)
            self.k_norm = Norm(build, f"{name}.k_norm", width, "rmsnorm", model.norm_eps, partial=cut)
        self.dropout_key = key_of(build.seed, name, "probabilities")
        self.first_head = self.parallel.rank * self.q.shape[0]

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x (s,B,D) -> (s,B,D)."""
        q, kv = column_linear(x, self.parallel, (self.q, self.q_bias), (self.kv, self.kv_bias))
        joined = context.keep.region("attention", partial(self._mix, context), q, kv)
        return row_linear(joined, self.out, self.out_bias, self.parallel)

    def _mix(self, context: Context, q: Tensor, kv: Tensor) -> Tensor:
        """q (S,B,H_l·h), kv (S,B,KV_l·2·h) -> (S,B,H_l·h): norms, rotation, attention."""
        q = q.view(*q.shape[:-1], *self.q.shape[:2])
        k, v = kv.view(*kv.shape[:-1], *self.kv.shape[:3]).unbind(3)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if context.rotary is not None:
            q, k = rotate(q, context.rotary), rotate(k, context.rotary)
        return self._attend(q, k, v, context).flatten(2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """q (S,B,H_l,h), k and v (S,B,KV_l,h) -> (S,B,H_l,h)."""
        dropout = None
        if context.training and self.model.attention_dropout > 0:
            dropout = partial(self._keep, context.samples)
        return self.context_parallel.attend(q, k, v, context.seen, dropout)

    def _keep(self, samples: Tensor, tile: Tile, queries: Tensor, keys: Tensor) -> Tensor:
        """(rows,H,height,width): dropout of a tile's probabilities, keyed by sample, head and both positions."""
        exchange = self.context_parallel.all_to_all
        heads = self.q.shape[0] // exchange.size
        first = self.first_head + exchange.index * heads
        numbers = torch.arange(first, first + heads, device=samples.device)
        tokens = token_rows(samples[slice(*tile.rows)], queries[slice(*tile.queries)]).t()[:, None, :]
        rows = tokens * self.model.heads + numbers[None, :, None]
        return keep_mask(self.model.attention_dropout, self.dropout_key, rows, keys[slice(*tile.keys)])
