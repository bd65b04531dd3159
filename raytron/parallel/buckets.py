"""Gradient buckets: fp32 sums that are reduced over dp while the backward still runs, and the shards that each rank owns.

Gradients accumulate in `Bucket.sums`, in which each parameter's `main_grad` is a view. When the last contribution of the
last parameter of a bucket is in, the bucket is reduced over dp, in the background, in bucket order on every rank:

    ZeRO 0   all-reduce; every rank owns every parameter whole
    ZeRO 1   reduce-scatter after the last micro-batch; a rank owns a share of each parameter
    ZeRO 2   reduce-scatter as soon as every parameter of the bucket has a new contribution, added to the owned share;
             the sums are freed in between

(Rajbhandari et al., arXiv 1910.02054.) Here dp stands for all ranks that see other tokens: dp · cp, for parameters of
experts edp (`raytron.parallel.mesh.Reduction`). A parameter is shared out within a replica only (`mesh.replicate`), and
its shares are then summed over the replicas: hybrid sharding (Zhang et al., arXiv 2304.11277).

The share of a parameter is a chunk along its widest local dimension, so an owned tensor is always one rectangle of the
global one: what a checkpoint wants. Reduce-scatter needs the chunks of one owner side by side, so `_pack` lays a bucket
out as (owners, share) just before it is sent.

What is left after dp is summed on the owned shares, where it is smallest: partial gradients over tp (norms under sequence
parallelism, repeated KV heads) and the two copies of a tied embedding on the first and last stage.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raytron.parallel.collectives import Wait, all_gather, all_reduce, start_all_reduce, start_reduce_scatter
from raytron.parallel.layout import Slice, chunk
from raytron.parallel.mesh import Group, Mesh, Reduction
from raytron.parallel.parameter import Param

MEBIBYTE = 1 << 20


@dataclass
class Owned:
    """The share of one parameter that this rank's optimizer updates."""

    param: Param
    dim: int  # along which dp cuts the local tensor
    start: int  # of the share along `dim`, in the local tensor
    length: int
    gradient: Tensor  # fp32, the share's shape; valid after `finish`
    counted: bool  # this rank is the one that counts the share in the gradient norm

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.gradient.shape)

    def view(self, local: Tensor) -> Tensor:
        """The owned share of a tensor of the parameter's local shape."""
        return local.narrow(self.dim, self.start, self.length)

    def slice(self, share: Tensor, mesh: Mesh) -> Slice:
        """A tensor of the share's shape as a Slice of the global parameter, without padding."""
        layout = self.param.cut
        offsets, sizes = layout.box(mesh.place)
        starts = [self.start if dim == self.dim else 0 for dim in range(len(sizes))]
        for dim, (size, start) in enumerate(zip(sizes, starts, strict=True)):
            share = share.narrow(dim, 0, max(0, min(share.shape[dim], size - start)))
        return Slice(layout.shape, tuple(map(operator.add, offsets, starts)), share)


