"""Stage splits: exact against trying all cuts."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytron.plan.split import balanced, ranges

cost_lists = st.lists(st.integers(0, 20), min_size=1, max_size=9)


def all_cuts(layers, stages):
    for ends in itertools.combinations(range(1, layers), stages - 1):
        edges = (0, *ends, layers)
        yield tuple(b - a for a, b in itertools.pairwise(edges))


def stage_costs(costs, sizes):
    return [sum(costs[a:b]) for a, b in ranges(sizes)]


@given(cost_lists, st.data())
def test_the_slowest_stage_is_the_fastest_possible_and_the_rest_even(costs, data):
    stages = data.draw(st.integers(1, len(costs)))
    sizes = balanced([float(cost) for cost in costs], stages)
    assert sum(sizes) == len(costs)
    assert len(sizes) == stages
    assert min(sizes) >= 1
    goal = min((max(c), sum(x * x for x in c)) for c in (stage_costs(costs, s) for s in all_cuts(len(costs), stages)))
    made = stage_costs(costs, sizes)
    assert (max(made), sum(x * x for x in made)) == goal


def test_the_head_takes_layers_off_the_last_stage():
    assert balanced([1.0] * 7 + [4.0], 4) == (3, 2, 2, 1)
    assert balanced([2.0] * 8, 4) == (2, 2, 2, 2)


@given(cost_lists, st.integers(1, 40), st.integers(1, 40), st.data())
def test_embedding_and_head_are_weighed_like_layers(costs, before, after, data):
    stages = data.draw(st.integers(1, len(costs)))
    sizes = balanced([float(cost) for cost in costs], stages, before, after)
    assert sum(sizes) == len(costs)
    assert min(sizes[1:-1], default=1) >= 1
    items = [before, *costs, after]
    goal = min(max(stage_costs(items, cut)) for cut in all_cuts(len(items), stages))
    whole = [sizes[0] + 1, *sizes[1:]]
    whole[-1] += 1
    assert max(stage_costs(items, whole)) == goal


def test_a_large_head_stands_alone():
    assert balanced([1.0] * 6, 3, 0.5, 8.0) == (3, 3, 0)
    assert balanced([1.0] * 6, 3, 0.5, 0.5) == (2, 2, 2)
    assert balanced([1.0] * 6, 2, 7.0, 0.5) == (0, 6)


def test_large_splits_are_quick():
    sizes = balanced([3.0] + [1.0] * 510 + [9.5], 64)
    assert sum(sizes) == 512
    assert max(stage_costs([3.0] + [1.0] * 510 + [9.5], sizes)) <= 9.5


def test_impossible_splits_are_refused():
    with pytest.raises(ValueError, match="2 layers cannot fill 3 stages"):
        balanced([1.0, 1.0], 3)
    with pytest.raises(ValueError, match="negative"):
        balanced([1.0, -1.0], 2)
