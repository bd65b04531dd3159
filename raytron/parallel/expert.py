"""Expert parallelism: tokens travel to the ranks that hold their experts, and back.

After GShard (Lepikhin et al., arXiv 2006.16668). The ranks of one pp plane are folded as edp · ep · etp
(`raytron.plan.mesh`): ep ranks share out the experts of a layer, etp ranks cut each expert's width. Every rank of the plane
starts with tokens of its own. Shapes:

    T tokens of this rank   k experts of a token   E experts, E_l of them on this rank   D hidden   F_l local expert width
    P pairs (token, one of its experts) that this rank sends   R rows that it computes, sorted by its own experts

    all_to_all   x (T,D) ─spread→ (P,D) ─all-to-all over ep, gather over etp→ (R,D) ─experts→ (R,D)
                 ─reduce-scatter over etp, all-to-all→ (P,D) ─combine→ (T,D)
    all_gather   x (T,D) ─gather over ep · etp→ (G·T,D) ─spread→ (R,D) ─experts→ (R,D)
                 ─combine→ (G·T,D) ─reduce-scatter→ (T,D)

The first sends each pair once, to one rank; the second sends every token to every rank, in one collective of even pieces,
and is the better one where a token has about as many experts as there are ranks. A token's k results are summed in the
order of its choices, in fp32, whatever the mesh. The way there is under way between `Dispatch.start` and `Dispatch.rows`,
so that whatever is computed in between (a shared expert) overlaps with it, and likewise in the backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from raytron.config import MeshConfig
from raytron.kernels.grouped import grouped_matmul
from raytron.parallel.collectives import (
    Wait,
    all_gather,
    start_all_gather,
    start_exchange,
    start_reduce_scatter,
)
from raytron.parallel.mesh import Group, Mesh
from raytron.parallel.parameter import Param
from raytron.parallel.tensor import Deferred, matrix


class ExpertParallel:
    """What a layer of experts needs to know of the mesh. All ranks of a mesh have to make it at the same point.

    penalty_scale: the gradient of an auxiliary loss, by which a step scales that of its loss.
    """

    def __init__(self, mesh: Mesh, config: MeshConfig):
        self.ep, self.etp, self.grid = mesh.axis("ep"), mesh.axis("etp"), mesh.axis("ep", "etp")
        self.sequence = mesh.axis("cp", "tp")  # the ranks that share a sequence
        self.plane = mesh.axis("dp", "cp", "tp")  # all ranks that route tokens through the same layers
        self.edp = mesh.experts.every
        self.tp = mesh.tp
        self.dispatch = config.expert_dispatch
        self.penalty_scale = 0.0


class Pairs(NamedTuple):
    """The pairs of some tokens that some experts take, sorted by expert.

    order: (P,) int64, token · k + slot of each pair. place: (T,k) int64, where a pair stands in `order`. taken: (T,k) bool,
    whether it stands there at all; None: all do.
    """

    order: Tensor
    place: Tensor
    taken: Tensor | None

    @property
    def tokens(self) -> Tensor:
        """(P,) the token of each pair."""
        return self.order // self.place.shape[1]


def sorted_pairs(experts: Tensor, count: int, taken: Tensor | None) -> Pairs:
    """experts: (T,k) int64, the expert of each pair; count: how many pairs are taken; those of one expert stand in the order
    of their tokens."""
    keys = experts if taken is None else experts.masked_fill(~taken, torch.iinfo(experts.dtype).max)
    order = torch.argsort(keys.flatten(), stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=order.device)
    return Pairs(order[:count], place.view(experts.shape).clamp(max=max(0, count - 1)), taken)


class _Spread(torch.autograd.Function):
    """A row for each pair; backward sums a token's pairs in the order of its slots."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pairs: Pairs) -> Tensor:
        ctx.pairs = pairs
        return x[pairs.tokens]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return _gathered(dy, ctx.pairs, None), None


