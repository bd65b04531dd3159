"""Span corruption: amounts, places, sentinels, and the text put together again."""

from __future__ import annotations

import itertools
from collections import Counter
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytron.data.corruption import Corrupted, SpanCorruption

VOCAB, EOD = 1000, 0


def restored(made: Corrupted, spans: int) -> list[int]:
    """The text: each sentinel of the inputs replaced by what follows it in the targets."""
    inputs, targets = made.inputs.tolist(), made.targets.tolist()
    assert inputs.pop() == targets.pop() == EOD
    left_out: dict[int, list[int]] = {}
    for token in targets:
        if token >= VOCAB - spans:
            current = left_out.setdefault(token, [])
        else:
            current.append(token)
    assert [*left_out] == [VOCAB - 1 - number for number in range(spans)]
    text: list[int] = []
    for token in inputs:
        text += left_out.pop(token) if token >= VOCAB - spans else [token]
    assert not left_out
    return text


@settings(max_examples=200, deadline=None)
@given(
    length=st.integers(2, 300),
    sample=st.integers(0, 10**12),
    rate=st.sampled_from([0.05, 0.15, 0.5, 0.9]),
    mean=st.sampled_from([1.0, 3.0, 8.0]),
)
def test_the_text_can_be_put_together_again(length: int, sample: int, rate: float, mean: float) -> None:
    how = SpanCorruption(5, VOCAB, EOD, rate, mean)
    tokens = np.random.default_rng(sample).integers(1, 500, length)
    noise, spans = how.amounts(length)
    made = how(tokens, sample)
    assert (len(made.inputs), len(made.targets)) == (length - noise + spans + 1, noise + spans + 1)
    assert restored(made, spans) == tokens.tolist()
    assert all(again.tolist() == first.tolist() for again, first in zip(how(tokens, sample), made, strict=True))


def test_amounts_are_those_of_the_paper() -> None:
    how = SpanCorruption(0, VOCAB, EOD)
    assert how.amounts(512) == (77, 26)
    assert how.amounts(2) == (1, 1)
    assert how.amounts(20) == (3, 1)
    assert SpanCorruption(0, VOCAB, EOD, rate=0.95, mean_span=1.0).amounts(20) == (19, 1)


@settings(max_examples=100, deadline=None)
@given(inputs=st.integers(4, 400), rate=st.sampled_from([0.05, 0.15, 0.5]), mean=st.sampled_from([1.0, 3.0, 8.0]))
def test_texts_that_fit(inputs: int, rate: float, mean: float) -> None:
    how = SpanCorruption(0, VOCAB, EOD, rate, mean)
    length, targets = how.fitting(inputs)
    made = how(np.ones(length, np.int64), 0)
    assert len(made.inputs) <= inputs
    assert len(made.targets) == targets
    assert len(how(np.ones(length + 1, np.int64), 0).inputs) > inputs


def test_512_inputs_are_of_568_tokens_as_in_t5() -> None:
    assert SpanCorruption(0, 32_128, 1).fitting(512) == (568, 114)


def test_every_way_to_cut_is_equally_likely() -> None:
    """Ten tokens, four of noise in two spans: 3 ways to cut the noise and 5 to cut the rest, 6,000 samples."""
    how, tokens = SpanCorruption(1, VOCAB, EOD, 0.4, 2.0), np.arange(1, 11)
    found: Counter[tuple[int, ...]] = Counter()
    for sample in range(6000):
        inputs = how(tokens, sample).inputs.tolist()
        first, second = inputs.index(VOCAB - 1), inputs.index(VOCAB - 2)
        found[first, second - first - 1, inputs[first + 1] - first - 1] += 1
    assert len(found) == comb(3, 1) * comb(5, 1)
    assert set(found) == {(k, 6 - k, n) for k, n in itertools.product(range(1, 6), range(1, 4))}
    chi_square = sum((count - 400) ** 2 / 400 for count in found.values())
    assert chi_square < 38  # fourteen degrees of freedom: once in 2,000


def test_seeds_and_samples_differ() -> None:
    tokens = np.arange(1, 200)
    made = [
        SpanCorruption(seed, VOCAB, EOD)(tokens, sample).inputs.tolist() for seed, sample in ((0, 0), (1, 0), (0, 1))
    ]
    assert made[0] != made[1]
    assert made[0] != made[2]


def test_what_can_not_be_corrupted_is_refused() -> None:
    how = SpanCorruption(0, VOCAB, EOD)
    with pytest.raises(ValueError, match="no room for noise"):
        how(np.array([5]), 0)
    with pytest.raises(ValueError, match="token 999 is among the 1 sentinels at the top of 1000 ids"):
        how(np.array([5, 999, 4]), 0)
