"""The fast attention equals the formula, forward and backward."""

import pytest
import torch

from raytron.kernels.attention import causal_attention, reference


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_equals_the_formula(kv_heads, window):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 9, 8, generator=generator, requires_grad=True)
    k, v = (torch.randn(2, kv_heads, 9, 8, generator=generator, requires_grad=True) for _ in range(2))
    fast, plain = causal_attention(q, k, v, window), reference(q, k, v, window)
    assert torch.allclose(fast, plain, atol=1e-6)
    weight = torch.randn(fast.shape, generator=generator)
    for a, b in zip(
        torch.autograd.grad((fast * weight).sum(), (q, k, v)),
        torch.autograd.grad((plain * weight).sum(), (q, k, v)),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-5)
