"""`determinism: canonical`: gradients that are equal to the bit for every number of data-parallel ranks.

A step has M micro-batches, wherever they run; a rank of dp has some that follow each other (`raytron.deal`). Each
contribution is computed alone, by the same operations on the same numbers, and so is the same on every rank. Only their sum
could differ: here it is bracketed by one binary tree over the numbers of the micro-batches (`raytron.parallel.tree`).

    backward     each contribution becomes a leaf, the tree merges what it can
    reduce       an owner gets from every rank its share of that rank's nodes: one all-to-all for each bucket
    settle       the owner merges them to the root by the tree, for each cp rank alone, then adds those in rank order

A rank with m of them holds up to log₂ m + 1 partial sums of its parameters where they otherwise have one, up to 2 · log₂ M
where its numbers are no node of the tree, and while a bucket travels as much again. There is no early reduction: ZeRO 2 and
3 keep sums to the end of the step. Elementwise updates and weights that are copied bit by bit do the rest; the gradient norm
is summed exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from raytron.config import DataParallelConfig
from raytron.deal import Deal
from raytron.parallel.buckets import Bucket
from raytron.parallel.collectives import all_reduce, start_exchange
from raytron.parallel.mesh import Mesh, Reduction
from raytron.parallel.parameter import Param
from raytron.parallel.tensor import Deferred
from raytron.parallel.tree import Node, TreeSum, from_digits, largest, nodes_of, square_digits


class CanonicalBucket(Bucket):
    """A bucket that sums by the tree. `work` says which micro-batch a contribution is of."""

    ordered = True

    def __init__(
        self,
        params: Sequence[Param],
        over: Reduction,
        how: DataParallelConfig,
        *,
        mesh: Mesh,
        work: Deferred,
        uses: Callable[[Param], int],
    ):
        super().__init__(params, over, how)
        self.early = False
        self.work, self.dp, self.uses = work, mesh.shape.dp, uses
        self.cp = over.every.size // self.dp  # of the parameters of experts cp · tp
        self.deal = Deal(0, self.dp)
        self.trees: dict[Param, TreeSum] = {}
        self.halves: dict[tuple[Param, int], Tensor] = {}  # first contributions of parameters that get two

    def allocate(self) -> None:
        """Nothing: contributions share no memory."""

    def begin(self, deal: Deal) -> None:
        super().begin(deal)
        self.deal = deal
        self.trees = {param: TreeSum(deal.total) for param in self.params}

    def prepare(self, param: Param) -> None:
        param.main_grad, param.fresh = torch.empty(param.shape, device=param.device), True

    def contributed(self, param: Param) -> None:
        value, param.main_grad = param.main_grad, None
        assert value is not None
        terms = self._terms(self.over.every.index)
        if self.work.microbatch >= len(terms):  # only keeps step
            return
        term = terms[self.work.microbatch]
        if self.uses(param) == 2:  # a + b = b + a: it does not matter which comes first
            other = self.halves.pop((param, term), None)
            if other is None:
                self.halves[param, term] = value
                return
            value.add_(other)
        self.trees[param].add(Node(0, term), value)

    def _terms(self, position: int) -> range:
        """The numbers of the micro-batches of a rank, given its position among all that reduce this bucket."""
        return self.deal.of(position // self.cp)

    def _nodes(self, position: int) -> list[Node]:
        return nodes_of(self._terms(position), self.deal.total)

    def unsummed(self) -> list[Tensor]:
        return [value for param in self.params for value in self.trees[param].held.values()]

    @torch.no_grad()
    def reduce(self) -> None:
        every, size = self.over.every, self.shares.size
        for observe in self.observers:
            observe(self)
        nodes = self._nodes(every.index)
        packed = [
            self.shares.pack([self.trees[param].held[node] for param in self.params], torch.float32) for node in nodes
        ]
        self.trees.clear()
        stacked = torch.stack(packed, dim=1)  # (owners, nodes, size)
        owner_of = [position % self.shares.owners for position in range(every.size)]
        travelling = stacked.view(-1) if len(owner_of) == self.shares.owners else stacked[owner_of].view(-1)
        received = [len(self._nodes(position)) * size for position in range(every.size)]
        self._pending.append(start_exchange(travelling, [len(nodes) * size] * every.size, received, every))

    def _keep(self, summed: Tensor) -> None:
        """summed: the nodes of all ranks, one rank after another."""
        assert self.share is not None
        roots = [TreeSum(self.deal.total) for _ in range(self.cp)]
        parts = iter(summed.view(-1, self.shares.size))
        for group in range(self.dp):
            for root in roots:  # of ranks that hold other parts of the same sequences
                for node in self._nodes(group * self.cp):
                    root.add(node, next(parts))
        for root in roots[1:]:
            roots[0].total.add_(root.total)
        self.share.copy_(roots[0].total, non_blocking=True)

    def start_among_replicas(self) -> None:
        """Replicas took part in the exchange already."""
        self.settle()


def exact_squared_norms(counted: Mapping[str, Sequence[Tensor]], mesh: Mesh) -> dict[str, float]:
    """Squared norms of groups of gradients, equal to the bit however they are cut. Collective over the world; not finite
    where a gradient is not.

    counted: what this rank counts, under the same names on all ranks.
    """
    tops = torch.stack([_largest_or_infinite(tensors, mesh.device) for tensors in counted.values()])
    largest_of_all: list[float] = all_reduce(tops, mesh.world, dist.ReduceOp.MAX).tolist()
    if not all(map(math.isfinite, largest_of_all)):
        return dict(zip(counted, largest_of_all, strict=True))
    digits = torch.stack(
        [
            square_digits(tensors, top, mesh.device)
            for tensors, top in zip(counted.values(), largest_of_all, strict=True)
        ]
    )
    rows: list[list[float]] = all_reduce(digits, mesh.world).tolist()
    return {name: from_digits(row, top) for name, row, top in zip(counted, rows, largest_of_all, strict=True)}


def _largest_or_infinite(shares: Sequence[Tensor], device: torch.device) -> Tensor:
    """The largest magnitude; infinite for one that is not a number, which a maximum over ranks may lose."""
    return largest(shares, device).nan_to_num(nan=math.inf, posinf=math.inf)


def in_order(values: Mapping[int, float], deal: Deal, mesh: Mesh) -> float:
    """The sum of one value for each micro-batch of a step in the order of their numbers, equal on every rank. Collective
    over the world. values: of this rank's own micro-batches, from 0 on, on the one rank that speaks for them; those beyond
    its deal only keep step."""
    slots = torch.zeros(deal.total, mesh.shape.cp, dtype=torch.float64, device=mesh.device)
    for number, term in enumerate(deal.of(mesh.coords.dp)):
        slots[term, mesh.coords.cp] = values.get(number, 0.0)
    all_reduce(slots, mesh.world)  # the others add zeros, which is exact
    total: float = sum(slots.view(-1).tolist())
    return total
