"""How much memory a machine, or the container that this process is in, can still give.

What is written to tmpfs takes memory like any other: a file system that has room says nothing about it, and who takes the
last of it is killed.
"""

from __future__ import annotations

import errno
from pathlib import Path

RESERVE = 0.05  # of all memory, that stays free
MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def check_room(size: int) -> None:
    """Raise OSError where `size` bytes more would leave too little memory; nothing where that can't be told."""
    for total, free in filter(None, (_machine(), _container())):
        if free - size < RESERVE * total:
            text = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB of memory are free, and {RESERVE:.0%} have to stay"
            raise OSError(errno.ENOMEM, text)


def _machine() -> tuple[int, int] | None:
    """(all, free) bytes of the machine."""
    try:
        rows = (line.split() for line in MEMINFO.read_text().splitlines())
        kibibytes = {row[0].rstrip(":"): int(row[1]) for row in rows}
        return kibibytes["MemTotal"] << 10, kibibytes["MemAvailable"] << 10
    except (OSError, ValueError, KeyError, IndexError):
        return None


def _container() -> tuple[int, int] | None:
    """(all, free) bytes of the control group, where it has a limit; file caches count as free."""
    try:
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
        rows = (line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        caches = next((int(value) for name, value in rows if name == "inactive_file"), 0)
        return limit, limit - used + caches
    except (OSError, ValueError):
        return None
