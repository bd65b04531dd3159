"""What is handed to a GPU's flash attention, with the formula in its place: tiles by their bands, documents in one pack."""

import math

import pytest
import torch

from raytron.kernels import flash
from raytron.kernels.attention import add_attention, add_gradients, reference, seen_by
from raytron.kernels.flash import Pack, packed
from raytron.kernels.tiles import Span, tiles

LENGTH, ROWS = 24, 2
STARTS = ((0, 3, 4, 15), (0, 20))


def seen(height, width, left, right):
    own = torch.arange(height)[:, None] + width - height
    key = torch.arange(width)[None, :]
    return ((left < 0) | (key >= own - left)) & ((right < 0) | (key <= own + right))


def dense(q, k, v, left, right):
    """(S,H,h) and (T,KV,h) -> output (S,H,h), log-sum-exp (H,S)."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~seen(len(q), len(k), left, right), -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v), scores.logsumexp(-1)


def dense_backward(dout, q, k, v, out, lse, left, right):
    group = q.shape[1] // k.shape[1]
    wide_k, wide_v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, wide_k) / math.sqrt(q.shape[-1])
    p = (scores - lse[..., None]).exp() * seen(len(q), len(k), left, right)
    delta = (dout * out).sum(-1).t()[..., None]
    ds = p * (torch.einsum("qhd,khd->hqk", dout, wide_v) - delta) / math.sqrt(q.shape[-1])
    dk, dv = torch.einsum("hqk,qhd->khd", ds, q), torch.einsum("hqk,qhd->khd", p, dout)
    dk, dv = (x.view(len(k), k.shape[1], group, -1).sum(2) for x in (dk, dv))
    return torch.einsum("hqk,khd->qhd", ds, wide_k), dk, dv


class Fake:
    """The two operators by the formula; `calls` counts them."""

    def __init__(self):
        self.calls = 0

    def parts(self, x, ends):
        return x.unbind(0) if ends is None else x.split(ends.diff().tolist())

    def forward(self, q, k, v, q_ends, k_ends, q_longest, k_longest, *_, window_size_left, window_size_right):
        self.calls += 1
        parts = zip(*(self.parts(x, ends) for x, ends in ((q, q_ends), (k, k_ends), (v, k_ends))), strict=True)
        outs, sums = zip(*(dense(*part, window_size_left, window_size_right) for part in parts), strict=True)
        if q_ends is None:
            return torch.stack(outs), torch.stack(sums), None, None, None
        assert q_longest == max(map(len, outs))
        return torch.cat(outs), torch.cat(sums, 1), None, None, None

    def backward(self, dout, q, k, v, out, lse, q_ends, k_ends, *_, window_size_left, window_size_right):
        self.calls += 1
        assert lse.is_contiguous()
        lses = lse.unbind(0) if q_ends is None else lse.split(q_ends.diff().tolist(), 1)
        whole = [self.parts(x, q_ends) for x in (dout, q, k, v, out)]
        found = [
            dense_backward(*parts, window_size_left, window_size_right) for parts in zip(*whole, lses, strict=True)
        ]
        join = torch.stack if q_ends is None else torch.cat
        return [join(parts) for parts in zip(*found, strict=True)]


@pytest.fixture
def fake(monkeypatch):
    made = Fake()
    monkeypatch.setattr(flash, "_forward", made.forward)
    monkeypatch.setattr(flash, "_backward", made.backward)
    monkeypatch.setattr(flash, "takes", lambda q: True)
    return made


@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("starts", [None, STARTS], ids=["one", "documents"])
@pytest.mark.parametrize("blocks", [[(0, LENGTH)], [(12, LENGTH), (0, 12)]], ids=["whole", "two blocks"])
def test_equals_the_formula(fake, window, starts, blocks):
    generator = torch.Generator().manual_seed(0)
    q, dout = (torch.randn(LENGTH, ROWS, 4, 8, generator=generator).permute(1, 2, 0, 3) for _ in range(2))
    k, v = (torch.randn(LENGTH, ROWS, 2, 8, generator=generator).permute(1, 2, 0, 3) for _ in range(2))
    at, documents = torch.arange(LENGTH), None
    if starts is not None:
        documents = torch.stack([torch.bucketize(at, torch.tensor(row), right=True) for row in starts])
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    truth = reference(*leaves, seen_by(LENGTH, window, documents))
    out, lse = torch.zeros(q.shape), torch.full(q.shape[:3], -torch.inf)
    gradients = [torch.zeros(x.shape) for x in (q, k, v)]
    found = [tiles([Span(0, 0, LENGTH)], [Span(a, 0, b - a)], ROWS, window, starts) for a, b in blocks]
    for (a, b), some in zip(blocks, found, strict=True):
        add_attention(out, lse, q, k[:, :, a:b], v[:, :, a:b], some)
    if starts is not None and len(blocks) == 1:
        assert fake.calls == 1  # all documents at once
    for (a, b), some in zip(blocks, found, strict=True):
        parts = (gradients[0], gradients[1][:, :, a:b], gradients[2][:, :, a:b])
        add_gradients(parts, dout, q, k[:, :, a:b], v[:, :, a:b], out, lse, some)
    for mine, expected in zip((out, *gradients), (truth, *torch.autograd.grad(truth, leaves, dout)), strict=True):
        assert (mine - expected).abs().max() < 5e-6


def test_documents_of_two_chunks_are_one_pack():
    """Early and late chunk of a rank: what lies on the diagonal is one pack, the document that spans both is beside."""
    held = [Span(0, 0, 6), Span(18, 6, 6)]
    found = tiles(held, held, 2, None, ((0, 4, 20), (0,)))
    q = torch.zeros(2, 1, 12, 8)
    pack, rest = packed(q, found)
    assert pack == Pack((4, 2, 2, 4, 6, 6), -1)
    assert {(tile.rows, tile.queries, tile.keys) for tile in rest} == {
        ((0, 1), (6, 8), (4, 6)),
        ((1, 2), (6, 12), (0, 6)),
    }
    assert packed(q, rest) == (None, rest)
    assert packed(q, found[1:]) == (None, found[1:])
