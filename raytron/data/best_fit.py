"""Best-fit-decreasing bin packing, in time that hardly grows with the number of pieces.

Pieces of whole lengths go into bins of one capacity, the longest first, each into the fullest bin that still has room for
it (Johnson, 1973; for documents of language models Ding et al., "Fewer Truncations Improve Language Modeling",
arXiv 2404.10830, ICML 2024). A bin is known by its room alone, and pieces by their length: so what is moved here is not a
piece but a *group*, all bins of equal history, and pieces of one length are dealt out together.

    length 5, three pieces            room 11 │ bins 0-3  ──►  room  1 │ bin 0     two pieces each, as 11 // 5 = 2:
    into bins of capacity 11                                   room  6 │ bin 1     having taken one it is the fullest
                                                               room 11 │ bins 2-3  with room, and so takes the next

A group that takes pieces goes to a smaller room, and a length splits one group at most in three: the work is that of the
distinct lengths, a few thousand, not of the pieces. Each dealing is noted as (first bin, bins, pieces in each), from which
numpy makes the places of all pieces at once.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Packing(NamedTuple):
    """Bin b holds the pieces `order[ends[b - 1]:ends[b]]`, longest first."""

    order: NDArray[np.int64]  # (pieces,)
    ends: NDArray[np.int64]  # (bins,)


class _Group(NamedTuple):
    """Bins next to each other, with pieces of the same lengths."""

    first: int
    bins: int
    filled: int  # pieces in each


def best_fit(lengths: NDArray[np.int64], capacity: int) -> Packing:
    """Packs pieces of `lengths` (pieces,), all in [1, capacity], fewer than 2^31 of them.

    Deterministic; of pieces of one length the earlier go first. Raises ValueError for a length outside that range.
    """
    if not len(lengths):
        return Packing(np.empty(0, np.int64), np.empty(0, np.int64))
    if lengths.min() < 1 or lengths.max() > capacity:
        raise ValueError(f"lengths from {lengths.min()} to {lengths.max()}, not all in [1, {capacity}]")
    dealings, groups = _deal(np.bincount(lengths, minlength=capacity + 1), capacity)
    in_bin = np.empty(sum(group.bins for group in groups), np.int32)
    for group in groups:
        in_bin[group.first : group.first + group.bins] = group.filled
    ends = np.cumsum(in_bin, dtype=np.int64)
    order = np.empty(len(lengths), np.int64)
    order[_places(dealings, (ends - in_bin).astype(np.int32))] = _longest_first(lengths, capacity)
    return Packing(order, ends)


def _deal(counts: NDArray[np.int64], capacity: int) -> tuple[NDArray[np.int32], list[_Group]]:
    """From the number of pieces of each length (capacity + 1,): dealings (n, 4) of first bin, bins, pieces in each and
    pieces that were there before, in the order of the pieces; and all groups at the end."""
    dealings: list[tuple[int, int, int, int]] = []
    by_room: defaultdict[int, list[_Group]] = defaultdict(list)
    rooms: list[int] = []  # with groups in them, ascending
    bins = 0

    def put(group: _Group, room: int) -> None:
        if group.bins:
            if not by_room[room]:
                insort(rooms, room)
            by_room[room].append(group)

    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            at = bisect_left(rooms, length)
            if at < len(rooms):
                room = rooms[at]
                group = by_room[room].pop()
                if not by_room[room]:
                    del rooms[at]
            else:
                room, group = capacity, _Group(bins, -(-left // (capacity // length)), 0)
                bins += group.bins
            each = room // length
            full = min(group.bins, left // each)
            rest = left - full * each if full < group.bins else 0
            for first, count, pieces in ((group.first, full, each), (group.first + full, int(rest > 0), rest)):
                if count:
                    dealings.append((first, count, pieces, group.filled))
                    put(_Group(first, count, group.filled + pieces), room - pieces * length)
            used = full + (rest > 0)
            put(_Group(group.first + used, group.bins - used, group.filled), room)
            left -= full * each + rest
    return np.array(dealings, np.int32).reshape(-1, 4), [group for room in by_room.values() for group in room]


def _places(dealings: NDArray[np.int32], begins: NDArray[np.int32]) -> NDArray[np.int32]:
    """Where each piece, longest first, goes in the order of the bins; begins (bins,): each bin's first place."""
    first, bins, each, before = dealings.T
    pieces = bins * each
    starts = np.cumsum(pieces, dtype=np.int32) - pieces
    number = np.arange(int(pieces.sum()), dtype=np.int32) - np.repeat(starts, pieces)
    several = np.repeat(each, pieces)
    row = number // several
    places: NDArray[np.int32] = (
        begins[np.repeat(first, pieces) + row] + np.repeat(before, pieces) + number - row * several
    )
    return places


def _longest_first(lengths: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """The stable order of descending lengths: numpy sorts numbers of 16 bits by radix, so larger ones go in two passes."""
    shortness = capacity - lengths
    order = np.argsort(shortness.astype(np.uint16), kind="stable")
    if capacity >= 1 << 16:
        order = order[np.argsort((shortness >> 16).astype(np.uint16)[order], kind="stable")]
    return order
