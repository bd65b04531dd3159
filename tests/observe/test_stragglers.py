"""Who is slow, told from how long ranks were busy: no noise is, half speed is within ten steps."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytron.config import RunConfig
from raytron.observe.stragglers import Stragglers
from raytron.plan.plan import make_plan

RANKS = 8


class Noise:
    """Busy times of a healthy cluster: spread, heavy tails, garbage collection, and a rank that writes checkpoints."""

    def __init__(self, seed, base_s=0.2):
        self.random, self.base_s = random.Random(seed), base_s

    def step(self, number, ranks=RANKS, slow=None):
        shared = self.random.lognormvariate(0, 0.2)  # the batch, which all share
        return {rank: self.one(number, rank, shared) * (slow or {}).get(rank, 1.0) for rank in range(ranks)}

    def one(self, number, rank, shared):
        busy = self.base_s * shared * self.random.lognormvariate(0, 0.08)
        if self.random.random() < 0.03:
            busy *= self.random.paretovariate(1.2)  # up to very long
        if self.random.random() < 0.02:
            busy += 0.5  # a pause of the interpreter
        if rank == 0 and number % 10 == 0:
            busy += 1.0  # saving
        return busy


def watch(steps, ranks=RANKS, limit=1.5, **settings):
    stragglers = Stragglers(**({"stages": [0] * ranks, "work": [1.0] * ranks, "limit": limit} | settings))
    return [change for number, busy in enumerate(steps) for change in stragglers.saw(number, busy)]


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("seed", range(10))
def test_noise_flags_nobody_in_500_steps(seed, ranks):
    noise = Noise(seed)
    assert watch((noise.step(number, ranks) for number in range(500)), ranks) == []


@settings(max_examples=60, derandomize=True)  # a claim about noise, which a rare seed misses by a step
@given(st.integers(0, 10**6), st.integers(0, RANKS - 1), st.floats(2.0, 20.0), st.sampled_from([0.05, 0.3, 5.0]))
def test_half_speed_is_flagged_within_ten_steps_and_forgiven_after(seed, slow, factor, base_s):
    noise = Noise(seed, base_s)
    factors = [{slow: factor} if 50 <= number < 100 else {} for number in range(150)]
    changes = watch(noise.step(number, slow=factors[number]) for number in range(150))
    assert [(change.rank, change.slow) for change in changes] == [(slow, True), (slow, False)]
    assert 50 <= changes[0].step < 60
    assert 40 <= changes[0].since <= 53
    assert changes[0].ratio >= 1.5
    assert 100 <= changes[1].step < 125


@pytest.mark.parametrize("seed", range(5))
def test_one_that_is_slow_every_other_step_is_flagged_later(seed):
    noise = Noise(seed)
    changes = watch(noise.step(number, slow={3: 3.0} if number % 2 else {}) for number in range(60))
    assert [(change.rank, change.slow) for change in changes] == [(3, True)]
    assert changes[0].step <= 40


@pytest.mark.parametrize("seed", range(5))
def test_two_slow_ranks_of_eight_are_both_flagged(seed):
    noise = Noise(seed)
    changes = watch(noise.step(number, slow={2: 2.0, 5: 2.5}) for number in range(30))
    assert {change.rank for change in changes} == {2, 5}


def test_one_of_two_is_told_from_the_other():
    changes = watch([{0: 1.0, 1: 2.0}] * 20, ranks=2)
    assert [change.rank for change in changes] == [1]
    assert str(changes[0]) == "rank 1 is busy 1.7 × as long as rank 0, since step 0"


def test_what_all_share_is_nobodys():
    assert watch([dict.fromkeys(range(4), 1.0 if number < 20 else 30.0) for number in range(40)], ranks=4) == []


def test_a_few_milliseconds_are_nothing():
    assert watch([{0: 0.001, 1: 0.004}] * 50, ranks=2) == []


def test_peers_are_those_of_the_same_stage():
    changes = watch([{0: 1.0, 1: 1.0, 2: 4.0, 3: 4.0}] * 20, ranks=4, stages=[0, 0, 1, 1])
    assert changes == []
    changes = watch([{0: 1.0, 1: 1.0, 2: 4.0, 3: 8.0}] * 20, ranks=4, stages=[0, 0, 1, 1])
    assert [(change.rank, change.peers) for change in changes] == [(3, (2,))]


def test_without_peers_of_a_stage_work_is_weighed():
    even = [{0: 1.0, 1: 3.0, 2: 1.0}] * 20
    assert watch(even, ranks=3, stages=[0, 1, 2], work=[1.0, 3.0, 1.0]) == []
    assert [change.rank for change in watch(even, ranks=3, stages=[0, 1, 2])] == [1]


def test_less_work_need_not_take_less_time():
    """What does not depend on how much there is: the optimizer, the interpreter."""
    assert watch([{0: 1.0, 1: 0.9, 2: 0.9}] * 20, ranks=3, work=[3.0, 1.0, 1.0]) == []


def test_a_plan_says_who_has_how_much_work():
    config = RunConfig().replace(**{"mesh.pp": 2, "mesh.dp": 2, "model.layers": 3, "global_batch_size": 7})
    stragglers = Stragglers.of(make_plan(config, None), 1.5)
    assert stragglers.peers == {0: (1,), 1: (0,), 2: (3,), 3: (2,)}
    assert stragglers.work[0] / stragglers.work[1] == pytest.approx(4 / 3)
    assert stragglers.work[0] != stragglers.work[2]


def test_ranks_are_heard_one_by_one_and_twice():
    stragglers, changes = Stragglers([0, 0], [1.0, 1.0], 1.5), []
    slow = [(step, 2.0) for step in range(1, 21)]
    changes += stragglers.heard(0, [(step, 1.0) for step in range(1, 21)])
    assert changes == []
    changes += stragglers.heard(1, slow[:5])
    changes += stragglers.heard(1, slow)
    assert [(change.rank, change.step) for change in changes] == [(1, 7)]
    assert stragglers.flagged.keys() == {1}
    assert stragglers.heard(1, slow) == []


def test_a_rank_that_is_never_heard_does_not_fill_memory():
    stragglers = Stragglers([0, 0], [1.0, 1.0], 1.5)
    stragglers.heard(0, [(step, 1.0) for step in range(5000)])
    assert len(stragglers._pending) <= 1000


def test_alone_nobody_is_slow():
    assert watch([{0: 1.0}] * 20, ranks=1) == []
