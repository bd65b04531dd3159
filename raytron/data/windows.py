"""Cuts text into *windows*: so many bytes that their tokens just fill a sample, before anything is tokenized.

How many tokens a text has is known only when it was tokenized; its bytes are known at once. So text that is tokenized as
it is read is cut by bytes: documents end to end, a window a sample, and S tokens are taken to be S · (bytes per token).

    window 0                      window 1                     window 2
    ├ d0 ────┤ d1 ──┤ d2 ───────  ───── d2 ──────────────────  ── d2 ─┤ d3 ──────┤ …

A document is cut where it does not fit, at a line end or before a space where there is one near, so that most tokenizers
give both sides the tokens that they have in the whole; else between two characters. No text is left out, and none is in
two windows. Where a window turns out to hold more than S + 1 tokens, the last ones are cut off; where it holds fewer, it
is padded: `raytron.data.density` measures how many bytes a token is best taken to have.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import xxhash

NEAR = 16  # in this part of a window a good place to cut is looked for
LEAST_BYTES = 8  # of a window: two characters, whatever they are
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
    used: float = 0.0  # bytes, those that the ends of documents count for included
    digest: int = 0  # xxh3-64 of its text


class Cutter:
    """Cuts documents, one after another, into windows.

    limit: bytes of a window. end_bytes: that the token which ends a document counts for. alone: each document begins a
    window of its own.
    """

    def __init__(self, limit: float, end_bytes: float, *, alone: bool = False):
        self.limit, self.end_bytes, self.alone = max(limit, LEAST_BYTES), end_bytes, alone
        self.near = max(int(self.limit) // NEAR, LEAST_BYTES // 2)
        self._begin()

    def add(self, unit: int, at: int, size: int, document: int, text: bytes) -> Iterator[Window]:
        """Takes in one document; the windows that are full now."""
        begin = 0
        while begin < len(text):
            room = int(self.limit - self._window.used)
            whole = len(text) - begin <= room
            if not whole and self._window.slices and room < self.near:
                yield self._close()
                continue
            end = len(text) if whole else self._place(text, begin, begin + room)
            ends = end == len(text)
            self._window.slices.append(Slice(unit, at, size, begin, end, ends, document))
            self._window.used += end - begin + (self.end_bytes if ends else 0)
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

    def _place(self, text: bytes, begin: int, stop: int) -> int:
        """Where to cut, after `begin` and at `stop` at most, but for a single character that is longer."""
        low = max(begin + 1, stop - self.near)
        near = text[low - 1 : stop + 1]  # with the characters on both sides
        for pattern, after in ((LINE_END, 1), (SPACE, 0)):
            found = [match.start() + after for match in pattern.finditer(near)]
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
