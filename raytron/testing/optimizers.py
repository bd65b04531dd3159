"""The optimizers on one device, written as their papers have them, for the single-device truth (`raytron.testing.twin`).

They share no code with the product; weights are whole tensors by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from raytron.config import ModelConfig, RunConfig


class PlainOptimizer:
    """AdamW, Lion, SGD, or Muon with AdamW beside it, over named whole weights whose gradients are in `.grad`."""

    def __init__(self, config: RunConfig, weights: Mapping[str, Tensor]):
        self.config, self.weights = config.optimizer, weights
        self.model: ModelConfig = config.model
        self.state: dict[str, list[Tensor]] = {n: [torch.zeros_like(w) for _ in "mv"] for n, w in weights.items()}
        self.count = 0

    def frozen(self, name: str) -> bool:
        return any(freeze for _, _, freeze in self._group(name))

    @torch.no_grad()
    def step(self, lr: float) -> None:
        self.count += 1
        for name, weight in self.weights.items():
            if self.frozen(name):
                continue
            factor, decay = 1.0, self.config.weight_decay if self._decays(name) else 0.0
            for factor, changed, _ in self._group(name):  # noqa: B007
                decay = decay if changed is None else changed
            assert weight.grad is not None
            weight *= 1 - lr * factor * decay
            weight -= lr * factor * self._move(name, weight.grad)

    def _group(self, name: str) -> list[tuple[float, float | None, bool]]:
        """The factors of the first group that matches, if there is one."""
        found = [group for group in self.config.groups if fnmatchcase(name, group.match)]
        return [(group.lr, group.weight_decay, group.freeze) for group in found[:1]]

    def _decays(self, name: str) -> bool:
        norm = name.endswith("norm.weight")
        table = name in ("embed.weight", "position.weight")
        return self.config.decay_all or not (name.endswith(".bias") or norm or table)

    def _move(self, name: str, g: Tensor) -> Tensor:
        """What is subtracted, for a learning rate of 1."""
        c, (m, v) = self.config, self.state[name]
        if c.name == "lion":
            move = torch.sign(c.beta1 * m + (1 - c.beta1) * g)
            m.copy_(c.beta2 * m + (1 - c.beta2) * g)
            return move
        if c.name == "sgd":
            m.copy_(c.momentum * m + g)
            return g + c.momentum * m if c.nesterov else m
        if c.name == "muon" and self._hidden(name):
            m.copy_(c.momentum * m + (1 - c.momentum) * g)
            u = c.momentum * m + (1 - c.momentum) * g if c.nesterov else m
            move = torch.zeros_like(g)
            for each, whole in zip(self._matrices(name, move), self._matrices(name, u), strict=True):
                flat = whole.reshape(-1, whole.shape[-1])
                each.copy_(self._orthogonal(flat).reshape(whole.shape) * 0.2 * math.sqrt(max(flat.shape)))
            return move
        m.copy_(c.beta1 * m + (1 - c.beta1) * g)
        v.copy_(c.beta2 * v + (1 - c.beta2) * g * g)
        return (m / (1 - c.beta1**self.count)) / ((v / (1 - c.beta2**self.count)).sqrt() + c.eps)

    def _hidden(self, name: str) -> bool:
        """A matrix between the embedding and the head."""
        matrix = self.weights[name].dim() > 1 and self.weights[name].shape[0] > 1
        return matrix and name.startswith("layers.") and name.endswith(".weight")

    def _matrices(self, name: str, whole: Tensor) -> Iterator[Tensor]:
        """Views of the matrices that a weight packs; a matrix's columns are its last dimension."""
        if ".attention.kv." in name:  # (KV, 2, h, D): keys and values
            yield from whole.unbind(1)
        elif ".attention." in name or whole.dim() == 2:
            yield whole
        else:  # experts, gate and up
            yield from whole.flatten(0, -3)

    def _orthogonal(self, g: Tensor) -> Tensor:
        """Newton-Schulz for one matrix."""
        x: Tensor = g.t() if g.shape[0] > g.shape[1] else g
        x = x / max(1e-7, x.norm().item())
        for _ in range(self.config.newton_schulz_steps):
            a = x @ x.t()
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        return x.t() if g.shape[0] > g.shape[1] else x
