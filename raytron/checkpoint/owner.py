"""Who is writing a generation, so that leftovers are removed but never from under a writer.

The coordinator of a save puts a WRITING file into the new directory: the machine's boot and process namespace, its
process id and that process's start time. Somebody who shares the namespace can tell for certain whether that process
still lives; others can only go by age. A coordinator that gives up, but lives on, leaves ABANDONED instead.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from raytron.checkpoint.files import from_json, read_file, storage_of, to_json
from raytron.errors import CheckpointError

WRITING = "WRITING"
ABANDONED = "ABANDONED"


def claim(directory: Path) -> None:
    """Say that this process writes a generation. Raises OSError."""
    storage_of(directory).write(directory / WRITING, [memoryview(to_json(this_process()))])


def release(directory: Path) -> None:
    """The generation is committed and nobody writes it any more."""
    storage_of(directory).remove(directory / WRITING)


def is_ownerless(directory: Path, abandoned_after_s: float) -> bool:
    """Whether nobody can be writing an uncommitted generation; in doubt, only if nothing changed for so long."""
    storage = storage_of(directory)
    if storage.exists(directory / ABANDONED):
        return True
    try:
        owner = from_json(directory / WRITING, read_file(directory / WRITING))
    except CheckpointError:
        owner = {}
    alive = lives(owner)
    if alive is not None:
        return not alive
    try:
        return time.time() - storage.last_change(directory) > abandoned_after_s
    except OSError:  # it is changing while we look
        return False


def this_process() -> dict[str, object]:
    """What tells this process from every other one, as JSON."""
    return {"place": _place(), "process": os.getpid(), "born": _born(os.getpid())}


def lives(process: dict[str, object]) -> bool | None:
    """Whether the process of which `this_process` told lives; None where it can't be seen from here."""
    number, place = process.get("process"), _place()
    if place is None or place != process.get("place") or type(number) is not int:
        return None
    return _born(number) == process.get("born")


def _place() -> str | None:
    """Processes with an equal place see each other's process ids; None where this can't be told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _born(process: int) -> str | None:
    """Start time of a living process in clock ticks since boot; None where there is no such process."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
