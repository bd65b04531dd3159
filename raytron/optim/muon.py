"""Muon: momentum made orthogonal (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon), for hidden matrices.

    m ← lerp(m, g, 1 − μ)      u = lerp(g, m, μ) with Nesterov's look ahead, else m
    O = U Vᵀ of u = U S Vᵀ, about: Newton-Schulz, X ← a X + (b A + c A²) X with A = X Xᵀ, from X = u / ‖u‖
    w ← (1 − lr·λ) w − lr · 0.2 √max(rows, columns) · O

The last factor gives an update the root mean square of AdamW's, so that one learning rate and decay serve both (Liu et al.,
arXiv 2502.16982). Embeddings, head, norms and biases are AdamW's. Matrices that a parameter packs are orthogonalised each
for itself:

    attention.q (H, h, D)      one of (H·h, D)            mlp.up (2, F, D), gated     two of (F, D)
    attention.kv (KV, 2, h, D) two of (KV·h, D)           experts (E, ...)            each expert's

Newton-Schulz needs a matrix whole: `raytron.optim.matrices` brings it together on one rank of those that share it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from raytron.config import OptimizerConfig, PrecisionConfig
from raytron.optim.matrices import Box, Matrices
from raytron.optim.optimizer import State
from raytron.optim.precision import Moments, Rounding
from raytron.optim.share import Share
from raytron.parallel.mesh import Group, Mesh

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
SMALLEST_NORM = 1e-7
LIKE_ADAMW = 0.2
PREFIX = "muon.m."


def batch_dims(name: str, shape: Sequence[int]) -> tuple[int, ...] | None:
    """The dimensions of a parameter that count its matrices; None: it is no hidden matrix."""
    if not (name.startswith("layers.") and name.endswith(".weight")) or len(shape) < 2:
        return None
    if name.endswith(".attention.q.weight"):
        dims: tuple[int, ...] = ()
    elif name.endswith(".attention.kv.weight"):
        dims = (1,)
    else:
        dims = tuple(range(len(shape) - 2))
    rows = math.prod(size for dim, size in enumerate(shape[:-1]) if dim not in dims)
    return dims if min(rows, shape[-1]) > 1 else None


def is_matrix(share: Share) -> bool:
    """Whether Muon updates a share; if not, AdamW does."""
    return batch_dims(share.name, share.owned.param.cut.shape) is not None


def orthogonal(x: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """x (n, R, C), n matrices -> their nearest orthogonal matrices, about: singular values end in [0.7, 1.2]."""
    a, b, c = COEFFICIENTS
    tall = x.shape[1] > x.shape[2]
    y = x.to(dtype)
    y = y.mT if tall else y
    y = y / y.norm(dim=(1, 2), keepdim=True).clamp(min=SMALLEST_NORM)
    for _ in range(steps):
        gram = y @ y.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        y = torch.baddbmm(y, gram, y, beta=a)
    return (y.mT if tall else y).to(x.dtype)


class Muon:
    """State: `muon.m.`, the momentum. All ranks that share the matrices make it, and step, together."""

    def __init__(
        self,
        shares: Sequence[Share],
        config: OptimizerConfig,
        precision: PrecisionConfig,
        rounding: Rounding,
        mesh: Mesh,
        group: Group,
        *,
        alone: bool = False,
    ):
        """group: the ranks that together hold the shares' parameters whole. alone: work on one matrix after another."""
        self.shares, self.config, self.mesh, self.alone = shares, config, mesh, alone
        self.dtype = torch.bfloat16 if config.newton_schulz == "bf16" else torch.float32
        self.moments = Moments(PREFIX, shares, precision, rounding)
        boxes, dims = {}, {}
        for share in shares:
            part = share.owned.slice(share.master, mesh)
            boxes[share.name] = Box(part.offsets, tuple(part.tensor.shape))
            dims[share.name] = batch_dims(share.name, part.shape) or ()
        self.matrices = Matrices(boxes, dims, group, mesh.device)

    def step(self, lr: float, update: int) -> None:
        directions = [self._direction(index, share, update) for index, share in enumerate(self.shares)]
        updates = self.matrices.scatter(self._orthogonalise(self.matrices.gather(directions)))
        for share, each in zip(self.shares, updates, strict=True):
            share.master.mul_(1 - lr * share.lr * share.decay)
            share.owned.slice(share.master, self.mesh).tensor.add_(each.to(share.master.device), alpha=-lr * share.lr)

    def _direction(self, index: int, share: Share, update: int) -> Tensor:
        """What is to be made orthogonal of one share, without padding."""
        momentum, gradient = self.moments.read(index), share.gradient
        momentum.lerp_(gradient, 1 - self.config.momentum)
        out = gradient.lerp(momentum, self.config.momentum) if self.config.nesterov else momentum
        self.moments.write(index, momentum, update)
        return share.owned.slice(out, self.mesh).tensor.to(self.mesh.device)

    def _orthogonalise(self, matrices: Sequence[Tensor]) -> list[Tensor]:
        """Those of one shape at once, scaled to the size of AdamW's updates."""
        out = list(matrices)
        for numbers in self._alike(matrices):
            made = orthogonal(
                torch.stack([matrices[number] for number in numbers]), self.config.newton_schulz_steps, self.dtype
            )
            made *= LIKE_ADAMW * math.sqrt(max(made.shape[1:]))
            for number, matrix in zip(numbers, made, strict=True):
                out[number] = matrix
        return out

    def _alike(self, matrices: Sequence[Tensor]) -> list[list[int]]:
        """The numbers of matrices to work on together: those of one shape, or each alone where the rounding of a product
        must not depend on which others a rank owns."""
        if self.alone:
            return [[number] for number in range(len(matrices))]
        alike: dict[torch.Size, list[int]] = {}
        for number, matrix in enumerate(matrices):
            alike.setdefault(matrix.shape, []).append(number)
        return list(alike.values())

    def state(self) -> Iterator[State]:
        for share, tensor in zip(self.shares, self.moments.tensors, strict=True):
            yield State(PREFIX, share, tensor)

    def loaded(self, updates: int) -> None:
        pass
