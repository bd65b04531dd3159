"""AdamW (Loshchilov and Hutter, arXiv 1711.05101): Adam with the weight decay decoupled from the gradient.

    m ← β₁ m + (1 − β₁) g      v ← β₂ v + (1 − β₂) g²
    w ← (1 − lr·λ) w − lr · (m / (1 − β₁ᵗ)) / (√(v / (1 − β₂ᵗ)) + ε)

With fp32 moments the arithmetic is torch's own fused kernel, run on the owned shares. With bf16 moments it is written out
here: moments are read into fp32, changed, and rounded back. (A bf16 v moves by less than its last bit where 1 − β₂ is below
2⁻⁹: use stochastic rounding there.) It is written out under `determinism: canonical`, too: the fused kernel rounds the last
few elements of a tensor otherwise than those before, so that an update would depend on how a parameter is shared out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from raytron.config import OptimizerConfig
from raytron.optim.optimizer import Elementwise, State
from raytron.optim.share import Share

PREFIXES = {"exp_avg": "adam.m.", "exp_avg_sq": "adam.v."}  # torch's name: prefix in a checkpoint


class FusedAdamW:
    """torch's fused AdamW on the shares' masters; state: `adam.m.`, `adam.v.`, fp32."""

    def __init__(self, shares: Sequence[Share], config: OptimizerConfig):
        self.shares = shares
        factors = sorted({(share.lr, share.decay) for share in shares}, reverse=True)
        groups = [
            {
                "params": [share.master for share in shares if (share.lr, share.decay) == (lr, decay)],
                "weight_decay": decay,
                "factor": lr,
            }
            for lr, decay in factors
        ]
        self.adamw = torch.optim.AdamW(groups, lr=0.0, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)

    def step(self, lr: float, update: int) -> None:
        for share in self.shares:
            share.master.grad = share.gradient
        for group in self.adamw.param_groups:
            group["lr"] = lr * group["factor"]
        self.adamw.step()
        for share in self.shares:
            share.master.grad = None

    def state(self) -> Iterator[State]:
        for share in self.shares:
            moments = self._moments(share.master)
            for name, prefix in PREFIXES.items():
                yield State(prefix, share, moments[name])

    def loaded(self, updates: int) -> None:
        for share in self.shares:
            self._moments(share.master)["step"].fill_(float(updates))

    def _moments(self, master: Tensor) -> dict[str, Tensor]:
        """torch's state of one master, made here where no update has been done yet."""
        state: dict[str, Tensor] = self.adamw.state[master]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
            for name in PREFIXES:
                state[name] = torch.zeros_like(master, memory_format=torch.preserve_format)
        return state


class AdamW(Elementwise):
    """The same written out, for moments in any type."""

    prefixes = tuple(PREFIXES.values())

    def update(self, master: Tensor, gradient: Tensor, moments: list[Tensor], lr: float, update: int) -> None:
        m, v = moments
        beta1, beta2 = self.config.beta1, self.config.beta2
        m.lerp_(gradient, 1 - beta1)
        v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = v.sqrt().div_(math.sqrt(1 - beta2**update)).add_(self.config.eps)
        master.addcdiv_(m, root, value=-lr / (1 - beta1**update))
