"""What is no loss of a worker: full disks, damaged copies, bad numbers, exceptions of a worker's own."""

from __future__ import annotations

from collections import Counter

import pytest
from fault_runs import assert_same_end, told

from raytron.checkpoint.catalog import committed, newest_good, verify
from raytron.errors import WorkerError

pytestmark = pytest.mark.recovery
TWO = {"mesh.dp": 2, "steps": 12}
WHOLE = {**TWO, "data_parallel.zero": 0}  # weights that are gathered before use would be healed by that
WAIT_S = 240


def test_training_goes_on_when_checkpoints_cannot_be_written(begin, undisturbed):
    """Disk full on one rank, a bad disk on the other, behind the training; what was committed before stays good."""
    run = begin(
        "fill the disk of rank 1 in the write of step 6",
        "spoil the disk of rank 0 in the write of step 9",
        **TWO,
        **{"checkpoint.every": 3},
    )
    story = told(run, run.wait(timeout_s=WAIT_S))
    assert_same_end(story, undisturbed(**TWO))
    assert story.result.restarts == 0
    assert [event["step"] for event in story.all("checkpoint_failed")] == [6, 9]
    assert "rank 1" in story.all("checkpoint_failed")[0]["message"]
    assert "No space left on device" in story.all("checkpoint_failed")[0]["message"]
    assert "Input/output error" in story.all("checkpoint_failed")[1]["message"]
    generations = committed(run.run_dir / "checkpoints")
    assert sorted(generation.step for generation in generations) == [3, 12]
    for generation in generations:
        verify(generation)
    assert len(list((run.run_dir / "checkpoints").iterdir())) == 2, "what failed leaves nothing"


def test_an_exception_of_a_workers_own_stops_the_run_with_its_cause(begin):
    run = begin("break rank 1 in every forward of step 3", **TWO, **{"recovery.spares": 1})
    with pytest.raises(WorkerError, match=r"rank 1 \(stage 0, step 3\): ZeroDivisionError: a fault that was asked for"):
        run.wait(timeout_s=WAIT_S)
    assert not {"lost", "restart"} & {event["event"] for event in run.events()}


def test_a_number_that_was_bad_once_leaves_no_trace(begin, undisturbed):
    run = begin("poison rank 1 in the forward of step 5", **WHOLE)
    story = told(run, run.wait(timeout_s=WAIT_S))
    assert_same_end(story, undisturbed(**WHOLE))
    (said,) = story.all("guard")
    assert "a transient fault" in said["message"]


def test_a_step_whose_numbers_are_bad_each_time_is_skipped_and_counted(begin):
    run = begin("poison rank 1 in every forward of step 5", **WHOLE)
    story = told(run, run.wait(timeout_s=WAIT_S))
    records = story.result.metrics
    assert [record["step"] for record in records] == list(range(1, 13))
    assert [record["step"] for record in records if record.get("skipped")] == [5]
    assert records[-1]["skipped_steps"] == 1
    assert story.samples == Counter(range(48)), "its samples are used up, as any other step's"


def test_damaged_memory_is_passed_over_for_the_step_before(begin, undisturbed):
    run = begin(
        "damage the memory of rank 1 in the forward of step 7",
        "kill rank 1 in the all-reduce of step 7",
        **TWO,
        **{"recovery.spares": 1},
    )
    story = told(run, run.wait(timeout_s=WAIT_S))
    assert_same_end(story, undisturbed(**TWO))
    assert [(event["source"], event["step"]) for event in story.all("workers")] == [(None, 0), ("memory", 5)]
    assert story.all("damaged")


def test_where_all_memory_is_damaged_disk_takes_its_place(begin, undisturbed):
    run = begin(
        "damage the memory of rank 1 in every forward",
        "kill rank 1 in the all-reduce of step 7",
        **TWO,
        **{"recovery.spares": 1, "checkpoint.background": False},
    )
    story = told(run, run.wait(timeout_s=WAIT_S))
    assert_same_end(story, undisturbed(**TWO))
    assert [(event["source"], event["step"]) for event in story.all("workers")] == [(None, 0), ("disk", 4)]


def test_a_run_goes_on_from_the_newest_checkpoint_that_verifies(begin, undisturbed):
    """The newest one has a flipped bit: the one before it is taken, and that is told."""
    fixed = {**TWO, "lr.decay_steps": 12}
    before = begin(**{**fixed, "steps": 8})
    before.wait(timeout_s=WAIT_S)
    newest = newest_good(before.run_dir / "checkpoints")
    assert newest.step == 8
    flip_a_bit(next(path for path in sorted(newest.path.rglob("*")) if path.suffix == ".safetensors"))
    run = begin(**fixed, run_dir=str(before.run_dir))
    story = told(run, run.wait(timeout_s=WAIT_S))
    assert_same_end(story, undisturbed(**TWO))
    assert newest.path.name in story.all("damaged")[0]["message"]
    assert [(event["source"], event["step"]) for event in story.all("workers")] == [(None, 0), ("disk", 4)]


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-10] ^= 4
    path.write_bytes(data)
