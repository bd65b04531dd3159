"""Reads samples of one source under one packing: sample number in, row of tokens out.

A `Reader` knows how many samples its source has and what each holds; in which order they are read, and whether among those
of other sources, is the order's matter (`raytron.data.order`). A row is put together of *pieces*, slices of shards:

    chop       one piece a row, S + 1 tokens of a shard from S · number on, wherever documents end
    packed     the pieces of one bin of a pack plan (`raytron.data.pack`), each a document of its own, then padding

Each piece becomes a slice of a memory map, in the process that asks for it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from raytron.config import RunConfig
from raytron.data.loss_spans import counted
from raytron.data.manifest import Split
from raytron.data.pack import PackPlan, PackRule, open_plan
from raytron.data.rows import Rows
from raytron.data.shard_file import REBUILD, Shard, offsets_of
from raytron.data.shards import Dataset
from raytron.errors import DataError, Problem

MAX_OPEN_SHARDS = 256


class Reader(Protocol):
    """The samples of one source. Implementations are pure: the same numbers, the same rows."""

    @property
    def size(self) -> int:
        """Samples that there are."""
        ...

    def read(self, samples: NDArray[np.int64]) -> Rows:
        """Samples (n,), each in [0, size). Raises DataError."""
        ...


class Piece(NamedTuple):
    """Tokens [start, stop) of a shard, and where they go."""

    row: int
    column: int
    shard: int  # its number in the split
    start: int
    stop: int


class OpenShards:
    """The shards of a split, mapped when they are asked for; the most recently used stay open."""

    def __init__(self, dataset: Dataset, split: Split):
        self.dataset, self.entries = dataset, dataset.entries(split)
        self._open: OrderedDict[int, Shard] = OrderedDict()  # the most recently used last

    def __getitem__(self, number: int) -> Shard:
        if number not in self._open:
            self._open[number] = self.dataset.read(self.entries[number])
            if len(self._open) > MAX_OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]

    def fill(self, rows: Rows, pieces: Iterable[Piece]) -> None:
        """Puts tokens in their places, and whether they count. Raises DataError for a token beyond the vocabulary."""
        for row, column, number, start, stop in pieces:
            shard, place = self[number], slice(column, column + stop - start)
            rows.tokens[row, place] = shard.tokens[start:stop]
            rows.counts[row, place] = True if shard.spans is None else counted(shard, start, stop)

    def check(self, rows: Rows, pieces: Iterable[Piece]) -> None:
        """An id beyond the vocabulary would be an opaque fault in an embedding: say here whose it is."""
        if not rows.tokens.size or rows.tokens.max() < self.dataset.vocab:
            return
        for _, _, number, start, stop in pieces:
            largest = int(self[number].tokens[start:stop].max())
            if largest >= self.dataset.vocab:
                path = self.dataset.path / self.entries[number].path
                what = f"token id {largest} is beyond the vocabulary of {self.dataset.vocab}"
                raise DataError(Problem(str(path), what, REBUILD))


class ChopReader:
    """Documents of a shard end to end, cut every S tokens; what is left at a shard's end is not read.

    documents: whether rows tell the documents apart. Raises DataError where no shard holds a single sample.
    """

    def __init__(self, dataset: Dataset, split: Split, sequence_length: int, *, documents: bool = False):
        self.shards, self._length, self._documents = OpenShards(dataset, split), sequence_length, documents
        samples = [max(entry.tokens - 1, 0) // sequence_length for entry in self.shards.entries]
        self._ends = np.cumsum(samples, dtype=np.int64)  # (shards,) samples up to and with each shard
        if not sum(samples):
            raise DataError(_too_short(dataset, split, sequence_length))

    @property
    def size(self) -> int:
        return int(self._ends[-1])

    def read(self, samples: NDArray[np.int64]) -> Rows:
        """See `Reader.read`."""
        shards = np.searchsorted(self._ends, samples, side="right")
        before = np.concatenate([np.zeros(1, np.int64), self._ends])[shards]
        starts = ((samples - before) * self._length).tolist()
        places = zip(shards.tolist(), starts, strict=True)
        pieces = [Piece(row, 0, shard, at, at + self._length + 1) for row, (shard, at) in enumerate(places)]
        shape = (len(samples), self._length + 1)
        documents = np.empty(shape, np.int32) if self._documents else None
        rows = Rows(np.empty(shape, np.int64), np.ones(shape, np.bool_), documents)
        self.shards.fill(rows, pieces)
        self.shards.check(rows, pieces)
        if documents is not None:
            for piece in pieces:
                documents[piece.row] = numbered(self.shards[piece.shard], piece.start, piece.stop)
        return rows


class PackReader:
    """The bins of a pack plan of this data set. What is left of a row is padding: the end-of-document token, which does
    not count, as a document of its own."""

    def __init__(self, dataset: Dataset, plan: PackPlan):
        self.plan, self.shards = plan, OpenShards(dataset, plan.rule.split)
        self._begins = offsets_of(
            np.array([entry.tokens for entry in self.shards.entries])
        )  # (shards + 1,) tokens before

    @property
    def size(self) -> int:
        return self.plan.bins

    def read(self, samples: NDArray[np.int64]) -> Rows:
        """See `Reader.read`."""
        shape = (len(samples), self.plan.rule.sequence_length + 1)
        documents = np.empty(shape, np.int32)
        rows = Rows(np.full(shape, self.shards.dataset.eod, np.int64), np.zeros(shape, np.bool_), documents)
        pieces: list[Piece] = []
        for row, number in enumerate(samples.tolist()):
            starts, lengths = self.plan.bin(number)
            shards = np.searchsorted(self._begins, starts, side="right") - 1
            ends = np.cumsum(lengths)
            at = (shards, starts - self._begins[shards], lengths, ends - lengths)
            for shard, start, length, column in zip(*(each.tolist() for each in at), strict=True):
                pieces.append(Piece(row, column, shard, start, start + length))
            documents[row, : ends[-1]] = np.repeat(np.arange(len(lengths)), lengths)
            documents[row, ends[-1] :] = len(lengths)
        self.shards.fill(rows, pieces)
        self.shards.check(rows, pieces)
        return rows


def numbered(shard: Shard, start: int, stop: int) -> NDArray[np.int32]:
    """(stop - start,): the document of each of those tokens of a shard, counted from the first one's."""
    begins = np.zeros(stop - start, np.int32)
    first, last = np.searchsorted(shard.offsets, (start, stop - 1), side="right")
    begins[shard.offsets[first:last] - start] = 1
    return np.cumsum(begins, dtype=np.int32)


