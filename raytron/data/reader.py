"""Reads samples of one source under one packing: sample number in, row of tokens out.

A `Reader` knows how many samples its source has and what each holds; in which order they are read, and whether among those
of other sources, is the order's matter (`raytron.data.order`). Text that is tokenized as it is read has a reader of its own
(`raytron.data.text_reader`). Of a tokenized data set a row is put together of *pieces*, slices of shards:

    chop       one piece a row, S + 1 tokens of a shard from S · number on, wherever documents end
    packed     the pieces of one bin of a pack plan (`raytron.data.pack`), each a document of its own, then padding

Each piece becomes a slice of a memory map, in the process that asks for it (`raytron.data.open_shards`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from raytron.config import RunConfig
from raytron.data.bounds import Bounds
from raytron.data.manifest import Split
from raytron.data.open_shards import OpenShards, Piece
from raytron.data.pack import PackPlan, PackRule, find_plan, no_sample, open_plan
from raytron.data.rows import Rows
from raytron.data.shard_file import offsets_of
from raytron.data.shards import Dataset
from raytron.data.text_index import TextCorpus
from raytron.data.text_reader import TextReader, no_text
from raytron.errors import DataError, Problem


class Reader(Protocol):
    """The samples of one source. Implementations are pure: the same numbers, the same rows."""

    @property
    def size(self) -> int:
        """Samples of one epoch."""
        ...

    def read(self, samples: NDArray[np.int64]) -> Rows:
        """Samples (n,) by number, each in [0, size). Raises DataError."""
        ...


class ChopReader:
    """Documents of a shard end to end, cut every S tokens; what is left at a shard's end is not read.

    documents: whether rows tell the documents apart. Raises DataError where no shard holds a single sample.
    """

    def __init__(self, dataset: Dataset, split: Split, sequence_length: int, *, documents: bool = False):
        self.dataset, self.shards = dataset, OpenShards(dataset, split)
        self._length, self._documents = sequence_length, documents
        self._begins = offsets_of(samples_in(dataset, split, sequence_length))  # (shards + 1,) samples before
        if not self._begins[-1]:
            raise DataError(too_short(dataset, split, sequence_length))

    @property
    def size(self) -> int:
        return int(self._begins[-1])

    def locate(self, samples: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of samples (n,): the number of the shard (n,) and the offset of the first token in it (n,)."""
        shard = self._begins.searchsorted(samples, "right") - 1
        return shard, (samples - self._begins[shard]) * self._length

    def pieces(self, samples: NDArray[np.int64]) -> list[Piece]:
        """What samples (n,) are made of, row by row."""
        places = zip(*(each.tolist() for each in self.locate(samples)), strict=True)
        return [Piece(row, 0, shard, at, at + self._length + 1) for row, (shard, at) in enumerate(places)]

    def read(self, samples: NDArray[np.int64]) -> Rows:
        """See `Reader.read`."""
        pieces, shape = self.pieces(samples), (len(samples), self._length + 1)
        rows = Rows(np.empty(shape, np.int64), np.ones(shape, np.bool_))
        self.shards.fill(rows, pieces)
        if not self._documents:
            return rows
        columns = (self.shards[number].begins(start, stop) for _, _, number, start, stop in pieces)
        return rows._replace(documents=Bounds.of_rows(columns, shape[1]))


