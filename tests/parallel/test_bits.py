"""Every flipped bit changes a fingerprint, wherever it is."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raytron.parallel.bits import BLOCK, fingerprint, odd_numbers, total

WEIGHTS = odd_numbers(torch.device("cpu"))
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


@given(st.sampled_from(list(BITS)), st.integers(1, 300), st.data())
def test_every_flipped_bit_changes_it(dtype, size, data):
    x = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
    before = fingerprint(x, WEIGHTS).item(), total(x).item()
    bit = data.draw(st.integers(0, 8 * x.element_size() - 1))
    mask = 1 << bit if bit < 8 * x.element_size() - 1 else -(1 << bit)  # the sign
    x.view(BITS[dtype])[data.draw(st.integers(0, size - 1))] ^= mask
    assert fingerprint(x, WEIGHTS).item() != before[0]
    assert total(x).item() != before[1]


def test_blocks_are_weighed_apart():
    x = torch.zeros(6 * BLOCK + 5)
    seen = {fingerprint(x, WEIGHTS).item()}
    for element in (0, 2 * BLOCK, 4 * BLOCK, 6 * BLOCK, 6 * BLOCK + 4):
        y = x.clone()
        y.view(torch.int32)[element] = 1
        seen.add(fingerprint(y, WEIGHTS).item())
    assert len(seen) == 6


def test_places_count():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert fingerprint(x, WEIGHTS).item() != fingerprint(x[[2, 3, 0, 1]], WEIGHTS).item()
    assert total(x).item() == total(x[[2, 3, 0, 1]]).item()


@pytest.mark.parametrize("dtype", BITS)
@given(st.integers(0, 9), st.integers(0, 40))
def test_where_a_tensor_lies_does_not_matter(dtype, start, size):
    whole = torch.randn(64).to(dtype)
    view = whole[start : start + size]
    assert fingerprint(view, WEIGHTS).item() == fingerprint(view.clone(), WEIGHTS).item()
    assert total(view).item() == total(view.clone()).item()


def test_what_is_not_contiguous_counts_as_its_copy():
    x = torch.randn(6, 7)
    assert fingerprint(x[:, 1:4], WEIGHTS).item() == fingerprint(x[:, 1:4].contiguous(), WEIGHTS).item()
