"""Another mesh, asked for while the run is at work."""

from __future__ import annotations

import time

import pytest
from fault_runs import assert_same_end, told

from raytron.errors import ConfigError

pytestmark = pytest.mark.recovery


def test_a_live_run_takes_another_mesh_on_command(begin, undisturbed):
    """dp 2 → 1 → 2: canonical sums keep the losses to the bit. What can't be is refused, and nothing changes."""
    run = begin("slow rank 0 in every forward", **{"mesh.dp": 2})
    reach(run, 1)
    with pytest.raises(ConfigError, match=r"model.layers: can't be changed while the run is at work"):
        run.remesh(**{"model.layers": 3})
    with pytest.raises(ConfigError, match="heads"):
        run.remesh(**{"mesh.tp": 3})
    assert "1 worker" in run.remesh(**{"mesh.dp": 1})
    built(run, 2)
    run.remesh(**{"mesh.dp": 2})
    story = told(run, run.wait(timeout_s=90))
    assert_same_end(story, undisturbed(**{"mesh.dp": 2}))
    assert [event["mesh"].split("·")[1] for event in story.all("workers")] == ["DP2", "DP1", "DP2"]
    assert story.result.restarts == 0


def built(run, times, timeout_s=60.0):
    deadline = time.monotonic() + timeout_s
    while sum(event["event"] == "workers" for event in run.events()) < times:
        assert time.monotonic() < deadline, run.status()
        time.sleep(0.02)


def reach(run, step, timeout_s=60.0):
    deadline = time.monotonic() + timeout_s
    while run.status()["step"] < step:
        assert time.monotonic() < deadline, run.status()
        time.sleep(0.02)