def _too_short(dataset: Dataset, split: Split, sequence_length: int) -> Problem:
    longest = max((entry.tokens for entry in dataset.entries(split)), default=0)
    what = (
        f"the {split} split holds {dataset.tokens(split)} tokens, at most {longest} in one shard; "
        f"one sample needs {sequence_length + 1}"
    )
    shorter = f"a sequence_length of at most {longest - 1}" if longest > 1 else "more text"
    more = " or a larger data.validation_fraction" if split == "validation" else " or a larger corpus"
    return Problem(str(dataset.path), what, f"use {shorter}{more}")


def open_reader(config: RunConfig, dataset: Dataset, split: Split, verify: bool = False) -> Reader:
    """What reads a split of a data set as a run's configuration says. Makes the pack plan, if one is needed and not there;
    verify: else reads every byte of it.

    Raises DataError where no sample is to be had, or the plan is damaged or can't be written.
    """
    data, length = config.data, config.sequence_length
    if data.packing == "chop":
        return ChopReader(dataset, split, length, documents=data.apart or data.fim.rate > 0)
    rule = PackRule(split, data.packing, length, whole=data.too_long == "drop")
    return PackReader(dataset, open_plan(dataset, rule, plan_folders(config, dataset), verify))


def has_samples(config: RunConfig, dataset: Dataset, split: Split) -> bool:
    """Whether a split has any sample for a run, as far as its counts tell: documents may yet be too long, or lie in shards
    that are too short."""
    tokens = dataset.tokens(split)
    return tokens > (config.sequence_length if config.data.packing == "chop" else dataset.documents(split))


def plan_folders(config: RunConfig, dataset: Dataset) -> list[Path]:
    """Where the pack plans of a run may lie: beside the shards, or else, where nobody may write there, in the run
    directory."""
    return [dataset.path, Path(config.run_dir) / "packs"]
