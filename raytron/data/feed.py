"""Samples through Ray Data: tasks anywhere on the cluster read the shards, a window of the order ahead of the training.

    window     requests of the next steps   [0, 8) [16, 24) [32, 40) …      this rank's share of each
      │ from_items
    tasks      each reads one request, range by range, where there is room  → blocks of rows with their sample ids
      │ iter_batches
    rank       rows by id ─► the batch that is asked for, whole and in order, or an error

Ray Data promises neither order nor that a row comes once; here both are checked, for the id of each row says which it is.
What a sample holds is the same pure function of its id as where a rank reads by itself, so the batches are the same to the
bit, and nothing of a window is state: after a rollback or on another mesh a new one begins at the sample that is asked for.
A rank that reads by itself is cheaper by far; this is for tokens whose fetching or unpacking needs more processors than
the node of a rank has. Ranks of a node that need the same tokens have one window (`raytron.training.read_once`).
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from raytron.data.batch import Around, Batch, TokenStream, part_of
from raytron.data.bounds import Bounds
from raytron.data.run_data import RunData, open_run_data
from raytron.errors import DataError, Problem

WINDOW = 128  # requests of one execution: what can be read ahead at most
TASKS = 4  # at once, for each rank
FIELDS = ("tokens", "labels", "weights", "documents")
Row = tuple[Any, ...]  # of each field, the row of one sample; None for documents that are not known


class RayDataStream(Around):
    """The TokenStream of a run's training data, read by Ray Data's tasks. Ray must be initialised.

    stride: of a request that begins with sample `first`, how many ids later the next one begins.
    """

    def __init__(self, data: RunData, stride: Callable[[int], int], window: int = WINDOW):
        super().__init__(data.train())  # for what it knows without reading
        self.data, self._stride, self._window = data, stride, window
        self._source = ray.put(data)
        self._key = hashlib.sha256(ray.cloudpickle.dumps(data)).hexdigest()
        self._blocks: Iterator[Mapping[str, NDArray[Any]]] = iter(())
        self._open: list[Any] = []  # the execution that blocks come from
        weakref.finalize(self, _end, self._open)
        self._rows: dict[int, Row] = {}
        self._expected: set[int] = set()  # ids of the window that have not come yet
        self._ahead: list[tuple[int, int]] = []  # requests of the window that were not made yet, the last one first
        self.windows = 0  # executions begun

    def batch(self, first: int, count: int, part: int = 0, parts: int = 1) -> Batch:
        """See `TokenStream.batch`. Raises DataError where Ray Data loses a sample, or gives one twice."""
        start, stop = part_of(first, count, part, parts)
        if start == stop:
            return self.inner.batch(start, 0)
        if not self._ahead or self._ahead[-1] != (start, stop - start):
            self._begin(start, stop - start)
        self._ahead.pop()
        ids = range(start, stop)
        while not all(number in self._rows for number in ids):
            self._take()
        rows = [self._rows.pop(number) for number in ids]
        tokens, labels, weights, numbers = zip(*rows, strict=True)
        documents = None if numbers[0] is None else Bounds.of_numbers(np.stack(numbers))
        return Batch(np.arange(start, stop), np.stack(tokens), np.stack(labels), np.stack(weights), documents)

    def _begin(self, first: int, count: int) -> None:
        """A new window, from one request on; what is left of the old one is forgotten."""
        requests = [(first, count)]
        while len(requests) < self._window:
            stride = self._stride(requests[-1][0])
            if stride < count:
                break  # requests that overlap are no steps of one run
            requests.append((requests[-1][0] + stride, count))
        self._ahead, self._rows = requests[::-1], {}
        self._expected = {number for start, size in requests for number in range(start, start + size)}
        _end(self._open)
        self._blocks = self._run(requests)
        self._open.append(self._blocks)
        self.windows += 1

    def _run(self, requests: list[tuple[int, int]]) -> Iterator[Mapping[str, NDArray[Any]]]:
        items = [{"first": first, "count": count} for first, count in requests]
        planned = ray.data.from_items(items, override_num_blocks=len(items))
        arguments = {"source": [self._source], "key": self._key}
        read = planned.map_batches(
            _read, batch_size=1, fn_kwargs=arguments, num_cpus=0, concurrency=TASKS
        )  # without processors of their own: the ranks may hold all there are, and would wait for them for ever
        blocks: Iterator[Mapping[str, NDArray[Any]]] = iter(read.iter_batches(batch_size=None, batch_format="numpy"))
        return blocks

    def _take(self) -> None:
        """Puts the rows of one more block by their ids."""
        block = next(self._blocks, None)
        if block is None:
            what = f"Ray Data ended before the sample {min(self._expected)} had come"
            raise DataError(Problem("data.feed", what, "use data.feed=direct"))
        ids = block["ids"].tolist()
        columns = [block.get(name, [None] * len(ids)) for name in FIELDS]
        for number, *row in zip(ids, *columns, strict=True):
            if number not in self._expected:
                what = f"Ray Data gave the sample {number}, which was not asked for or was there already"
                raise DataError(Problem("data.feed", what, "use data.feed=direct"))
            self._expected.remove(number)
            self._rows[number] = tuple(row)


def _end(executions: list[Any]) -> None:
    """Ends what is read for nobody. Ray Data would do so when the interpreter ends, and then wait for a thread that is no
    more."""
    while executions:
        executions.pop().close()


_STREAMS: dict[str, TokenStream] = {}  # of this process, by what they read: shards stay open between tasks


def _read(items: Mapping[str, NDArray[Any]], source: list[Any], key: str) -> dict[str, NDArray[Any]]:
    """A task: the samples of one request. source: a reference to the RunData, in a list, so that it is not fetched anew."""
    if key not in _STREAMS:
        _STREAMS.clear()
        data: RunData = ray.get(source[0])
        _STREAMS[key] = open_run_data(data.config, data.sources[0].name).train()  # as it is seen from this node
    batch = _STREAMS[key].batch(int(items["first"][0]), int(items["count"][0]))
    return {name: np.asarray(part) for name, part in batch._asdict().items() if part is not None}
