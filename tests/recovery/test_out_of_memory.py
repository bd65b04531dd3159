"""A rank runs out of memory: the run stops and says why, or goes on once with more recomputation."""

from __future__ import annotations

import pytest
from fault_runs import assert_same_end, told

from raytron.config import load
from raytron.errors import OutOfMemoryError

pytestmark = pytest.mark.recovery
TWO = {"mesh.dp": 2, "steps": 8, "model.norm": "layernorm"}  # whose recomputation is equal to the bit on a CPU, too
FULL_AT_3 = "exhaust rank 1 in every forward of step 3"  # unless whole blocks are recomputed
WAIT_S = 240


def test_it_is_retried_with_more_recomputation_to_the_same_end(begin, undisturbed):
    run = begin(FULL_AT_3, **TWO, **{"memory.recompute": "selective", "recovery.on_out_of_memory": "recompute"})
    story = told(run, run.wait(timeout_s=WAIT_S))
    assert_same_end(story, undisturbed(**TWO))
    (relief,) = story.all("relief")
    assert "stage 0, step 3, forward and backward" in relief["message"]
    assert "the plan had predicted" in relief["message"]
    assert relief["rank"] == 1
    assert relief["changes"]["memory.recompute"] == "full"
    assert story.result.restarts == 1
    assert [event["step"] for event in story.all("workers")] == [0, 2], "nothing is done again"
    assert load(run.run_dir / "config.yaml").memory.recompute == "full", "whoever resumes the run needs it, too"


@pytest.mark.slow
def test_it_is_retried_once_alone(begin):
    """From none to selective, which is not enough here."""
    run = begin(FULL_AT_3, **TWO, **{"recovery.on_out_of_memory": "recompute"})
    with pytest.raises(OutOfMemoryError, match=r"rank 1 \(stage 0, step 3, forward and backward\)") as raised:
        run.wait(timeout_s=WAIT_S)
    assert "memory.recompute=selective was not enough" in str(raised.value)
    kinds = [event["event"] for event in run.events()]
    assert (kinds.count("relief"), kinds.count("restart")) == (1, 1)


def test_unless_asked_to_go_on_a_run_stops(begin):
    run = begin(FULL_AT_3, **TWO, **{"recovery.spares": 1})
    with pytest.raises(OutOfMemoryError, match="the plan had predicted") as raised:
        run.wait(timeout_s=WAIT_S)
    assert "recovery.on_out_of_memory=recompute" in str(raised.value)
    assert not {"lost", "restart", "relief"} & {event["event"] for event in run.events()}