class Bucket:
    """Some parameters of one kind whose gradients travel together. All offsets count fp32 elements."""

    def __init__(self, params: Sequence[Param], over: Reduction, sharded: bool):
        self.params = list(params)
        self.over = over
        self.sharded = sharded and over.shard.size > 1
        self.dims = [_widest(param.shape) for param in self.params]
        self.sums: Tensor | None = None
        self.share = torch.zeros(0)
        if self.sharded:
            self.offsets, self.share_size = _offsets(
                param.numel() // param.shape[dim] * -(-param.shape[dim] // over.shard.size)
                for param, dim in zip(self.params, self.dims, strict=True)
            )
            self.share = torch.zeros(self.share_size, device=self.params[0].device)
        self.pending: list[Wait] = []
        self.reductions = 0
        self.before_reduce: Callable[[Bucket], None] | None = None  # sees the sums of this rank alone

    def allocate(self) -> None:
        """Makes the sums, if they are not there, and points each parameter's `main_grad` into them."""
        if self.sums is not None:
            return
        offsets, size = _offsets(param.numel() for param in self.params)
        self.sums = torch.empty(size, device=self.params[0].device)
        for param, offset in zip(self.params, offsets, strict=True):
            param.main_grad = self.sums[offset : offset + param.numel()].view(param.shape)

    def own(self, index: int, mesh: Mesh, first_copy: bool) -> Owned:
        """The share of parameter number `index`."""
        param, dim = self.params[index], self.dims[index]
        width = mesh.place[param.cut.width_axis][1]
        counted = first_copy and width % param.cut.holders(mesh.place) == 0 and self.over.replicate.index == 0
        if not self.sharded:
            assert param.main_grad is not None
            counted = counted and self.over.every.index == 0
            return Owned(param, dim, 0, param.shape[dim], param.main_grad, counted)
        start, length = chunk(param.shape[dim], self.over.shard.size, self.over.shard.index)
        return Owned(param, dim, start, length, self._piece(self.share, index, length), counted)

    def _piece(self, share: Tensor, index: int, length: int) -> Tensor:
        """Parameter `index`'s part of a share, viewed in its shape."""
        param, dim, offset = self.params[index], self.dims[index], self.offsets[index]
        shape = (*param.shape[:dim], length, *param.shape[dim + 1 :])
        return share[offset : offset + math.prod(shape)].view(shape)

    def reduce(self) -> None:
        """Starts summing over the data-parallel ranks what the parameters hold."""
        assert self.sums is not None
        for param in self.params:
            if param.fresh:
                assert param.main_grad is not None
                param.main_grad.zero_()
        if self.before_reduce is not None:
            self.before_reduce(self)
        if not self.sharded:
            self.pending.append(start_all_reduce(self.sums, self.over.every))
        else:
            self.pending.append(start_reduce_scatter(self._pack(), self.over.shard))

    def settle(self) -> None:
        """Waits for the reductions that were started and adds them to the share."""
        for wait in self.pending:
            summed = wait()
            if self.sharded:
                all_reduce(summed, self.over.replicate)
                if self.reductions == 0:
                    self.share.copy_(summed)
                else:
                    self.share.add_(summed)
            self.reductions += 1
        self.pending.clear()

    def free(self) -> None:
        """Gives the memory of the sums back."""
        self.sums = None
        for param in self.params:
            param.main_grad = None

    def _pack(self) -> Tensor:
        """The sums as (owners · share): all that belongs to one owner side by side."""
        packed = torch.zeros(self.over.shard.size, self.share_size, device=self.share.device)
        for index, (param, dim) in enumerate(zip(self.params, self.dims, strict=True)):
            assert param.main_grad is not None
            for owner in range(self.over.shard.size):
                start, length = chunk(param.shape[dim], self.over.shard.size, owner)
                self._piece(packed[owner], index, length).copy_(param.main_grad.narrow(dim, start, length))
        return packed.view(-1)

    @torch.no_grad()
    def publish(self, masters: Sequence[Tensor]) -> None:
        """Writes the owners' new values, one master share for each parameter, into every rank's parameters."""
        if not self.sharded:
            for param, master in zip(self.params, masters, strict=True):
                if master.data_ptr() != param.data_ptr():
                    param.copy_(master)
            return
        mine = torch.zeros(self.share_size, dtype=self.params[0].dtype, device=self.share.device)
        for index, master in enumerate(masters):
            self._piece(mine, index, master.shape[self.dims[index]]).copy_(master)
        everyone = all_gather(mine, self.over.shard).view(self.over.shard.size, -1)
        for index, (param, dim) in enumerate(zip(self.params, self.dims, strict=True)):
            for owner in range(self.over.shard.size):
                start, length = chunk(param.shape[dim], self.over.shard.size, owner)
                param.narrow(dim, start, length).copy_(self._piece(everyone[owner], index, length))


