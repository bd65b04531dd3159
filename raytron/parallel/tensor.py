"""Tensor parallelism: linear layers cut by columns or rows, and a vocabulary cut over the ranks.

After Megatron-LM (Shoeybi et al., arXiv 1909.08053; sequence parallelism: Korthikanti et al., arXiv 2205.05198). Shapes:

    S sequence (the whole of it)   s this rank's share of it: S / tp under sequence parallelism, else S
    B micro-batch   K input width   N output width   V vocabulary        a suffix _l: the local share over tp

                  column                              row
    x (s,B,K) --gather--> (S,B,K) --W_l--> (S,B,N_l) ... (S,B,K_l) --W_l--> (S,B,N) partial --scatter--> (s,B,N)

In backward the communication of the input gradient runs while the weight gradient is computed. A weight gradient may
also be put off: `Deferred` collects it while `active` and the pipeline runs it later (the W of zero-bubble schedules).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from raytron.parallel.collectives import (
    all_gather,
    all_reduce,
    reduce_from_group,
    reduce_scatter,
    scatter_sequence,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
)
from raytron.parallel.mesh import Group
from raytron.parallel.parameter import Param


class Deferred:
    """Weight-gradient work that is put off while `active`."""

    def __init__(self) -> None:
        self.active = False
        self.microbatch = 0  # that the backward work of the moment is of
        self.tasks: list[Callable[[], None]] = []

    def do(self, task: Callable[[], None]) -> None:
        """Runs a task now, or later where deferral is active."""
        if self.active:
            self.tasks.append(task)
        else:
            task()

    def take(self) -> list[Callable[[], None]]:
        """The tasks put off so far; the list starts anew."""
        tasks, self.tasks = self.tasks, []
        return tasks


class TensorParallel:
    """What a layer needs to know: the tp group, whether the sequence is cut over it, and where weight gradients wait."""

    def __init__(self, group: Group, sequence_parallel: bool):
        self.group = group
        self.sequence_parallel = sequence_parallel and group.size > 1
        self.deferred = Deferred()

    @property
    def size(self) -> int:
        return self.group.size

    @property
    def rank(self) -> int:
        return self.group.index


class _ColumnLinear(torch.autograd.Function):
    """Several weights share one gathered input: (s,B,K) -> one (S,B,N_l) for each weight."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, parallel: TensorParallel, weights: tuple[Param, ...], *biases_and_edges: Any
    ) -> Any:
        biases = biases_and_edges[: len(weights)]
        gathered = all_gather(x, parallel.group) if parallel.sequence_parallel else x
        ctx.parallel, ctx.weights = parallel, weights
        ctx.has_bias = [bias is not None for bias in biases]
        ctx.edges = len(biases_and_edges) - len(biases)
        ctx.save_for_backward(x)
        outputs = []
        for weight, bias in zip(weights, biases, strict=True):
            flat_bias = None if bias is None else bias.reshape(-1)
            outputs.append(F.linear(gathered, matrix(weight), flat_bias))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> Any:
        x, weights = ctx.saved_tensors[0].detach(), ctx.weights  # a task must not hold the graph, nor `ctx`
        parallel: TensorParallel = ctx.parallel
        group, cut = parallel.group, parallel.sequence_parallel
        later = parallel.deferred.active
        gathered = start_all_gather(x, group) if cut and not later else None
        dx = dys[0] @ matrix(weights[0])
        flat = dx.view(-1, dx.shape[-1])
        for dy, weight in zip(dys[1:], weights[1:], strict=True):
            flat.addmm_(_flat(dy), matrix(weight))
        communicated = start_reduce_scatter(dx, group) if cut else start_all_reduce(dx, group)
        inputs = gathered() if gathered is not None else None

        def weight_gradients() -> None:
            full = inputs
            if full is None:
                full = all_gather(x, group) if cut else x
            for dy, weight in zip(dys, weights, strict=True):
                weight.add_product(_flat(dy), _flat(full))

        parallel.deferred.do(weight_gradients)
        db = [
            _flat(dy).sum(0).view(weight.shape[:-1]) if has else None
            for dy, weight, has in zip(dys, weights, ctx.has_bias, strict=True)
        ]
        return communicated(), None, None, *db, *([None] * ctx.edges)


