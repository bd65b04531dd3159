"""Lion: the sign of a momentum (Chen et al., arXiv 2302.06675). One moment; the paper's β are 0.9 and 0.99.

    c = β₁ m + (1 − β₁) g        w ← (1 − lr·λ) w − lr · sign(c)        m ← β₂ m + (1 − β₂) g

Every element moves by lr: the paper uses a third to a tenth of AdamW's rate, and as many times its weight decay.
"""

from __future__ import annotations

from torch import Tensor

from raytron.optim.optimizer import Elementwise


class Lion(Elementwise):
    """State: `lion.m.`, the momentum."""

    prefixes = ("lion.m.",)

    def update(self, master: Tensor, gradient: Tensor, moments: list[Tensor], lr: float, update: int) -> None:
        (m,) = moments
        master.add_(m.lerp(gradient, 1 - self.config.beta1).sign_(), alpha=-lr)
        m.lerp_(gradient, 1 - self.config.beta2)
