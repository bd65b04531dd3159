"""Stochastic rounding is unbiased and the same on every mesh; bf16 moments; the loss scale of fp16."""

import pytest
import torch

from raytron.config import PrecisionConfig
from raytron.optim.precision import LossScale, round_stochastically
from raytron.parallel.random import element_numbers


def test_rounds_to_the_two_neighbours_with_the_right_odds():
    step = 2.0**-7  # between bf16 numbers from 1 to 2
    x = torch.full((200_000,), 1 + 0.3 * step)
    rounded = round_stochastically(x, torch.arange(len(x)), 5).float()
    assert set(rounded.tolist()) == {1.0, 1 + step}
    assert rounded.double().mean().item() == pytest.approx(1 + 0.3 * step, abs=4 * step * 0.5 / len(x) ** 0.5)


def test_rounding_keeps_what_bf16_can_say_and_what_is_not_finite():
    x = torch.tensor([0.0, -0.0, 1.5, -3.0, float("inf"), float("-inf"), float("nan")])
    rounded = round_stochastically(x, torch.arange(len(x)), 1)
    assert torch.equal(rounded[:-1].float(), x[:-1])
    assert rounded[-1].isnan()


def test_negative_numbers_round_like_positive_ones():
    x, index = torch.randn(1000), torch.arange(1000)
    assert torch.equal(round_stochastically(-x, index, 3), -round_stochastically(x, index, 3))


@pytest.mark.parametrize("dim", [0, 1])
def test_a_part_rounds_as_in_the_whole(dim):
    whole = torch.randn(6, 10)
    rounded = round_stochastically(whole, element_numbers((6, 10), (0, 0), (6, 10), whole.device), 9)
    part = whole.narrow(dim, 2, 3).contiguous()
    index = element_numbers((6, 10), (2, 0) if dim == 0 else (0, 2), part.shape, part.device)
    assert torch.equal(round_stochastically(part, index, 9), rounded.narrow(dim, 2, 3))


def test_keys_round_apart():
    x, index = torch.randn(1000), torch.arange(1000)
    assert not torch.equal(round_stochastically(x, index, 1), round_stochastically(x, index, 2))


def test_the_loss_scale_halves_at_overflow_and_doubles_after_a_while():
    scale = LossScale(PrecisionConfig(dtype="fp16", loss_scale=8.0, loss_scale_window=3))
    seen = []
    for finite in (True, False, True, True, True, True, False):
        scale.update(finite)
        seen.append(scale.value)
    assert seen == [8, 4, 4, 4, 8, 8, 4]
    other = LossScale(PrecisionConfig(dtype="fp16"))
    other.restore(scale.facts())
    assert (other.value, other.good_steps) == (scale.value, scale.good_steps)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_other_types_have_no_scale(dtype):
    scale = LossScale(PrecisionConfig(dtype=dtype))
    scale.update(finite=False)
    assert (scale.value, scale.facts()) == (1.0, {})
