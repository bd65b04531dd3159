"""Layouts: the ranks' slices cover every element, and the padding belongs to none."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from raytron.parallel.layout import Layout, chunk


@given(size=st.integers(0, 200), parts=st.integers(1, 17))
def test_chunks_are_even_and_cover(size, parts):
    pieces = [chunk(size, parts, part) for part in range(parts)]
    assert [index for start, length in pieces for index in range(start, start + length)] == list(range(size))
    assert max(length for _, length in pieces) <= -(-size // parts)


@st.composite
def layouts(draw):
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    repeat = draw(st.sampled_from([1, 2, 3]))
    tp = repeat * draw(st.integers(1, 4))
    dim = draw(st.sampled_from([None, *range(len(shape))]))
    return Layout(shape, dim=dim, repeat=1 if dim is None else repeat), tp


@given(layouts())
def test_slices_cover_the_global_tensor_once_for_each_holder(case):
    layout, tp = case
    seen = torch.zeros(layout.shape, dtype=torch.int64)
    for rank in range(tp):
        local = torch.zeros(layout.local_shape(tp))
        part = layout.slice(local, tp, rank)
        place = tuple(slice(at, at + size) for at, size in zip(part.offsets, part.tensor.shape, strict=True))
        assert seen[place].shape == part.tensor.shape
        seen[place] += 1
    assert (seen == layout.holders(tp)).all()


def test_a_slice_is_a_view():
    layout = Layout((5, 2), dim=0)
    local = torch.zeros(layout.local_shape(2))
    layout.slice(local, 2, 1).tensor.fill_(1)
    assert local.tolist() == [[1, 1], [1, 1], [0, 0]]
