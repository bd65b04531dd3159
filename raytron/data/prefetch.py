"""Reads the batches of coming steps ahead, in one thread beside the training, so that a step finds its samples there.

    training   ── step 7 ─────────────┤── step 8 ─────────────┤── step 9 ──
    thread     ── reads 8, 9, then waits ─┤ reads 10 ─────────┤ reads 11       at most `depth` batches are held

What is read ahead is a guess and counts for nothing: what a run has consumed is told by the steps that it committed. After
a rollback, on another mesh or at another batch size the next request is not the one that was guessed; then what was
prefetched is dropped and reading goes on from there. So a batch is always the one that was asked for, prefetched or not.

One thread reads everything, so that the stream inside need not be safe for several; numpy copies tokens without holding
Python's lock for long, and no process is started.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from raytron.data.batch import Around, Batch, TokenStream, part_of

Keep = Callable[[Batch], Batch]  # moves a batch to where it is wanted, such as page-locked memory


class PrefetchStream(Around):
    """The TokenStream of another one, whose batches are read before they are asked for.

    depth: batches that are read ahead, at least 1. stride: of a request that begins with sample `first`, how many ids
    later the next one begins. keep: done to each batch, in the thread.
    """

    def __init__(self, inner: TokenStream, depth: int, stride: Callable[[int], int], keep: Keep | None = None):
        if depth < 1:
            raise ValueError(f"{depth} batches can't be read ahead")
        super().__init__(inner)
        self.depth, self._stride, self._keep = depth, stride, keep
        self._thread = ThreadPoolExecutor(1, "prefetch")
        self._ahead: deque[tuple[tuple[int, int], Future[Batch]]] = deque()
        self._given: deque[Batch] = deque(maxlen=2)  # a device may still copy from these
        self.missed = 0  # batches that were not the ones that were read ahead

    def batch(self, first: int, count: int, part: int = 0, parts: int = 1) -> Batch:
        """See `TokenStream.batch`. Waits where the batch is not read yet; raises what reading it raised."""
        start, stop = part_of(first, count, part, parts)
        wanted = (start, stop - start)
        if not self._ahead or self._ahead[0][0] != wanted:
            self._drop()
            self._read(*wanted)
            self.missed += 1
        _, reading = self._ahead.popleft()
        last = self._ahead[-1][0] if self._ahead else wanted
        while len(self._ahead) < self.depth:
            last = (last[0] + self._stride(last[0]), last[1])
            self._read(*last)
        batch = reading.result()
        self._given.append(batch)
        return batch

    def close(self) -> None:
        """Ends the thread when it has read what it is at; what was prefetched is forgotten."""
        self._drop()
        self._thread.shutdown(wait=False)

    def _read(self, first: int, count: int) -> None:
        self._ahead.append(((first, count), self._thread.submit(_read, self.inner, first, count, self._keep)))

    def _drop(self) -> None:
        for _, reading in self._ahead:
            reading.cancel()
        self._ahead.clear()


def _read(stream: TokenStream, first: int, count: int, keep: Keep | None) -> Batch:
    batch = stream.batch(first, count)
    return batch if keep is None else keep(batch)
