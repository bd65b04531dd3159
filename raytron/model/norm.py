"""RMSNorm (Zhang and Sennrich, arXiv 1910.07467) and LayerNorm (Ba et al., arXiv 1607.06450)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from raytron.config import NormName
from raytron.model.build import Builder


class Norm(nn.Module):
    """Normalises the last dimension, of size `width`; LayerNorm also shifts by a bias."""

    def __init__(self, build: Builder, name: str, width: int, kind: NormName, eps: float, *, partial: bool):
        super().__init__()
        self.eps = eps
        self.weight = build.constant(f"{name}.weight", (width,), 1.0, partial=partial)
        self.bias = build.constant(f"{name}.bias", (width,), 0.0, partial=partial) if kind == "layernorm" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
