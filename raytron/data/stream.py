"""Training samples straight from the shards.

    ids ──► order: which samples ──► reader: rows of tokens ──► transform, if any ──► batch

Which sample an id names is the order's matter (`raytron.data.order`), what the sample holds the reader's
(`raytron.data.reader`). All of it happens in the process that asks, with no worker process and no queue.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from raytron.config import RunConfig
from raytron.data.batch import Batch, part_of
from raytron.data.check import fim_problems
from raytron.data.fim import FillInTheMiddle
from raytron.data.manifest import Split
from raytron.data.order import FixedOrder, Order, ShuffledOrder
from raytron.data.reader import ChopReader, Reader, open_reader
from raytron.data.rows import Rows, Transform, batch_of
from raytron.data.shards import Dataset
from raytron.data.tokenizer import token_ids
from raytron.errors import DataError


class ShardStream:
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
        self.dataset, self.split, self._sequence_length = dataset, split, sequence_length
        self.documents, self.transform = documents, transform
        self.reader = reader or ChopReader(dataset, split, sequence_length, documents=documents)
        size = self.reader.size
        self.order: Order = ShuffledOrder(size, seed) if split == "train" else FixedOrder(size)

    @property
    def sequence_length(self) -> int:
        return self._sequence_length

    @property
    def samples_per_epoch(self) -> int:
        return self.reader.size

    def batch(self, first: int, count: int, part: int = 0, parts: int = 1) -> Batch:
        """See `TokenStream.batch`. Reads only the part that is asked for."""
        return batch_of(*self.rows(first, count, part, parts), self.documents)

    def rows(self, first: int, count: int, part: int = 0, parts: int = 1) -> tuple[NDArray[np.int64], Rows]:
        """Sample ids (n,) and samples of the same part, before they are cut into tokens and labels: for objectives that cut
        them otherwise."""
        ids = np.arange(*part_of(first, count, part, parts), dtype=np.int64)
        rows = self.reader.read(self.order.locate(ids).sample)
        return ids, rows if self.transform is None else self.transform(rows, ids)


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


def training_transform(config: RunConfig, dataset: Dataset) -> Transform | None:
    """What is done to training samples after they were packed. Raises DataError where the tokenizer lacks a token."""
    fim = config.data.fim
    if not fim.rate:
        return None
    prefix, middle, suffix = token_ids(dataset.tokenizer, (fim.prefix, fim.middle, fim.suffix))
    if prefix is None or middle is None or suffix is None:
        raise DataError("\n".join(map(str, fim_problems(dataset.tokenizer, config.data))))
    return FillInTheMiddle(config.seed, fim.rate, fim.spm_rate, prefix, middle, suffix, dataset.eod)
