"""How one tensor is cut over the mesh, and where a rank's slice of it stands.

One `Layout` beside each parameter answers five questions that are usually kept apart: which slice to initialise, over
which ranks its gradient is summed, which ranks share it (so that the gradient norm counts it once), which part an
optimizer shard owns, and which part a checkpoint entry covers.

A cut is even by chunks: a dimension of n over k ranks gives each ceil(n / k), the last ones fewer, perhaps none. Where
fewer remain, the local tensor is padded to the full chunk; padding belongs to no global coordinate, so it never reaches a
checkpoint or a norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


class Slice(NamedTuple):
    """A tensor that holds one rectangle of a global tensor.

    `tensor` has exactly the rectangle's sizes (no padding); it is usually a view of live storage, so that reading into it
    changes the model. Slices of one name on different ranks may be equal (replicas); together they cover `shape`.
    """

    shape: tuple[int, ...]  # of the global tensor
    offsets: tuple[int, ...]  # of the rectangle in it
    tensor: torch.Tensor


def chunk(size: int, parts: int, part: int) -> tuple[int, int]:
    """(start, length) of chunk `part` of `parts`, each of ceil(size / parts), the last ones shorter or empty."""
    width = -(-size // parts)
    start = min(part * width, size)
    return start, min(width, size - start)


@dataclass(frozen=True)
class Layout:
    """The cut of one parameter over tp.

    shape: of the global tensor, without padding.
    dim: the dimension that tp cuts; None: every tp rank holds the whole tensor.
    repeat: runs of this many neighbouring tp ranks hold the same slice (KV heads fewer than tp).
    partial: the gradient that a rank computes is a partial sum over the tp ranks that hold the same slice (norms under
        sequence parallelism, repeated KV heads); otherwise those ranks compute equal gradients.
    """

    shape: tuple[int, ...]
    dim: int | None = None
    repeat: int = 1
    partial: bool = False

    def cut(self, tp: int, tp_rank: int) -> tuple[int, int]:
        """(start, length) of a rank's slice along `dim`, in global coordinates."""
        assert self.dim is not None
        return chunk(self.shape[self.dim], tp // self.repeat, tp_rank // self.repeat)

    def local_shape(self, tp: int) -> tuple[int, ...]:
        """The shape that every tp rank allocates, padding included."""
        if self.dim is None:
            return self.shape
        width = -(-self.shape[self.dim] // (tp // self.repeat))
        return (*self.shape[: self.dim], width, *self.shape[self.dim + 1 :])

    def holders(self, tp: int) -> int:
        """How many neighbouring tp ranks hold the same slice."""
        return tp if self.dim is None else self.repeat

    def slice(self, local: torch.Tensor, tp: int, tp_rank: int) -> Slice:
        """A rank's local tensor as a Slice: a view without the padding."""
        if self.dim is None:
            return Slice(self.shape, (0,) * len(self.shape), local)
        start, length = self.cut(tp, tp_rank)
        offsets = tuple(start if d == self.dim else 0 for d in range(len(self.shape)))
        return Slice(self.shape, offsets, local.narrow(self.dim, 0, length))
