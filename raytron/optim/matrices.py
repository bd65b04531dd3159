"""Brings the whole matrices of a group of ranks together, each on one rank, and takes them apart again.

Muon needs every matrix whole, and a rank owns a part of it: a chunk over the data parallel shard group, of a slice over tp.
The matrices of a group are shared out by cost; each rank sends its parts to the owners, and the owners send back what
became of them, one all-to-all each way:

    rank 0   A₀ B₀ C₀             A (from ranks 0, 1)   orthogonalise             A₀′ B₀′ C₀′
                        gather →                                      scatter →
    rank 1   A₁ B₁ C₁             B C                                             A₁′ B₁′ C₁′

A parameter may hold several matrices side by side: `batch_dims` names the dimensions that count them, the last dimension
is a matrix's columns, all others together are its rows.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from raytron.parallel.collectives import exchange
from raytron.parallel.mesh import Group

Offsets = tuple[int, ...]
T = TypeVar("T")


class Box(NamedTuple):
    """A rectangle of a global parameter."""

    offsets: Offsets
    sizes: Offsets

    def meet(self, other: Box) -> Box | None:
        """What both cover, or None."""
        starts = tuple(map(max, self.offsets, other.offsets))
        stops = tuple(min(a + n, b + m) for a, n, b, m in zip(*self, *other, strict=True))
        sizes = tuple(stop - start for start, stop in zip(starts, stops, strict=True))
        return Box(starts, sizes) if min(sizes) > 0 else None

    def within(self, outer: Box) -> tuple[slice, ...]:
        """Where this box stands in a tensor that holds `outer`."""
        return tuple(slice(a - b, a - b + n) for a, n, b in zip(self.offsets, self.sizes, outer.offsets, strict=True))


class Matrix(NamedTuple):
    """One matrix of a parameter, and the rank of the group that works on it."""

    name: str
    box: Box
    owner: int

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        columns = self.box.sizes[-1]
        return math.prod(self.box.sizes) // columns, columns


class _Piece(NamedTuple):
    """A part of a matrix that travels between a rank's share and the matrix's owner."""

    matrix: int  # its number
    box: Box
    source: int  # rank of the group that sends it to the owner
    holders: tuple[int, ...]  # ranks that get it back


_Route = tuple[int, _Piece]  # the rank at the other end, and what travels


def _peer(route: _Route) -> int:
    return route[0]


class Matrices:
    """The matrices of one rank's shares. All ranks of `group` make it together, and call its methods together."""

    def __init__(
        self, shares: Mapping[str, Box], batch_dims: Mapping[str, Offsets], group: Group, device: torch.device
    ):
        """shares: by parameter name, the box that this rank owns (of size 0 where it owns nothing).
        batch_dims: by parameter name, the dimensions that count its matrices."""
        self.group, self.device = group, device
        self.boxes = list(shares.items())
        self._numbers = {name: number for number, name in enumerate(shares)}
        everyone = _from_all(dict(shares), group)
        self.matrices = _share_out(_all_matrices(everyone, batch_dims), group.size)
        self.mine = [number for number, matrix in enumerate(self.matrices) if matrix.owner == group.index]
        pieces = list(_pieces(self.matrices, everyone))
        here, owners = group.index, [matrix.owner for matrix in self.matrices]
        # in the order of the peers, as an all-to-all wants it; both ends keep the pieces of a pair in one order
        self._outward = sorted(((owners[p.matrix], p) for p in pieces if p.source == here), key=_peer)
        self._inward = sorted(((p.source, p) for p in pieces if owners[p.matrix] == here), key=_peer)
        self._back = sorted(((to, p) for p in pieces if owners[p.matrix] == here for to in p.holders), key=_peer)
        self._home = sorted(((owners[p.matrix], p) for p in pieces if here in p.holders), key=_peer)

    def gather(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """One fp32 tensor for each share, of its box's sizes -> the matrices that this rank owns, (rows, columns) each."""
        sent, received = self._outward, self._inward
        values = [parts[self._numbers[self._name(piece)]][self._in_share(piece)] for _, piece in sent]
        out = {number: torch.empty(self.matrices[number].box.sizes, device=self.device) for number in self.mine}
        for (_, piece), value in zip(received, self._carry(values, sent, received), strict=True):
            out[piece.matrix][piece.box.within(self.matrices[piece.matrix].box)] = value
        return [out[number].view(self.matrices[number].shape) for number in self.mine]

    def scatter(self, matrices: Sequence[Tensor]) -> list[Tensor]:
        """The way back: the matrices that this rank owns -> a tensor for each share, of its box's sizes."""
        sent, received = self._back, self._home
        boxes = {number: self.matrices[number].box for number in self.mine}
        whole = {number: each.view(boxes[number].sizes) for number, each in zip(self.mine, matrices, strict=True)}
        values = [whole[piece.matrix][piece.box.within(boxes[piece.matrix])] for _, piece in sent]
        out = [torch.empty(box.sizes, device=self.device) for _, box in self.boxes]
        for (_, piece), value in zip(received, self._carry(values, sent, received), strict=True):
            out[self._numbers[self._name(piece)]][self._in_share(piece)] = value
        return out

    def _carry(self, values: Sequence[Tensor], sent: Sequence[_Route], received: Sequence[_Route]) -> Iterator[Tensor]:
        """Sends `values` on their routes; what arrives, in the order of `received`."""
        flat = [value.reshape(-1) for value in values] or [torch.empty(0, device=self.device)]
        arrived = exchange(torch.cat(flat), self._counts(sent), self._counts(received), self.group)
        volumes = [math.prod(piece.box.sizes) for _, piece in received]
        for (_, piece), part in zip(received, torch.split(arrived, volumes), strict=True):
            yield part.view(piece.box.sizes)

    def _counts(self, routes: Sequence[_Route]) -> list[int]:
        """Elements that travel to or from each rank of the group."""
        counts = [0] * self.group.size
        for peer, piece in routes:
            counts[peer] += math.prod(piece.box.sizes)
        return counts

    def _name(self, piece: _Piece) -> str:
        return self.matrices[piece.matrix].name

    def _in_share(self, piece: _Piece) -> tuple[slice, ...]:
        return piece.box.within(self.boxes[self._numbers[self._name(piece)]][1])


def _from_all(value: T, group: Group) -> list[T]:
    """The values of all ranks of a group, in order."""
    if group.size == 1:
        return [value]
    out: list[Any] = [None] * group.size
    dist.all_gather_object(out, value, group=group.process_group)
    return out


def _all_matrices(
    everyone: Sequence[Mapping[str, Box]], batch_dims: Mapping[str, Offsets]
) -> Iterator[tuple[str, Box]]:
    """Every matrix that the ranks of a group hold together, in an order that they agree on."""
    for name in everyone[0]:
        boxes = [boxes[name] for boxes in everyone if math.prod(boxes[name].sizes)]
        starts = [min(offsets) for offsets in zip(*(box.offsets for box in boxes), strict=True)]
        stops = [max(ends) for ends in zip(*(map(operator.add, box.offsets, box.sizes) for box in boxes), strict=True)]
        choices = [
            [(at, 1) for at in range(start, stop)] if dim in batch_dims[name] else [(start, stop - start)]
            for dim, (start, stop) in enumerate(zip(starts, stops, strict=True))
        ]
        for choice in itertools.product(*choices):
            yield name, Box(tuple(start for start, _ in choice), tuple(size for _, size in choice))


def _share_out(matrices: Iterable[tuple[str, Box]], ranks: int) -> list[Matrix]:
    """Gives each matrix to a rank, the costliest first, always to the rank that has the least to do."""
    found = [Matrix(name, box, 0) for name, box in matrices]
    costs = [math.prod(matrix.shape) * min(matrix.shape) for matrix in found]
    load = [0] * ranks
    for number in sorted(range(len(found)), key=lambda number: -costs[number]):
        owner = load.index(min(load))
        load[owner] += costs[number]
        found[number] = found[number]._replace(owner=owner)
    return found


def _pieces(matrices: Sequence[Matrix], everyone: Sequence[Mapping[str, Box]]) -> Iterator[_Piece]:
    """What each matrix is put together from. Of ranks that hold the same piece the owner, else the first, sends it."""
    for number, matrix in enumerate(matrices):
        holders: dict[Box, list[int]] = {}
        for rank, boxes in enumerate(everyone):
            common = matrix.box.meet(boxes[matrix.name])
            if common is not None:
                holders.setdefault(common, []).append(rank)
        assert sum(math.prod(box.sizes) for box in holders) == math.prod(matrix.box.sizes), matrix
        for box, ranks in holders.items():
            yield _Piece(number, box, matrix.owner if matrix.owner in ranks else ranks[0], tuple(ranks))
