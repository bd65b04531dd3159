"""Rotary position embeddings (Su et al., arXiv 2104.09864), in the half-split convention of Llama.

Channel i of the first half and of the second turn together by the angle position · theta^(−2i / head_dim).
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_table(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """positions (S,) or (S,B) -> cosines and sines, float32, each (S, 1 or B, 1, head_dim / 2)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device=positions.device).float() / head_dim
    angles = positions.float().view(len(positions), -1, 1, 1) * (1.0 / theta**exponents)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """x (S, B, H, head_dim), turned by its position; computed in float32, returned in x's type."""
    cos, sin = table
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
