"""Copies on a partner node: whole, checked, one step behind at most; and folders that nobody uses any more."""

from __future__ import annotations

import json
import multiprocessing
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_memory_segments import facts, fill, restored, state

from raytron.checkpoint import copies, folder, owner
from raytron.checkpoint.copies import Follower, News, piece
from raytron.checkpoint.folder import COPIES
from raytron.checkpoint.memory import Replicas, segment_name
from raytron.checkpoint.pulled import ALONE, Pulled, PulledBoard
from raytron.errors import CheckpointError


class Near:
    """A source in this process. damage: changes the pieces on their way."""

    def __init__(self, place: Path, epoch: int = 1, damage: Any = lambda found, data: data):
        self.place, self.damage = place, damage
        self.all_news = News(place, epoch, 1)
        self.pieces = 0

    def news(self, epoch: int, got: Any) -> Any:
        return self.all_news.wait(got, 0.05)

    def piece(self, name: str, seal: str, first: int, count: int) -> Any:
        self.pieces += 1
        return self.damage(self.pieces, piece(self.place, name, seal, first, count))


@pytest.fixture
def nodes(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    return tmp_path / "a", tmp_path / "b"


def write(replicas: Replicas, step: int) -> None:
    fill(replicas.slices, float(step))
    replicas.write(step, facts(step))


def until(condition: Any, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_every_step_is_on_the_partner_before_the_next_is_committed(nodes, monkeypatch):
    here, there = nodes
    monkeypatch.setattr(copies, "PIECE_BYTES", 1000)
    source = Near(here)
    follower = Follower(there, 1, source)
    replicas = Replicas(here, 1, state(0.0), facts(0))
    for step in range(1, 6):
        write(replicas, step)
        replicas.wait()
        assert restored(there / COPIES) == (step, float(step))
    follower.stop(5.0)
    assert restored(there / COPIES, up_to=4) == (4, 4.0)
    assert source.pieces > 5


def test_a_copy_that_came_damaged_does_not_count_and_is_asked_for_again(nodes):
    here, there = nodes

    def damage(number: int, data: Any) -> Any:
        return np.where(np.arange(len(data)) == len(data) - 70, data ^ 1, data) if number == 2 else data

    replicas = Replicas(here, 1, state(0.0), facts(0))
    source = Near(here, damage=damage)
    follower = Follower(there, 1, source)
    write(replicas, 1)
    until(lambda: source.pieces == 1)
    write(replicas, 2)
    until(lambda: len(follower.got) == 2)
    assert source.pieces == 3
    assert restored(there / COPIES) == (2, 2.0)
    follower.stop(5.0)


def test_a_new_follower_catches_up(nodes):
    here, there = nodes
    replicas = Replicas(here, 1, state(0.0), facts(0))
    write(replicas, 1)
    write(replicas, 2)
    follower = Follower(there, 1, Near(here))
    until(lambda: len(follower.got) == 2)
    follower.stop(5.0)
    assert restored(there / COPIES, up_to=1) == (1, 1.0)


def test_a_piece_of_what_was_written_again_or_lies_elsewhere_is_refused(nodes):
    here, _ = nodes
    replicas = Replicas(here, 1, state(0.0), facts(0))
    write(replicas, 1)
    (found,) = News(here, 1, 1).wait([], 1.0)
    write(replicas, 2)
    write(replicas, 3)
    with pytest.raises(CheckpointError, match="written again"):
        piece(here, found.name, found.seal, 0, 8)
    with pytest.raises(CheckpointError, match="no name of a segment"):
        piece(here, "../a/" + found.name, found.seal, 0, 8)


def test_nobody_waits_without_a_partner(tmp_path):
    assert Pulled(tmp_path, 1, 0).wait(5, 0.0)


def test_a_silent_partner_is_waited_for_once(tmp_path, caplog):
    board = PulledBoard(tmp_path, 1, 2)
    word = Pulled(tmp_path, 1, 1)
    assert not word.wait(3, 0.05)
    assert "did not reach the partner" in caplog.text
    start = time.monotonic()
    assert not word.wait(4, 60.0)
    assert time.monotonic() - start < 10
    board.say(0, 9)
    board.say(1, 4)
    assert word.wait(4, 0.0)
    threading.Timer(0.1, board.say, (1, 5)).start()
    assert word.wait(5, 60.0)
    board.leave()
    assert word.wait(1 << 40, 0.0)
    assert word._word() == ALONE


def use_and_die(place: Path) -> None:
    folder.use(place)


def test_a_folder_goes_when_no_user_lives(tmp_path):
    names = ("raytron-dead", "raytron-alive", "raytron-both", "raytron-nobodys", "other")
    dead, alive, both, nobodys, other = (tmp_path / name for name in names)
    process = multiprocessing.get_context("spawn").Process(target=use_and_die, args=(dead,))
    process.start()
    process.join()
    (left,) = dead.iterdir()
    for place in (alive, both):
        folder.use(place)
    (both / left.name).write_bytes(left.read_bytes())
    nobodys.mkdir()
    other.mkdir()
    (other / left.name).write_bytes(left.read_bytes())
    assert folder.sweep(tmp_path) == [dead]
    elsewhere = json.loads((other / left.name).read_bytes()) | {"place": "another machine"}
    assert owner.lives(elsewhere) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[1:])


def test_old_epochs_are_forgotten(nodes):
    here, there = nodes
    for epoch in (1, 2):
        write(Replicas(here, epoch, state(0.0), facts(0)), epoch)
        follower = Follower(there, epoch, Near(here, epoch))
        until(lambda follower=follower: follower.got)
        follower.stop(5.0)
    for place in (here, there):
        folder.forget(place, 2)
    assert restored(here) == (2, 2.0)
    assert [path.name for path in (there / COPIES).iterdir()] == [segment_name(2, 0, 0)]
    assert not (here / "000001.pulled").exists()
    assert (here / "000002.pulled").exists()
