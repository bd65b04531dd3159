"""Samples that several ranks of one node want, read by one of them: those of a pipeline, of tp and of cp want the same.

    the lowest such rank   reads [64, 72) ──► FOLDER/64-72, on tmpfs ──► removed some requests later
    the others             ask for [64, 72) ── wait until it is there ──► take it

A slice of a memory map costs less than that. It is for what is dear: ranges of a remote shard, text that is tokenized as it
is read, the tasks of Ray Data. Nobody waits in a collective: these are files, and whoever waits for one looks whether the
rank that reads lives, and whether it still does.
"""

from __future__ import annotations

import shutil
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytron.checkpoint.files import from_json, read_file, to_json
from raytron.checkpoint.owner import lives, this_process
from raytron.data.batch import Around, Batch, TokenStream, part_of
from raytron.data.bounds import Bounds
from raytron.data.shard_file import replacing
from raytron.errors import CheckpointError

NAME = "feed-"  # of a folder, before the number of its epoch
READER, ENDED = "reader", "ended"  # files: who reads; that it does not any more
SHORTEST_S, LONGEST_S = 0.001, 0.02  # between two looks for a file
LOOK_S = 0.5  # between two looks for who reads


class ReadOnce(Around):
    """The TokenStream of another one. Until `begin` it reads by itself.

    kept: files that stay for the others; more than any of them is behind, in requests.
    """

    def __init__(self, inner: TokenStream, kept: int):
        super().__init__(inner)
        self.kept = kept
        self._folder: Path | None = None
        self._leads = False
        self._given: deque[Path] = deque()

    def begin(self, folder: Path, epoch: int, share: int, leads: bool) -> None:
        """From here on samples of a share of a step are read once. The same on all ranks of a node that want them, before
        they ask for any, but for `leads`, which is so on one.

        folder: in the node's memory; epoch: of the mesh; share: the dp coordinate.
        """
        self._folder, self._leads = folder / f"{NAME}{epoch:06d}-{share}", leads
        if not leads:
            return
        for old in folder.glob(f"{NAME}*"):
            if not old.name.startswith(f"{NAME}{epoch:06d}-"):
                shutil.rmtree(old, ignore_errors=True)
        self._folder.mkdir(parents=True, exist_ok=True)
        with replacing(self._folder / READER) as temporary:
            temporary.write_bytes(to_json(this_process()))

    def end(self) -> None:
        """This rank asks for nothing any more: whoever waits for it is freed."""
        if self._folder is not None and self._leads:
            with suppress(OSError):
                (self._folder / ENDED).touch()

    def batch(self, first: int, count: int, part: int = 0, parts: int = 1) -> Batch:
        """See `TokenStream.batch`. Raises ConnectionError where the rank that reads is gone or has ended."""
        start, stop = part_of(first, count, part, parts)
        if self._folder is None or start == stop:
            return self.inner.batch(start, stop - start)
        path = self._folder / f"{start}-{stop}"
        return self._give(path, start, stop) if self._leads else self._take(path)

    def _give(self, path: Path, start: int, stop: int) -> Batch:
        try:
            batch = self.inner.batch(start, stop - start)
            with replacing(path) as temporary, temporary.open("wb") as file:
                for part in _parts(batch):
                    np.save(file, part, allow_pickle=False)
                file.flush()
        except Exception:
            self.end()
            raise
        self._given.append(path)
        while len(self._given) > self.kept:
            self._given.popleft().unlink(missing_ok=True)
        return batch

    def _take(self, path: Path) -> Batch:
        wait_s, looked = SHORTEST_S, time.monotonic()
        while True:
            with suppress(FileNotFoundError):
                return _read(path)
            if (path.parent / ENDED).exists():
                raise ConnectionError(f"samples {path.name}: the rank that reads them for this node has ended")
            if time.monotonic() - looked > LOOK_S:
                looked = time.monotonic()
                self._look(path)
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, LONGEST_S)

    def _look(self, path: Path) -> None:
        """Raises ConnectionError where nobody will read."""
        try:
            reader = from_json(path.parent / READER, read_file(path.parent / READER))
        except CheckpointError:  # not there yet, or another mesh has begun
            gone = any(each.name > path.parent.name for each in path.parent.parent.glob(f"{NAME}*"))
        else:
            gone = lives(reader) is False
        if gone:
            raise ConnectionError(f"samples {path.name}: the rank that reads them for this node is gone")


def _parts(batch: Batch) -> list[NDArray[Any]]:
    parts: list[NDArray[Any]] = [batch.ids, batch.tokens, batch.labels, batch.weights]
    if batch.documents is not None:
        parts += [batch.documents.splits, batch.documents.begins]
    return parts


def _read(path: Path) -> Batch:
    size = path.stat().st_size
    with path.open("rb") as file:
        parts = []
        while file.tell() < size:
            parts.append(np.load(file, allow_pickle=False))
    ids, tokens, labels, weights, *bounds = parts
    documents = Bounds(bounds[0], bounds[1], tokens.shape[1]) if bounds else None
    return Batch(ids, tokens, labels, weights, documents)
