"""What counts against a run, what does not, and what stops it at once."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytron.actors.budget import Budget, Kind

HOUR = 3600.0


class Clock:
    """Time that passes when told to."""

    def __init__(self):
        self.now = 1e9

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_preemptions_never_count(clock):
    budget = Budget(most=0, tries=1, clock=clock)
    verdicts = [budget.judge(Kind.PREEMPTED, 5, "spot instance taken") for _ in range(100)]
    assert all(verdict.goes_on for verdict in verdicts)
    assert "for the 22nd time" in verdicts[21].why


def test_crashes_count_within_a_sliding_window(clock):
    budget = Budget(most=2, window_s=HOUR, clock=clock)
    for step in (10, 20):
        assert budget.judge(Kind.CRASHED, step, "rank 1 died").goes_on
        clock.now += 600
    stopped = budget.judge(Kind.CRASHED, 30, "rank 2 died")
    assert not stopped.goes_on
    assert stopped.why == "crashed too often, 3 of 2 in 1 hour; the last time: rank 2 died"


def test_crashes_are_forgiven_after_the_window(clock):
    budget = Budget(most=2, window_s=HOUR, clock=clock)
    for step in range(10, 500, 10):
        assert budget.judge(Kind.CRASHED, step, "rank 1 died").goes_on
        clock.now += HOUR / 2 + 1


def test_preemptions_between_crashes_do_not_fill_the_window(clock):
    budget = Budget(most=2, clock=clock)
    for step in (1, 2):
        assert budget.judge(Kind.CRASHED, step, "died").goes_on
        for _ in range(5):
            assert budget.judge(Kind.PREEMPTED, step, "notice").goes_on
    assert not budget.judge(Kind.CRASHED, 3, "died").goes_on


def test_the_same_failure_again_without_progress_stops_the_run_with_its_cause(clock):
    budget = Budget(most=10, clock=clock)
    assert budget.judge(Kind.FAILED, 40, "rank 1: CUDA out of memory. Tried to allocate 20 MiB at 0x7f3a").goes_on
    stopped = budget.judge(Kind.FAILED, 40, "rank 3: CUDA out of memory. Tried to allocate 24 MiB at 0x7e00")
    assert not stopped.goes_on
    assert "step 41" in stopped.why
    assert "rank 3: CUDA out of memory" in stopped.why


def test_the_same_failure_after_an_older_checkpoint_is_no_progress(clock):
    budget = Budget(most=10, clock=clock)
    assert budget.judge(Kind.FAILED, 40, "ValueError: bad sample").goes_on
    assert not budget.judge(Kind.FAILED, 30, "ValueError: bad sample").goes_on


def test_the_same_failure_later_on_only_counts(clock):
    budget = Budget(most=3, clock=clock)
    for step in (40, 41, 42):
        assert budget.judge(Kind.FAILED, step, "OSError: no answer").goes_on
    assert not budget.judge(Kind.FAILED, 43, "OSError: no answer").goes_on


def test_a_step_that_kills_whoever_tries_it_stops_the_run(clock):
    budget = Budget(most=10, tries=3, clock=clock)
    assert budget.judge(Kind.CRASHED, 7, "rank 0 died").goes_on
    assert budget.judge(Kind.PREEMPTED, 7, "spot").goes_on
    assert budget.judge(Kind.CRASHED, 7, "rank 1 was silent").goes_on
    stopped = budget.judge(Kind.FAILED, 7, "RuntimeError: bad")
    assert not stopped.goes_on
    assert "step 8 was tried 3 times" in stopped.why
    assert "rank 0 died; rank 1 was silent; RuntimeError: bad" in stopped.why


@given(st.lists(st.tuples(st.sampled_from([Kind.CRASHED, Kind.FAILED]), st.integers(0, 30), st.floats(0, 7200))))
def test_no_window_holds_more_losses_than_allowed(events):
    clock = Clock()
    budget = Budget(most=3, window_s=HOUR, tries=1000, clock=clock)
    survived = []
    for kind, step, wait in events:
        clock.now += wait
        if not budget.judge(kind, step, f"cause {len(survived)} {'x' * len(survived)}").goes_on:
            break
        survived.append(clock.now)
        assert sum(at > clock.now - HOUR for at in survived) <= 3


def test_a_new_controller_counts_on(clock):
    first = Budget(most=1, clock=clock)
    assert first.judge(Kind.CRASHED, 3, "died").goes_on
    second = Budget(most=1, clock=clock)
    second.restore(json.loads(json.dumps(first.facts())))
    assert not second.judge(Kind.CRASHED, 4, "died").goes_on