class PackReader:
    """The bins of a pack plan of this data set. What is left of a row is padding: the end-of-document token, which does
    not count, as a document of its own."""

    def __init__(self, dataset: Dataset, plan: PackPlan):
        self.dataset, self.plan, self.shards = dataset, plan, OpenShards(dataset, plan.rule.split)
        self._begins = offsets_of(self.shards.entries.column("tokens"))  # (shards + 1,) tokens before

    @property
    def size(self) -> int:
        return self.plan.bins

    def pieces(self, samples: NDArray[np.int64]) -> list[Piece]:
        """What samples (n,) are made of, row by row and from left to right."""
        bins = [self.plan.bin(number) for number in samples.tolist()]
        if not bins:
            return []
        starts, lengths = (np.concatenate(parts) for parts in zip(*bins, strict=True))
        rows = np.repeat(np.arange(len(bins)), [len(starts) for starts, _ in bins])
        before = np.cumsum(lengths) - lengths
        columns = before - before[rows.searchsorted(rows)]
        shards = self._begins.searchsorted(starts, "right") - 1
        at = starts - self._begins[shards]
        return list(map(Piece, *(each.tolist() for each in (rows, columns, shards, at, at + lengths))))

    def read(self, samples: NDArray[np.int64]) -> Rows:
        """See `Reader.read`."""
        pieces, shape = self.pieces(samples), (len(samples), self.plan.rule.sequence_length + 1)
        columns = [[0] for _ in range(shape[0])]
        for row, column, _, start, stop in pieces:
            if column + stop - start < shape[1]:  # the next piece, or padding
                columns[row].append(column + stop - start)
        documents = Bounds.of_rows(columns, shape[1])
        rows = Rows(np.full(shape, self.dataset.eod, np.int64), np.zeros(shape, np.bool_), documents)
        self.shards.fill(rows, pieces)
        return rows


def samples_in(dataset: Dataset, split: Split, sequence_length: int) -> NDArray[np.int64]:
    """(shards,): how many samples each shard of a split holds, where it is chopped."""
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
    return Problem(dataset.name, what, f"use {shorter}{more}")


def open_reader(config: RunConfig, dataset: Dataset | TextCorpus, split: Split, verify: bool = False) -> Reader:
    """What reads a split of a data set, or of text, as a run's configuration says. Makes the pack plan, if one is needed and
    not there; verify: else reads every byte of it.

    Raises DataError where no sample is to be had, or the plan is damaged or can't be written.
    """
    data, length = config.data, config.sequence_length
    if isinstance(dataset, TextCorpus):
        return TextReader(dataset, split, documents=data.apart or data.fim.rate > 0)
    if data.packing == "chop":
        return ChopReader(dataset, split, length, documents=data.apart or data.fim.rate > 0)
    return PackReader(dataset, open_plan(dataset, _rule(config, split), plan_folders(config, dataset), verify))


def size_of(config: RunConfig, dataset: Dataset | TextCorpus, split: Split) -> int | None:
    """Samples of a split, without reading a shard; None where documents are packed and no plan has been made yet. Raises
    DataError where there is one that is damaged."""
    if isinstance(dataset, TextCorpus):
        return dataset.samples(split)
    if config.data.packing == "chop":
        return int(samples_in(dataset, split, config.sequence_length).sum())
    found = find_plan(dataset, _rule(config, split), plan_folders(config, dataset))
    return None if found is None else found.bins


def shortage(config: RunConfig, dataset: Dataset | TextCorpus, split: Split) -> Problem | None:
    """What to say where a split has no sample for a run, as far as its counts tell: documents may yet all be too long."""
    if isinstance(dataset, TextCorpus):
        return None if dataset.samples(split) else no_text(dataset, split)
    if config.data.packing == "chop":
        none = not samples_in(dataset, split, config.sequence_length).any()
        return too_short(dataset, split, config.sequence_length) if none else None
    none = dataset.tokens(split) <= dataset.documents(split)  # each label needs a token before it
    return no_sample(dataset, _rule(config, split)) if none else None


def _rule(config: RunConfig, split: Split) -> PackRule:
    assert config.data.packing != "chop"
    return PackRule(split, config.data.packing, config.sequence_length, whole=config.data.too_long == "drop")


def plan_folders(config: RunConfig, dataset: Dataset) -> list[Path]:
    """Where the pack plans of a run may lie: beside the shards, or else, where nobody may write there or they are remote, in
    the run directory, which all nodes see."""
    return [*([dataset.path] if dataset.url is None else []), Path(config.run_dir) / "packs"]
