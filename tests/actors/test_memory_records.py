"""Steps that only memory tells of: taken with their records, or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raytron.actors.memory_records import choose_told, untold
from raytron.checkpoint.coverage import Box
from raytron.checkpoint.memory import segment_name
from raytron.checkpoint.segment import Inventory, Origin, Part, SegmentFile
from raytron.checkpoint.sources import Held, survey

WHOLE = Inventory.of({"a": ("F32", (2,))})


def write(folder: Path, step: int, records: list[int], *, rank: int = 0, epoch: int = 5, buffer: int = 0) -> None:
    """Half of a state of two ranks; rank 0 tells of steps."""
    part = Part("a", "F32", (2,), Box((rank,), (1,)))
    path = folder / segment_name(epoch, rank, buffer)
    file = SegmentFile(path, Origin(epoch, rank, 2, "dp2", WHOLE), [part], 99, 10_000)
    file.publish(step, {"step": step}, [json.dumps({"step": each, "loss": each / 3}).encode() for each in records])


def held_in(folder: Path) -> list[Held]:
    found = survey(folder, "here")
    assert not found.passed_over
    return found.held


def chosen(folder: Path, known: int, epoch: int | None = 5) -> Any:
    generation = choose_told(held_in(folder), known, epoch).generation
    return None if generation is None else generation.step


@pytest.fixture
def four_and_five(tmp_path):
    """Both ranks have step 4 and step 5; rank 0 tells of what came after 2."""
    for rank in range(2):
        write(tmp_path, 4, [3, 4] * (rank == 0), rank=rank, buffer=0)
        write(tmp_path, 5, [3, 4, 5] * (rank == 0), rank=rank, buffer=1)
    return tmp_path


def test_the_newest_step_is_taken_with_the_records_that_lead_to_it(four_and_five):
    generation = choose_told(held_in(four_and_five), 2, 5).generation
    assert generation is not None
    assert generation.step == 5
    assert untold(generation, 2) == [{"step": step, "loss": step / 3} for step in (3, 4, 5)]
    assert untold(generation, 5) == []


@pytest.mark.parametrize("known", [4, 5, 9])
def test_what_is_known_needs_no_record(four_and_five, known):
    assert chosen(four_and_five, known) == 5
    assert chosen(four_and_five, known, epoch=None) == min(known, 5)


def test_without_the_record_of_a_step_between_it_is_not_taken(four_and_five):
    assert chosen(four_and_five, 1) is None


def test_steps_of_another_epoch_do_not_follow_from_what_is_known(four_and_five):
    assert chosen(four_and_five, 4, epoch=6) == 4
    assert chosen(four_and_five, 4, epoch=None) == 4


def test_a_step_that_is_not_whole_is_left_for_the_one_before(tmp_path):
    for rank in range(2):
        write(tmp_path, 4, [3, 4] * (rank == 0), rank=rank, buffer=0)
    write(tmp_path, 5, [3, 4, 5], buffer=1)
    assert chosen(tmp_path, 2) == 4
