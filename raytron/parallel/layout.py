"""How one tensor is cut over the mesh, and where a rank's slice of it stands.

One `Layout` beside each parameter answers five questions that are usually kept apart: which slice to initialise, over
which ranks its gradient is summed, which ranks share it (so that the gradient norm counts it once), which part an
optimizer shard owns, and which part a checkpoint entry covers.

A cut is even by chunks: a dimension of n over k ranks gives each ceil(n / k), the last ones fewer, perhaps none. Where
fewer remain, the local tensor is padded to the full chunk; padding belongs to no global coordinate, so it never reaches a
checkpoint or a norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from raytron.plan.mesh import Axis

Place = Mapping[Axis, tuple[int, int]]  # of a rank: the number of ranks on an axis and its own index; absent: one rank


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


class Cut(NamedTuple):
    """A mesh axis cuts a tensor dimension.

    repeat: runs of this many neighbouring ranks hold the same slice (KV heads fewer than tp).
    """

    axis: Axis
    dim: int
    repeat: int = 1


@dataclass(frozen=True)
class Layout:
    """The cut of one parameter.

    shape: of the global tensor, without padding.
    cuts: at most one for each dimension; along a width axis (tp, of an expert's parameter etp) that does not cut it, every
        rank holds the whole tensor.
    partial: the gradient that a rank computes is a partial sum over the ranks of the width axis that hold the same slice
        (norms under sequence parallelism, repeated KV heads); otherwise those ranks compute equal gradients.
    expert: a parameter of experts: its gradient is summed over edp in place of dp · cp.
    """

    shape: tuple[int, ...]
    cuts: tuple[Cut, ...] = ()
    partial: bool = False
    expert: bool = False

    @property
    def width_axis(self) -> Axis:
        return "etp" if self.expert else "tp"

    def box(self, place: Place) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(offsets, sizes) of a rank's rectangle of the global tensor, without padding."""
        offsets, sizes = [0] * len(self.shape), list(self.shape)
        for axis, dim, repeat in self.cuts:
            ranks, index = place.get(axis, (1, 0))
            offsets[dim], sizes[dim] = chunk(self.shape[dim], max(1, ranks // repeat), index // repeat)
        return tuple(offsets), tuple(sizes)

    def local_shape(self, place: Place) -> tuple[int, ...]:
        """The shape that every rank allocates, padding included."""
        shape = list(self.shape)
        for axis, dim, repeat in self.cuts:
            shape[dim] = -(-shape[dim] // max(1, place.get(axis, (1, 0))[0] // repeat))
        return tuple(shape)

    def holders(self, place: Place) -> int:
        """How many neighbouring ranks of the width axis hold the same slice."""
        ranks = place.get(self.width_axis, (1, 0))[0]
        return next((min(ranks, cut.repeat) for cut in self.cuts if cut.axis == self.width_axis), ranks)

    def slice(self, local: torch.Tensor, place: Place) -> Slice:
        """A rank's local tensor as a Slice: a view without the padding."""
        offsets, sizes = self.box(place)
        for dim, size in enumerate(sizes):
            local = local.narrow(dim, 0, size)
        return Slice(self.shape, offsets, local)
