"""Pieces of one source: sample number i of a data set's split, whatever order they are asked for in.

Concatenate and chop: each shard is one run of tokens, documents end to end, cut every S tokens; a sample also sees one
token more, the label of its last. What is left at a shard's end is not read.

    shard      t t t t e t t e t t t t t e t          S = 4
    sample 0   t t t t|e                              tokens | last label
    sample 1           e t t e|t

Where documents are kept apart, rows also say which document each token is of, and the label of a document's last token,
which would be the first of another document, has weight 0.

Which source and which sample an id names is the order's matter; another way to pack is another `Reader`. A sample becomes
a slice of a memory map, in the process that asks for it, with no worker process and no queue.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from raytron.data.manifest import Split
from raytron.data.shard_file import REBUILD, Shard
from raytron.data.shards import Dataset
from raytron.errors import DataError, Problem

MAX_OPEN_SHARDS = 256


class Rows(NamedTuple):
    """Some samples of one source: the fields of a Batch without the ids, of the same shapes."""

    tokens: NDArray[np.int64]  # (n, S)
    labels: NDArray[np.int64]  # (n, S)
    weights: NDArray[np.float32]  # (n, S)
    documents: NDArray[np.int32] | None = None  # (n, S)


class Reader(Protocol):
    """The samples [0, size) of one source."""

    @property
    def size(self) -> int:
        """Samples of one epoch."""
        ...

    def read(self, samples: NDArray[np.int64]) -> Rows:
        """Samples (n,) by number, each in [0, size). Pure. Raises DataError."""
        ...


class ChopReader:
    """One split of a data set, concatenated and chopped.

    documents: whether rows tell the documents apart.
    Raises DataError where no shard of the split holds a single sample.
    """

    def __init__(self, dataset: Dataset, split: Split, sequence_length: int, *, documents: bool = False):
        self.dataset, self.split, self.sequence_length = dataset, split, sequence_length
        self.documents = documents
        self._entries = dataset.entries(split)
        self._ends = np.cumsum(samples_in(dataset, split, sequence_length))  # (shards,) samples up to and with each
        if not len(self._ends) or not self._ends[-1]:
            raise DataError(too_short(dataset, split, sequence_length))
        self._open: OrderedDict[int, Shard] = OrderedDict()  # the most recently used last

    @property
    def size(self) -> int:
        return int(self._ends[-1])

    def read(self, samples: NDArray[np.int64]) -> Rows:
        tokens = np.empty((len(samples), self.sequence_length), np.int64)
        labels = np.empty_like(tokens)
        shards, offsets = self.locate(samples)
        for row, (shard, offset) in enumerate(zip(shards.tolist(), offsets.tolist(), strict=True)):
            piece = self._shard(shard).tokens[offset : offset + self.sequence_length + 1]
            tokens[row], labels[row] = piece[:-1], piece[1:]
        self._check_ids(tokens, labels, shards)
        weights = np.ones(tokens.shape, np.float32)
        if not self.documents:
            return Rows(tokens, labels, weights)
        numbers = self._documents(shards, offsets)
        weights[numbers[:, :-1] != numbers[:, 1:]] = 0
        return Rows(tokens, labels, weights, numbers[:, :-1])

    def locate(self, samples: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of samples (n,): the number of the shard (n,) and the offset of the first token in it (n,)."""
        shard = np.searchsorted(self._ends, samples, side="right").astype(np.int64)
        before = np.where(shard > 0, self._ends[shard - 1], 0)
        return shard, (samples - before) * self.sequence_length

    def shard(self, number: int) -> Shard:
        """A shard of the split, mapped now if it is not."""
        return self._shard(number)

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


def samples_in(dataset: Dataset, split: Split, sequence_length: int) -> NDArray[np.int64]:
    """(shards,): how many samples each shard of a split holds."""
    samples: NDArray[np.int64] = np.maximum(dataset.entries(split).column("tokens") - 1, 0) // sequence_length
    return samples


def too_short(dataset: Dataset, split: Split, sequence_length: int) -> Problem:
    """What to say where no shard holds a sample."""
    longest = int(dataset.entries(split).column("tokens").max(initial=0))
    what = (
        f"the {split} split holds {dataset.tokens(split)} tokens, at most {longest} in one shard; "
        f"one sample needs {sequence_length + 1}"
    )
    shorter = f"a sequence_length of at most {longest - 1}" if longest > 1 else "more text"
    more = " or a larger data.validation_fraction" if split == "validation" else " or a larger corpus"
    return Problem(str(dataset.path), what, f"use {shorter}{more}")
