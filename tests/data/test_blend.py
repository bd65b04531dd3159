"""Blends: exact counts in every block, indices without gaps, epochs each whole, and a past that no later stage changes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytron.data.blend import UNIT, BlendOrder, Stage, whole_weights
from raytron.data.order import ShuffledOrder, permute, permute_each, sample_index

BLOCK = 64


@st.composite
def some_weights(draw: st.DrawFn, sources: int | None = None) -> tuple[int, ...]:
    """Weights that are each none or at least a sample of a block."""
    count = sources or draw(st.integers(1, 9))
    parts = draw(st.lists(st.integers(0, 6), min_size=count, max_size=count).filter(any))
    return whole_weights(parts)


@st.composite
def orders(draw: st.DrawFn) -> BlendOrder:
    count = draw(st.integers(1, 6))
    starts = sorted(draw(st.sets(st.integers(1, 400), max_size=3)))
    stages = [Stage(start, draw(some_weights(count))) for start in (0, *starts)]
    sizes = draw(st.lists(st.integers(1, 90), min_size=count, max_size=count))
    return BlendOrder(tuple(sizes), tuple(stages), draw(st.integers(0, 99)), BLOCK)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=300).filter(lambda weights: sum(weights) > 1e-3))
def test_weights_become_whole_numbers_with_an_exact_sum(weights: list[float]) -> None:
    whole = whole_weights(weights)
    assert sum(whole) == UNIT
    off = np.array(whole) / UNIT - np.array(weights) / sum(weights)
    assert np.abs(off).max() < (len(weights) + 1) / UNIT
    assert [number for number, weight in zip(whole, weights, strict=True) if weight == 0 and number] == []


@pytest.mark.parametrize("weights", [[], [0.0], [0.5, -0.1]])
def test_weights_without_a_sum_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="no weights"):
        whole_weights(weights)


@settings(max_examples=80, deadline=None)
@given(weights=some_weights(), block=st.integers(0, 10**12), seed=st.integers(0, 9))
def test_every_block_has_its_exact_counts(weights: tuple[int, ...], block: int, seed: int) -> None:
    """⌊W(n + B)⌋ - ⌊Wn⌋ in exact arithmetic, for running sums W of the weights; each within one sample of the share."""
    order = BlendOrder((10,) * len(weights), (Stage(0, weights),), seed, BLOCK)
    source, index = order.choose(np.arange(block * BLOCK, (block + 1) * BLOCK))
    edges = [sum(weights[:number]) for number in range(len(weights) + 1)]
    begin, end = ([edge * at * BLOCK // UNIT for edge in edges] for at in (block, block + 1))
    counts = np.bincount(source, minlength=len(weights))
    assert counts.tolist() == np.diff(np.array(end) - np.array(begin)).tolist()
    assert np.abs(counts - np.array(weights) * BLOCK / UNIT).max() < 2
    for number in range(len(weights)):
        first = begin[number + 1] - begin[number]
        assert index[source == number].tolist() == list(range(first, first + counts[number]))


@settings(max_examples=80, deadline=None)
@given(order=orders(), samples=st.integers(0, 900))
def test_after_any_number_of_samples_indices_have_no_gap_and_counts_no_drift(order: BlendOrder, samples: int) -> None:
    source, index = order.choose(np.arange(samples))
    assert order.taken(samples).tolist() == np.bincount(source, minlength=len(order.sizes)).tolist()
    for number in range(len(order.sizes)):
        assert index[source == number].tolist() == list(range(int(order.taken(samples)[number])))
    if len(order.stages) == 1:
        whole = samples // BLOCK * BLOCK
        assert np.abs(order.taken(whole) - np.array(order.stages[0].weights) / UNIT * whole).max() < 1


@settings(max_examples=60, deadline=None)
@given(order=orders(), ids=st.lists(st.integers(0, 10**13), min_size=1, max_size=30))
def test_a_place_depends_on_its_own_id_alone(order: BlendOrder, ids: list[int]) -> None:
    together = order.locate(np.array(ids, np.int64))
    for number, one in enumerate(ids):
        alone = order.locate(np.array([one]))
        assert [part[0] for part in alone] == [part[number] for part in together]


@settings(max_examples=40, deadline=None)
@given(order=orders())
def test_every_epoch_of_every_source_is_whole_and_in_an_order_of_its_own(order: BlendOrder) -> None:
    place = order.locate(np.arange(900))
    for source, size in enumerate(order.sizes):
        mine = place.source == source
        for epoch in range(int(mine.sum()) // size):
            found = place.sample[mine & (place.epoch == epoch)]
            assert found.tolist() == sample_index(order.seed, epoch, np.arange(size), size, source).tolist()
            assert sorted(found.tolist()) == list(range(size))


@settings(max_examples=60, deadline=None)
@given(order=orders(), data=st.data())
def test_another_stage_or_source_leaves_every_earlier_sample(order: BlendOrder, data: st.DataObject) -> None:
    more = data.draw(st.integers(0, 2))
    start = order.stages[-1].start + data.draw(st.integers(1, 500))
    stages = [Stage(stage.start, (*stage.weights, *[0] * more)) for stage in order.stages]
    added = Stage(start, data.draw(some_weights(len(order.sizes) + more)))
    longer = BlendOrder((*order.sizes, *[7] * more), (*stages, added), order.seed, order.block)
    before, after = (each.locate(np.arange(start)) for each in (order, longer))
    assert all(np.array_equal(one, other) for one, other in zip(before, after, strict=True))
    ids = np.arange(start + 300)
    source, index = longer.choose(ids)
    for number in range(len(longer.sizes)):
        assert index[source == number].tolist() == list(range(int((source == number).sum())))


def test_a_blend_of_one_source_has_its_order() -> None:
    ids = np.arange(500)
    blended = BlendOrder((97,), (Stage(0, (UNIT,)),), 5, BLOCK).locate(ids)
    assert all(np.array_equal(one, other) for one, other in zip(blended, ShuffledOrder(97, 5).locate(ids), strict=True))


def test_a_block_is_shuffled_and_blocks_are_unlike() -> None:
    order = BlendOrder((10, 10), (Stage(0, whole_weights([1, 1])),), 1, 1024)
    first, second = order.choose(np.arange(2048))[0].reshape(2, 1024)
    assert abs((first == second).mean() - 0.5) < 0.08
    assert abs((first[1:] == first[:-1]).mean() - 0.5) < 0.08
    other = BlendOrder((10, 10), order.stages, 2, 1024).choose(np.arange(1024))[0]
    assert abs((first == other).mean() - 0.5) < 0.08


def test_the_blend_never_changes_between_versions() -> None:
    order = BlendOrder((5, 50), (Stage(0, whole_weights([1, 3])), Stage(8, whole_weights([1, 1]))), 7, 8)
    place = order.locate(np.arange(16))
    assert place.source.tolist() == [1, 1, 1, 0, 0, 1, 1, 1, 1, 0, 1, 1, 0, 0, 0, 1]
    assert place.sample.tolist() == [28, 35, 37, 2, 1, 10, 27, 1, 34, 4, 6, 0, 3, 0, 3, 31]


def test_a_weight_below_one_sample_of_a_block_is_refused() -> None:
    order = BlendOrder((9, 9, 9), (Stage(0, whole_weights([0.5, 0.1, 0.4])),), 0, 1)
    with pytest.raises(ValueError, match="below one sample in a block of 1"):
        order.choose(np.arange(400))


@settings(max_examples=40, deadline=None)
@given(order=orders(), data=st.data())
def test_the_first_sample_beyond_a_count_is_found(order: BlendOrder, data: st.DataObject) -> None:
    source = data.draw(st.integers(0, len(order.sizes) - 1))
    count = data.draw(st.integers(0, 300))
    at = np.flatnonzero(order.choose(np.arange(700))[0] == source)
    assert order.first_beyond(source, count, 700) == (int(at[count]) if len(at) > count else None)
    assert order.first_beyond(source, count + 0.5, 700) == (int(at[count]) if len(at) > count else None)


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 2**53), min_size=1, max_size=5), data=st.data())
def test_permuting_each_agrees_with_permuting_one(sizes: list[int], data: st.DataObject) -> None:
    which = data.draw(st.lists(st.integers(0, len(sizes) - 1), min_size=1, max_size=40))
    keys = data.draw(st.lists(st.integers(0, 2**64 - 1), min_size=len(sizes), max_size=len(sizes)))
    positions = [data.draw(st.integers(0, sizes[one] - 1)) for one in which]
    images = permute_each(np.array(positions), np.array(which), np.array(sizes), np.array(keys, np.uint64))
    alone = [permute(at, sizes[one], keys[one])[0] for at, one in zip(positions, which, strict=True)]
    assert images.tolist() == alone
