"""All ranks die at once, while steps are much shorter than the controller's looks at them."""

from __future__ import annotations

import pytest
from fault_runs import assert_same_end, told
from test_lost_workers import redone

pytestmark = pytest.mark.recovery
SHORT = {"mesh.dp": 2, "steps": 120, "checkpoint.every": 60}
WAIT_S = 240


def test_no_step_is_lost_for_want_of_its_record(begin, undisturbed):
    """Their records lie beside the state: metrics.jsonl has them though nobody had asked for them."""
    lost_at = (25, 51, 99)
    faults = [f"kill rank {rank} in the forward of step {step}" for step in lost_at for rank in (0, 1)]
    run = begin(*faults, **SHORT)
    story = told(run, run.wait(timeout_s=WAIT_S))
    assert_same_end(story, undisturbed(**SHORT))
    assert story.result.restarts == len(lost_at)
    assert [event["source"] for event in story.all("workers")] == [None] + ["memory"] * len(lost_at)
    assert max(redone(story)) <= 1
    went_on = [event["step"] for event in story.all("workers")[1:]]
    assert all(step - 2 <= at <= step - 1 for step, at in zip(lost_at, went_on, strict=True))
    recorded = story.all("recorded")
    assert recorded, "at three losses, records of all steps before them were fetched in time: improbable"
    assert {event["last"] for event in recorded} <= set(went_on)
