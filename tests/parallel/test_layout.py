"""Layouts: the ranks' slices cover every element, and the padding belongs to none."""

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from raytron.parallel.layout import Cut, Layout, chunk


@given(size=st.integers(0, 200), parts=st.integers(1, 17))
def test_chunks_are_even_and_cover(size, parts):
    pieces = [chunk(size, parts, part) for part in range(parts)]
    assert [index for start, length in pieces for index in range(start, start + length)] == list(range(size))
    assert max(length for _, length in pieces) <= -(-size // parts)


@st.composite
def layouts(draw):
    """A layout and the sizes of the axes that cut it."""
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    repeat = draw(st.sampled_from([1, 2, 3]))
    sizes = {"tp": repeat * draw(st.integers(1, 4)), "ep": draw(st.integers(1, 3))}
    dims = draw(st.permutations(range(len(shape))))
    cuts = [Cut("tp", dims[0], repeat)] if draw(st.booleans()) else []
    if len(dims) > 1 and draw(st.booleans()):
        cuts.append(Cut("ep", dims[1]))
    return Layout(shape, tuple(cuts)), sizes


@given(layouts())
def test_slices_cover_the_global_tensor_once_for_each_holder(case):
    layout, sizes = case
    seen = torch.zeros(layout.shape, dtype=torch.int64)
    for at in itertools.product(*map(range, sizes.values())):
        place = {axis: (size, index) for (axis, size), index in zip(sizes.items(), at, strict=True)}
        part = layout.slice(torch.zeros(layout.local_shape(place)), place)
        box = tuple(slice(at, at + size) for at, size in zip(part.offsets, part.tensor.shape, strict=True))
        assert seen[box].shape == part.tensor.shape
        assert (part.offsets, tuple(part.tensor.shape)) == layout.box(place)
        seen[box] += 1
    others = 1 if any(cut.axis == "ep" for cut in layout.cuts) else sizes["ep"]
    assert (seen == layout.holders({"tp": (sizes["tp"], 0)}) * others).all()


def test_a_slice_is_a_view():
    layout, place = Layout((5, 2), (Cut("tp", 0),)), {"tp": (2, 1)}
    local = torch.zeros(layout.local_shape(place))
    layout.slice(local, place).tensor.fill_(1)
    assert local.tolist() == [[1, 1], [1, 1], [0, 0]]


def test_the_width_of_an_expert_is_cut_over_its_own_axis():
    layout = Layout((4, 6, 3), (Cut("ep", 0), Cut("etp", 1)), expert=True)
    assert layout.box({"tp": (2, 1), "ep": (2, 1), "etp": (3, 2)}) == ((2, 4, 0), (2, 2, 3))
    assert layout.holders({"tp": (2, 1), "ep": (2, 1), "etp": (3, 2)}) == 1
    assert Layout((4, 3), (Cut("ep", 0),), expert=True).holders({"tp": (2, 1), "etp": (3, 2)}) == 3
