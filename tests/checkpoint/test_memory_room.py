"""Nobody takes the last memory of a machine or a container."""

from __future__ import annotations

import pytest
from test_memory_segments import state

from raytron.checkpoint import room
from raytron.checkpoint.memory import Replicas
from raytron.errors import CheckpointError

GIB = 1 << 30


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with 100 GiB, half of them free, and a container without a limit."""
    monkeypatch.setattr(room, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(room, "CGROUP", tmp_path)
    (tmp_path / "meminfo").write_text(f"MemTotal: {100 << 20} kB\nMemFree: 7 kB\nMemAvailable: {50 << 20} kB\n")
    (tmp_path / "memory.max").write_text("max\n")
    return tmp_path


def limit(folder, total: int, used: int, caches: int) -> None:
    (folder / "memory.max").write_text(f"{total * GIB}\n")
    (folder / "memory.current").write_text(f"{used * GIB}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {caches * GIB}\n")


def test_a_twentieth_of_the_machine_stays_free(machine):
    room.check_room(45 * GIB)
    with pytest.raises(OSError, match=r"50\.0 of 100\.0 GiB"):
        room.check_room(45 * GIB + 1)


def test_a_container_has_less(machine):
    limit(machine, total=20, used=15, caches=6)
    room.check_room(10 * GIB)
    with pytest.raises(OSError, match=r"11\.0 of 20\.0 GiB"):
        room.check_room(10 * GIB + 1)


def test_who_does_not_tell_has_room(machine):
    (machine / "meminfo").write_text("nothing of use\n")
    room.check_room(1 << 60)


def test_segments_ask(machine, tmp_path):
    limit(machine, total=20, used=20, caches=0)
    with pytest.raises(CheckpointError, match="no room for"):
        Replicas(tmp_path / "folder", 1, state(0.0), {})