class _Combine(torch.autograd.Function):
    """Each token's pairs, weighed and summed in the order of its slots: y (P,D), weights (T,k) fp32 -> (T,D)."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, weights: Tensor, pairs: Pairs) -> Tensor:
        ctx.pairs = pairs
        ctx.save_for_backward(y, weights)
        return _gathered(y, pairs, weights)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        y, weights = ctx.saved_tensors
        pairs: Pairs = ctx.pairs
        spread = dy[pairs.tokens].float()
        of_pairs = weights.new_zeros(weights.numel())
        of_pairs[pairs.order] = (spread * y).sum(-1)
        return (spread * weights.flatten()[pairs.order, None]).to(y.dtype), of_pairs.view(weights.shape), None


def _gathered(y: Tensor, pairs: Pairs, weights: Tensor | None) -> Tensor:
    """(T,D): Σ over slots, in their order and in fp32, of the pairs' rows y (P,D), each times its weight."""
    tokens, slots = pairs.place.shape
    out = torch.zeros(tokens, y.shape[1], dtype=torch.float32, device=y.device)
    if y.shape[0] == 0:
        return out.to(y.dtype)
    factors = weights
    if pairs.taken is not None:
        factors = pairs.taken.float() if weights is None else weights * pairs.taken
    for slot in range(slots):
        rows = y[pairs.place[:, slot]]
        if factors is None:
            out += rows
        else:
            out.addcmul_(rows.float(), factors[:, slot, None])
    return out.to(y.dtype)


class _Pick(torch.autograd.Function):
    """Rows by their numbers, each at most once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.index, ctx.rows = index, x.shape[0]
        return x[index]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return _placed(dy, ctx.index, ctx.rows), None


class _Place(torch.autograd.Function):
    """The way back from `_Pick`: zeros where no row comes."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, index: Tensor, rows: int) -> Tensor:
        ctx.index = index
        return _placed(y, index, rows)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> Any:
        return dx[ctx.index], None, None


def _placed(y: Tensor, index: Tensor, rows: int) -> Tensor:
    out = y.new_zeros(rows, y.shape[1])
    out[index] = y
    return out


class Exchange:
    """A collective in two halves, forward and backward: what is computed between the halves overlaps with it.

    Only an empty tensor passes through autograd from the first half to the second; the rows wait in the exchange.
    """

    def __init__(self, forward: Callable[[Tensor], Wait], backward: Callable[[Tensor], Wait]):
        self.forward, self.backward = forward, backward
        self.waiting: Wait | None = None

    def take(self) -> Tensor:
        """What has come; waits for it."""
        assert self.waiting is not None
        waiting, self.waiting = self.waiting, None
        return waiting()

    def start(self, x: Tensor) -> Tensor:
        """The first half; what it returns goes to `finish`."""
        return _apply(_Start, x, self)

    def finish(self, token: Tensor) -> Tensor:
        return _apply(_Finish, token, self)


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.waiting = exchange.forward(x)
        return x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        return ctx.exchange.take(), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.take()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        ctx.exchange.waiting = ctx.exchange.backward(dy)
        return dy.new_empty(0), None


def _gather(group: Group) -> Exchange:
    """(n, ...) of each rank -> (size · n, ...); the gradients of all ranks are summed."""
    return Exchange(lambda x: start_all_gather(x, group), lambda dy: start_reduce_scatter(dy, group))


def _scatter(group: Group) -> Exchange:
    """(size · n, ...) -> this rank's (n, ...) of the sum over the group."""
    return Exchange(lambda x: start_reduce_scatter(x, group), lambda dy: start_all_gather(dy, group))


def _swap(sent: Sequence[int], received: Sequence[int], group: Group) -> Exchange:
    return Exchange(
        lambda x: start_exchange(x, sent, received, group), lambda dy: start_exchange(dy, received, sent, group)
    )


class Dispatch:
    """One micro-batch on its way through the experts of a layer."""

    counts: list[int]  # rows of each local expert, after `rows`

    def start(self, x: Tensor) -> None:
        """Sends the tokens (T,D) on their way."""
        raise NotImplementedError

    def rows(self) -> Tensor:
        """(R,D), sorted by local expert, once they are here."""
        raise NotImplementedError

    def combine(self, y: Tensor) -> Tensor:
        """y (R,D), of each row its expert's output, over etp a partial sum -> (T,D)."""
        raise NotImplementedError


