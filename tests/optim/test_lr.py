"""Learning rate schedules at their corners."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytron.config import LearningRateChange, LearningRateConfig
from raytron.optim.lr import learning_rate
from raytron.optim.sharded import clip_scale


def rates(steps=100, **changes):
    config = LearningRateConfig(peak=1.0, final=0.1, warmup_steps=10, **changes)
    return [learning_rate(config, steps, step) for step in range(steps + 20)]


@pytest.mark.parametrize("decay", ["cosine", "linear", "wsd", "inverse_sqrt", "constant"])
def test_warmup_rises_to_the_peak(decay):
    made = rates(decay=decay)
    assert made[0] == pytest.approx(1 / 11)
    assert made[:11] == sorted(made[:11])
    assert made[10] == 1.0
    assert max(made) == 1.0


@pytest.mark.parametrize(("decay", "middle", "end"), [("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("constant", 1, 1)])
def test_decay(decay, middle, end):
    made = rates(decay=decay)
    assert made[55] == pytest.approx(middle)
    assert made[100] == pytest.approx(end)
    assert made[119] == pytest.approx(end)


def test_wsd_stays_then_falls():
    made = rates(decay="wsd", stable_fraction=0.5)
    assert made[10:55] == [1.0] * 45
    assert made[78] == pytest.approx(1 - 0.9 * (68 / 90 - 0.5) / 0.5)
    assert made[100] == pytest.approx(0.1)


def test_inverse_sqrt():
    assert rates(decay="inverse_sqrt")[40] == pytest.approx(0.5)


@given(steps=st.integers(20, 50), longer=st.integers(1, 50))
def test_more_steps_do_not_bend_it(steps, longer):
    """The horizon is a number of its own: the first steps of a longer run have the same rates."""
    config = LearningRateConfig(peak=1.0, final=0.0, decay_steps=steps)
    assert [learning_rate(config, steps, s) for s in range(steps + longer)][:steps] == rates_of(config, steps)


def rates_of(config, steps):
    return [learning_rate(config, steps, step) for step in range(steps)]


@given(start=st.integers(0, 60), decay=st.sampled_from(["cosine", "linear", "constant", "inverse_sqrt"]))
def test_a_change_holds_from_its_step_on_and_bends_nothing_before(start, decay):
    config = LearningRateConfig(peak=1.0, final=0.1, warmup_steps=5, decay=decay)
    peak, end = LearningRateChange(start, peak=0.5), LearningRateChange(start + 10, final=0.2, decay_steps=80)
    changed = rates_of(dataclasses.replace(config, changes=(peak, end)), 50)
    assert changed[:start] == rates_of(config, 50)[:start]
    between = rates_of(dataclasses.replace(config, peak=0.5), 50)
    assert changed[start : start + 10] == between[start : start + 10]
    after = dataclasses.replace(config, peak=0.5, final=0.2)
    assert changed[start + 10 :] == [learning_rate(after, 80, step) for step in range(start + 10, 50)]


def test_clip_scale():
    assert clip_scale(5.0, None) == 1.0
    assert clip_scale(0.5, 1.0) == 1.0
    assert clip_scale(4.0, 1.0) == pytest.approx(0.25, rel=1e-5)
