"""Limits are nested whatever was seen, and neither a first step nor a slip lengthens them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytron.actors.patience import BUILDING, EVALUATION, FLOOR_S, LOADING, SAVING, STEP, Patience

SECONDS = st.floats(0, 1e5)
PHASES = st.sampled_from([STEP, STEP, STEP, SAVING, EVALUATION, BUILDING, LOADING])
EVENTS = st.one_of(
    st.tuples(PHASES, SECONDS), st.tuples(st.just("answer"), SECONDS), st.tuples(st.just("begin"), st.floats(0, 8))
)


def after(events, **settings):
    patience = Patience(**settings)
    for what, value in events:
        if what == "begin":
            patience.begin(value)
        elif what == "answer":
            patience.answered(value)
        else:
            patience.saw(what, value)
    return patience


def steps(*seconds):
    return after([("begin", 1.0), (STEP, 40.0), *((STEP, x) for x in seconds)])


@given(st.lists(EVENTS, max_size=60), st.floats(0.01, 1000), st.floats(0.01, 1000), PHASES)
def test_limits_are_strictly_nested_for_any_history(events, unknown, heartbeat, phase):
    limits = after(events, unknown_s=unknown, heartbeat_s=heartbeat).limits(phase)
    assert 0 < limits.heartbeat < limits.progress < limits.collective < min(limits.build, limits.load)


@given(st.lists(EVENTS, max_size=60))
def test_a_collective_outlasts_every_phase_that_ranks_may_wait_in(events):
    patience = after(events)
    for phase in (STEP, SAVING, EVALUATION):
        assert patience.limits(phase).progress == patience.limit(phase) < patience.limits(STEP).collective


@given(st.lists(st.floats(0.01, 100), min_size=8, max_size=400))
def test_a_watchdog_waits_three_times_as_long_as_nearly_all_steps_took(seconds):
    limit = steps(*seconds).limits().progress
    kept = sorted(seconds[-300:])
    assert limit >= FLOOR_S
    assert sum(3 * x > limit for x in kept) <= max(1, len(kept) // 100)
    assert limit <= max(FLOOR_S, 3 * kept[-1])


@given(st.lists(st.floats(0.01, 100), min_size=7, max_size=50), st.floats(100, 1e6), st.integers(0, 50))
def test_one_long_step_changes_nothing(seconds, long, where):
    slipped = steps(*seconds[:where], long, *seconds[where:]).limits().progress
    assert slipped <= max(FLOOR_S, 3 * max(seconds))


def test_fast_steps_are_missed_after_five_seconds():
    assert steps(*[0.2] * 20).limits().progress == 5.0
    assert steps(*[4.0] * 20).limits().progress == 12.0


def test_little_is_known_of_few_steps():
    assert Patience(unknown_s=60).limits().progress == 60
    assert steps(0.2).limits().progress == 3 * 40.0  # as long as a first one
    assert steps(*[0.2] * 8).limits().progress == 5.0


def test_the_first_step_of_each_mesh_has_its_own_time():
    patience = steps(*[0.2] * 20)
    assert patience.limits().progress == 5.0
    patience.begin()
    assert patience.limits().progress == 120.0
    patience.saw(STEP, 30.0)
    assert patience.limits().progress == 5.0


def test_saving_and_evaluation_do_not_lengthen_a_step():
    patience = steps(*[0.2] * 20)
    for _ in range(20):
        patience.saw(SAVING, 50.0)
        patience.saw(EVALUATION, 20.0)
    assert patience.limits().progress == 5.0
    assert patience.limits(SAVING).progress == 150.0
    assert patience.limits().collective == 300.0


def test_a_smaller_mesh_is_given_more_time():
    patience = steps(*[4.0] * 20)
    patience.begin(slower=2.0)
    patience.saw(STEP, 10.0)
    assert patience.limits().progress == pytest.approx(24.0)


def test_slow_answers_of_a_busy_machine_are_no_silence():
    patience = steps(*[30.0] * 20)
    assert patience.limits().heartbeat == 2.0
    for _ in range(20):
        patience.answered(4.0)
    assert patience.limits().heartbeat == 12.0
