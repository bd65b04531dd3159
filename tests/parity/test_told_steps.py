"""The records that rank 0 keeps beside its state are those that it gives to its driver."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_checkpoint_meshes import config_of as dense
from test_checkpoint_meshes import trainer_of

from raytron.checkpoint.sources import survey
from raytron.config import RunConfig

STEPS, KNOWN = 5, 2
TIMES = ("step_time_s", "tokens_per_s", "request")


def without_times(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in TIMES}


def train(rank: int, config: RunConfig, folder: Path) -> tuple[list[Any], dict[int, list[Any]]]:
    """The records that are given, and those in the segment of each step that is still there."""
    trainer = trainer_of(rank, config)
    trainer.open_replicas(folder / str(rank), 1, lambda: KNOWN)
    records = [trainer.train_step() for _ in range(STEPS)]
    found = {held.step: list(held.head.notes) for held in survey(folder / str(rank), "here").held}
    parked = trainer.park()
    (again,) = [held for held in survey(folder / str(rank), "here").held if held.path == str(parked)]
    trainer.close_replicas()
    assert [note["step"] for note in again.head.notes] == [note["step"] for note in found.get(again.step, [])]
    return records, found


@pytest.mark.parametrize("at_once", [False, True])
def test_a_segment_tells_of_the_steps_up_to_its_own(world, tmp_path, at_once):
    config = dense({"mesh.dp": 2, "optimizer.at_once": at_once, "optimizer.clip_norm": None})
    (records, found), (_, others) = world.run(2, train, config, tmp_path)
    told = {record["step"]: without_times(record) for record in records if record is not None}
    newest = STEPS - at_once
    assert sorted(found) == [newest - 1, newest]
    for step, notes in found.items():
        assert [note["step"] for note in notes] == list(range(KNOWN + 1, step + 1))
        assert [without_times(note) for note in notes] == [told[note["step"]] for note in notes]
        assert all(note["step_time_s"] > 0 for note in notes)
    assert set(map(len, others.values())) == {0}, "one rank tells for all"
