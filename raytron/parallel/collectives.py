"""Collectives over a `Group`, plain and differentiable. A group of one costs nothing.

A row-parallel region ends in a sum over the group. Sequence parallelism (Korthikanti et al., arXiv 2205.05198) leaves each
rank its share of that sum along the sequence, which is dimension 0 here:

    function               forward          backward
    reduce_from_group      all-reduce       identity
    scatter_sequence       reduce-scatter   all-gather
    all_to_all             all-to-all       all-to-all

The linear layers of `raytron.parallel.tensor` do their own communication, so that it overlaps with their GEMMs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from raytron.parallel.mesh import Group

Wait = Callable[[], Tensor]

# torch 2.13 renamed both and warns at the old names.
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def all_reduce(x: Tensor, group: Group, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """Sums `x` over the group, in place; returns it."""
    if group.size > 1:
        with group.waiting:
            dist.all_reduce(x, op=op, group=group.process_group)
    return x


def start_all_reduce(x: Tensor, group: Group) -> Wait:
    """Starts summing `x` over the group in place; the result is there when the returned function is called."""
    if group.size == 1:
        return lambda: x
    work = dist.all_reduce(x, group=group.process_group, async_op=True)
    return _after(work, x, group)


def start_all_gather(x: Tensor, group: Group) -> Wait:
    """Starts gathering `x` (n, ...) from all ranks into (size · n, ...), in rank order."""
    if group.size == 1:
        return lambda: x
    out = x.new_empty((x.shape[0] * group.size, *x.shape[1:]))
    work = _all_gather(out, x.contiguous(), group=group.process_group, async_op=True)
    return _after(work, out, group)


def start_reduce_scatter(x: Tensor, group: Group) -> Wait:
    """Starts summing `x` (size · n, ...) over the group; each rank gets its own (n, ...) of the sum."""
    if group.size == 1:
        return lambda: x
    out = x.new_empty((x.shape[0] // group.size, *x.shape[1:]))
    work = _reduce_scatter(out, x.contiguous(), group=group.process_group, async_op=True)
    return _after(work, out, group)


def start_exchange(x: Tensor, sent: Sequence[int], received: Sequence[int], group: Group) -> Wait:
    """Starts an all-to-all of pieces of any sizes, side by side in rank order: `sent[r]` rows of x (n, ...) go to rank r of
    the group, and `received[r]` come from it."""
    if group.size == 1:
        return lambda: x
    out = x.new_empty((sum(received), *x.shape[1:]))
    source = x.contiguous()
    work = dist.all_to_all_single(out, source, list(received), list(sent), group=group.process_group, async_op=True)
    return _after(work, out, group)


def all_gather(x: Tensor, group: Group) -> Tensor:
    return start_all_gather(x, group)()


def reduce_scatter(x: Tensor, group: Group) -> Tensor:
    return start_reduce_scatter(x, group)()


def exchange(x: Tensor, sent: Sequence[int], received: Sequence[int], group: Group) -> Tensor:
    return start_exchange(x, sent, received, group)()


def _all_to_all(x: Tensor, group: Group) -> Tensor:
    """x (size, ...), part i for rank i -> (size, ...), part i from rank i."""
    if group.size == 1:
        return x
    x = x.contiguous()
    out = torch.empty_like(x)
    with group.waiting:
        dist.all_to_all_single(out, x, group=group.process_group)
    return out


def _after(work: Any, out: Tensor, group: Group) -> Wait:
    def wait() -> Tensor:
        with group.waiting:
            work.wait()
        return out

    return wait


class _ReduceFromGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return all_reduce(x.clone(memory_format=torch.contiguous_format), group)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy, None


class _ScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return reduce_scatter(x, group)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return all_gather(dy, ctx.group), None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _all_to_all(x, group)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return _all_to_all(dy, ctx.group), None


def reduce_from_group(x: Tensor, group: Group) -> Tensor:
    return x if group.size == 1 else _apply(_ReduceFromGroup, x, group)


def scatter_sequence(x: Tensor, group: Group) -> Tensor:
    """x (S, ...), partial sums -> this rank's (S / size, ...) of their sum."""
    return x if group.size == 1 else _apply(_ScatterSequence, x, group)


def all_to_all(x: Tensor, group: Group) -> Tensor:
    """x (size, ...), part i for rank i -> (size, ...), part i from rank i."""
    return x if group.size == 1 else _apply(_AllToAll, x, group)


def _apply(function: type[torch.autograd.Function], x: Tensor, group: Group) -> Tensor:
    out = function.apply(x, group)  # type: ignore[no-untyped-call]
    assert isinstance(out, Tensor)
    return out
