"""Training samples by id: an order says which sample of which source an id names, a reader for each source reads it.

    ids ──► Order.locate ──► source, sample ──► readers[source].read ──► rows, put together by id ──► transform ──► batch

The order is `raytron.data.order` for one data set and `raytron.data.blend` for several; the readers are
`raytron.data.reader`. Neither knows of the other. All of it happens in the process that asks, with no worker process.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from raytron.config import RunConfig
from raytron.data.batch import Batch, part_of
from raytron.data.bounds import Bounds
from raytron.data.fim import FillInTheMiddle, fim_problems
from raytron.data.manifest import Split
from raytron.data.order import FixedOrder, InRuns, Order, ShuffledOrder
from raytron.data.reader import ChopReader, Reader, open_reader
from raytron.data.rows import Rows, Transform, batch_of
from raytron.data.shards import Dataset
from raytron.data.text_index import TextCorpus
from raytron.data.tokenizer import token_ids
from raytron.errors import DataError


class SampleStream:
    """The TokenStream of an order over one reader for each source, all of one packing.

    documents: whether batches tell the documents apart, which readers have to know then. transform: of every sample, keyed
    by its id.
    """

    def __init__(
        self,
        order: Order,
        readers: Sequence[Reader],
        sequence_length: int,
        *,
        documents: bool = False,
        transform: Transform | None = None,
    ):
        self.order, self.readers, self._sequence_length = order, tuple(readers), sequence_length
        self._runs = InRuns(order)
        self.documents, self.transform = documents, transform

    @property
    def sequence_length(self) -> int:
        return self._sequence_length

    @property
    def samples_per_epoch(self) -> int:
        return sum(reader.size for reader in self.readers)

    def batch(self, first: int, count: int, part: int = 0, parts: int = 1) -> Batch:
        """See `TokenStream.batch`. Reads only the part that is asked for."""
        return batch_of(*self.rows(first, count, part, parts), self.documents)

    def rows(self, first: int, count: int, part: int = 0, parts: int = 1) -> tuple[NDArray[np.int64], Rows]:
        """Sample ids (n,) and samples of the same part, before they are cut into tokens and labels: for objectives that cut
        them otherwise."""
        ids = np.arange(*part_of(first, count, part, parts), dtype=np.int64)
        place = self._runs.locate(ids)
        sources = [0] if len(self.readers) == 1 else np.unique(place.source).tolist() or [0]
        if len(sources) == 1:
            rows = self.readers[sources[0]].read(place.sample)
        else:
            where = [np.flatnonzero(place.source == source) for source in sources]
            each = [self.readers[source].read(place.sample[at]) for source, at in zip(sources, where, strict=True)]
            rows = _together(each, where, len(ids))
        return ids, rows if self.transform is None else self.transform(rows, ids)


class ShardStream(SampleStream):
    """The TokenStream of one split of a data set; `train` is shuffled anew each epoch, `validation` never.

    documents: whether batches tell the documents apart. reader: of the samples; None: documents end to end, cut every S
    tokens. transform: of every sample, keyed by its id.
    Raises DataError where no shard of the split holds a single sample.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: Split,
        sequence_length: int,
        seed: int = 0,
        *,
        documents: bool = False,
        reader: Reader | None = None,
        transform: Transform | None = None,
    ):
        reader = reader or ChopReader(dataset, split, sequence_length, documents=documents)
        order: Order = ShuffledOrder(reader.size, seed) if split == "train" else FixedOrder(reader.size)
        super().__init__(order, [reader], sequence_length, documents=documents, transform=transform)


def open_stream(config: RunConfig, dataset: Dataset, split: Split) -> ShardStream:
    """The stream of a split as a run's configuration says; only training samples are transformed. Raises DataError as
    `open_reader` does."""
    return ShardStream(
        dataset,
        split,
        config.sequence_length,
        config.seed,
        documents=config.data.apart,
        reader=open_reader(config, dataset, split),
        transform=training_transform(config, dataset) if split == "train" else None,
    )


def training_transform(config: RunConfig, dataset: Dataset | TextCorpus) -> Transform | None:
    """What is done to training samples after they were packed; dataset: whose tokenizer made them. Raises DataError where
    the tokenizer lacks a token."""
    fim = config.data.fim
    if not fim.rate:
        return None
    prefix, middle, suffix = token_ids(dataset.tokenizer, (fim.prefix, fim.middle, fim.suffix))
    if prefix is None or middle is None or suffix is None:
        raise DataError("\n".join(map(str, fim_problems(dataset.tokenizer, config.data))))
    return FillInTheMiddle(config.seed, fim.rate, fim.spm_rate, prefix, middle, suffix, dataset.eod)


def _together(parts: Sequence[Rows], where: Sequence[NDArray[np.intp]], count: int) -> Rows:
    """Rows of several sources, each at its places among `count`."""
    shape = (count, parts[0].tokens.shape[1])
    rows = Rows(np.empty(shape, np.int64), np.empty(shape, np.bool_))
    for part, here in zip(parts, where, strict=True):
        rows.tokens[here], rows.counts[here] = part.tokens, part.counts
    documents = [part.documents for part in parts if part.documents is not None]
    if not documents:
        return rows
    assert len(documents) == len(parts), "sources of one blend know their documents, or none does"
    return rows._replace(documents=Bounds.joined(documents, where))
