"""Rotary position embeddings (Su et al., arXiv 2104.09864), in the half-split convention of Llama.

Channel i of the first half and of the second turn together by the angle position · theta^(−2i / head_dim).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rotary_table(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """positions (S,) or (S,B) -> cosines and sines, float32, each (S, 1 or B, 1, head_dim / 2)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device=positions.device).float() / head_dim
    angles = positions.float().view(len(positions), -1, 1, 1) * (1.0 / theta**exponents)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """x (S, B, H, head_dim), turned by its position; computed in float32, returned in x's type."""
    out = _Rotation.apply(x, *table)  # type: ignore[no-untyped-call]
    assert isinstance(out, Tensor)
    return out


class _Rotation(torch.autograd.Function):
    """The gradient of a rotation is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return _turned(dy, cos, sin, -1), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sense: int) -> Tensor:
    """sense: 1 forwards, -1 back."""
    halves = x.float().view(*x.shape[:-1], 2, -1)
    out: Tensor = halves * cos.unsqueeze(-2)
    (first, second), (turned_first, turned_second) = halves.unbind(-2), out.unbind(-2)
    turned_first.addcmul_(second, sin, value=-sense)
    turned_second.addcmul_(first, sin, value=sense)
    return out.flatten(-2).to(x.dtype)
