"""What is held against a state that came from memory, and what is not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from raytron.actors.budget import Kind
from raytron.actors.memory_records import choose_told
from raytron.actors.probation import PROBATION, Probation
from raytron.actors.tiers import Memory
from raytron.checkpoint.sources import MemoryGeneration
from raytron.config import RecoveryConfig


def generation(step: int) -> MemoryGeneration:
    return MemoryGeneration(1, step, {}, "one", (), {})


def begun(source: Any, *, stands: bool = True) -> Probation:
    probation = Probation()
    probation.begin(1, source)
    if stands:
        probation.stands()
    return probation


def test_only_memory_is_on_probation_and_only_for_its_first_steps():
    assert not begun(None).suspects(0)
    probation = begun(generation(7))
    assert [probation.suspects(7 + step) for step in range(PROBATION + 1)] == [True] * PROBATION + [False]


@pytest.mark.parametrize(
    ("more", "doubted"),
    [
        ({}, False),
        ({"rerun": {"transient": True, "message": "once"}}, False),
        ({"rerun": {"transient": False, "message": "always"}}, True),
        ({"replicas": {"agrees": True, "message": "alike"}}, False),
        ({"replicas": {"agrees": False, "message": "different"}}, True),
    ],
)
def test_what_a_step_says_against_its_state(more, doubted):
    for step in (8, 7 + PROBATION):
        probation = begun(generation(7))
        probation.saw({"step": step, **more})
        assert (probation.take() is not None) == doubted
        assert probation.take() is None
    late = begun(generation(7))
    late.saw({"step": 8 + PROBATION, **more})
    assert late.take() is None


def test_one_crash_is_bad_luck_and_a_second_without_a_step_between_is_not():
    probation = begun(None)
    probation.lost(Kind.CRASHED)
    assert probation.verdict(7) is None
    for kind, stands, step, doubted in (
        (Kind.CRASHED, True, 7, True),
        (Kind.CRASHED, True, 8, False),  # a step of progress
        (Kind.PREEMPTED, True, 8, False),
        (Kind.CRASHED, False, 8, False),  # it had read nothing
        (Kind.CRASHED, True, 8, True),
    ):
        probation.begin(2, generation(step))
        if stands:
            probation.stands()
        probation.lost(kind)
        assert (probation.verdict(step) is not None) == doubted, (kind, stands, step)


def test_what_was_demoted_is_not_used_and_a_later_mesh_is_when_it_has_trained(monkeypatch):
    told = []
    memory = Memory("run", RecoveryConfig(), lambda kind, message, **facts: told.append((kind, message)))
    looked = []

    def choose(held: Any, up_to: int, later_of: int | None) -> Any:
        looked.append([(each.epoch, each.step) for each in held])
        return choose_told([], up_to, later_of)

    held = [SimpleNamespace(epoch=epoch, step=step) for epoch in (1, 2, 3) for step in (4, 5, 6, 7, 8)]
    monkeypatch.setattr("raytron.actors.tiers.choose_told", choose)
    monkeypatch.setattr(memory, "_ask", lambda method, **_: {"node": SimpleNamespace(held=held, passed_over=[])})
    memory.newest(8)
    memory.stood(4)
    memory.newest(8)
    assert len(looked[0]) == len(looked[1]) == 15, "what stands has no say where nothing was demoted"
    memory.demote(2, "bad numbers")
    assert told == [("demoted", "what memory holds is not used: bad numbers")]
    assert memory.newest(8) is None
    assert len(looked) == 2, "it is not even asked"
    memory.stood(4)
    memory.newest(8)
    assert looked[2] == [(3, step) for step in (4, 5, 6, 7, 8) if step >= 4 + PROBATION]
