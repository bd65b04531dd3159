"""What counts as a leap: not noise, not a loss that falls, but a value far above the usual one."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytron.observe.spikes import SpikeDetector


def watch(values, limit=20.0, window=100):
    """The steps that leap."""
    detector, found = SpikeDetector(["loss"], limit, window), []
    for step, value in enumerate(values):
        if detector.leaps({"loss": value}):
            found.append(step)
        detector.saw({"loss": value})
    return found


@pytest.mark.parametrize("seed", range(5))
def test_noise_on_a_falling_loss_is_no_leap(seed):
    noise = random.Random(seed)
    assert watch([2 + 8 * 0.99**step * noise.lognormvariate(0, 0.1) for step in range(3000)]) == []


@pytest.mark.parametrize("seed", range(5))
def test_the_heavy_tail_of_a_gradient_norm_is_no_leap(seed):
    noise = random.Random(seed)
    assert watch([noise.lognormvariate(0, 0.3) for _ in range(3000)]) == []


@given(st.integers(50, 290), st.floats(2.0, 1e30), st.integers(0, 100))
def test_a_leap_is_found_wherever_it_stands(where, factor, seed):
    noise = random.Random(seed)
    values = [3 * noise.uniform(0.98, 1.02) for _ in range(300)]
    values[where] *= factor
    assert watch(values) == [where]


def test_leaps_one_after_another_do_not_hide_each_other():
    values = [1.0] * 300
    for step in range(100, 140):
        values[step] = 1e6
    assert watch(values) == list(range(100, 140))


def test_a_lasting_change_becomes_usual():
    found = watch([1.0] * 200 + [10.0] * 200)
    assert found[0] == 200
    assert found[-1] <= 250


def test_the_first_half_of_a_window_is_not_judged():
    assert watch([1.0] * 4 + [1e9], window=10) == []
    assert watch([1.0] * 5 + [1e9], window=10) == [5]


def test_zeros_and_numbers_that_are_not_finite_do_no_harm():
    detector = SpikeDetector(["loss", "gradient norm"], 20.0, 10)
    for _ in range(20):
        detector.saw({"loss": 0.0, "gradient norm": float("nan")})
    assert detector.leaps({"loss": 1.0, "gradient norm": 5.0}) == {}


def test_a_leap_says_what_would_be_usual():
    detector = SpikeDetector(["loss"], 20.0, 10)
    for _ in range(10):
        detector.saw({"loss": 2.0})
    assert detector.leaps({"loss": 9.0}) == {"loss": "loss 9 where 2 ± 0.04 is usual"}


@given(st.lists(st.floats(0.1, 100), max_size=60), st.lists(st.floats(0.1, 1000), max_size=30))
def test_a_resumed_detector_decides_alike(before, after):
    one = SpikeDetector(["loss"], 3.0, 20)
    for value in before:
        one.saw({"loss": value})
    other = SpikeDetector(["loss"], 3.0, 20)
    other.restore(json.loads(json.dumps(one.facts())))
    for value in after:
        assert one.leaps({"loss": value}) == other.leaps({"loss": value})
        one.saw({"loss": value})
        other.saw({"loss": value})
    assert one.facts() == other.facts()


def test_the_state_has_one_length_from_the_beginning():
    detector, lengths = SpikeDetector(["loss"], 20.0, 100), set()
    for step in range(250):
        lengths.add(len(json.dumps(detector.facts())))
        detector.saw({"loss": 10.0**step})
    assert len(lengths) == 1
