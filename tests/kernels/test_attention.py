"""Every way to compute attention equals the formula, forward and backward."""

import pytest
import torch

from raytron.kernels import attention
from raytron.kernels.attention import (
    add_attention,
    add_gradients,
    causal_attention,
    reference,
    seen_by,
    tile_formula,
    tile_formula_backward,
)
from raytron.kernels.tiles import Span, tiles

LENGTH, WIDTH = 23, 8


def heads(kv_heads, length=LENGTH):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, length, WIDTH, generator=generator, requires_grad=True)
    k, v = (torch.randn(2, kv_heads, length, WIDTH, generator=generator, requires_grad=True) for _ in range(2))
    return q, k, v, torch.randn(q.shape, generator=generator)


def close(mine, truth):
    for a, b in zip(mine, truth, strict=True):
        assert (a - b).abs().max() < 5e-6


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_causal(kv_heads):
    q, k, v, dout = heads(kv_heads)
    fast, plain = causal_attention(q, k, v), reference(q, k, v, seen_by(LENGTH))
    close([fast], [plain])
    close(torch.autograd.grad(fast, (q, k, v), dout), torch.autograd.grad(plain, (q, k, v), dout))


@pytest.mark.parametrize("formula", [False, True], ids=["flash", "formula"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize("starts", [None, [[0, 3, 4, 15], [0]]], ids=["one", "documents"])
def test_tiles(monkeypatch, formula, kv_heads, window, starts):
    """Tiles of two blocks of keys merged, and their gradients, equal the formula of the whole."""
    monkeypatch.setattr(attention, "STRIP", 4)
    if formula:
        monkeypatch.setattr(attention, "_forward", tile_formula)
        monkeypatch.setattr(attention, "_backward", tile_formula_backward)
    q, k, v, dout = heads(kv_heads)
    documents = None
    if starts is not None:
        documents = torch.stack([torch.bucketize(torch.arange(LENGTH), torch.tensor(s), right=True) for s in starts])
    truth = reference(q, k, v, seen_by(LENGTH, window, documents))
    out, lse = torch.zeros(q.shape), torch.full(q.shape[:3], -torch.inf)
    blocks = [
        (slice(start, stop), tiles([Span(0, 0, LENGTH)], [Span(start, 0, stop - start)], 2, window, starts))
        for start, stop in ((10, LENGTH), (0, 10))
    ]
    with torch.no_grad():
        for block, found in blocks:
            add_attention(out, lse, q, k[:, :, block], v[:, :, block], found)
        close([out], [truth])
        grads = [torch.zeros(x.shape) for x in (q, k, v)]
        for block, found in blocks:
            part = (grads[0], grads[1][:, :, block], grads[2][:, :, block])
            add_gradients(part, dout, q, k[:, :, block], v[:, :, block], out, lse, found)
    close(grads, torch.autograd.grad(truth, (q, k, v), dout))


def test_half_precision_keeps_its_sums_in_float32():
    q, k, v, dout = (x.detach().bfloat16() for x in heads(2))
    found = tiles([Span(0, 0, LENGTH)], [Span(0, 0, LENGTH)], 2, 7)
    out, lse = torch.zeros(q.shape), torch.full(q.shape[:3], -torch.inf)
    add_attention(out, lse, q, k, v, found)
    grads = tuple(torch.zeros(x.shape) for x in (q, k, v))
    add_gradients(grads, dout, q, k, v, out.bfloat16(), lse, found)
    wide = [x.float().requires_grad_() for x in (q, k, v)]
    truth = reference(*wide, seen_by(LENGTH, 7))
    for mine, plain in zip((out, *grads), (truth, *torch.autograd.grad(truth, wide, dout.float())), strict=True):
        assert (mine - plain).norm() < 0.01 * plain.norm()
