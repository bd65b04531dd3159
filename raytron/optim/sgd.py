"""Stochastic gradient descent with momentum (Sutskever et al., ICML 2013), its decay decoupled as with every optimizer.

m ← μ m + g        w ← (1 − lr·λ) w − lr · (g + μ m with Nesterov's look ahead, else m)
"""

from __future__ import annotations

from torch import Tensor

from raytron.optim.optimizer import Elementwise


class SGD(Elementwise):
    """State: `sgd.m.`, the momentum."""

    prefixes = ("sgd.m.",)

    def update(self, master: Tensor, gradient: Tensor, moments: list[Tensor], lr: float, update: int) -> None:
        (m,) = moments
        m.mul_(self.config.momentum).add_(gradient)
        master.add_(gradient.add(m, alpha=self.config.momentum) if self.config.nesterov else m, alpha=-lr)
