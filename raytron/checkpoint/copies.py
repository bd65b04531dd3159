"""Copies of the partner node's segments: each step once, checked, two buffers as at its source.

    source node                                    this node
    rank 0 writes S ─► News finds it ─── news ───► Follower asks for it in pieces ─► copies/, digest checked
    rank 0 goes on  ◄─ its word: S  ◄─── news (got: S) ───────────────────────────┘

One question does both: it says what has arrived since the last one, and waits for what is new. A copy has the name of its
source's buffer, so while S overwrites S-2 the copy of S-1 stays whole. What is pulled is written like a segment: it counts
only when all of it is there and its digests are right.
"""

from __future__ import annotations

import logging
import mmap
import re
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from raytron.checkpoint.files import is_plain_name
from raytron.checkpoint.folder import COPIES
from raytron.checkpoint.pulled import PulledBoard
from raytron.checkpoint.segment import SUFFIX, TURN, TURN_AT, Newest, glance, make, mapped, read_segment, turn_of
from raytron.errors import CheckpointError

PIECE_BYTES = 64 << 20
POLL_S, LIST_S = 0.002, 0.02  # between two looks at the segments, and at the folder
AGAIN_S = 0.05  # after something went wrong
log = logging.getLogger(__name__)


class Found(NamedTuple):
    """One step of one rank, whole in one buffer. size: bytes of the file."""

    name: str
    rank: int
    step: int
    seal: str
    size: int


class Source(Protocol):
    """What a follower asks of the node that it follows. A question may raise; it is then asked again."""

    def news(self, epoch: int, got: Sequence[Found]) -> list[Found]: ...

    def piece(self, name: str, seal: str, first: int, count: int) -> NDArray[np.uint8]: ...


class News:
    """The segments of one epoch in a folder, as its follower asks for them."""

    def __init__(self, folder: Path, epoch: int, world: int):
        self.folder, self.epoch = folder, epoch
        self.board = PulledBoard(folder, epoch, world)
        self._pattern = re.compile(rf"{epoch:06d}-(\d+)-\d+\{SUFFIX}")
        self._views: dict[str, mmap.mmap] = {}
        self._seen: dict[str, tuple[int, Found | None]] = {}  # by name, the turn and what was there
        self._listed = 0.0
        self.over = False

    def wait(self, got: Iterable[Found], timeout_s: float) -> list[Found]:
        """Notes what the follower has got; then all that is whole and that it has not got, oldest first, as soon as there
        is something, or nothing after `timeout_s`."""
        seals: dict[str, str] = {}
        steps: dict[int, int] = {}
        for each in got:
            seals[each.name] = each.seal
            steps[each.rank] = max(each.step, steps.get(each.rank, 0))
        for rank, step in steps.items():
            self.board.say(rank, step)
        end = time.monotonic() + timeout_s
        while not self.over:
            found = [each for each in self._whole() if seals.get(each.name) != each.seal]
            if found or time.monotonic() > end:
                return sorted(found, key=lambda each: (each.step, each.rank))
            time.sleep(POLL_S)
        return []

    def _whole(self) -> list[Found]:
        if time.monotonic() - self._listed > LIST_S:
            self._list()
        for name, view in self._views.items():
            turn = turn_of(view)
            if self._seen.get(name, (None,))[0] != turn:
                self._seen[name] = (turn, self._look(name, view))
        return [found for _, found in self._seen.values() if found is not None]

    def _look(self, name: str, view: mmap.mmap) -> Found | None:
        match, newest = self._pattern.fullmatch(name), glance(view)
        return Found(name, int(match[1]), newest.step, newest.seal, len(view)) if match and newest else None

    def _list(self) -> None:
        self._listed = time.monotonic()
        for path in self.folder.glob(f"{self.epoch:06d}-*{SUFFIX}"):
            if path.name not in self._views and self._pattern.fullmatch(path.name):
                try:
                    with mapped(path) as view:
                        self._views[path.name] = view
                except CheckpointError:
                    continue  # it is being made


def piece(folder: Path, name: str, seal: str, first: int, count: int) -> NDArray[np.uint8]:
    """Some bytes of a segment that is still the one with this seal: a view. Raises CheckpointError."""
    if not is_plain_name(name):
        raise CheckpointError(f"{name[:100]!r} is no name of a segment")
    with mapped(folder / name) as view:
        newest = glance(view)
        if newest is None or newest.seal != seal:
            raise CheckpointError(f"{folder / name}: it has been written again")
        return np.frombuffer(view, np.uint8)[first : first + count]


class Follower:
    """Copies what a source node writes in one epoch, in a thread of its own, until `stop`."""

    def __init__(self, folder: Path, epoch: int, source: Source):
        self.folder, self.epoch, self.source = folder / COPIES, epoch, source
        self.folder.mkdir(exist_ok=True)
        self.got: dict[str, Found] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name=f"follow-{epoch}", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float = 0.0) -> None:
        self._stop.set()
        self._thread.join(timeout_s)

    def _follow(self) -> None:
        while not self._stop.is_set():
            try:
                news = self.source.news(self.epoch, list(self.got.values()))
            except Exception as error:
                log.warning("no news of epoch %d: %s", self.epoch, error)
                return
            for found in news:
                self._pull(found)

    def _pull(self, found: Found) -> None:
        try:
            copy(self.folder / found.name, found, self.source)
            self.got[found.name] = found
        except Exception as error:
            log.warning("step %d of rank %d was not copied: %s", found.step, found.rank, error)
            self._stop.wait(AGAIN_S)


def copy(path: Path, found: Found, source: Source) -> None:
    """Copies a segment in pieces. Raises CheckpointError where what came is damaged, or there is no room."""
    if not is_plain_name(found.name):
        raise CheckpointError(f"{found.name[:100]!r} is no name of a segment")
    view = _room(path, found.size)
    TURN.pack_into(view, TURN_AT, 1)
    target = np.frombuffer(view, np.uint8)
    for first in range(0, found.size, PIECE_BYTES):
        count = min(PIECE_BYTES, found.size - first)
        data = source.piece(found.name, found.seal, first, count)
        if len(data) != count:
            raise CheckpointError(f"{found.name}: {len(data)} bytes came, not {count}")
        begin = max(first, TURN_AT + TURN.size) - first
        target[first + begin : first + count] = data[begin:]
        if first == 0:
            target[:TURN_AT] = data[:TURN_AT]
    TURN.pack_into(view, TURN_AT, 2)
    try:
        head = read_segment(path)
        if Newest(head.seal, head.step) != Newest(found.seal, found.step):
            raise CheckpointError(f"{path}: another step came than was asked for")
    except CheckpointError:
        TURN.pack_into(view, TURN_AT, 1)
        raise


def _room(path: Path, size: int) -> mmap.mmap:
    """A file of `size` bytes, mapped to be written; the one that is there, if it is as large."""
    if path.exists() and path.stat().st_size == size:
        with open(path, "r+b") as stream:
            return mmap.mmap(stream.fileno(), size)
    return make(path, size)
