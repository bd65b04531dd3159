"""Context parallelism: one long sequence on several ranks, whose attention still sees all of it.

A ring of R ranks (Liu et al., arXiv 2310.01889) holds a sequence in 2R chunks. Causal attention gives late queries more to
do than early ones, so a rank takes an early chunk and a late one (zigzag), and all do equally much in every step:

    R = 2    chunks 0 1 2 3      rank 0: 0 and 3      rank 1: 1 and 2

Keys and values go round the ring, a step each, while the block that came before is attended to; a rank merges what it
sees by the log-sum-exp of each query (`raytron.kernels.attention`). In backward they go round again, and their gradients
follow them one step behind, until they are home.

    step          0     1     2     3                each rank computes on the block that stands there,
    rank 0        kv0   kv3   kv2   kv1              while the next one is on its way

Blocks leap the steps in which no rank sees anything of them: with short documents or a narrow window only neighbouring
chunks meet, which lie on neighbouring ranks.

All-to-all (Ulysses; Jacobs et al., arXiv 2309.14509) cuts a ring rank's share again in A neighbouring parts, and around
attention exchanges sequence for heads, (s, H) → (A·s, H/A), and back. Both together are the hybrid (USP; Fang and Zhao,
arXiv 2405.07719): cp = R · A. Only KV heads travel; fewer than A of them are repeated for the exchange.

Shapes: s this rank's tokens (S / cp), r those of its ring position (A · s), B batch, H and KV local query and KV heads,
h head_dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from raytron.kernels.attention import add_attention, add_gradients, causal_attention
from raytron.kernels.tiles import Span, Tile, tiles
from raytron.parallel.collectives import Wait, all_to_all
from raytron.parallel.mesh import Group, Mesh

Dropout = Callable[[Tile, Tensor, Tensor], Tensor]  # a tile and the positions of all its block's queries and keys
ALONE = Group((0,), 0)


class Seen(NamedTuple):
    """What of the blocks of keys that come by the queries of a rank see."""

    steps: tuple[int, ...]  # how far round the ring a block has come, ascending from 0; the same on all ranks
    tiles: tuple[tuple[Tile, ...], ...]  # in each of these steps


def spans(length: int, ring: int, index: int) -> tuple[Span, ...]:
    """The runs of a sequence of `length` tokens that ring position `index` of `ring` holds, ascending."""
    if ring == 1:
        return (Span(0, 0, length),)
    chunk, late = length // (2 * ring), 2 * ring - 1 - index
    if late == index + 1:
        return (Span(index * chunk, 0, 2 * chunk),)
    return Span(index * chunk, 0, chunk), Span(late * chunk, chunk, chunk)


def steps(length: int, ring: int, window: int | None, starts: Sequence[Sequence[int]] | None) -> tuple[int, ...]:
    """The steps, ascending from 0, in which some rank of a ring sees something of the block that stands there."""
    found = {0}
    for begins in starts or ((0,),):
        for first, stop in pairwise((*begins, length)):
            if len(found) < ring:
                found |= _steps_of(first, stop, length // (2 * ring), ring, window)
    return tuple(sorted(found))


def _steps_of(first: int, stop: int, chunk: int, ring: int, window: int | None) -> set[int]:
    """Those in which chunks meet that have tokens of one document, at positions [first, stop)."""
    found: set[int] = set()
    for late in range(first // chunk + 1, (stop - 1) // chunk + 1):
        for early in range(late - 1, first // chunk - 1, -1):
            between = (late - early - 1) * chunk  # tokens between the chunks
            if len(found) == ring or (window is not None and between + 1 >= window):
                break
            found.add((_holder(late, ring) - _holder(early, ring)) % ring)
    return found


def _holder(chunk: int, ring: int) -> int:
    return min(chunk, 2 * ring - 1 - chunk)


class ContextParallel:
    """Where a rank stands on the ring and in its all-to-all group, and how attention runs over both."""

    def __init__(self, ring: Group = ALONE, all_to_all: Group = ALONE):
        self.ring, self.all_to_all = ring, all_to_all
        self._cached = functools.lru_cache(8)(self._seen)

    @classmethod
    def of(cls, mesh: Mesh) -> ContextParallel:
        """Of a mesh. The ring gets a process group of its own, so that its transfers wait for no others."""
        ring = mesh.axis("ring")
        if ring.size > 1:
            ring = Group(ring.ranks, ring.index, mesh.new_process_group(ring.ranks), mesh.waiting)
        return cls(ring, mesh.axis("all_to_all"))

    @property
    def size(self) -> int:
        return self.ring.size * self.all_to_all.size

    def positions(self, length: int) -> Tensor:
        """(s,) int64, on the host: the positions in a sequence of `length` tokens that this rank holds."""
        return ring_positions(length, self.ring.size, self.ring.index).chunk(self.all_to_all.size)[
            self.all_to_all.index
        ]

    def seen(self, length: int, rows: int, window: int | None, starts: Sequence[Sequence[int]] | None = None) -> Seen:
        """What this rank's queries see, in a micro-batch of `rows` sequences of `length` tokens;
        `starts`: of each sequence's documents, None for one document."""
        return self._cached(length, rows, window) if starts is None else self._seen(length, rows, window, starts)

    def _seen(self, length: int, rows: int, window: int | None, starts: Sequence[Sequence[int]] | None = None) -> Seen:
        ring = self.ring.size
        mine = spans(length, ring, self.ring.index)
        taken = steps(length, ring, window, starts)
        owners = (self.owner(step) for step in taken)
        return Seen(taken, tuple(tiles(mine, spans(length, ring, owner), rows, window, starts) for owner in owners))

    def owner(self, step: int) -> int:
        """The ring position whose keys are here in a step."""
        return (self.ring.index - step) % self.ring.size

    def attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Seen, dropout: Dropout | None = None) -> Tensor:
        """q (s,B,H,h), k and v (s,B,KV,h) -> (s,B,H,h): causal attention over the whole sequence.

        seen: of this rank, from the method of that name. dropout: gives what multiplies the probabilities of a tile, of the
        heads [i · H/A, (i+1) · H/A) where i is this rank's place in the all-to-all group.
        """
        q, k, v = _heads_for_sequence(q, k, v, self.all_to_all)
        heads_first = [x.permute(1, 2, 0, 3) for x in (q, k, v)]  # without a copy
        whole = self.ring.size == 1 and len(seen.tiles[0]) == 1 and seen.tiles[0][0].square
        if whole and dropout is None:
            mixed = causal_attention(*heads_first)
        else:
            mixed = _RingAttention.apply(*heads_first, self, seen, dropout)  # type: ignore[no-untyped-call]
        return _sequence_for_heads(mixed.permute(2, 0, 1, 3), self.all_to_all)


