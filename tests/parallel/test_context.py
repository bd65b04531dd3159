"""Ring, all-to-all and hybrid attention equal full attention, forward and backward, under every mask."""

import functools
import itertools

import numpy as np
import pytest
import torch

from raytron.kernels.attention import reference, seen_by
from raytron.kernels.tiles import Span, tiles
from raytron.parallel.context import ContextParallel, spans, steps
from raytron.parallel.mesh import Mesh
from raytron.plan.mesh import MeshShape

LENGTH, ROWS, HEADS, WIDTH = 24, 2, 8, 4
STARTS = ((0, 5, 6, 17), (0,))
DOCUMENTS = torch.stack([torch.bucketize(torch.arange(LENGTH), torch.tensor(s), right=True) for s in STARTS])
CASES = list(itertools.product((1, 2, 4, 8), (None, 2, 5, 9), (None, STARTS), (False, True)))


def tensors(kv_heads):
    generator = torch.Generator().manual_seed(kv_heads)
    sizes = [(LENGTH, ROWS, heads, WIDTH) for heads in (HEADS, kv_heads, kv_heads, HEADS)]
    return [torch.randn(size, generator=generator) for size in sizes]


def mask(heads, queries, keys):
    """A dropout mask of positions and heads: something that each rank can make its part of."""
    numbers = heads[:, None, None] * 7919 + queries[:, None] * 101 + keys[None, :] * 31
    return torch.where(numbers % 7 < 2, 0.0, 1.4)


@functools.cache
def truth(kv_heads, window, starts, dropped):
    q, k, v, dout = tensors(kv_heads)
    x = [t.permute(1, 2, 0, 3).requires_grad_() for t in (q, k, v)]
    at = torch.arange(LENGTH)
    keep = mask(torch.arange(HEADS), at, at) if dropped else None
    out = reference(*x, seen_by(LENGTH, window, None if starts is None else DOCUMENTS), keep)
    return out, torch.autograd.grad(out, x, dout.permute(1, 2, 0, 3))


def one_rank(rank, ring, parts):
    context = ContextParallel.of(Mesh(MeshShape(cp=ring * parts, cp_all_to_all=parts), rank))
    first = context.all_to_all.index * HEADS // parts
    heads = torch.arange(first, first + HEADS // parts)

    def dropout(tile, queries, keys):
        kept = mask(heads, queries[slice(*tile.queries)], keys[slice(*tile.keys)])
        return kept.expand(tile.rows[1] - tile.rows[0], -1, -1, -1)

    out = []
    at = context.positions(LENGTH)
    for kv_heads, window, starts, dropped in CASES:
        q, k, v, dout = (x[at] for x in tensors(kv_heads))
        x = [t.requires_grad_() for t in (q, k, v)]
        seen = context.seen(LENGTH, ROWS, window, starts)
        y = context.attend(*x, seen, dropout if dropped else None)
        grads = torch.autograd.grad(y, x, dout)
        out.append([t.detach().numpy() for t in (y, *grads)])
    return at.numpy(), out


@pytest.mark.parametrize(("ring", "parts"), [(1, 1), (2, 1), (3, 1), (4, 1), (1, 2), (1, 4), (2, 2)])
def test_equals_full_attention(world, ring, parts):
    ranks = world.run(ring * parts, one_rank, ring, parts)
    assert sorted(np.concatenate([at for at, _ in ranks])) == list(range(LENGTH))
    for number, case in enumerate(CASES):
        out, grads = truth(*case)
        for index, expected in enumerate((out, *grads)):
            for at, results in ranks:
                difference = torch.from_numpy(results[number][index]) - expected.permute(2, 0, 1, 3)[at]
                assert difference.norm() <= 1e-6 * expected.norm(), (case, index)


@pytest.mark.parametrize("ring", [1, 2, 3, 4, 8])
def test_zigzag_gives_each_rank_the_same_work(ring):
    held = [spans(48, ring, index) for index in range(ring)]
    positions = [p for mine in held for span in mine for p in range(span.position, span.end)]
    assert sorted(positions) == list(range(48))
    work = [sum(p + 1 for span in mine for p in range(span.position, span.end)) for mine in held]
    assert len(set(work)) == 1


def test_neighbouring_chunks_are_one_run():
    assert spans(48, 1, 0) == (Span(0, 0, 48),)
    assert spans(48, 2, 1) == (Span(12, 0, 24),)
    assert spans(48, 2, 0) == (Span(0, 0, 12), Span(36, 12, 12))


@pytest.mark.parametrize("ring", [1, 2, 3, 6])
@pytest.mark.parametrize("window", [None, 1, 2, 9, 30, 60])
@pytest.mark.parametrize("starts", [None, ((0, 17, 18), (0, 40)), (range(0, 72, 12), range(0, 72, 6))], ids=str)
def test_steps_are_those_in_which_a_rank_sees_something(ring, window, starts):
    length, rows = 72, 2
    held = [spans(length, ring, index) for index in range(ring)]
    expected = [
        step
        for step in range(ring)
        if any(tiles(held[rank], held[(rank - step) % ring], rows, window, starts) for rank in range(ring))
    ]
    assert steps(length, ring, window, starts) == tuple(expected)
