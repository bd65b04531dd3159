"""Packing is best-fit-decreasing: against the textbook's loop, piece by piece."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytron.data.best_fit import best_fit


def rooms_of(lengths: list[int], capacity: int) -> list[int]:
    """What is left of each bin, ascending, when each piece goes into the fullest bin that has room."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        at = bisect_left(rooms, length)
        insort(rooms, (rooms.pop(at) if at < len(rooms) else capacity) - length)
    return rooms


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[int], int]:
    capacity = draw(st.integers(1, 60))
    return draw(st.lists(st.integers(1, capacity), max_size=200)), capacity


@settings(max_examples=200, deadline=None)
@given(case=cases())
def test_bins_are_those_of_the_plain_loop(case: tuple[list[int], int]) -> None:
    lengths, capacity = case
    packing = best_fit(np.array(lengths, np.int64), capacity)
    assert sorted(packing.order.tolist()) == list(range(len(lengths)))
    bins = np.split(np.array(lengths, np.int64)[packing.order], packing.ends[:-1]) if lengths else []
    assert all((np.diff(pieces) <= 0).all() and len(pieces) for pieces in bins)
    assert sorted(capacity - int(pieces.sum()) for pieces in bins) == rooms_of(lengths, capacity)


def test_more_room_than_sixteen_bits() -> None:
    lengths = np.random.default_rng(0).integers(1, 200_000, 500)
    packing = best_fit(lengths, 200_000)
    bins = np.split(lengths[packing.order], packing.ends[:-1])
    assert all((np.diff(pieces) <= 0).all() for pieces in bins)
    assert sorted(200_000 - int(pieces.sum()) for pieces in bins) == rooms_of(lengths.tolist(), 200_000)


def test_of_equal_pieces_the_earlier_go_first() -> None:
    packing = best_fit(np.array([2, 5, 2, 5, 2]), 9)
    assert (packing.order.tolist(), packing.ends.tolist()) == ([1, 0, 2, 3, 4], [3, 5])


def test_padding_of_documents_like_those_of_the_web_is_below_a_thousandth() -> None:
    lengths = np.random.default_rng(1).lognormal(6.0, 1.2, 60_000).astype(np.int64) + 2
    lengths = np.minimum(lengths, 2049)
    bins = len(best_fit(lengths, 2049).ends)
    assert 1 - lengths.sum() / (bins * 2049) < 1e-3


def test_lengths_outside_are_refused() -> None:
    for length in (0, 11):
        with pytest.raises(ValueError, match=r"not all in \[1, 10\]"):
            best_fit(np.array([3, length]), 10)
