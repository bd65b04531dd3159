"""Gradient buckets: fp32 sums that are reduced over dp while the backward still runs, and the shards that each rank owns.

Gradients accumulate in `Bucket.sums`, in which each parameter's `main_grad` is a view. When the last contribution of the
last parameter of a bucket is in, the bucket is reduced over dp, in the background, in bucket order on every rank:

    ZeRO 0   all-reduce; every rank owns every parameter whole
    ZeRO 1   reduce-scatter after the last micro-batch; a rank owns a share of each parameter
    ZeRO 2   reduce-scatter as soon as every parameter of the bucket has a new contribution, added to the owned share;
             the sums are freed in between
    ZeRO 3   the same, a bucket being what one block holds; the weights come and go, too (`raytron.parallel.weights`).
             `data_parallel.reduce: last_microbatch` keeps the sums as ZeRO 1 does: one reduction, and more memory

(Rajbhandari et al., arXiv 1910.02054.) Here dp stands for all ranks that see other tokens: dp · cp, for parameters of
experts edp (`raytron.parallel.mesh.Reduction`). A parameter is shared out within a replica only (`mesh.replicate`), and
its shares are then summed over the replicas: hybrid sharding (Zhang et al., arXiv 2304.11277). That second step of a
bucket starts with the first step of the next one:

    bucket 0   scatter ──────► replicas ──────►
    bucket 1                   scatter ──────► replicas ──────►         all while the backward goes on

Gradients travel in fp32 or bf16 and are kept in fp32, so that contributions of micro-batches are not lost in the sum.
Under `offload` the shares live on the host, and with them the optimizer's masters and state (ZeRO-Offload, Ren et al.,
arXiv 2101.06840): a share goes there once it is reduced, while the backward goes on.

What is left after dp is summed on the owned shares, where it is smallest: partial gradients over tp (norms under sequence
parallelism, repeated KV heads) and the two copies of a tied embedding on the first and last stage.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from raytron.config import DataParallelConfig
from raytron.deal import Deal
from raytron.parallel.collectives import Wait, all_gather, all_reduce, start_all_reduce, start_reduce_scatter
from raytron.parallel.mesh import Group, Mesh, Reduction
from raytron.parallel.parameter import Param
from raytron.parallel.shares import Owned, Shares
from raytron.parallel.weights import Weights

__all__ = ["Bucket", "GradientBuckets", "Owned"]
MEBIBYTE = 1 << 20
UNDER_WAY = 2  # buckets that are reduced at the same time; each takes as much memory again as its sums
WIRE = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Bucket:
    """Some parameters of one kind and type whose gradients travel together."""

    ordered = False  # what follows dp has to be summed in a fixed order

    def __init__(self, params: Sequence[Param], over: Reduction, how: DataParallelConfig):
        self.params, self.over = list(params), over
        self.device = self.params[0].device
        owners = over.shard if how.zero >= 1 else Group((over.every.ranks[over.every.index],), 0)
        self.shares = Shares(self.params, owners.size, owners.index)
        self.sharded = owners.size > 1
        self.early = how.reduces_each and self.sharded  # reduced with each micro-batch; the sums are freed in between
        self.wire = WIRE[how.reduce_dtype]
        self.sums: Tensor | None = None
        self.share: Tensor | None = None  # (size,) fp32, where it is not the sums themselves
        if self.sharded or how.offload or self.ordered:
            self.share = _zeros(self.shares.size, torch.device("cpu") if how.offload else self.device)
        self.weights = Weights(self.shares, owners, lasting=how.zero < 3) if self.sharded else None
        if not self.early:
            self.allocate()
        self._pending: list[Wait] = []
        self._among_replicas: Wait | None = None
        self._reductions = 0
        self.observers: list[Callable[[Bucket], None]] = []  # see what is `unsummed` before it is reduced

    def begin(self, deal: Deal) -> None:
        """Before the first backward of a step, whose micro-batches are dealt so."""
        self._reductions = 0
        for param in self.params:
            param.fresh = True

    def allocate(self) -> None:
        """Makes the sums and points each parameter's `main_grad` into them."""
        self.sums = torch.empty(sum(param.numel() for param in self.params), device=self.device)
        parts = torch.split(self.sums, [param.numel() for param in self.params])
        for param, part in zip(self.params, parts, strict=True):
            param.main_grad, param.fresh = part.view(param.shape), True

    def prepare(self, param: Param) -> None:
        """A parameter has a gradient and no `main_grad` for it."""
        self.allocate()

    def contributed(self, param: Param) -> None:
        """A contribution is in the parameter's `main_grad`."""

    def own(self, number: int, mesh: Mesh, first_copy: bool) -> Owned:
        """The share of parameter `number`."""
        param, dim = self.params[number], self.shares.dims[number]
        width = mesh.place[param.cut.width_axis][1]
        counted = first_copy and width % param.cut.holders(mesh.place) == 0 and self.over.replicate.index == 0
        if not self.sharded:
            counted = counted and self.over.every.index == 0
        gradient = param.main_grad if self.share is None else self.shares.piece(self.share, number)
        assert gradient is not None
        start, length = self.shares.bounds(number, self.shares.index)
        value = None if self.weights is None else self.weights.value(number)
        return Owned(param, dim, start, length, gradient, counted, value)

    def unsummed(self) -> list[Tensor]:
        """What this rank alone has summed up and is about to send."""
        return [] if self.sums is None else [self.sums]

    @torch.no_grad()
    def reduce(self) -> None:
        """Starts summing over the data-parallel ranks what the parameters hold."""
        assert self.sums is not None
        gradients = [param.main_grad for param in self.params if param.main_grad is not None]
        for param, gradient in zip(self.params, gradients, strict=True):
            if param.fresh:
                gradient.zero_()
        for observe in self.observers:
            observe(self)
        if self.sharded:
            packed = self.shares.pack(gradients, self.wire).view(-1)
            self._pending.append(start_reduce_scatter(packed, self.over.shard))
        else:
            travelling = self.sums.to(self.wire) if self.over.every.size > 1 else self.sums
            self._pending.append(start_all_reduce(travelling, self.over.every))
        if self.early:
            self.sums = None
            for param in self.params:
                param.main_grad = None

    @torch.no_grad()
    def settle(self) -> None:
        """Waits for the reductions that were started and keeps what they bring."""
        for wait in self._pending:
            self._keep(wait())
        self._pending.clear()

    def _keep(self, summed: Tensor) -> None:
        if self.share is None:
            if summed is not self.sums and self.sums is not None:
                self.sums.copy_(summed)
        elif self._reductions == 0:
            self.share.copy_(summed, non_blocking=True)  # to the host, where the shares live there
        else:
            self.share.add_(summed.to(self.share.device))
        self._reductions += 1

    @torch.no_grad()
    def start_among_replicas(self) -> None:
        """After the last reduction: starts to sum the share over the replicas."""
        self.settle()
        if self.sharded and self.over.replicate.size > 1 and self._among_replicas is None:
            assert self.share is not None
            travelling = self.share.to(self.device, self.wire, copy=True)
            self._among_replicas = start_all_reduce(travelling, self.over.replicate)

    @torch.no_grad()
    def finish(self) -> None:
        """Waits for all of it."""
        if self._among_replicas is not None:
            assert self.share is not None
            self.share.copy_(self._among_replicas(), non_blocking=True)
            self._among_replicas = None

    @torch.no_grad()
    def publish(self, masters: Sequence[Tensor]) -> None:
        """Gives the owners' new values, one master share for each parameter, to every rank's parameters."""
        if self.weights is not None:
            self.weights.publish(masters)
            return
        for param, master in zip(self.params, masters, strict=True):
            if master.data_ptr() != param.data_ptr():
                param.copy_(master, non_blocking=True)


