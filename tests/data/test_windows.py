"""Text cut by bytes: nothing is lost, nothing is in two windows, and cuts are where tokenizers do not mind."""

from __future__ import annotations

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from raytron.data.density import CUT, best_share, measure
from raytron.data.windows import LEAST_BYTES, Cutter, Window


def windows_of(texts: list[bytes], limit: float, end_bytes: float = 1.0, alone: bool = False) -> list[Window]:
    cutter = Cutter(limit, end_bytes, alone=alone)
    found = [window for number, text in enumerate(texts) for window in cutter.add(0, number, 0, number, text)]
    return [*found, *cutter.finish()]


TEXTS = st.lists(st.text(min_size=1).map(str.encode), max_size=8)


@given(TEXTS, st.integers(1, 60), st.booleans())
def test_every_byte_is_in_one_window_and_no_character_is_cut(texts: list[bytes], limit: int, alone: bool) -> None:
    windows = windows_of(texts, limit, alone=alone)
    pieces = [each for window in windows for each in window.slices]
    assert all(window.slices for window in windows)
    for number, text in enumerate(texts):
        mine = [each for each in pieces if each.document == number]
        assert b"".join(text[each.begin : each.end] for each in mine) == text
        assert [each.begin for each in mine] == [0, *(each.end for each in mine[:-1])]
        assert [each.ends for each in mine] == [False] * (len(mine) - 1) + [True]
        assert "".join(text[each.begin : each.end].decode() for each in mine) == text.decode()
    for window in windows:
        taken = [texts[each.document][each.begin : each.end] for each in window.slices]
        assert window.digest == xxhash.xxh3_64_intdigest(b"".join(taken))
        assert sum(map(len, taken)) <= max(limit, LEAST_BYTES)
        assert len({each.document for each in window.slices}) == 1 or not alone


def test_windows_are_full() -> None:
    texts = [b"word " * size for size in (3, 200, 40, 1, 77, 500, 9)]
    windows = windows_of(texts, 160.0)
    assert all(window.used >= 160 - 10 for window in windows[:-1])


def test_a_document_is_cut_at_a_line_end_or_before_a_space() -> None:
    (first, *_) = windows_of([b"a" * 60 + b"\nb c" + b"d" * 60], 64.0)
    assert first.slices[0].end == 61
    (first, *_) = windows_of([b"a" * 58 + b" bb c" + b"d" * 60], 64.0)
    assert first.slices[0].end == 61
    (first, *_) = windows_of([b"a" * 100], 64.0)
    assert first.slices[0].end == 64
    (first, *_) = windows_of([("ü" * 100).encode()], 65.0)
    assert first.slices[0].end == 64


def test_the_most_bytes_are_taken_with_which_little_is_cut() -> None:
    even = best_share(np.full(640, 4.0), np.ones(640, np.int64), 64, 4.0)
    assert even == 1.0
    random = np.random.default_rng(0)
    costs = np.full(64000, 4.0)
    tokens = random.permuted(np.repeat([0, 1, 3], [16000, 40000, 8000])).astype(np.int64)
    tokens = (tokens.reshape(-1, 40) * random.integers(1, 4, (1600, 1))).ravel()  # some stretches are denser
    mean = costs.sum() / tokens.sum()
    share = best_share(costs, tokens, 64, mean)
    assert 0.5 < share < 0.9
    ends, counted = np.cumsum([0, *costs]), np.cumsum([0, *tokens])

    def lost(share: float) -> float:
        held = np.diff(np.interp(np.arange(0, ends[-1], share * mean * 64), ends, counted))
        return float(np.maximum(held - 65, 0).sum() / counted[-1])

    assert lost(share) <= CUT < lost(share + 0.01)


def test_bytes_have_one_byte_for_a_token() -> None:
    def encode(texts: object) -> tuple[np.ndarray, np.ndarray]:
        found = [np.frombuffer(text.encode(), np.uint8).astype(np.uint32) for text in texts]
        return np.concatenate(found), np.array([len(one) for one in found])

    texts = [f"text {number} " * (number % 90 + 1) for number in range(300)]
    density = measure(texts, encode, 128, 257, 256)
    assert (density.bytes_per_token, density.mean) == (1.0, 1.0)
    assert density.counts[256] == 300
    assert density.tokens == density.counts.sum() == sum(len(text) + 1 for text in texts)
    with pytest.raises(ValueError, match="no token"):
        measure([], encode, 128, 257, 256)
