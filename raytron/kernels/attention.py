"""Causal attention with an optional sliding window, grouped queries included.

`causal_attention` is torch's scaled_dot_product_attention, which picks cuDNN or flash attention on a GPU and a flash
kernel on a CPU. `reference` is the formula softmax(q kᵀ / √h) v, with the probabilities at hand (for dropout).

Shapes: B batch, H query heads, KV key-value heads (H a multiple of KV), S sequence, h head_dim.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    """q (B,H,S,h), k and v (B,KV,S,h) -> (B,H,S,h). A query sees itself and the `window` - 1 tokens before it."""
    grouped = q.shape[1] != k.shape[1]
    if window is None or window >= q.shape[2]:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    mask = window_mask(q.shape[2], window, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)


def reference(q: Tensor, k: Tensor, v: Tensor, window: int | None = None, keep: Tensor | None = None) -> Tensor:
    """The same by the formula, in float32; `keep` (B,H,S,S), if given, multiplies the probabilities."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q @ k.transpose(-1, -2)).float() / math.sqrt(q.shape[-1])
    seen = window_mask(q.shape[2], window or q.shape[2], q.device)
    probabilities = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    if keep is not None:
        probabilities = probabilities * keep
    return probabilities.to(v.dtype) @ v


def window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """(S, S) bool: whether a query (row) sees a key (column)."""
    at = torch.arange(length, device=device)
    distance = at[:, None] - at[None, :]
    return (distance >= 0) & (distance < window)
