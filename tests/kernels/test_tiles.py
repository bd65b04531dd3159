"""Tiles cover exactly what a query may see, each place once."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from raytron.kernels.tiles import Span, Tile, strips, tiles


def painted(found, shape, height=None):
    """How often each place (row, query, key) is seen."""
    seen = np.zeros(shape, int)
    for tile in found:
        for part in [tile] if height is None else strips(tile, height):
            rows, queries, keys = (slice(*part[i]) for i in range(3))
            distance = part.lead + np.arange(part.height)[:, None] - np.arange(part.width)[None, :]
            visible = (distance >= 0) & (distance < (part.window or 10**9))
            assert visible.any(1).all(), "a query without a key"
            assert visible.any(0).all(), "a key without a query"
            assert part.full == visible.all()
            if part.square:
                assert np.array_equal(visible, np.tri(part.height, dtype=bool))
            assert np.array_equal(visible, by_band(part))
            seen[rows, queries, keys] += visible
    return seen


def by_band(tile: Tile):
    """What flash attention makes of the tile's band."""
    left, right = tile.band
    own = np.arange(tile.height)[:, None] + tile.width - tile.height
    key = np.arange(tile.width)[None, :]
    return ((left < 0) | (key >= own - left)) & ((right < 0) | (key <= own + right))


@st.composite
def cases(draw):
    chunk, count = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    length, rows = chunk * count, 2
    chosen = [draw(st.lists(st.integers(0, count - 1), min_size=1, unique=True)) for _ in range(2)]
    spans = [[Span(c * chunk, i * chunk, chunk) for i, c in enumerate(chunks)] for chunks in chosen]
    window = draw(st.none() | st.integers(1, length + 1))
    begins = st.lists(st.integers(1, max(1, length - 1)), unique=True, max_size=4).map(lambda s: [0, *sorted(s)])
    return length, spans, window, draw(st.none() | st.tuples(*[begins] * rows))


@settings(max_examples=300, deadline=None)
@given(cases(), st.none() | st.integers(1, 4))
def test_tiles_are_what_may_be_seen(case, height):
    length, (queries, keys), window, starts = case
    found = tiles(queries, keys, 2, window, starts)
    at = [np.concatenate([np.arange(s.position, s.end) for s in spans]) for spans in (queries, keys)]
    distance = at[0][:, None] - at[1][None, :]
    expected = np.broadcast_to((distance >= 0) & (distance < (window or length)), (2, *distance.shape)).copy()
    if starts is not None:
        for row, begins in enumerate(starts):
            of = [np.searchsorted(begins, positions, side="right") for positions in at]
            expected[row] &= of[0][:, None] == of[1][None, :]
    assert np.array_equal(painted(found, expected.shape, height), expected)


def test_plain_causal_attention_is_one_tile():
    zigzag = [Span(0, 0, 4), Span(12, 4, 4)]
    assert tiles(zigzag, zigzag, 3) == (Tile((0, 3), (0, 8), (0, 8), 0, None),)


def test_full_blocks_are_joined():
    early, late = [Span(0, 0, 4), Span(12, 4, 4)], [Span(4, 0, 8)]
    (one,) = tiles(late, early, 1)
    assert (one.queries, one.keys, one.full) == ((0, 8), (0, 4), True)
    (other,) = tiles(early, late, 1)
    assert (other.queries, other.keys, other.full) == ((4, 8), (0, 8), True)


def test_a_long_sequence_needs_only_small_masks():
    """A million tokens, a window of 4,096, documents: no strip's mask holds more than 512 · (4,096 + 512) places."""
    length, window = 1 << 20, 4096
    zigzag = [Span(0, 0, length // 16), Span(length * 15 // 16, length // 16, length // 16)]
    found = tiles(zigzag, zigzag, 1, window, [list(range(0, length, 100_000))])
    strip = [part for tile in found for part in strips(tile, 512)]
    assert max(part.height * part.width for part in strip) <= 512 * (4096 + 512)
    assert sum(part.height for part in strip) == length // 8  # each query once: no other chunk is in reach
