"""Many matrix products of one shape with different numbers of rows: what a mixture of experts computes.

Rows stand sorted by expert, and `counts` says how many each expert has, perhaps none:

    x (T,K)    rows of expert 0   ×  matrix 0 (K,N)       y (T,N)
               rows of expert 1   ×  matrix 1         →
               …

Padding every expert to one number of rows would waste work or drop tokens (MegaBlocks, Gale et al., arXiv 2211.15841). On
a GPU in bf16 all experts are one launch of torch's grouped GEMM; elsewhere, and where a width is no multiple of 8 (16
bytes, which that kernel asks for), a loop over the experts.

Shapes: T rows of all experts, E experts, K input width, N output width.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_matmul(x: Tensor, matrices: Tensor, counts: Sequence[int]) -> Tensor:
    """x (T,K), sorted by expert, by matrices (E,K,N): the rows of expert e by matrix e -> (T,N)."""
    if _one_launch(x, matrices.shape[1:]):
        return F.grouped_mm(x, matrices, offs=_ends(counts, x.device))
    out = x.new_empty(x.shape[0], matrices.shape[2])
    for matrix, rows, target in zip(
        matrices, torch.split(x, list(counts)), torch.split(out, list(counts)), strict=True
    ):
        if rows.shape[0]:
            torch.mm(rows, matrix, out=target)
    return out


def grouped_product(dy: Tensor, x: Tensor, counts: Sequence[int]) -> Tensor:
    """dyᵀ x of each expert's rows: dy (T,N), x (T,K) -> (E,N,K), zero for an expert without rows."""
    if _one_launch(x, (dy.shape[1], x.shape[1])):
        ends = _ends(counts, x.device)
        empty = torch.diff(ends, prepend=ends.new_zeros(1)) == 0
        return F.grouped_mm(dy.t(), x, offs=ends).masked_fill_(empty[:, None, None], 0)
    out = x.new_empty(len(counts), dy.shape[1], x.shape[1])
    for target, left, right in zip(out, torch.split(dy, list(counts)), torch.split(x, list(counts)), strict=True):
        torch.mm(left.t(), right, out=target)
    return out


def add_grouped_product(out: Tensor, dy: Tensor, x: Tensor, counts: Sequence[int], *, fresh: bool) -> None:
    """Adds `grouped_product` to `out` (E,N,K) fp32, or writes it there where `out` is fresh."""
    if dy.dtype != out.dtype or _one_launch(x, (dy.shape[1], x.shape[1])):
        product = grouped_product(dy, x, counts)
        out.copy_(product) if fresh else out.add_(product)
        return
    for target, left, right in zip(out, torch.split(dy, list(counts)), torch.split(x, list(counts)), strict=True):
        if left.shape[0] or fresh:
            torch.addmm(target, left.t(), right, beta=0 if fresh else 1, out=target)


def _one_launch(x: Tensor, widths: Sequence[int]) -> bool:
    """Whether torch's grouped GEMM takes these rows."""
    return x.is_cuda and x.dtype == torch.bfloat16 and x.shape[0] > 0 and all(width % 8 == 0 for width in widths)


def _ends(counts: Sequence[int], device: torch.device) -> Tensor:
    """(E,) int32: where each expert's rows end."""
    return torch.tensor(list(accumulate(counts)), dtype=torch.int32).to(device, non_blocking=True)