def dispatch(parallel: ExpertParallel, experts: Tensor, weights: Tensor, kept: Tensor | None, count: int) -> Dispatch:
    """experts (T,k) int64 and weights (T,k) fp32 of each token's choices; kept (T,k) bool: choices that are not dropped,
    None: all; count: experts of the layer."""
    kind = AllGather if parallel.dispatch == "all_gather" and parallel.grid.size > 1 else AllToAll
    return kind(parallel, experts, weights, kept, count)


class AllToAll(Dispatch):
    """Each pair goes to the one rank over ep that holds its expert; over etp all get the rows of all."""

    def __init__(self, parallel: ExpertParallel, experts: Tensor, weights: Tensor, kept: Tensor | None, count: int):
        self.parallel, self.weights = parallel, weights
        ep, etp = parallel.ep, parallel.etp
        keys = experts.flatten() if kept is None else experts[kept]
        sent = torch.bincount(keys, minlength=count)
        ones = [count // ep.size] * ep.size
        got = start_exchange(sent, ones, ones, ep)()
        self.received = all_gather(got, etp).view(etp.size * ep.size, -1)  # rows by (etp, source over ep) and expert
        both = torch.cat([sent, self.received.flatten()]).tolist()  # to the host, once
        table = [both[at : at + ones[0]] for at in range(count, len(both), ones[0])]
        of_sources = [sum(row) for row in table]
        self.counts = [sum(column) for column in zip(*table, strict=True)]
        self.sent = [sum(both[at : at + ones[0]]) for at in range(0, count, ones[0])]
        self.here = of_sources[etp.index * ep.size : (etp.index + 1) * ep.size]
        self.of_etp = [sum(of_sources[at : at + ep.size]) for at in range(0, len(of_sources), ep.size)]
        self.pairs = sorted_pairs(experts, sum(self.sent), kept)
        self.index = self._by_expert()

    def _by_expert(self) -> Tensor | None:
        """(R,) where the rows of each local expert stand in what comes; None: they come in order."""
        sources, local = self.received.shape
        if sources == 1:
            return None
        rows = sum(self.of_etp)
        counts = self.received.flatten()
        runs = torch.arange(sources * local, device=counts.device).repeat_interleave(counts, output_size=rows)
        at = torch.arange(rows, device=counts.device)
        if self.parallel.etp.size > 1:  # each etp rank's rows are padded to the longest
            lengths = torch.tensor(self.of_etp, device=counts.device)
            padding = max(self.of_etp) - lengths
            at += (padding.cumsum(0) - padding).repeat_interleave(lengths, output_size=rows)
        return at[torch.argsort(runs % local, stable=True)]

    def start(self, x: Tensor) -> None:
        self.exchange = _swap(self.sent, self.here, self.parallel.ep)
        self.token = self.exchange.start(_apply(_Spread, x, self.pairs))

    def rows(self) -> Tensor:
        x = self.exchange.finish(self.token)
        if self.parallel.etp.size > 1:
            gather = _gather(self.parallel.etp)
            x = gather.finish(gather.start(F.pad(x, (0, 0, 0, max(self.of_etp) - x.shape[0]))))
        return x if self.index is None else _apply(_Pick, x, self.index)

    def combine(self, y: Tensor) -> Tensor:
        etp = self.parallel.etp
        if self.index is not None:
            y = _apply(_Place, y, self.index, max(self.of_etp) * etp.size if etp.size > 1 else y.shape[0])
        if etp.size > 1:
            scatter = _scatter(etp)
            y = scatter.finish(scatter.start(y))[: sum(self.here)]
        back = _swap(self.here, self.sent, self.parallel.ep)
        return _apply(_Combine, back.finish(back.start(y)), self.weights, self.pairs)


class AllGather(Dispatch):
    """Every rank over ep · etp gets all tokens and computes its own experts' part of each."""

    def __init__(self, parallel: ExpertParallel, experts: Tensor, weights: Tensor, kept: Tensor | None, count: int):
        self.parallel = parallel
        grid = parallel.grid
        if kept is not None:
            experts = experts.masked_fill(~kept, count)  # none of anybody's
        everyone = all_gather(experts, grid)
        gather = _gather(grid)
        self.weights = gather.finish(gather.start(weights))
        local = count // parallel.ep.size
        own = everyone - parallel.ep.index * local
        taken = (own >= 0) & (own < local)
        self.counts = torch.bincount(own[taken], minlength=local).tolist()
        self.pairs = sorted_pairs(own, sum(self.counts), taken)

    def start(self, x: Tensor) -> None:
        self.exchange = _gather(self.parallel.grid)
        self.token = self.exchange.start(x)

    def rows(self) -> Tensor:
        return _apply(_Spread, self.exchange.finish(self.token), self.pairs)

    def combine(self, y: Tensor) -> Tensor:
        scatter = _scatter(self.parallel.grid)
        return scatter.finish(scatter.start(_apply(_Combine, y, self.weights, self.pairs)))


class _GroupedLinear(torch.autograd.Function):
    """x (R,K), sorted by expert -> (R,N): the rows of each expert by its own matrix (N,K)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Param, counts: list[int], deferred: Deferred) -> Tensor:
        ctx.weight, ctx.counts, ctx.deferred = weight, counts, deferred
        ctx.save_for_backward(x)
        return grouped_matmul(x, matrices(weight).transpose(1, 2), counts)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, counts = ctx.saved_tensors[0].detach(), ctx.counts  # a task must not hold the graph, nor `ctx`
        weight: Param = ctx.weight
        dy = dy.contiguous()
        dx = grouped_matmul(dy, matrices(weight), counts)
        ctx.deferred.do(lambda: weight.add_products(dy, x, counts))
        return dx, None, None, None


def grouped_linear(x: Tensor, weight: Param, counts: list[int], deferred: Deferred) -> Tensor:
    """x (R,K), `counts[e]` rows of each local expert e in turn; weight (E_l, ..., K) -> (R,N), N the product of the rest."""
    return _apply(_GroupedLinear, x, weight, counts, deferred)


class _RouterLinear(torch.autograd.Function):
    """x (T,D) by a weight (E,D) in fp32, whatever their type."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Param, deferred: Deferred) -> Tensor:
        ctx.weight, ctx.deferred = weight, deferred
        ctx.save_for_backward(x)
        return F.linear(x.float(), matrix(weight).float())

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x = ctx.saved_tensors[0].detach()
        weight: Param = ctx.weight
        dx = dy @ matrix(weight).float()
        ctx.deferred.do(lambda: weight.add_product(dy, x.float()))
        return dx.to(x.dtype), None, None


def router_linear(x: Tensor, weight: Param, deferred: Deferred) -> Tensor:
    """x (T,D) and weight (E,D) of any type -> fp32 (T,E)."""
    return _apply(_RouterLinear, x, weight, deferred)


class _AddPenalty(torch.autograd.Function):
    """Passes x on; backward gives the penalty the gradient that the step gives its loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, penalty: Tensor, parallel: ExpertParallel) -> Tensor:
        ctx.parallel = parallel
        return x

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return dy, dy.new_full((), ctx.parallel.penalty_scale, dtype=torch.float32), None


def add_penalty(x: Tensor, penalty: Tensor, parallel: ExpertParallel) -> Tensor:
    """x, through which the loss of a later stage will flow back, and with it the gradient of `penalty`, a fp32 scalar."""
    return _apply(_AddPenalty, x, penalty, parallel)


class _TakeShare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.chunk(group.size)[group.index].contiguous()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return all_gather(dy, ctx.group), None


class _GiveShare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return dy.chunk(ctx.group.size)[ctx.group.index].contiguous(), None


def take_share(x: Tensor, group: Group) -> Tensor:
    """This rank's part (n / size, ...) of x (n, ...), which all ranks hold."""
    return _apply(_TakeShare, x, group)


def give_share(x: Tensor, group: Group) -> Tensor:
    """The way back: the parts (n, ...) of all ranks as (size · n, ...) on each."""
    return _apply(_GiveShare, x, group)


def matrices(weight: Tensor) -> Tensor:
    """A weight (E, ..., K) as (E, N, K)."""
    return weight.reshape(weight.shape[0], -1, weight.shape[-1])


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    out = function.apply(*arguments)  # type: ignore[no-untyped-call]
    assert isinstance(out, Tensor)
    return out
