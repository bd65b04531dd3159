"""Workers die, stop or hang, at named phases: the run goes on by itself, to the end of an undisturbed one."""

from __future__ import annotations

from pathlib import Path

import pytest
from fault_runs import assert_same_end, told

from raytron.checkpoint.catalog import committed
from raytron.errors import ClusterError

pytestmark = pytest.mark.recovery
TWO = {"mesh.dp": 2, "steps": 12}
WAIT_S = 240  # of a run on a machine that has other work

KILLED = {
    "in each phase of a step": (
        "kill rank 1 in the forward of step 2",
        "kill rank 0 in the all-reduce of step 5",
        "kill rank 1 in the optimizer of step 8",
    ),
    "while another loss is mended": (
        "kill rank 1 in the forward of step 3",
        "kill rank 0 in the second build",
        "kill rank 1 in the load",
    ),
    "while a checkpoint is written": (
        "kill rank 1 in the write of step 4",
        "kill rank 0 in the publish of step 8",
        "kill rank 0 in the published of step 12",
    ),
}


@pytest.mark.parametrize("case", KILLED)
def test_killed_ranks_are_replaced(begin, undisturbed, case):
    run = begin(*KILLED[case], **TWO, **{"recovery.spares": 3})
    story = told(run, run.wait(timeout_s=WAIT_S))
    assert_same_end(story, undisturbed(**TWO))
    assert story.result.restarts in (2, 3), "two that die in one recovery are one loss, or two"
    assert sources(story) == {"memory"}
    assert max(redone(story)) <= 1, "at most one step is done again"
    found = list(Path(run.run_dir, "checkpoints").iterdir())
    assert {generation.path for generation in committed(run.run_dir / "checkpoints")} == set(found), (
        "nothing else is left"
    )


@pytest.mark.slow
def test_all_ranks_die_at_once_and_no_spare_waits(begin, undisturbed):
    run = begin("kill rank 0 in the forward of step 6", "kill rank 1 in the forward of step 6", **TWO)
    story = told(run, run.wait(timeout_s=WAIT_S))
    assert_same_end(story, undisturbed(**TWO))
    assert story.result.restarts == 1
    assert sources(story) == {"memory"}


@pytest.mark.parametrize("zero", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_what_only_the_dead_rank_held_comes_out_of_its_memory(begin, undisturbed, zero):
    changes = {**TWO, "data_parallel.zero": zero}
    run = begin(
        "kill rank 1 in the forward of step 4",
        "kill rank 0 in the optimizer of step 7",
        **changes,
        **{"recovery.spares": 2},
    )
    story = told(run, run.wait(timeout_s=WAIT_S))
    assert_same_end(story, undisturbed(**changes))
    assert sources(story) == {"memory"}


@pytest.mark.parametrize("axis", ["pp", pytest.param("tp", marks=pytest.mark.slow)])
def test_a_part_of_the_model_comes_out_of_the_dead_ranks_memory(begin, undisturbed, axis):
    changes = {f"mesh.{axis}": 2, "steps": 12}
    run = begin(
        "kill rank 1 in the forward of step 4",
        "kill rank 0 in the all-reduce of step 7",
        **changes,
        **{"recovery.spares": 2},
    )
    story = told(run, run.wait(timeout_s=WAIT_S))
    assert_same_end(story, undisturbed(**changes))
    assert sources(story) == {"memory"}


def test_without_memory_a_run_goes_on_from_disk(begin, undisturbed):
    """A rank that dies while it loads is replaced, too."""
    run = begin(
        "kill rank 1 in the forward of step 7",
        "kill rank 0 in the load",
        **TWO,
        **{"recovery.spares": 2, "recovery.memory_every": None, "checkpoint.background": False},
    )
    story = told(run, run.wait(timeout_s=WAIT_S))
    assert_same_end(story, undisturbed(**TWO))
    assert [(event["source"], event["step"]) for event in story.all("workers")] == [(None, 0), ("disk", 4)]
    assert story.result.restarts == 2


@pytest.mark.slow
def test_memory_of_every_second_step_gives_the_newest_whole_one(begin, undisturbed):
    run = begin("kill rank 1 in the forward of step 8", **TWO, **{"recovery.spares": 1, "recovery.memory_every": 2})
    story = told(run, run.wait(timeout_s=WAIT_S))
    assert_same_end(story, undisturbed(**TWO))
    assert [(event["source"], event["step"]) for event in story.all("workers")] == [(None, 0), ("memory", 6)]


def test_ranks_that_do_not_answer_are_replaced(begin, undisturbed):
    """Stopped by a signal; busy in C without letting go of the interpreter."""
    run = begin(
        "stop rank 1 in the forward of step 4",
        "seize rank 0 in the forward of step 8",
        **TWO,
        **{"recovery.spares": 2},
    )
    story = told(run, run.wait(timeout_s=WAIT_S))
    assert_same_end(story, undisturbed(**TWO))
    assert [("no sign of life" in event["message"], event["ranks"]) for event in story.all("lost")] == [
        (True, [1]),
        (True, [0]),
    ]


def test_a_rank_that_gets_nowhere_is_replaced(begin, undisturbed):
    """It answers; the others wait for it in a collective, and are not blamed."""
    run = begin("hang rank 1 in the forward of step 6", **TWO, **{"recovery.spares": 1})
    story = told(run, run.wait(timeout_s=WAIT_S))
    assert_same_end(story, undisturbed(**TWO))
    (lost,) = story.all("lost")
    assert lost["ranks"] == [1]
    assert "no progress" in lost["message"]


@pytest.mark.slow
def test_a_step_that_kills_its_rank_again_and_again_ends_the_run(begin):
    run = begin("kill rank 1 in every forward of step 3", **TWO, **{"recovery.spares": 3})
    with pytest.raises(ClusterError, match="step 3 was tried 3 times and never committed"):
        run.wait(timeout_s=WAIT_S)
    assert [event["event"] for event in run.events()].count("restart") == 2


def sources(story):
    """Where the meshes after the first one went on from."""
    return {event["source"] for event in story.all("workers")[1:]}


def redone(story):
    """Steps that were done again after each restart."""
    told = [event for event in story.events if event["event"] in ("restart", "redo")]
    counts = []
    for event in told:
        if event["event"] == "restart":
            counts.append(0)
        else:
            counts[-1] = event["last"] - event["first"] + 1
    return counts
