"""RMSNorm (Zhang and Sennrich, arXiv 1910.07467) and LayerNorm (Ba et al., arXiv 1607.06450)."""

from __future__ import annotations

from typing import Any

import torch
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
        if self.bias is not None:
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., D) / sqrt(mean(x²) + eps) · weight (D,); computed in float32, returned in x's type."""
    if x.device.type != "cpu":  # one kernel each way there, which keeps x and the factors, too
        return F.rms_norm(x, weight.shape, weight, eps)
    out = _RmsNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    assert isinstance(out, Tensor)
    return out


class _RmsNorm(torch.autograd.Function):
    """With n = x · r, r = 1 / sqrt(mean(x²) + eps) and g = dy · weight: dx = r · (g − n · mean(g · n)).

    On a CPU torch makes it, and its gradient, of a dozen operations, and keeps n.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        factor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, factor)
        ctx.weight = weight
        out: Tensor = (wide * factor).mul_(weight).to(x.dtype)
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, factor = ctx.saved_tensors
        normed, dy = x.float() * factor, dy.float()
        scaled = dy * ctx.weight
        common = (scaled * normed).sum(-1, keepdim=True).div_(x.shape[-1])
        dx = scaled.addcmul_(normed, common, value=-1).mul_(factor)
        dweight = normed.mul_(dy).view(-1, x.shape[-1]).sum(0)
        return dx.to(x.dtype), dweight.to(ctx.weight.dtype), None
