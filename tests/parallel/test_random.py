"""Counter-based random numbers: the same wherever they are drawn, and as random as they should be."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raytron.parallel.layout import Cut, Layout, chunk
from raytron.parallel.random import dropout_mask, fill_normal, key_of, mix, normal, to_unit, uniform


def whole(shape, key):
    out = torch.empty(shape)
    fill_normal(out, Layout(shape), {}, key, 1.0)
    return out


@given(rows=st.integers(1, 20), columns=st.integers(1, 9), tp=st.integers(1, 5), dim=st.sampled_from([0, 1]))
def test_a_rank_makes_its_own_slice(rows, columns, tp, dim):
    layout = Layout((rows, columns), (Cut("tp", dim),))
    truth = whole((rows, columns), 7)
    for rank in range(tp):
        place = {"tp": (tp, rank)}
        local = torch.full(layout.local_shape(place), math.nan)
        fill_normal(local, layout, place, 7, 1.0)
        start, length = chunk(layout.shape[dim], tp, rank)
        assert torch.equal(local.narrow(dim, 0, length), truth.narrow(dim, start, length))
        assert (local.narrow(dim, length, local.shape[dim] - length) == 0).all()


def test_uniform_and_normal_have_their_moments():
    index = torch.arange(1_000_000)
    u, n = uniform(3, index), normal(3, index)
    assert u.min() > 0
    assert u.max() < 1
    assert u.mean() == pytest.approx(0.5, abs=2e-3)
    assert n.mean() == pytest.approx(0, abs=5e-3)
    assert n.std() == pytest.approx(1, abs=5e-3)
    assert (n[1:] * n[:-1]).mean() == pytest.approx(0, abs=5e-3)
    assert (n > 3).double().mean() == pytest.approx(0.00135, abs=3e-4)


def test_the_ends_are_never_reached():
    """A value of exactly 1 would make a normal number infinite, once in some ten million."""
    ends = to_unit(torch.tensor([0, -1, 1 << 62, -(1 << 63)]))
    assert ends.min() > 0
    assert ends.max() < 1
    assert torch.isfinite((ends * 2 - 1).erfinv()).all()


def test_other_keys_give_other_numbers():
    index = torch.arange(10_000)
    a, b = normal(key_of(1, "init", "a"), index), normal(key_of(1, "init", "b"), index)
    assert abs((a * b).mean()) < 0.05
    assert key_of(1, "ab") != key_of(1, "a", "b")


def test_mix_is_splitmix64():
    """The first outputs of the published generator for seed 0 (Steele et al.): states are multiples of the golden ratio."""
    golden = -7046029254386353131
    mixed = mix(torch.tensor([golden, golden * 2 % 2**64 - (2**64 if golden * 2 % 2**64 >= 2**63 else 0)]))
    assert [value % 2**64 for value in mixed.tolist()] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


def test_dropout_depends_on_the_token_not_on_the_share():
    samples, positions = torch.tensor([5, 9]), torch.arange(8)
    full = dropout_mask(16, 0.25, 11, samples, positions)
    part = dropout_mask(16, 0.25, 11, samples[1:], positions[4:])
    assert torch.equal(full[4:, 1:], part)
    assert not torch.equal(full[:, 0], full[:, 1])
    assert full.unique().tolist() == [0.0, pytest.approx(1 / 0.75)]
    big = dropout_mask(256, 0.25, 12, torch.arange(16), torch.arange(64))
    assert (big == 0).double().mean() == pytest.approx(0.25, abs=5e-3)
