"""Which rectangles of the score matrix hold anything: what causality, a sliding window and documents leave of it.

Attention between some queries and some keys of one sequence is cut into `Tile`s, rectangles in which every query sees at
least one key. No mask of the whole sequence is ever made: most tiles are seen in full or up to their diagonal, and the
rest know their band by two numbers.

    keys →     documents of 3 and 5 tokens, window 4          a query at position p sees the key at position c where
    queries    ■                                                  0 ≤ p − c < window, and both are of one document
       ↓       ■ ■
               ■ ■ ■                                          2 tiles: the square of the first document, and
                     ■                                                 the band of the second
                     ■ ■
                     ■ ■ ■
                     ■ ■ ■ ■
                       ■ ■ ■ ■

Positions may be scattered over ranks: a rank holds `Span`s, runs of consecutive positions, side by side in its tensors.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple


class Span(NamedTuple):
    """A run of a sequence's tokens in a local tensor."""

    position: int  # of the first token, in the sequence
    start: int  # of the first token, in the local tensor
    length: int

    @property
    def end(self) -> int:
        """The position after the last token."""
        return self.position + self.length


class Tile(NamedTuple):
    """A rectangle of the scores: `rows` of the batch, local ranges [start, stop) of queries and of keys."""

    rows: tuple[int, int]
    queries: tuple[int, int]
    keys: tuple[int, int]
    lead: int  # the first query's position minus the first key's
    window: int | None

    @property
    def height(self) -> int:
        return self.queries[1] - self.queries[0]

    @property
    def width(self) -> int:
        return self.keys[1] - self.keys[0]

    @property
    def full(self) -> bool:
        """Whether each query sees each key."""
        return self.lead >= self.width - 1 and (self.window is None or self.lead + self.height <= self.window)

    @property
    def square(self) -> bool:
        """Whether each query sees the keys up to its own number."""
        within = self.window is None or self.window >= self.height
        return self.lead == 0 and self.height == self.width and within

    @property
    def band(self) -> tuple[int, int]:
        """(left, right): a query sees so many keys before and after its own, the last query's own being the last key;
        -1 for no limit (the convention of flash attention)."""
        last = self.lead + self.height - self.width  # of the last query before the last key
        right = -1 if self.lead >= self.width - 1 else last
        left = -1 if self.window is None or self.lead + self.height <= self.window else self.window - 1 - last
        return left, right


def tiles(
    queries: Sequence[Span],
    keys: Sequence[Span],
    rows: int,
    window: int | None = None,
    starts: Sequence[Sequence[int]] | None = None,
) -> tuple[Tile, ...]:
    """The tiles of causal attention between two sets of spans, in a batch of `rows` sequences.

    starts: for each sequence the positions at which its documents begin, ascending from 0; None: one document.
    """
    if starts is None and window is None and queries == keys and _ascending(queries):
        length = sum(span.length for span in queries)  # what is before in the tensors is before in the sequence
        return (Tile((0, rows), (0, length), (0, length), 0, None),)
    found: list[Tile] = []
    for query in queries:
        for key in keys:
            if starts is None:
                found += _trimmed(_meet((0, rows), query, key, window))
                continue
            for row, begins in enumerate(starts):
                for first, stop in _documents(begins, query, key):
                    pieces = _part(query, first, stop), _part(key, first, stop)
                    found += _trimmed(_meet((row, row + 1), *pieces, window))
    return tuple(_joined(found))


def strips(tile: Tile, height: int) -> Iterator[Tile]:
    """A tile cut in tiles of at most `height` queries, each with no more keys than they see."""
    for start in range(tile.queries[0], tile.queries[1], height):
        stop = min(start + height, tile.queries[1])
        lead = tile.lead + start - tile.queries[0]
        yield from _trimmed(Tile(tile.rows, (start, stop), tile.keys, lead, tile.window))


def _ascending(spans: Sequence[Span]) -> bool:
    return all(before.end <= after.position for before, after in pairwise(spans))


def _documents(starts: Sequence[int], query: Span, key: Span) -> Iterator[tuple[int, int]]:
    """[first, stop) of the documents that have tokens in both spans; `stop` may lie beyond them."""
    index = bisect_right(starts, query.position) - 1
    while index < len(starts) and starts[index] < min(key.end, query.end):
        stop = starts[index + 1] if index + 1 < len(starts) else max(key.end, query.end)
        if stop > key.position:
            yield starts[index], stop
        index += 1


def _part(span: Span, first: int, stop: int) -> Span:
    """What of a span lies in positions [first, stop)."""
    position, end = max(span.position, first), min(span.end, stop)
    return Span(position, span.start + position - span.position, end - position)


def _meet(rows: tuple[int, int], query: Span, key: Span, window: int | None) -> Tile:
    ranges = [(span.start, span.start + span.length) for span in (query, key)]
    return Tile(rows, ranges[0], ranges[1], query.position - key.position, window)


def _trimmed(tile: Tile) -> Iterator[Tile]:
    """The tile without the queries and keys that see nothing and that nobody sees; nothing where none is left."""
    (q, q_stop), (k, k_stop), lead, window = tile.queries, tile.keys, tile.lead, tile.window
    if lead < 0:  # queries before the first key
        q, lead = q - lead, 0
    k_stop = min(k_stop, k + lead + q_stop - q)  # keys after the last query
    if window is not None:
        skip = max(0, lead - window + 1)  # keys too far before the first query
        k, lead = k + skip, lead - skip
        q_stop = min(q_stop, q + (k_stop - k) - 1 + window - lead)  # queries too far after the last key
    if q >= q_stop or k >= k_stop:
        return
    trimmed = Tile(tile.rows, (q, q_stop), (k, k_stop), lead, window)
    yield _whole(trimmed) if trimmed.full else trimmed


def _whole(tile: Tile) -> Tile:
    """A full tile in the one form that full tiles of its size have."""
    return tile._replace(lead=tile.width - 1, window=None)


def _joined(found: Sequence[Tile]) -> Iterator[Tile]:
    """Full tiles that lie side by side as one."""
    last: Tile | None = None
    for tile in found:
        if last is not None:
            both = _union(last, tile)
            if both is None:
                yield last
            tile = both or tile
        last = tile
    if last is not None:
        yield last


def _union(a: Tile, b: Tile) -> Tile | None:
    if not (a.full and b.full) or a.rows != b.rows:
        return None
    if a.keys == b.keys and a.queries[1] == b.queries[0]:
        return _whole(a._replace(queries=(a.queries[0], b.queries[1])))
    if a.queries == b.queries and a.keys[1] == b.keys[0]:
        return _whole(a._replace(keys=(a.keys[0], b.keys[1])))
    return None
