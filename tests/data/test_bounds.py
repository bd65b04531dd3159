from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytron.data.bounds import Bounds

WIDTH = 6
rows = st.lists(st.sets(st.integers(1, WIDTH - 1)).map(lambda inner: [0, *sorted(inner)]), max_size=4)


def numbers_of(columns, width):
    """As one would count by hand."""
    return [[sum(column <= at for column in row) - 1 for at in range(width)] for row in columns]


@given(rows)
def test_numbers_and_positions_are_those_that_one_counts(columns):
    bounds = Bounds.of_rows(columns, WIDTH)
    numbers = numbers_of(columns, WIDTH)
    assert np.asarray(bounds).tolist() == numbers
    assert bounds.positions().tolist() == [
        [at - row[number[at]] for at in range(WIDTH)] for row, number in zip(columns, numbers, strict=True)
    ]
    assert [bounds[row].tolist() for row in range(len(bounds))] == columns
    assert bounds.shape == (len(columns), WIDTH)


@given(rows)
def test_numbers_say_where_documents_begin(columns):
    numbers = np.array(numbers_of(columns, WIDTH), np.int32).reshape(-1, WIDTH)
    bounds = Bounds.of_numbers(numbers)
    assert [bounds[row].tolist() for row in range(len(bounds))] == columns


def test_numbers_may_begin_anywhere():
    bounds = Bounds.of_numbers(np.array([[0, 0, 1, 1, 1, 2], [3, 3, 3, 3, 3, 3]], np.int32))
    assert [bounds[row].tolist() for row in range(2)] == [[0, 2, 5], [0]]
    assert bounds.positions().tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5]]


@given(rows, st.integers(1, WIDTH))
def test_the_first_tokens_of_each_row(columns, width):
    cut = Bounds.of_rows(columns, WIDTH).cut(width)
    assert [cut[row].tolist() for row in range(len(cut))] == [[at for at in row if at < width] for row in columns]
    assert cut.shape == (len(columns), width)


@given(rows, st.randoms(use_true_random=False))
def test_rows_of_several_parts_go_to_their_places(columns, random):
    places = [[], []]
    for at in range(len(columns)):
        places[random.randrange(2)].append(at)
    parts = [Bounds.of_rows((columns[at] for at in here), WIDTH) for here in places]
    joined = Bounds.joined(parts, [np.array(here, np.intp) for here in places])
    assert [joined[row].tolist() for row in range(len(joined))] == columns


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_as_an_array_it_may_be_of_another_type(dtype):
    assert np.asarray(Bounds.of_rows([[0, 2]], 3), dtype).dtype == dtype
