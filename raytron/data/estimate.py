"""How many tokens a text will have, told from its bytes: fast, and the same on every machine.

A tokenizer's appetite differs by what it reads: a byte of a common word is worth a fifth of a token, one of a table of
numbers most of one, one in a run of blanks next to none. So each byte is worth what bytes of its *class* are worth after one
of the class before it, in thousandths of a token:

    text       d  e  f     r  u  n  (  1  2  )
    classes    a  a  a  _  a  a  a  .  1  1  .         a small, A capital, 1 digit, _ blank, ⏎ line end, . sign, é not ASCII
    worth     ┆210 ┆ 190 ┆ …                           of (a, a), of (a, _), …

What each pair of classes is worth is fitted once, to pieces of the corpus that were tokenized (least squares, drawn towards
the mean, none below FLOOR). Sums are of whole numbers, so they are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

TOKEN = 1000  # what one token counts
FLOOR = 10  # what a byte counts at least
KINDS = 8  # classes of bytes
ROUNDS = 20  # of fitting without the pairs that came out below the floor
DRAW = 20.0  # how strongly a pair is drawn towards the mean: as so many bytes of it would


def _classes() -> bytes:
    """The class of each of 256 bytes, as `bytes.translate` takes them."""
    table = np.full(256, 5, np.uint8)  # signs
    table[ord("a") : ord("z") + 1], table[ord("A") : ord("Z") + 1], table[ord("0") : ord("9") + 1] = 0, 1, 2
    table[[ord(" "), ord("\t")]], table[[ord("\n"), ord("\r")]] = 3, 4
    table[0x80:0xC0], table[0xC0:] = 7, 6  # inside a character, and where one begins
    return table.tobytes()


TABLE = _classes()


@dataclass(frozen=True)
class Estimate:
    """worth: (KINDS · KINDS,) of a byte by the class of the byte before it and its own, in thousandths of a token."""

    worth: tuple[int, ...]

    @classmethod
    def even(cls, per_byte: int = TOKEN) -> Estimate:
        """All bytes are worth the same."""
        return cls((per_byte,) * KINDS**2)

    def running(self, text: bytes, begin: int, stop: int) -> NDArray[np.int64]:
        """(stop - begin + 1,): what the bytes from `begin` up to each place are worth; text: what they are a part of."""
        running = np.zeros(stop - begin + 1, np.int64)
        np.cumsum(self._table[_pairs(text, begin, stop)], out=running[1:])
        return running

    @cached_property
    def _table(self) -> NDArray[np.int64]:
        return np.array(self.worth, np.int64)


def fitted(texts: Sequence[bytes], tokens: NDArray[np.int64]) -> Estimate:
    """The estimate that comes nearest to the tokens (texts,) of some texts."""
    counts = np.stack([np.bincount(_pairs(text, 0, len(text)), minlength=KINDS**2) for text in texts]).astype(
        np.float64
    )
    mean = float(tokens.sum() / counts.sum())
    scale = 1 / np.sqrt(np.maximum(counts.sum(axis=1), 1.0))  # the error of a text grows with the root of its length
    normal = (counts * scale[:, None] ** 2).T @ counts
    wanted = (counts * scale[:, None] ** 2).T @ (tokens - mean * counts.sum(axis=1))
    low, free = FLOOR / TOKEN - mean, np.ones(KINDS**2, bool)
    found = np.zeros(KINDS**2)
    for _ in range(ROUNDS):
        found[~free] = low
        left = wanted[free] - normal[np.ix_(free, ~free)] @ found[~free]
        found[free] = np.linalg.solve(normal[np.ix_(free, free)] + DRAW / TOKEN * np.eye(int(free.sum())), left)
        below = free & (found < low)
        if not below.any():
            break
        free &= ~below
    return Estimate(tuple(np.maximum(np.round((found + mean) * TOKEN), FLOOR).astype(int).tolist()))


def _pairs(text: bytes, begin: int, stop: int) -> NDArray[np.uint8]:
    """(stop - begin,) the pair of classes that each byte is; the first of a text comes after a line end."""
    before = text[begin - 1 : begin] if begin else b"\n"
    classes = np.frombuffer((before + text[begin:stop]).translate(TABLE), np.uint8)
    pairs: NDArray[np.uint8] = (classes[:-1] << np.uint8(3)) | classes[1:]  # KINDS is 2³
    return pairs
