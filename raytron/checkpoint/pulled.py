"""Which step of each rank has reached the partner node: a word for each rank in a mapped file of the source node.

    the partner's keeper has pulled and checked a segment ─► the source's keeper: word[rank] = step + 1 ─► the rank sees it

The file of an epoch is there if and only if a partner follows its ranks. A word of ALONE means that the partner is gone, and
that nobody is to be waited for.
"""

from __future__ import annotations

import logging
import mmap
import os
import struct
import time
from pathlib import Path

WORD = struct.Struct("<Q")
ALONE = (1 << 64) - 1
POLL_S = 0.0002
log = logging.getLogger(__name__)


def pulled_path(folder: Path, epoch: int) -> Path:
    """The file of an epoch's words."""
    return folder / f"{epoch:06d}.pulled"


class PulledBoard:
    """The words of an epoch, as the source's keeper writes them."""

    def __init__(self, folder: Path, epoch: int, world: int):
        self.path = pulled_path(folder, epoch)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, world * WORD.size)
            self._map = mmap.mmap(descriptor, world * WORD.size)
        finally:
            os.close(descriptor)
        self.world = world

    def reset(self) -> None:
        """Nothing has been pulled yet."""
        for rank in range(self.world):
            WORD.pack_into(self._map, rank * WORD.size, 0)

    def say(self, rank: int, step: int) -> None:
        """The partner holds the segment of `rank` at `step`, digest checked."""
        WORD.pack_into(self._map, rank * WORD.size, step + 1)

    def leave(self) -> None:
        """Nobody pulls any more."""
        for rank in range(self.world):
            WORD.pack_into(self._map, rank * WORD.size, ALONE)


class Pulled:
    """One rank's word, as the rank reads it."""

    def __init__(self, folder: Path, epoch: int, rank: int):
        self.path, self.rank = pulled_path(folder, epoch), rank
        self._map = self._open()
        self._gave_up_at: int | None = None  # the word that was seen when patience ended

    def _open(self) -> mmap.mmap | None:
        try:
            with open(self.path, "rb") as stream:
                view = mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ)
        except (OSError, ValueError):
            return None
        return view if len(view) >= (self.rank + 1) * WORD.size else None

    def wait(self, step: int, patience_s: float) -> bool:
        """Waits until the partner holds `step`, or there is no partner. False: it did not within `patience_s`, and until it
        says something new it will not be waited for."""
        if self._map is None:
            return True
        start = time.monotonic()
        while (word := self._word()) <= step:
            if word == self._gave_up_at:
                return False
            if time.monotonic() - start > patience_s:
                log.warning("rank %d: step %d did not reach the partner in %g s", self.rank, step, patience_s)
                self._gave_up_at = word
                return False
            time.sleep(POLL_S)
        self._gave_up_at = None
        return True

    def _word(self) -> int:
        assert self._map is not None
        return int(WORD.unpack_from(self._map, self.rank * WORD.size)[0])