class GradientBuckets:
    """All buckets of the parameters that one rank holds."""

    def __init__(
        self,
        params: Sequence[Param],
        mesh: Mesh,
        *,
        zero: int,
        bucket_mb: float,
        tied: tuple[Param, Group] | None = None,
        uses: Callable[[Param], int] = lambda param: 1,
    ):
        """params: in the order of the forward pass.
        tied: a parameter that has a copy on another rank, and the group of the copies' holders, the one that counts first.
        uses: how many contributions one micro-batch brings a parameter (2 for an embedding tied on one rank).
        """
        self.mesh, self.zero, self.tied, self.uses = mesh, zero, tied, uses
        ordered = list(reversed(params))
        self.buckets = [
            Bucket(group, mesh.experts if group[0].cut.expert else mesh.dense, sharded=zero >= 1)
            for group in _grouped(ordered, int(bucket_mb * MEBIBYTE))
        ]
        self._bucket_of = {param: index for index, bucket in enumerate(self.buckets) for param in bucket.params}
        for bucket in self.buckets:
            bucket.allocate()
            for param in bucket.params:
                assert param.main_grad is not None
                param.route_gradient(param.main_grad, self._contributed)
        self.owned = [
            bucket.own(index, mesh, first_copy=not (tied and tied[0] is param and tied[1].index > 0))
            for bucket in self.buckets
            for index, param in enumerate(bucket.params)
        ]
        self._partial = self._partial_sums()
        self._remaining: dict[Param, int] = {}
        self._next = 0

    def begin(self, microbatches: int) -> None:
        """Before the first backward of a step: nothing is summed yet, each parameter awaits `microbatches` micro-batches."""
        self._remaining = {param: microbatches * self.uses(param) for param in self._bucket_of}
        self._next = 0
        for bucket in self.buckets:
            bucket.reductions = 0
            bucket.allocate()
            for param in bucket.params:
                param.fresh = True

    def _contributed(self, param: Param) -> None:
        self._remaining[param] -= 1
        bucket = self.buckets[self._bucket_of[param]]
        if self.zero == 2 and bucket.sharded and self._remaining[param] > 0:
            self._reduce_early(bucket)
        self._reduce_complete()

    def _reduce_early(self, bucket: Bucket) -> None:
        """ZeRO 2, before the last micro-batch: reduces a bucket in which every parameter has something new."""
        if any(param.fresh for param in bucket.params) or any(self._remaining[param] == 0 for param in bucket.params):
            return
        bucket.settle()
        bucket.reduce()
        for param in bucket.params:
            param.fresh = True

    def _reduce_complete(self) -> None:
        """Starts, in order, the reduction of each bucket that awaits nothing more."""
        while self._next < len(self.buckets):
            bucket = self.buckets[self._next]
            if any(self._remaining[param] > 0 for param in bucket.params):
                return
            bucket.reduce()
            self._next += 1

    def finish(self) -> None:
        """After the last backward: every owned gradient is the sum over dp, tp and tied copies."""
        missing = [param.full_name for param, count in self._remaining.items() if count > 0]
        assert not missing, f"no gradient came for {missing}"
        for bucket in self.buckets:
            bucket.settle()
            if self.zero == 2 and bucket.sharded:
                bucket.free()
        for shares, group in self._partial:
            _sum_together(shares, group)

    def _partial_sums(self) -> list[tuple[list[Tensor], Group]]:
        """What is still to be summed after dp: owned gradients, and the group over which."""
        place, out = self.mesh.place, []
        partial = [owned for owned in self.owned if owned.param.cut.partial]
        for run in sorted({owned.param.cut.holders(place) for owned in partial} - {1}):
            first = self.mesh.coords.tp // run * run
            shares = [owned.gradient for owned in partial if owned.param.cut.holders(place) == run]
            out.append((shares, self.mesh.group(self.mesh.tp.ranks[first : first + run])))
        if self.tied is not None:
            param, copies = self.tied
            out.append(([owned.gradient for owned in self.owned if owned.param is param], copies))
        return out


def _sum_together(shares: Sequence[Tensor], group: Group) -> None:
    """Sums several tensors over a group in one collective, in place."""
    if group.size == 1 or not shares:
        return
    flat = torch.cat([share.reshape(-1) for share in shares])
    all_reduce(flat, group)
    for share, part in zip(shares, torch.split(flat, [share.numel() for share in shares]), strict=True):
        share.copy_(part.view(share.shape))


def _grouped(params: Sequence[Param], limit_bytes: int) -> list[list[Param]]:
    """Neighbouring parameters of one kind in buckets of at least one parameter and about `limit_bytes` of fp32, in the
    order in which they fill up."""
    groups: list[list[Param]] = []
    open_groups: dict[bool, list[Param]] = {}
    for param in params:
        group = open_groups.setdefault(param.cut.expert, [])
        group.append(param)
        if sum(member.numel() * 4 for member in group) >= limit_bytes:
            groups.append(open_groups.pop(param.cut.expert))
    return groups + list(open_groups.values())


def _widest(shape: Sequence[int]) -> int:
    return max(range(len(shape)), key=lambda dim: (shape[dim], -dim))


def _offsets(sizes: Iterable[int]) -> tuple[list[int], int]:
    """Where pieces of these sizes start when laid end to end, and the size of it all."""
    offsets, total = [], 0
    for size in sizes:
        offsets.append(total)
        total += size
    return offsets, total