class GradientBuckets:
    """All buckets of the parameters that one rank holds."""

    def __init__(
        self,
        params: Sequence[Param],
        mesh: Mesh,
        how: DataParallelConfig,
        *,
        tied: tuple[Param, Group] | None = None,
        uses: Callable[[Param], int] = lambda param: 1,
        blocks: Sequence[Sequence[Param]] = (),
        make: Callable[[Sequence[Param], Reduction, DataParallelConfig], Bucket] = Bucket,
    ):
        """params: in the order of the forward pass.
        tied: a parameter that has a copy on another rank, and the group of the copies' holders, the one that counts first.
        uses: how many contributions one micro-batch brings a parameter (2 for an embedding tied on one rank).
        blocks: parameters that are used together, in the order of the forward pass: the buckets of ZeRO 3.
        """
        self.mesh, self.tied, self.uses = mesh, tied, uses
        groups = _grouped(list(reversed(params)), int(how.bucket_mb * MEBIBYTE)) if how.zero < 3 else _by_block(blocks)
        self.buckets = [make(group, mesh.experts if group[0].cut.expert else mesh.dense, how) for group in groups]
        self._bucket_of = {param: bucket for bucket in self.buckets for param in bucket.params}
        assert set(self._bucket_of) == set(params), "every parameter has a bucket"
        for param in self._bucket_of:
            param.route_gradient(self)
        self.owned = [
            bucket.own(number, mesh, first_copy=not (tied and tied[0] is param and tied[1].index > 0))
            for bucket in self.buckets
            for number, param in enumerate(bucket.params)
        ]
        self._partial = self._partial_sums()
        self._remaining: dict[Param, int] = {}
        self._next = 0
        self._under_way: deque[Bucket] = deque()

    @property
    def weights(self) -> list[Weights]:
        """Of the parameters that are shared out."""
        return [bucket.weights for bucket in self.buckets if bucket.weights is not None]

    def begin(self, microbatches: int, deal: Deal) -> None:
        """Before the first backward of a step: nothing is summed yet, each parameter awaits `microbatches` micro-batches on
        this rank, those that only keep step included. deal: the step's, over all ranks."""
        self._remaining = {param: microbatches * self.uses(param) for param in self._bucket_of}
        self._next = 0
        for bucket in self.buckets:
            bucket.begin(deal)

    def prepare(self, param: Param) -> None:
        self._bucket_of[param].prepare(param)

    def contributed(self, param: Param) -> None:
        self._remaining[param] = left = self._remaining[param] - 1
        bucket = self._bucket_of[param]
        bucket.contributed(param)
        if left == 0:
            self._reduce_complete()
        elif bucket.early:
            self._reduce_early(bucket)

    def _reduce_early(self, bucket: Bucket) -> None:
        """Before the last micro-batch: reduces a bucket in which every parameter has something new."""
        if any(param.fresh for param in bucket.params) or any(self._remaining[param] == 0 for param in bucket.params):
            return
        bucket.settle()
        self._start(bucket)

    def _start(self, bucket: Bucket) -> None:
        """Starts a reduction, and waits for the one before the last, which gives its memory back."""
        bucket.reduce()
        self._under_way.append(bucket)
        if len(self._under_way) > UNDER_WAY:
            self._under_way.popleft().settle()

    def _reduce_complete(self) -> None:
        """Starts, in order, the reduction of each bucket that awaits nothing more."""
        while self._next < len(self.buckets):
            bucket = self.buckets[self._next]
            if any(self._remaining[param] > 0 for param in bucket.params):
                return
            self._start(bucket)
            if self._next > 0 and bucket.over.replicate.size > 1:
                self.buckets[self._next - 1].start_among_replicas()
            self._next += 1

    def finish(self) -> None:
        """After the last backward: every owned gradient is the sum over dp, tp and tied copies."""
        self._under_way.clear()
        missing = [param.full_name for param, count in self._remaining.items() if count > 0]
        assert not missing, f"no gradient came for {missing}"
        for bucket in self.buckets:
            bucket.start_among_replicas()
        for bucket in self.buckets:
            bucket.finish()
        if self.mesh.device.type == "cuda" and any(owned.gradient.device.type == "cpu" for owned in self.owned):
            torch.cuda.current_stream(self.mesh.device).synchronize()  # shares on their way to the host have come
        for shares, group in self._partial:
            _sum_together(shares, group, self.mesh.device, ordered=self.buckets[0].ordered)

    def publish(self, masters: Sequence[Tensor]) -> None:
        """Gives new values, one master for each of `owned`, to every rank's parameters."""
        first = 0
        for bucket in self.buckets:
            bucket.publish(masters[first : first + len(bucket.params)])
            first += len(bucket.params)

    def _partial_sums(self) -> list[tuple[list[Tensor], Group]]:
        """What is still to be summed after dp: owned gradients, and the group over which."""
        place, out = self.mesh.place, []
        partial = [owned for owned in self.owned if owned.param.cut.partial]
        for run in sorted({owned.param.cut.holders(place) for owned in partial} - {1}):
            shares = [owned.gradient for owned in partial if owned.param.cut.holders(place) == run]
            out.append((shares, self.mesh.neighbours(run)))
        if self.tied is not None:
            param, copies = self.tied
            out.append(([owned.gradient for owned in self.owned if owned.param is param], copies))
        return out


