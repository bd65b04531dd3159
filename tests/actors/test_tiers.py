"""Questions to keepers: those that are gone are not asked, and enough is enough."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace

import pytest
import ray

from raytron.actors import tiers
from raytron.actors.tiers import Memory
from raytron.config import RecoveryConfig


@ray.remote(num_cpus=0)
class Slow:
    """A keeper that takes its time."""

    def __init__(self, answer, seconds):
        self.answer, self.seconds = answer, seconds

    async def held(self):
        await asyncio.sleep(self.seconds)
        return self.answer


@pytest.fixture(scope="module")
def keepers(local_ray):
    """One answers at once, one after a second, one after a minute."""
    made = {name: Slow.remote(name, seconds) for name, seconds in (("a", 0.0), ("b", 1.0), ("c", 60.0))}
    ray.get([actor.__ray_ready__.remote() for actor in made.values()])
    yield made
    for actor in made.values():
        ray.kill(actor)


@pytest.fixture
def memory(keepers):
    told = []
    made = Memory("run", RecoveryConfig(), lambda kind, message, **facts: told.append(message))
    made.told, made.keepers = told, dict(keepers)
    return made


def test_sufficient_answers_are_waited_for_and_no_others(memory, monkeypatch):
    asked = []

    def enough(answers):
        asked.append(set(answers))
        return "a" in answers

    start = time.monotonic()
    assert memory._ask("held", enough=enough) == {"a": "a"}
    assert time.monotonic() - start < 1
    assert asked == [{"a"}]
    monkeypatch.setattr(tiers, "SETTLE_S", 5.0)  # the second one still comes
    assert memory._ask("held", limit_s=3, enough=enough) == {"a": "a", "b": "b"}


def test_who_is_gone_is_not_asked_and_not_waited_for(memory):
    gone = {"keeper-c"}
    memory.lines = SimpleNamespace(broke=lambda name: name in gone)
    memory.line_of = {"b": "keeper-b", "c": "keeper-c"}
    start = time.monotonic()
    assert memory._ask("held") == {"a": "a", "b": "b"}
    assert time.monotonic() - start < 5
    memory.keepers["b"] = memory.keepers["c"]
    gone.clear()
    memory.lines.broke = lambda name: time.monotonic() - start > 2  # while it is asked
    start = time.monotonic()
    assert memory._ask("held") == {"a": "a"}
    assert time.monotonic() - start < 5
    assert memory.told == []


def test_a_node_that_is_lost_has_no_keeper(memory):
    memory.folders, memory.line_of = {"a": "/a", "b": "/b"}, {"a": "line"}
    lost = memory.keepers["a"]
    memory.lose("a")
    memory.lose("a")
    assert set(memory.keepers) == {"b", "c"}
    assert (memory.folders, memory.line_of) == ({"b": "/b"}, {})
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(lost.held.remote(), timeout=10)
