"""Training samples straight from the shards: concatenate and chop.

Each shard is one run of tokens, documents end to end, cut every S tokens; a sample also sees one token more, the label
of its last. What is left at a shard's end is not read.

    shard      t t t t e t t e t t t t t e t          S = 4
    sample 0   t t t t|e                              tokens | last label
    sample 1           e t t e|t

Where documents are kept apart, a batch also says which document each token is of, and the label of a document's last
token, which would be the first of another document, has weight 0.

Which sample an id names is the order's matter (`raytron.data.order`); here a sample becomes a slice of a memory map, in
the process that asks for it, with no worker process and no queue.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from raytron.data.batch import Batch, part_of
from raytron.data.manifest import Split
from raytron.data.order import FixedOrder, Order, ShuffledOrder
from raytron.data.shard_file import REBUILD, Shard
from raytron.data.shards import Dataset
from raytron.errors import DataError, Problem

MAX_OPEN_SHARDS = 256


class ShardStream:
    """The TokenStream of one split of a data set; `train` is shuffled anew each epoch, `validation` never.

    documents: whether batches tell the documents apart.
    Raises DataError where no shard of the split holds a single sample.
    """

    def __init__(self, dataset: Dataset, split: Split, sequence_length: int, seed: int = 0, *, documents: bool = False):
        self.dataset, self.split, self._sequence_length = dataset, split, sequence_length
        self.documents = documents
        self._entries = dataset.entries(split)
        samples = [max(entry.tokens - 1, 0) // sequence_length for entry in self._entries]
        self._ends = np.cumsum(samples, dtype=np.int64)  # (shards,) samples up to and with each shard
        if not sum(samples):
            raise DataError(_too_short(dataset, split, sequence_length))
        size = int(self._ends[-1])
        self.order: Order = ShuffledOrder(size, seed) if split == "train" else FixedOrder(size)
        self._open: OrderedDict[int, Shard] = OrderedDict()  # the most recently used last

    @property
    def sequence_length(self) -> int:
        return self._sequence_length

    @property
    def samples_per_epoch(self) -> int:
        return int(self._ends[-1])

    def batch(self, first: int, count: int, part: int = 0, parts: int = 1) -> Batch:
        """See `TokenStream.batch`. Reads only the part that is asked for."""
        start, stop = part_of(first, count, part, parts)
        ids = np.arange(start, stop, dtype=np.int64)
        tokens = np.empty((len(ids), self.sequence_length), np.int64)
        labels = np.empty_like(tokens)
        shards, offsets = self.locate(ids)
        for row, (shard, offset) in enumerate(zip(shards.tolist(), offsets.tolist(), strict=True)):
            piece = self._shard(shard).tokens[offset : offset + self.sequence_length + 1]
            tokens[row], labels[row] = piece[:-1], piece[1:]
        self._check_ids(tokens, labels, shards)
        weights = np.ones(tokens.shape, np.float32)
        if not self.documents:
            return Batch(ids, tokens, labels, weights)
        numbers = self._documents(shards, offsets)
        weights[numbers[:, :-1] != numbers[:, 1:]] = 0
        return Batch(ids, tokens, labels, weights, numbers[:, :-1])

    def locate(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of sample ids (n,): the number of the shard (n,) and the offset of the first token in it (n,)."""
        index = self.order.locate(ids).sample
        shard = np.searchsorted(self._ends, index, side="right")
        before = np.concatenate([np.zeros(1, np.int64), self._ends])[shard]
        return shard.astype(np.int64), (index - before) * self.sequence_length

    def _documents(self, shards: NDArray[np.int64], offsets: NDArray[np.int64]) -> NDArray[np.int32]:
        """(n, S + 1): the document, counted from the sample's first, of each token and of the last label."""
        at = np.arange(self.sequence_length + 1)
        numbers = np.empty((len(shards), len(at)), np.int32)
        for row, (shard, offset) in enumerate(zip(shards.tolist(), offsets.tolist(), strict=True)):
            found = np.searchsorted(self._shard(shard).offsets, offset + at, side="right")
            numbers[row] = found - found[0]
        return numbers

    def _shard(self, number: int) -> Shard:
        if number not in self._open:
            self._open[number] = self.dataset.read(self._entries[number])
            if len(self._open) > MAX_OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]

    def _check_ids(self, tokens: NDArray[np.int64], labels: NDArray[np.int64], shards: NDArray[np.int64]) -> None:
        """An id beyond the vocabulary would be an opaque fault in an embedding: say here whose it is."""
        if not len(tokens) or max(tokens.max(), labels.max()) < self.dataset.vocab:
            return
        row = int(np.argmax(np.maximum(tokens, labels).max(axis=1)))
        path = self.dataset.path / self._entries[int(shards[row])].path
        what = f"token id {max(tokens.max(), labels.max())} is beyond the vocabulary of {self.dataset.vocab}"
        raise DataError(Problem(str(path), what, REBUILD))


def _too_short(dataset: Dataset, split: Split, sequence_length: int) -> Problem:
    longest = max((entry.tokens for entry in dataset.entries(split)), default=0)
    what = (
        f"the {split} split holds {dataset.tokens(split)} tokens, at most {longest} in one shard; "
        f"one sample needs {sequence_length + 1}"
    )
    shorter = f"a sequence_length of at most {longest - 1}" if longest > 1 else "more text"
    more = " or a larger data.validation_fraction" if split == "validation" else " or a larger corpus"
    return Problem(str(dataset.path), what, f"use {shorter}{more}")
