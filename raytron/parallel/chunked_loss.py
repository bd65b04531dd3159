"""Logits and cross-entropy in pieces along the sequence, so that logits of the whole sequence never exist.

With a large vocabulary the logits are the widest activation of a model: V / D times as wide as what a layer passes on,
and their softmax is kept in float32. Here the forward keeps of each token only what its softmax needs: the largest logit
and the sum of exponentials. The backward makes a piece's logits again, turns them into their gradient, and multiplies
that with the weight and the input at once:

    forward    piece of x (s/n,B,D) ─> logits (S/n,B,V_l) ─> loss, top, sum        logits are let go
    backward   piece of x ─> logits ─> softmax − target ─> dx (s/n,B,D), dW += …   for each piece

The price is one more product with the head. Under sequence parallelism each rank's share of the sequence is cut, and a
piece is gathered from all ranks' shares. The weight's gradient is complete only with the last piece, and is not put off:
for that the gradient of all logits would have to wait.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from raytron.parallel.collectives import all_gather, start_all_reduce, start_reduce_scatter
from raytron.parallel.parameter import Param
from raytron.parallel.tensor import Softmax, TensorParallel


class _Pieces:
    """The same tokens of x (s,B,...), which may be cut over tp, and of labels (S,B), which are not."""

    def __init__(self, parallel: TensorParallel, count: int, length: int):
        self.parallel, self.size = parallel, -(-length // count)
        self.shares = parallel.size if parallel.sequence_parallel else 1

    def local(self, x: Tensor) -> tuple[Tensor, ...]:
        return torch.split(x, self.size)

    def whole(self, x: Tensor) -> list[Tensor]:
        """(S,B) -> for each piece the tokens of all shares that its gathered input has."""
        parts = torch.split(x.reshape(self.shares, -1, x.shape[-1]), self.size, 1)
        return [part.flatten(0, 1) for part in parts]

    def gather(self, x: Tensor) -> Tensor:
        return all_gather(x, self.parallel.group) if self.parallel.sequence_parallel else x


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        head: Param,
        labels: Tensor,
        weights: Tensor,
        vocab: int,
        parallel: TensorParallel,
        count: int,
    ) -> Tensor:
        pieces = _Pieces(parallel, count, x.shape[0])
        total = torch.zeros((), device=x.device)
        kept = []
        for part, label, weight in zip(pieces.local(x), pieces.whole(labels), pieces.whole(weights), strict=True):
            softmax = Softmax(F.linear(pieces.gather(part), head), label, vocab, parallel.group)
            total += (softmax.loss() * weight).sum()
            kept += [softmax.top, softmax.total]
        ctx.pieces, ctx.head, ctx.vocab = pieces, head, vocab
        ctx.save_for_backward(x, labels, weights, *kept)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, labels, weights, *kept = ctx.saved_tensors
        pieces, head, group = ctx.pieces, ctx.head, ctx.pieces.parallel.group
        cut = pieces.parallel.sequence_parallel
        parts = list(zip(pieces.local(x), pieces.whole(labels), pieces.whole(weights), strict=True))
        out = []
        for index, (part, label, weight) in enumerate(parts):
            full = pieces.gather(part)
            sums = (kept[2 * index], kept[2 * index + 1])
            softmax = Softmax(F.linear(full, head), label, ctx.vocab, group, sums)
            dy = softmax.gradient(weight * gradient).to(x.dtype)
            dx = dy @ head
            arrived = start_reduce_scatter(dx, group) if cut else start_all_reduce(dx, group)
            head.add_product(dy.flatten(0, 1), full.flatten(0, 1), last=index == len(parts) - 1)
            out.append(arrived())
        return torch.cat(out), *([None] * 6)


def chunked_loss(
    x: Tensor, head: Param, labels: Tensor, weights: Tensor, vocab: int, parallel: TensorParallel, count: int
) -> Tensor:
    """Σ weights · -log softmax(x headᵀ)[labels], a scalar, equal on all tp ranks, in `count` pieces.

    x: (s,B,D); head: (V_l,D); labels: (S,B) int64 in [0, vocab); weights: (S,B) float32, 0 where a label does not count.
    """
    out = _ChunkedLoss.apply(x, head, labels, weights, vocab, parallel, count)  # type: ignore[no-untyped-call]
    assert isinstance(out, Tensor)
    return out