class _RowLinear(torch.autograd.Function):
    """(S,B,K_l) -> (s,B,N), summed over the group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: tuple[Param], parallel: TensorParallel, *edges: Param) -> Tensor:
        (weight,) = weights
        ctx.parallel, ctx.weight, ctx.edges = parallel, weight, len(edges)
        ctx.save_for_backward(x)
        out = F.linear(x, weight)
        if parallel.sequence_parallel:
            return reduce_scatter(out, parallel.group)
        return all_reduce(out, parallel.group)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x = ctx.saved_tensors[0].detach()
        parallel: TensorParallel = ctx.parallel
        weight: Param = ctx.weight
        full = all_gather(dy, parallel.group) if parallel.sequence_parallel else dy
        dx = full @ weight
        parallel.deferred.do(lambda: weight.add_product(_flat(full), _flat(x)))
        return dx, None, None, *([None] * ctx.edges)


def column_linear(x: Tensor, parallel: TensorParallel, *layers: tuple[Param, Param | None]) -> tuple[Tensor, ...]:
    """x (s,B,K) -> for each (weight, bias) an output (S,B,N_l). A weight is (..., K) with N_l = the product of the rest."""
    weights = tuple(weight for weight, _ in layers)
    biases = [bias for _, bias in layers]
    out = _ColumnLinear.apply(x, parallel, weights, *biases, *_edges(x, weights))  # type: ignore[no-untyped-call]
    assert isinstance(out, tuple)
    return out


def row_linear(x: Tensor, weight: Param, bias: Param | None, parallel: TensorParallel) -> Tensor:
    """x (S,B,K_l), weight (N, K_l) -> (s,B,N), summed over tp, the bias added once."""
    out = _RowLinear.apply(x, (weight,), parallel, *_edges(x, (weight,)))  # type: ignore[no-untyped-call]
    assert isinstance(out, Tensor)
    return out if bias is None else out + bias


class _LookUp(torch.autograd.Function):
    """rows (S,B) int64, weight (V_l,D) -> (S,B,D)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Param) -> Tensor:
        ctx.weight = weight
        ctx.save_for_backward(rows)
        return F.embedding(rows, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        (rows,) = ctx.saved_tensors
        ctx.weight.add_rows(_flat(dy), rows.reshape(-1))
        return None, None


def vocab_embedding(tokens: Tensor, weight: Param, parallel: TensorParallel) -> Tensor:
    """tokens (S,B) int64 -> (s,B,D); each rank looks up the rows that it holds, weight (V_l, D)."""
    if parallel.size == 1:
        return _look_up(tokens, weight)
    rows = weight.shape[0]
    local = tokens - parallel.rank * rows
    outside = (local < 0) | (local >= rows)
    out = _look_up(local.masked_fill(outside, 0), weight).masked_fill(outside.unsqueeze(-1), 0)
    if parallel.sequence_parallel:
        return scatter_sequence(out, parallel.group)
    return reduce_from_group(out, parallel.group)


def _look_up(rows: Tensor, weight: Param) -> Tensor:
    out = _LookUp.apply(rows, weight)  # type: ignore[no-untyped-call]
    assert isinstance(out, Tensor)
    return out


class Softmax:
    """The softmax of logits (S,B,V_l) whose last dimension is cut over the group, in float32; no rank sees them all. It
    takes the memory of logits that are in float32 already.

    Columns at and beyond `vocab` are padding and take no part. sums: `top` and `total` of another one of equal logits,
    which spares asking the other ranks.
    """

    def __init__(
        self, logits: Tensor, labels: Tensor, vocab: int, group: Group, sums: tuple[Tensor, Tensor] | None = None
    ):
        self.scores = logits.detach().to(torch.float32)
        rows = self.scores.shape[-1]
        self.scores[..., max(0, min(rows, vocab - group.index * rows)) :] = -torch.inf
        local = labels - group.index * rows
        self.outside = (local < 0) | (local >= rows)  # whose label another rank has
        self.target = local.masked_fill(self.outside, 0)
        if sums is not None:
            self.top, self.total = sums
            self.scores.sub_(self.top.unsqueeze(-1)).exp_()
        else:
            self.top = all_reduce(self.scores.amax(-1), group, dist.ReduceOp.MAX)
            self.scores -= self.top.unsqueeze(-1)
            hit = self.scores.gather(-1, self.target.unsqueeze(-1)).squeeze(-1).masked_fill(self.outside, 0)
            self.scores.exp_()
            self.total, self.hit = all_reduce(torch.stack([self.scores.sum(-1), hit]), group).unbind()
        self.scores /= self.total.unsqueeze(-1)

    def loss(self) -> Tensor:
        """(S,B): the cross-entropy of each token."""
        return self.total.log() - self.hit

    def gradient(self, weights: Tensor) -> Tensor:
        """The gradient of the logits where each token's loss has a weight (S,B); takes the softmax's own memory."""
        hit = (~self.outside).to(self.scores.dtype)
        self.scores.scatter_add_(-1, self.target.unsqueeze(-1), -hit.unsqueeze(-1))
        self.scores *= weights.unsqueeze(-1)
        return self.scores


class _VocabCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, weights: Tensor, vocab: int, group: Group) -> Tensor:
        ctx.softmax = Softmax(logits, labels, vocab, group)
        ctx.weights, ctx.dtype = weights, logits.dtype
        loss: Tensor = (ctx.softmax.loss() * weights).sum()
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        softmax: Softmax = ctx.softmax
        ctx.softmax = None
        return softmax.gradient(ctx.weights * gradient).to(ctx.dtype), None, None, None, None


def vocab_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor, vocab: int, group: Group) -> Tensor:
    """Σ weights · -log softmax(logits)[labels], a scalar, equal on all ranks of the group.

    logits: (S,B,V_l); labels: (S,B) int64 in [0, vocab); weights: (S,B) float32, 0 where a label does not count.
    Columns at and beyond `vocab` are padding and take no part. Logits in float32 are overwritten.
    """
    out = _VocabCrossEntropy.apply(logits, labels, weights, vocab, group)  # type: ignore[no-untyped-call]
    assert isinstance(out, Tensor)
    return out


def _edges(x: Tensor, weights: tuple[Param, ...]) -> tuple[Param, ...]:
    """The weights, where only they let autograd come by: their gradients don't go through it, and an edge of its graph costs
    as much as a small operation."""
    return () if x.requires_grad else weights


def matrix(weight: Tensor) -> Tensor:
    """A weight (..., K) as (N, K)."""
    return weight.reshape(-1, weight.shape[-1])


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
