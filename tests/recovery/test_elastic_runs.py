"""A run that goes on with the workers that are left, and takes in those that come."""

from __future__ import annotations

import pytest
from fault_runs import assert_same_end, told

pytestmark = pytest.mark.recovery
ELASTIC = {"mesh.dp": 2, "elastic.min_workers": 1, "elastic.max_workers": 2, "elastic.grow_after_s": 1, "steps": 24}


def test_a_run_shrinks_at_once_and_grows_again_with_the_same_losses(begin, undisturbed):
    """dp 2 → 1 → 2: canonical sums keep the losses to the bit."""
    run = begin("kill rank 1 in the forward of step 3", "slow rank 0 in every forward", **ELASTIC)
    story = told(run, run.wait(timeout_s=150))
    assert_same_end(story, undisturbed(**{"mesh.dp": 2, "steps": 24}))
    meshes = [event["mesh"].split("·")[1] for event in story.all("workers")]
    assert meshes == ["DP2", "DP1", "DP2"]
    assert "1 worker left" in story.all("mesh")[0]["message"]
    assert story.result.restarts == 1
