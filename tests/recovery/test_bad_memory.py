"""What comes from memory is whole, and bad: the run goes on from disk, to the end of an undisturbed one."""

from __future__ import annotations

import pytest
from fault_runs import assert_same_end, told

pytestmark = pytest.mark.recovery
WHOLE = {"mesh.dp": 2, "steps": 12, "data_parallel.zero": 0}
FROM = {**WHOLE, "recovery.spares": 2, "checkpoint.background": False}
WAIT_S = 240

BAD = {
    "numbers that are bad in all runs of a step": ("ruin rank 1 in every restored", {}, "in each of 2 runs"),
    "numbers for which the run would stop": (
        "ruin rank 1 in every restored", {"guard.on_nonfinite": "stop"}, "in each of 2 runs",
    ),
    "numbers for which it would go back and skip": (
        "ruin rank 1 in every restored", {"guard.on_nonfinite": "rollback"}, "in each of 2 runs",
    ),
    "replicas that differ": (
        "flip rank 1 in every restored", {"guard.digest_every": 1}, "replicas hold different parameters",
    ),
    "an exception of a rank's own": ("break rank 1 in every restored", {}, "ZeroDivisionError"),
}  # fmt: skip


ALWAYS = ("numbers that are bad in all runs of a step", "replicas that differ")  # the others are slow


@pytest.mark.parametrize(
    "case", [case if case in ALWAYS else pytest.param(case, marks=pytest.mark.slow) for case in BAD]
)
def test_bad_memory_is_demoted(begin, undisturbed, case):
    fault, changes, why = BAD[case]
    run = begin("kill rank 0 in the forward of step 7", fault, **FROM, **changes)
    story = told(run, run.wait(timeout_s=WAIT_S))
    assert_same_end(story, undisturbed(**WHOLE))
    assert sources(story)[-1] == ("disk", 4)
    assert ("memory", 6) in sources(story) or case == "an exception of a rank's own", "that mesh was never built"
    (demoted,) = story.all("demoted")
    assert why in demoted["message"]
    assert not any(record.get("skipped") for record in story.result.metrics)
    assert story.result.restarts == 2


@pytest.mark.slow
def test_memory_whose_reading_kills_is_demoted_before_the_run_is_given_up(begin, undisturbed):
    run = begin(
        "kill rank 0 in the forward of step 7", "kill rank 1 in every restored", **{**FROM, "recovery.spares": 3}
    )
    story = told(run, run.wait(timeout_s=WAIT_S))
    assert_same_end(story, undisturbed(**WHOLE))
    assert sources(story) == [(None, 0), ("disk", 4)]
    assert len(story.all("demoted")) == 1
    assert story.result.restarts in (3, 4), (
        "the first loss may count for an older step, where the last were not heard of yet"
    )


def test_a_step_that_is_lost_again_is_tried_from_disk(begin, undisturbed):
    run = begin("kill rank 1 in the forward of step 7", "kill rank 0 in the second forward of step 7", **FROM)
    story = told(run, run.wait(timeout_s=WAIT_S))
    assert_same_end(story, undisturbed(**WHOLE))
    assert sources(story) == [(None, 0), ("memory", 6), ("disk", 4)]
    assert "came to nothing twice" in story.all("demoted")[0]["message"]


def sources(story):
    return [(event["source"], event["step"]) for event in story.all("workers")]
