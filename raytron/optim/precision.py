"""Numbers of less than 32 bits: stochastic rounding, moments in bf16, and the loss scale of fp16.

Stochastic rounding (Gupta et al., arXiv 1502.02551) goes up or down to the neighbour of 8 significant bits with odds by
nearness, so that the mean of what is written is what was meant, and a change of less than half a step is not lost:

    fp32     s eeeeeeee mmmmmmm|mmmmmmmmmmmmmmmm      bf16 is the upper half of the bits:
    + random                   |rrrrrrrrrrrrrrrr      add 16 random bits to the lower half, then cut it off

The random bits are keyed by (seed, tensor, update) and the global element number (`raytron.parallel.random`): every mesh
rounds an element the same way.

fp16 has 5 bits of exponent: small gradients vanish. So the loss is multiplied by a scale, halved whenever a gradient
overflows (that step is skipped) and doubled after many steps without one (Micikevicius et al., arXiv 1710.03740).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raytron.config import PrecisionConfig
from raytron.optim.share import Share
from raytron.parallel.random import element_numbers, key_of, random_bits

LOW_BITS = 0xFFFF  # of fp32, that bf16 does not have
BLOCK = 1 << 22  # elements rounded at a time: their numbers take 8 bytes each


def round_stochastically(x: Tensor, index: Tensor, key: int) -> Tensor:
    """x (fp32) as bf16, rounded up or down by chance; index: int64 of x's shape, equal numbers round alike."""
    noise = random_bits(key, index).bitwise_and_(LOW_BITS).to(torch.int32)
    raised = (x.view(torch.int32) + noise).bitwise_and_(~LOW_BITS).view(torch.float32)
    return torch.where(torch.isfinite(x), raised, x).to(torch.bfloat16)


class Rounding:
    """How fp32 values become those of another type."""

    def __init__(self, precision: PrecisionConfig, seed: int):
        self.stochastic, self.seed = precision.stochastic_rounding, seed

    def cast(self, x: Tensor, dtype: torch.dtype, share: Share, what: str, update: int) -> Tensor:
        """x (fp32, the share's shape) as `dtype`. what: tells the tensors of one share apart; update: their age."""
        if dtype != torch.bfloat16 or not self.stochastic:
            return x.to(dtype)
        key = key_of(self.seed, "round", what, share.name, update)
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
        rows = max(1, BLOCK // max(1, x[:1].numel()))
        for first in range(0, x.shape[0], rows):
            part = x[first : first + rows]
            offsets = (share.offsets[0] + first, *share.offsets[1:])
            index = element_numbers(share.owned.param.cut.shape, offsets, part.shape, x.device)
            out[first : first + rows] = round_stochastically(part.contiguous(), index, key)
        return out


class Moments:
    """One running average of each of some shares, in fp32 or bf16, written at each update."""

    def __init__(self, prefix: str, shares: Sequence[Share], precision: PrecisionConfig, rounding: Rounding):
        dtype = torch.bfloat16 if precision.moments == "bf16" else torch.float32
        self.prefix, self.shares, self.rounding = prefix, shares, rounding
        self.tensors = [torch.zeros_like(share.master, dtype=dtype) for share in shares]

    def read(self, index: int) -> Tensor:
        """fp32; the stored tensor itself where it is fp32."""
        return self.tensors[index].float()

    def write(self, index: int, value: Tensor, update: int) -> None:
        """Stores what was read and changed."""
        stored = self.tensors[index]
        if stored is not value:
            stored.copy_(self.rounding.cast(value, stored.dtype, self.shares[index], self.prefix, update))


class LossScale:
    """The factor on the loss: 1 but for fp16. Equal on all ranks, since all see the same norm."""

    SMALLEST = 2.0**-14

    def __init__(self, precision: PrecisionConfig):
        self.dynamic, self.window = precision.dtype == "fp16", precision.loss_scale_window
        self.value = precision.loss_scale if self.dynamic else 1.0
        self.good_steps = 0  # since the last change

    def update(self, finite: bool) -> None:
        """After each step: whether its gradient was finite."""
        if not self.dynamic:
            return
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.value = max(self.value / 2, self.SMALLEST)
        elif self.good_steps == self.window:
            self.value, self.good_steps = self.value * 2, 0

    def facts(self) -> dict[str, float]:
        """What a checkpoint keeps of it."""
        return {"value": self.value, "good_steps": self.good_steps} if self.dynamic else {}

    def restore(self, facts: dict[str, float]) -> None:
        if self.dynamic and facts:
            self.value, self.good_steps = float(facts["value"]), int(facts["good_steps"])
