from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytron.data.batch import part_of
from raytron.data.order import (
    FixedOrder,
    InRuns,
    ShuffledOrder,
    derive_key,
    mix64,
    mix64_array,
    permute,
    sample_index,
)

keys = st.integers(0, 2**64 - 1)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 5000), key=keys)
def test_a_permutation_visits_every_position_once(size: int, key: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 2**62), key=keys, data=st.data())
def test_large_sizes_stay_in_range_and_do_not_collide(size: int, key: int, data: st.DataObject) -> None:
    positions = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=50, unique=True))
    images = permute(positions, size, key)
    assert images.min() >= 0
    assert images.max() < size
    assert len(set(images.tolist())) == len(positions)


def test_positions_outside_are_refused() -> None:
    for position in (-1, 10):
        with pytest.raises(ValueError, match=r"\[0, 10\)"):
            permute(position, 10, 1)


def test_the_shuffle_looks_random() -> None:
    size = 100_003
    for seed in range(3):
        images = sample_index(seed, 0, np.arange(size), size)
        correlation = np.corrcoef(images[:-1], images[1:])[0, 1]
        assert abs(correlation) < 0.015
        parity_changes = (np.diff(images & 1) != 0).mean()
        assert abs(parity_changes - 0.5) < 0.01
        same_half = ((images[:-1] < size / 2) == (images[1:] < size / 2)).mean()
        assert abs(same_half - 0.5) < 0.01
        rows = np.histogram(images[: size // 10], bins=100, range=(0, size))[0]
        assert ((rows - rows.mean()) ** 2 / rows.mean()).sum() < 160  # chi-square with 99 degrees of freedom


def test_epochs_and_seeds_give_unlike_orders() -> None:
    positions = np.arange(1000)
    orders = [sample_index(seed, epoch, positions, 1000) for seed in (0, 1) for epoch in (0, 1)]
    for one in range(4):
        for other in range(one):
            assert (orders[one] == orders[other]).sum() < 10


def test_the_order_never_changes_between_versions() -> None:
    assert sample_index(seed=7, epoch=2, position=np.arange(10), size=10).tolist() == [0, 5, 8, 3, 4, 2, 6, 7, 9, 1]
    assert derive_key(1, 2) != derive_key(2, 1)


@settings(max_examples=50, deadline=None)
@given(value=keys)
def test_mixing_agrees_with_its_vectorised_twin(value: int) -> None:
    assert int(mix64_array(np.array([value], np.uint64))[0]) == mix64(value)


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 60), seed=st.integers(0, 2**32), epochs=st.integers(1, 4))
def test_each_epoch_is_exact(size: int, seed: int, epochs: int) -> None:
    place = ShuffledOrder(size, seed).locate(np.arange(size * epochs))
    assert not place.source.any()
    for epoch in range(epochs):
        assert sorted(place.sample[place.epoch == epoch].tolist()) == list(range(size))


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 1000), seed=st.integers(0, 100), ids=st.lists(st.integers(0, 10**12), max_size=20))
def test_a_place_depends_on_its_id_alone(size: int, seed: int, ids: list[int]) -> None:
    together = ShuffledOrder(size, seed).locate(np.array(ids, np.int64))
    alone = [ShuffledOrder(size, seed).locate(np.array([one])).sample[0] for one in ids]
    assert together.sample.tolist() == alone


def test_the_fixed_order_is_first_to_last() -> None:
    place = FixedOrder(3).locate(np.arange(7))
    assert place.sample.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert place.epoch.tolist() == [0, 0, 0, 1, 1, 1, 2]


@settings(max_examples=200, deadline=None)
@given(first=st.integers(0, 10**9), units=st.integers(0, 500), parts=st.integers(1, 40), unit=st.integers(1, 3))
def test_parts_cover_each_id_once_in_order(first: int, units: int, parts: int, unit: int) -> None:
    count = units * unit
    bounds = [part_of(first, count, part, parts, unit) for part in range(parts)]
    assert [one for start, stop in bounds for one in range(start, stop)] == list(range(first, first + count))
    lengths = [stop - start for start, stop in bounds]
    assert max(lengths) - min(lengths) in (0, unit)
    assert not any(length % unit for length in lengths)
    assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize(
    ("first", "count", "part", "parts"), [(-1, 4, 0, 1), (0, -1, 0, 1), (0, 4, 2, 2), (0, 4, -1, 2)]
)
def test_a_part_that_does_not_exist_is_refused(first: int, count: int, part: int, parts: int) -> None:
    with pytest.raises(ValueError, match="no part"):
        part_of(first, count, part, parts)


def test_samples_that_are_no_whole_units_are_refused() -> None:
    with pytest.raises(ValueError, match="in units of 3"):
        part_of(0, 7, 0, 2, 3)


class Counted:
    """An order that counts how often it is asked."""

    def __init__(self, order):
        self.order, self.asked = order, 0

    def locate(self, ids):
        self.asked += 1
        return self.order.locate(ids)


@pytest.mark.parametrize("first", [0, 5, 63, 64, 60, 1000, 2**40])
@pytest.mark.parametrize("count", [0, 1, 8, 63, 64, 65, 200])
def test_places_of_a_run_of_ids_are_those_of_each(first, count):
    order, ids = ShuffledOrder(1000, seed=7), np.arange(first, first + count)
    for place, expected in zip(InRuns(order, 64).locate(ids), order.locate(ids), strict=True):
        assert np.array_equal(place, expected)


def test_neighbours_are_located_together():
    counted = Counted(ShuffledOrder(10_000, seed=7))
    runs = InRuns(counted, 1024)
    for first in range(0, 4096, 8):
        runs.locate(np.arange(first, first + 8))
    assert counted.asked == 4
