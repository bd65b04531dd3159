"""Text cut by bytes: nothing is lost, nothing is in two windows, and cuts are where tokenizers do not mind."""

from __future__ import annotations

import re

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from raytron.data.density import CUT, best_fill, measure
from raytron.data.estimate import TOKEN, Estimate, fitted
from raytron.data.windows import CHARACTER, Cutter, Window


def windows_of(texts: list[bytes], limit: float, alone: bool = False) -> list[Window]:
    cutter = Cutter(Estimate.even(), limit, alone=alone)
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
        assert sum(map(len, taken)) <= max(limit, CHARACTER)
        assert len({each.document for each in window.slices}) == 1 or not alone


def test_windows_are_full() -> None:
    texts = [b"word " * size for size in (3, 200, 40, 1, 77, 500, 9)]
    windows = windows_of(texts, 160)
    assert all(window.used >= TOKEN * 150 for window in windows[:-1])


def test_a_document_is_cut_at_a_line_end_or_before_a_space() -> None:
    (first, *_) = windows_of([b"a" * 60 + b"\nb c" + b"d" * 60], 64.0)
    assert first.slices[0].end == 61
    (first, *_) = windows_of([b"a" * 58 + b" bb c" + b"d" * 60], 64.0)
    assert first.slices[0].end == 61
    (first, *_) = windows_of([b"a" * 100], 64.0)
    assert first.slices[0].end == 64
    (first, *_) = windows_of([("ü" * 100).encode()], 65.0)
    assert first.slices[0].end == 64


def test_as_much_is_taken_as_loses_little() -> None:
    assert best_fill(np.ones(640), np.ones(640, np.int64), 64) == 1.0
    random = np.random.default_rng(0)
    tokens = random.poisson(np.repeat(random.uniform(0.7, 1.3, 1600), 40))  # some stretches are denser than estimated
    worth = np.ones(len(tokens))
    fill = best_fill(worth, tokens, 64)
    assert 0.6 < fill < 0.95
    counted = np.cumsum([0, *tokens])

    def lost(fill: float) -> float:
        held = np.diff(np.interp(np.arange(0, len(tokens), fill * 64), np.arange(len(counted)), counted))
        return float(np.maximum(held - 65, 0).sum() / counted[-1])

    assert lost(fill) <= CUT < lost(fill + 0.01)


def test_an_estimate_knows_dense_text_from_thin() -> None:
    """Here words, digits and signs are tokens, and blanks none: so is a token in real ones."""
    words, numbers = (
        [("some words of a text " * n).encode() for n in range(1, 80)],
        [b"1234 " * n for n in range(1, 80)],
    )
    texts = [*words, *numbers, *(one + b"\n" + other for one, other in zip(words, numbers, strict=True))]
    tokens = np.array([len(re.findall(rb"[a-z]+|[0-9]", text)) for text in texts])
    estimate = fitted(texts, tokens)
    for text in (b"other text of words\n" * 50, b"77 4096 " * 90, b"a line of 12 words and 345 of numbers\n" * 20):
        true = len(re.findall(rb"[a-z]+|[0-9]", text))
        assert estimate.running(text, 0, len(text))[-1] / TOKEN == pytest.approx(true, rel=0.2)
    whole = estimate.running(texts[-1], 0, len(texts[-1]))
    parts = [estimate.running(texts[-1], at, min(at + 7, len(texts[-1])))[-1] for at in range(0, len(texts[-1]), 7)]
    assert sum(parts) == whole[-1]
    assert min(estimate.worth) >= 10


def test_bytes_have_one_byte_for_a_token() -> None:
    def encode(texts: object) -> tuple[np.ndarray, np.ndarray]:
        found = [np.frombuffer(text.encode(), np.uint8).astype(np.uint32) for text in texts]
        return np.concatenate(found), np.array([len(one) for one in found])

    texts = [f"text {number} " * (number % 90 + 1) for number in range(300)]
    density = measure(texts, encode, 128, 257, 256)
    assert (set(density.estimate.worth), density.fill, density.mean) == ({TOKEN}, 1.0, 1.0)
    assert density.counts[256] == 300
    assert density.counts.sum() == sum(len(text) + 1 for text in texts)
    with pytest.raises(ValueError, match="no token"):
        measure([], encode, 128, 257, 256)
