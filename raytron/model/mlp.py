"""The feed-forward layer, gated (Shazeer, arXiv 2002.05202) or plain; its width F is cut over tp.

plain   x (s,B,D) → up (S,B,F_l) → act → down (s,B,D)
gated   x (s,B,D) → gate and up, one GEMM (S,B,2,F_l) → act(gate) · up → down (s,B,D)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raytron.config import ModelConfig
from raytron.model.build import Builder
from raytron.model.context import Context
from raytron.parallel.tensor import column_linear, row_linear

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "reglu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: torch.square(F.relu(x)),
}


class FeedForward(nn.Module):
    """One feed-forward layer of one rank."""

    def __init__(self, build: Builder, name: str, model: ModelConfig, width: int | None = None):
        """width: F, if not the model's."""
        super().__init__()
        width = model.ffn if width is None else width
        self.parallel = build.parallel
        self.activate = functools.partial(activate, ACTIVATIONS[model.activation], model.gated)
        wide = (2, width) if model.gated else (width,)
        dim = len(wide) - 1
        self.up = build.normal(f"{name}.up.weight", (*wide, model.hidden), model.init_std, dim=dim)
        self.down = build.normal(
            f"{name}.down.weight", (model.hidden, width), model.init_std / math.sqrt(2 * model.layers), dim=1
        )
        self.up_bias = self.down_bias = None
        if model.bias:
            partial = self.parallel.sequence_parallel
            self.up_bias = build.constant(f"{name}.up.bias", wide, 0.0, dim=dim)
            self.down_bias = build.constant(f"{name}.down.bias", (model.hidden,), 0.0, partial=partial)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x (s,B,D) -> (s,B,D)."""
        (wide,) = column_linear(x, self.parallel, (self.up, self.up_bias))
        wide = context.keep.region("activation", self.activate, wide)
        return row_linear(wide, self.down, self.down_bias, self.parallel)


def activate(activation: Callable[[Tensor], Tensor], gated: bool, wide: Tensor) -> Tensor:
    """(..., 2·F_l), or (..., F_l) where it is not gated, -> (..., F_l)."""
    if not gated:
        return activation(wide)
    if activation is F.silu:
        out: Tensor = _SwiGlu.apply(wide)  # type: ignore[no-untyped-call]
        return out
    gate, up = wide.chunk(2, dim=-1)
    return activation(gate) * up


class _SwiGlu(torch.autograd.Function):
    """silu(gate) · up, whose gradient is written where it belongs; autograd would join its two halves by a copy."""

    @staticmethod
    def forward(ctx: Any, wide: Tensor) -> Tensor:
        gate, up = wide.chunk(2, dim=-1)
        active = F.silu(gate)
        ctx.save_for_backward(wide, active)
        return active * up

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        wide, active = ctx.saved_tensors
        gate, up = wide.chunk(2, dim=-1)
        dwide = torch.empty_like(wide)
        dgate, dup = dwide.chunk(2, dim=-1)
        torch.mul(dy, active, out=dup)
        torch.ops.aten.silu_backward.grad_input(dy * up, gate, grad_input=dgate)
        return dwide