@functools.lru_cache(8)
def ring_positions(length: int, ring: int, index: int) -> Tensor:
    """(r,) int64: the positions that a ring position holds."""
    return torch.cat([torch.arange(span.position, span.end) for span in spans(length, ring, index)])


class _RingAttention(torch.autograd.Function):
    """q (B,H,r,h), k and v (B,KV,r,h) -> (B,H,r,h)."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, context: ContextParallel, seen: Seen, dropout: Dropout | None
    ) -> Tensor:
        total = _zeros_like(q)
        lse = torch.full(q.shape[:3], -torch.inf, device=q.device)
        block = _stacked(k, v, context)
        for step, after, part in _rounds(seen, context):
            arrives = _pass_on(block, context.ring, after - step) if after < context.ring.size else None
            add_attention(total, lse, q, block[0], block[1], part, _keep(context, step, q, dropout))
            block = block if arrives is None else arrives()
        out = total.to(q.dtype)
        ctx.context, ctx.seen, ctx.dropout = context, seen, dropout
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        context, seen = ctx.context, ctx.seen
        dq, block = _zeros_like(q), _stacked(k, v, context)
        gradients_arrive: Wait | None = None
        for step, after, part in _rounds(seen, context):
            arrives = _pass_on(block, context.ring, after - step) if after < context.ring.size else None
            own = torch.zeros((2, *k.shape), device=k.device)
            keep = _keep(context, step, q, ctx.dropout)
            add_gradients((dq, own[0], own[1]), dout, q, block[0], block[1], out, lse, part, keep)
            if gradients_arrive is not None:
                own += gradients_arrive()
            gradients_arrive = _pass_on(own, context.ring, after - step)
            block = block if arrives is None else arrives()
        assert gradients_arrive is not None
        dk, dv = gradients_arrive().to(k.dtype).unbind(0)
        return dq.to(q.dtype), dk, dv, None, None, None


def _rounds(seen: Seen, context: ContextParallel) -> Iterator[tuple[int, int, tuple[Tile, ...]]]:
    """Each step, the one after it (in the end, back home), and what is seen in it."""
    yield from zip(seen.steps, (*seen.steps[1:], context.ring.size), seen.tiles, strict=True)


def _zeros_like(q: Tensor) -> Tensor:
    """Float32 zeros (B,H,r,h) that lie in memory as (r,B,H,h)."""
    batch, heads, length, width = q.shape
    return torch.zeros(length, batch, heads, width, device=q.device).permute(1, 2, 0, 3)


def _stacked(k: Tensor, v: Tensor, context: ContextParallel) -> tuple[Tensor, Tensor] | Tensor:
    """One message of keys and values (2,B,KV,r,h); no copy where nothing is sent."""
    return torch.stack([k, v]) if context.ring.size > 1 else (k, v)


def _keep(context: ContextParallel, step: int, q: Tensor, dropout: Dropout | None) -> Callable[[Tile], Tensor] | None:
    if dropout is None:
        return None
    length, ring = q.shape[2] * context.ring.size, context.ring
    queries = ring_positions(length, ring.size, ring.index).to(q.device)
    keys = ring_positions(length, ring.size, context.owner(step)).to(q.device)
    return lambda tile: dropout(tile, queries, keys)


def _pass_on(x: Tensor | tuple[Tensor, Tensor], ring: Group, leap: int) -> Wait:
    """Starts sending `x` to the rank `leap` steps on in the ring and receiving from the one as far before; the wait gives
    what came.

    Both go in one batch, so that NCCL cannot deadlock (its transfers block each other when they are issued one by one).
    Not run on NCCL yet.
    """
    assert isinstance(x, Tensor)
    if leap % ring.size == 0:
        return lambda: x
    after, before = (ring.ranks[(ring.index + way) % ring.size] for way in (leap, -leap))
    came = torch.empty_like(x)
    group = ring.process_group
    transfers = [dist.P2POp(dist.isend, x, after, group), dist.P2POp(dist.irecv, came, before, group)]
    pending = (dist.batch_isend_irecv(transfers), x)  # what is sent stays alive until it has left

    def wait() -> Tensor:
        with ring.waiting:
            for work in pending[0]:
                work.wait()
        return came

    return wait


def _heads_for_sequence(q: Tensor, k: Tensor, v: Tensor, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """(s,B,H,h) and (s,B,KV,h) twice -> (A·s,B,H/A,h) and (A·s,B,KV/A,h) twice, in one exchange."""
    parts = group.size
    if parts == 1:
        return q, k, v
    repeat = max(1, parts // k.shape[2])
    if repeat > 1:
        k, v = k.repeat_interleave(repeat, 2), v.repeat_interleave(repeat, 2)
    cut = [x.reshape(*x.shape[:2], parts, -1, x.shape[3]) for x in (q, k, v)]  # (s,B,A,·,h)
    came = all_to_all(torch.cat(cut, 3).permute(2, 0, 1, 3, 4), group).flatten(0, 1)
    mine = torch.split(came, [x.shape[3] for x in cut], 2)
    return mine[0], mine[1], mine[2]


def _sequence_for_heads(x: Tensor, group: Group) -> Tensor:
    """(A·s,B,H/A,h) -> (s,B,H,h)."""
    if group.size == 1:
        return x
    came = all_to_all(x.reshape(group.size, -1, *x.shape[1:]), group)  # (A,s,B,H/A,h), by heads
    return came.permute(1, 2, 0, 3, 4).flatten(2, 3)
