"""Cuts text into *windows*: so much of it as just fills a sample, before anything is tokenized.

How many tokens a text has is known only when it was tokenized; about how many is told by its bytes
(`raytron.data.estimate`). So text that is tokenized as it is read is cut by that estimate: documents end to end, a window a
sample.

    window 0                      window 1                     window 2
    ├ d0 ────┤ d1 ──┤ d2 ───────  ───── d2 ──────────────────  ── d2 ─┤ d3 ──────┤ …

A document is cut where it does not fit, at a line end or before a space where there is one near, so that most tokenizers
give both sides the tokens that they have in the whole; else between two characters. No text is left out, and none is in
two windows. Where a window turns out to hold more than S + 1 tokens, the last ones are cut off; where it holds fewer, it
is padded: `raytron.data.density` measures for how many tokens windows are best cut.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from raytron.data.estimate import TOKEN, Estimate

NEAR = 16  # in this part of a window a good place to cut is looked for
REACH = 5  # bytes for each token of a window, whose worth is looked at first
CHARACTER = 4  # bytes, at most
LINE_END = re.compile(rb"(?<=\S)\n(?=\S)")
SPACE = re.compile(rb"(?<=\S) (?=\S)")


class Slice(NamedTuple):
    """Bytes [begin, end) of a document's UTF-8 text, and where the document lies."""

    unit: int  # number of the unit in the corpus
    at: int  # of its record, as `raytron.data.records.Record` tells
    size: int
    begin: int
    end: int
    ends: bool  # with the document: the end-of-document token follows
    document: int  # its id


@dataclass
class Window:
    slices: list[Slice] = field(default_factory=list)
    used: int = 0  # what it is worth, the ends of documents included, in thousandths of a token
    digest: int = 0  # xxh3-64 of its text


class Cutter:
    """Cuts documents, one after another, into windows.

    tokens: that a window is cut for. alone: each document begins a window of its own.
    """

    def __init__(self, estimate: Estimate, tokens: float, *, alone: bool = False):
        self.estimate, self.alone = estimate, alone
        self.limit = max(int(tokens * TOKEN), TOKEN)
        self._begin()

    def add(self, unit: int, at: int, size: int, document: int, text: bytes) -> Iterator[Window]:
        """Takes in one document; the windows that are full now."""
        begin = 0
        while begin < len(text):
            room = self.limit - self._window.used
            worth = self._worth(text, begin, room)
            whole = worth[-1] <= room
            end = len(text) if whole else self._place(text, begin, worth, room)
            little = room < self.limit // NEAR or worth[min(end - begin, len(worth) - 1)] > room  # not even a character
            if not whole and little and self._window.slices:
                yield self._close()
                continue
            ends = end == len(text)
            self._window.slices.append(Slice(unit, at, size, begin, end, ends, document))
            self._window.used += int(worth[min(end - begin, len(worth) - 1)]) + TOKEN * ends
            self._digest.update(text[begin:end])
            if not ends or self.alone:
                yield self._close()
            begin = end

    def finish(self) -> Iterator[Window]:
        """The last window, which is not full."""
        if self._window.slices:
            yield self._close()

    def _begin(self) -> None:
        self._window, self._digest = Window(), xxhash.xxh3_64()

    def _close(self) -> Window:
        window = self._window
        window.digest = self._digest.intdigest()
        self._begin()
        return window

    def _worth(self, text: bytes, begin: int, room: int) -> NDArray[np.int64]:
        """(n + 1,): what the text is worth from `begin` up to each place, until it is worth more than `room`, or ends."""
        reach = REACH * self.limit // TOKEN
        while True:
            stop = min(begin + reach, len(text))
            worth = self.estimate.running(text, begin, stop)
            if stop == len(text) or worth[-1] > room:
                return worth
            reach *= 2

    def _place(self, text: bytes, begin: int, worth: NDArray[np.int64], room: int) -> int:
        """Where to cut, so that no more than `room` is taken, but for a single character that is worth more."""
        stop = begin + max(int(np.searchsorted(worth, room, side="right")) - 1, 0)
        near = begin + int(np.searchsorted(worth, room - self.limit // NEAR))
        low = max(begin + 1, min(near, stop - CHARACTER))
        around = text[low - 1 : stop + 1]  # with the characters on both sides
        for pattern, after in ((LINE_END, 1), (SPACE, 0)):
            found = [match.start() + after for match in pattern.finditer(around)]
            if found:
                return low - 1 + found[-1]
        while stop > begin and _is_inside(text, stop):
            stop -= 1
        while stop == begin or _is_inside(text, stop):
            stop += 1
        return stop


def _is_inside(text: bytes, at: int) -> bool:
    """Whether a character of UTF-8 goes on there."""
    return at < len(text) and text[at] & 0xC0 == 0x80
