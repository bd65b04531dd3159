"""The controller itself dies: workers train on, are adopted by the one that Ray starts again, and nothing is lost."""

from __future__ import annotations

import os
import signal
import time

import pytest
import ray
from fault_runs import assert_same_end, told

from raytron.actors.adoption import names

pytestmark = pytest.mark.recovery
SLOW = "slow rank 0 in every forward"


def reach(run, step, timeout_s=60.0):
    deadline = time.monotonic() + timeout_s
    while run.status()["step"] < step:
        assert time.monotonic() < deadline, run.status()
        time.sleep(0.05)


def built(run, times, timeout_s=60.0):
    deadline = time.monotonic() + timeout_s
    while sum(event["event"] == "workers" for event in run.events()) < times:
        assert time.monotonic() < deadline, run.status()
        time.sleep(0.02)


def kill_controller(run):
    """It is at work in its default group, which answers nothing else."""
    call = run._controller.__ray_call__.options(concurrency_group="ctl")
    os.kill(ray.get(call.remote(lambda self: os.getpid())), signal.SIGKILL)


def test_workers_are_adopted_and_no_step_is_lost(begin, undisturbed):
    """It dies twice, the second time as soon as it may."""
    run = begin(SLOW, **{"mesh.dp": 2, "steps": 16})
    for times in (1, 2):
        built(run, times)
        reach(run, 3)
        kill_controller(run)
    story = told(run, run.wait(timeout_s=120))
    assert_same_end(story, undisturbed(**{"mesh.dp": 2, "steps": 16}))
    assert [event["why"] for event in story.all("lost")] == ["the controller died and was started again"] * 2
    assert len({tuple(event["pids"].values()) for event in story.all("workers")}) == 1
    assert {event["source"] for event in story.all("workers")[1:]} == {"memory"}
    assert not story.all("redo")


def test_a_worker_that_dies_with_the_controller_is_replaced(begin, undisturbed):
    run = begin(SLOW, **{"mesh.dp": 2, "steps": 10})
    reach(run, 3)
    pids = [event for event in run.events() if event["event"] == "workers"][-1]["pids"]
    kill_controller(run)
    os.kill(pids["1"], signal.SIGKILL)
    story = told(run, run.wait(timeout_s=120))
    assert_same_end(story, undisturbed(**{"mesh.dp": 2, "steps": 10}))
    assert story.all("lost")[0]["ranks"] == [1]
    before, after = story.all("workers")
    assert before["pids"]["0"] == after["pids"]["0"]


@pytest.mark.slow
def test_the_checkpoint_under_way_is_ended_before_the_mesh_is_left(begin, undisturbed):
    """Its bytes are slow to be written; meanwhile the controller dies, and another one comes."""
    changes = {"mesh.dp": 2, "steps": 24, "checkpoint.every": 8}
    run = begin(SLOW, *["slow rank 0 in every write of step 8"] * 18, **changes)
    reach(run, 9)
    kill_controller(run)
    story = told(run, run.wait(timeout_s=120))
    assert_same_end(story, undisturbed(**changes))
    (lost,), (_, adopted) = story.all("lost"), story.all("workers")
    saved = {event["step"]: event for event in story.all("checkpoint")}
    assert lost["time"] < saved[8]["time"] < adopted["time"]
    assert set(saved) == {8, 16, 24}


def test_workers_end_themselves_when_the_controller_is_gone_for_good(begin):
    run = begin(SLOW, **{"mesh.dp": 2, "steps": 100, "recovery.lease_s": 5.0})
    reach(run, 2)
    assert len(names(run.name)) == 3  # and a keeper
    ray.kill(run._controller)
    deadline = time.monotonic() + 30
    while names(run.name):
        assert time.monotonic() < deadline, names(run.name)
        time.sleep(0.2)
