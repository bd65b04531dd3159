"""The shards of a split, opened when they are asked for, and rows of tokens put together from slices of them.

A reader says of each sample which *pieces* make it: tokens [start, stop) of a shard, and the row and column where they go.

    shard 3   ┆····[10 ───── 14)┆·········       row 0   │ 10 11 12 13 │ 0 1 2 │ pad │
    shard 0   [0 ─ 3)···········                                 piece      piece

Everything that fetches tokens is here, so that where shards lie is no matter of how they are packed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from raytron.data.files import read_ranges
from raytron.data.loss_spans import counted
from raytron.data.manifest import Split
from raytron.data.ranged import RangedShard, RangedTokens
from raytron.data.rows import Rows
from raytron.data.shard_file import REBUILD, Shard
from raytron.data.shards import Dataset
from raytron.errors import DataError, Problem

MAX_OPEN_SHARDS = 256


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
        self._places: dict[int, RangedTokens] = {}

    def __getitem__(self, number: int) -> Shard:
        if number not in self._open:
            self._open[number] = self.dataset.read(self.entries[number])
            if len(self._open) > MAX_OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]

    def fill(self, rows: Rows, pieces: Sequence[Piece]) -> None:
        """Puts tokens in their places, and whether they count. Raises DataError for a token beyond the vocabulary."""
        fetched = None if self.dataset.url is None else self._fetched(pieces)
        for row, column, number, start, stop in pieces:
            shard, place = self[number], slice(column, column + stop - start)
            rows.tokens[row, place] = shard.tokens[start:stop] if fetched is None else next(fetched)
            rows.counts[row, place] = True if shard.spans is None else counted(shard, start, stop)
        if rows.tokens.size and rows.tokens.max() >= self.dataset.vocab:
            self._name_the_shard(rows, pieces)

    def _fetched(self, pieces: Sequence[Piece]) -> Iterator[NDArray[Any]]:
        """Of each piece its tokens (stop - start,), from remote shards; all are asked for at once."""
        places = [self._place(piece.shard) for piece in pieces]
        ranges = [tokens.range_of(piece.start, piece.stop) for tokens, piece in zip(places, pieces, strict=True)]
        parts = zip(places, read_ranges(ranges), strict=True)
        return (np.frombuffer(data, tokens.dtype) for tokens, data in parts)

    def _place(self, number: int) -> RangedTokens:
        """Where a remote shard's tokens lie: remembered longer than the shard stays open."""
        if number not in self._places:
            shard = self[number]
            assert isinstance(shard, RangedShard)
            self._places[number] = shard.tokens
        return self._places[number]

    def _name_the_shard(self, rows: Rows, pieces: Iterable[Piece]) -> None:
        """An id beyond the vocabulary would be an opaque fault in an embedding: say here whose it is."""
        for row, column, number, start, stop in pieces:
            largest = int(rows.tokens[row, column : column + stop - start].max())
            if largest >= self.dataset.vocab:
                path = self.dataset.path_of(self.entries[number])
                what = f"token id {largest} is beyond the vocabulary of {self.dataset.vocab}"
                raise DataError(Problem(path, what, REBUILD))
