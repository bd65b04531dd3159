"""Training samples by id: an order says which sample of which source an id names, a reader for each source reads it.

    ids ──► Order.locate ──► source, sample ──► readers[source].read ──► rows, put together by id

The order is `raytron.data.order` for one data set and `raytron.data.blend` for several; the readers are
`raytron.data.reader`. Neither knows of the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from raytron.data.batch import Batch, part_of
from raytron.data.manifest import Split
from raytron.data.order import FixedOrder, Order, ShuffledOrder
from raytron.data.reader import ChopReader, Reader, Rows
from raytron.data.shards import Dataset


class SampleStream:
    """The TokenStream of an order over one reader for each source."""

    def __init__(self, order: Order, readers: Sequence[Reader], sequence_length: int):
        self.order, self.readers, self._sequence_length = order, tuple(readers), sequence_length

    @property
    def sequence_length(self) -> int:
        return self._sequence_length

    @property
    def samples_per_epoch(self) -> int:
        return sum(reader.size for reader in self.readers)

    def batch(self, first: int, count: int, part: int = 0, parts: int = 1) -> Batch:
        """See `TokenStream.batch`. Reads only the part that is asked for."""
        start, stop = part_of(first, count, part, parts)
        ids = np.arange(start, stop, dtype=np.int64)
        place = self.order.locate(ids)
        sources = np.unique(place.source).tolist() or [0]
        if len(sources) == 1:
            return Batch(ids, *self.readers[sources[0]].read(place.sample))
        where = [np.flatnonzero(place.source == source) for source in sources]
        rows = [self.readers[source].read(place.sample[here]) for source, here in zip(sources, where, strict=True)]
        return Batch(ids, *_together(rows, where, len(ids), self._sequence_length))


class ShardStream(SampleStream):
    """The TokenStream of one split of a data set; `train` is shuffled anew each epoch, `validation` never.

    documents: whether batches tell the documents apart.
    Raises DataError where no shard of the split holds a single sample.
    """

    def __init__(self, dataset: Dataset, split: Split, sequence_length: int, seed: int = 0, *, documents: bool = False):
        reader = ChopReader(dataset, split, sequence_length, documents=documents)
        order: Order = ShuffledOrder(reader.size, seed) if split == "train" else FixedOrder(reader.size)
        super().__init__(order, [reader], sequence_length)


def _together(parts: Sequence[Rows], where: Sequence[NDArray[np.intp]], count: int, length: int) -> Rows:
    """Rows of several sources, each at its places among `count`."""
    rows = Rows(
        np.empty((count, length), np.int64),
        np.empty((count, length), np.int64),
        np.empty((count, length), np.float32),
        np.empty((count, length), np.int32) if parts[0].documents is not None else None,
    )
    for part, here in zip(parts, where, strict=True):
        rows.tokens[here], rows.labels[here], rows.weights[here] = part.tokens, part.labels, part.weights
        if rows.documents is not None and part.documents is not None:
            rows.documents[here] = part.documents
    return rows