def _sum_together(shares: Sequence[Tensor], group: Group, device: torch.device, *, ordered: bool) -> None:
    """Sums several tensors over a group in one collective, in place. ordered: from the first rank to the last, however
    long the tensors are."""
    if group.size == 1 or not shares:
        return
    flat = torch.cat([share.reshape(-1) for share in shares]).to(device)
    if ordered:
        first, *others = all_gather(flat, group).chunk(group.size)
        for other in others:
            first.add_(other)
        flat = first
    else:
        all_reduce(flat, group)
    for share, part in zip(shares, torch.split(flat, [share.numel() for share in shares]), strict=True):
        share.copy_(part.view(share.shape))


def _kind(param: Param) -> tuple[bool, torch.dtype]:
    """Parameters of one kind may share a bucket."""
    return param.cut.expert, param.dtype


def _grouped(params: Sequence[Param], limit_bytes: int) -> list[list[Param]]:
    """Neighbouring parameters of one kind in buckets of at least one parameter and about `limit_bytes` of fp32, in the
    order in which they fill up."""
    groups: list[list[Param]] = []
    open_groups: dict[tuple[bool, torch.dtype], list[Param]] = {}
    for param in params:
        group = open_groups.setdefault(_kind(param), [])
        group.append(param)
        if sum(member.numel() * 4 for member in group) >= limit_bytes:
            groups.append(open_groups.pop(_kind(param)))
    return groups + list(open_groups.values())


def _by_block(blocks: Sequence[Sequence[Param]]) -> list[list[Param]]:
    """One group for each kind of parameter in each block, last block first; a parameter of two blocks stays in the first."""
    seen: set[Param] = set()
    groups: list[list[Param]] = []
    for block in blocks:
        own: dict[tuple[bool, torch.dtype], list[Param]] = {}
        for param in block:
            if param not in seen:
                own.setdefault(_kind(param), []).append(param)
                seen.add(param)
        groups.extend(own.values())
    return groups[::-1]


def _zeros(size: int, device: torch.device) -> Tensor:
    """fp32 zeros; on the host of a CUDA machine in pinned memory, from which copies overlap with compute."""
    return torch.zeros(size, device=device, pin_memory=device.type == "cpu" and torch.cuda.is_available())
