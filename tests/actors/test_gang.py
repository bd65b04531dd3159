"""Places and nodes that a gang counts on: none that is lost, and none that is long in coming."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from tiny_run import TINY

from raytron.actors import gang as gangs
from raytron.actors.cluster import Free
from raytron.actors.gang import Gang, Member
from raytron.actors.versions import versions
from raytron.actors.worker import Facts
from raytron.config import load
from raytron.plan.cluster import ClusterShape, NodeShape
from raytron.plan.plan import make_plan


@ray.remote(num_cpus=0)
def after(seconds: float, answer: Any = None) -> Any:
    time.sleep(seconds)
    return answer


class Group:
    """A placement group that is there after so many seconds."""

    def __init__(self, seconds: float):
        self.id, self.call = object(), after.remote(seconds)

    def ready(self) -> Any:
        return self.call


@pytest.fixture
def gang(local_ray, monkeypatch):
    """On a cluster where one node, n, has room; its places are there after `late` seconds."""
    ray.get([after.remote(0.0) for _ in range(2)])
    made = Gang(
        "gang",
        make_plan(load({**TINY, "data": {"tokenizer": {"vocab": 300}}}), ClusterShape.local(8)),
        lambda kind, message, **facts: None,
    )
    made.late, made.removed, made.spawned = [0.0], [], []
    room = [Free("n", NodeShape("10.0.0.1", 1.0 * made.config.cpus_per_worker, 0.0))]
    monkeypatch.setattr(gangs, "free", lambda: room)
    monkeypatch.setattr(gangs, "living", lambda: [{"NodeID": "n", "NodeManagerAddress": "10.0.0.1"}])
    monkeypatch.setattr(gangs, "homes", lambda group: {0: "n"})
    monkeypatch.setattr("raytron.actors.seat.homes", lambda group: {0: "n"})
    monkeypatch.setattr(gangs, "placement_group", lambda *_: Group(made.late[0]))
    monkeypatch.setattr(gangs, "remove_placement_group", made.removed.append)
    monkeypatch.setattr(ray, "kill", lambda actor: None)

    def spawn(number, seat):
        made.spawned.append(number)
        return SimpleNamespace(describe=SimpleNamespace(remote=lambda witness: after.remote(60.0)))

    monkeypatch.setattr(made, "_spawn", spawn)
    return made


def test_places_that_nobody_waits_for_hold_up_nothing(gang, tmp_path):
    gang.late[0] = 1.0
    start = time.monotonic()
    gang.start(1, tmp_path, wait=False)
    assert time.monotonic() - start < 0.9
    assert gang.spawned == []
    while not gang.spawned:
        gang.start(1, tmp_path, wait=False)
        assert time.monotonic() - start < 10
    assert (gang.spawned, gang.removed, len(gang.seats)) == ([0], [], 1)


def test_places_that_do_not_come_are_given_up(gang, tmp_path, monkeypatch):
    monkeypatch.setattr(gangs, "ROOM_S", 0.3)
    gang.late[0] = 60.0
    gang.start(1, tmp_path, wait=False)
    gang.settle()
    assert gang.removed == []
    time.sleep(0.4)
    gang.settle()
    assert len(gang.removed) == 1
    assert gang.seats == ()


def test_only_those_that_are_needed_are_waited_for(gang, tmp_path):
    gang.start(1, tmp_path, wait=False, room_s=10)  # this one starts for a minute
    (slow,) = gang.members.values()
    facts = Facts("host", "10.0.0.1", "n", 1, None, None, versions(), True)
    gang.members[8] = Member(8, slow.seat, slow.actor, after.remote(1.0, facts))
    start = time.monotonic()
    gang.fill(1, tmp_path)
    assert [member.number for member in gang.ready] == [8]
    gang.fill(1, tmp_path)
    assert time.monotonic() - start < 30
    assert slow.facts is None


def test_nobody_is_put_on_a_lost_node_until_ray_must_know(gang, tmp_path, monkeypatch):
    gang.start(1, tmp_path, wait=False, room_s=10)
    (member,) = gang.members.values()
    facts = Facts("host", "10.0.0.1", "n", 1, None, None, None, True)
    gang.members[9] = Member(9, member.seat, member.actor, None, facts)
    assert [each.number for each in gang.ready] == [9]
    assert gang.capacity() == {"n": 2}
    gang.lose("n")
    assert gang.members == {}, "whoever lived or was starting there"
    assert gang.capacity() == {}
    gang.start(1, tmp_path, wait=False)
    assert gang.spawned == [0]
    monkeypatch.setattr(gangs, "DOUBT_S", 0.0)  # Ray still says that it lives
    gang.start(1, tmp_path, wait=False)
    assert gang.spawned == [0, 1]
