"""Where the documents of some rows begin: what attention kernels call cu_seqlens, row by row.

    rows       a a a b b b        begins   0 3 │ 0 │ 0 1 4        splits   0 2 3 6
               c c c c c c
               d e e e f f

The tokens of a row are many and its documents few, so this is what is made while samples are read; the number of each
token's document, and its place in it, are made of it where they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, eq=False)
class Bounds:
    """Of n rows of `width` tokens. As a numpy array it is (n, width) int32: the number of each token's document, from 0."""

    splits: NDArray[np.int64]  # (n + 1,): those of row r are begins[splits[r]:splits[r + 1]]
    begins: NDArray[np.int64]  # (documents,): columns, ascending in each row, the first of each row 0
    width: int

    @classmethod
    def of_rows(cls, rows: Iterable[ArrayLike], width: int) -> Bounds:
        """rows: of each its columns, ascending from 0."""
        columns = [np.asarray(row, np.int64) for row in rows]
        splits = np.array([0, *map(len, columns)], np.int64).cumsum()
        return cls(splits, np.concatenate([np.empty(0, np.int64), *columns]), width)

    @classmethod
    def of_numbers(cls, numbers: NDArray[Any]) -> Bounds:
        """numbers (n, width): of each token's document, ascending in each row."""
        first = np.ones(numbers.shape, np.bool_)
        first[:, 1:] = np.diff(numbers) != 0
        splits = np.concatenate([np.zeros(1, np.int64), np.cumsum(first.sum(1))])
        return cls(splits, first.nonzero()[1], numbers.shape[1])

    @classmethod
    def joined(cls, parts: Sequence[Bounds], where: Sequence[NDArray[np.intp]]) -> Bounds:
        """Of rows that come in several parts, each with the places of its rows among all."""
        rows = {at: part[row] for part, here in zip(parts, where, strict=True) for row, at in enumerate(here.tolist())}
        return cls.of_rows((rows[at] for at in range(len(rows))), parts[0].width)

    def __len__(self) -> int:
        return len(self.splits) - 1

    def __getitem__(self, row: int) -> NDArray[np.int64]:
        """The columns of a row."""
        return self.begins[self.splits[row] : self.splits[row + 1]]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        numbers = np.zeros(self.shape, np.int32)
        numbers[self.where()] = 1
        numbers[:, :1] = 0
        return np.cumsum(numbers, axis=1, dtype=dtype or np.int32)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self), self.width

    def where(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The row (documents,) and the column (documents,) of each one's first token."""
        return np.arange(len(self)).repeat(self.splits[1:] - self.splits[:-1]), self.begins

    def positions(self) -> NDArray[np.int64]:
        """(n, width): how many tokens of its document, as far as the row holds it, stand before each token."""
        begins = np.zeros(self.shape, np.int64)
        begins[self.where()] = self.begins
        at: NDArray[np.int64] = np.arange(self.width) - np.maximum.accumulate(begins, axis=1)
        return at

    def cut(self, width: int) -> Bounds:
        """Of the first `width` tokens of each row."""
        kept = self.begins < width
        return Bounds(np.concatenate([[0], kept.cumsum()])[self.splits], self.begins[kept], width)
