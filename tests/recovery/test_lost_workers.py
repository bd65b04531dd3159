"""A worker dies, stops or hangs, at a named phase: the run goes on by itself, to the end of an undisturbed one."""

from __future__ import annotations

import pytest
from fault_runs import assert_same_end, told

pytestmark = pytest.mark.recovery
MESH = {"mesh.dp": 2}
SPARE = {**MESH, "recovery.spares": 1}


@pytest.mark.parametrize(
    "fault",
    [
        "kill rank 1 in the forward of step 6",
        "kill rank 0 in the all-reduce of step 3",
    ],
)
def test_a_killed_rank_is_replaced(begin, undisturbed, fault):
    run = begin(fault, **SPARE)
    result = run.wait(timeout_s=90)
    assert_same_end(told(run, result), undisturbed(**MESH))
    assert result.restarts == 1


@pytest.mark.parametrize(
    "fault",
    [
        "stop rank 1 in the forward of step 6",
        "seize rank 1 in the forward of step 6",
    ],
)
def test_a_rank_that_does_not_answer_is_replaced(begin, undisturbed, fault):
    run = begin(fault, **SPARE)
    story = told(run, run.wait(timeout_s=90))
    assert_same_end(story, undisturbed(**MESH))
    assert "no sign of life" in story.all("lost")[0]["message"]
