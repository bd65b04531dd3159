"""How random orders look, beside `numpy.random.permutation` of the same sizes.

Each figure is a z-score: how many standard deviations of a uniformly random permutation it lies from that one's mean.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from raytron.data.blend import BlendOrder, Stage, whole_weights
from raytron.data.order import mix64_array, sample_index

SEEDS = 6
CELLS = 32  # of positions, and of values
BATCH = 256
Permutation = NDArray[np.int64]


def figures(order: Permutation) -> dict[str, float]:
    """Of a permutation (n,) of [0, n)."""
    size = len(order)
    changes = (np.diff(order & 1) != 0).sum()
    position, value = np.arange(size) * CELLS // size, order * CELLS // size
    table = np.bincount(position * CELLS + value, minlength=CELLS**2).reshape(CELLS, CELLS)
    expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / size
    freedom = (CELLS - 1) ** 2
    chi2 = ((table - expected) ** 2 / expected).sum()
    return {
        "last bit changes": float((changes - (size - 1) / 2) / np.sqrt(size / 4)),
        "cells": float((chi2 - freedom) / np.sqrt(2 * freedom)),
        "neighbours": float(np.corrcoef(order[:-1], order[1:])[0, 1] * np.sqrt(size)),
        "pairs stay": float(((order[::2][: size // 2] < size // 2) == (order[1::2] < size // 2)).mean() - 0.5)
        * float(np.sqrt(2 * size)),
        "batches": composition(order < size // 4, 0.25),
    }


def composition(mine: NDArray[np.bool_], share: float) -> float:
    """Whether batches hold as much of one part as chance gives: their counts' sum of squares, near to χ²."""
    batches = len(mine) // BATCH
    counts = mine[: batches * BATCH].reshape(batches, BATCH).sum(1)
    chi2 = ((counts - BATCH * share) ** 2 / (BATCH * share * (1 - share))).sum()
    return float((chi2 - batches) / np.sqrt(2 * batches))


def ours(seed: int, size: int) -> Permutation:
    return sample_index(seed, seed % 3, np.arange(size), size, source=seed % 2)


def theirs(seed: int, size: int) -> Permutation:
    return np.random.default_rng(seed).permutation(size)


@pytest.mark.parametrize("size", [200_003, 1 << 17])
def test_epochs_look_as_random_as_numpys_permutations(size: int) -> None:
    mine, other = ([figures(made(seed, size)) for seed in range(SEEDS)] for made in (ours, theirs))
    for name in mine[0]:
        for found in (mine, other):
            scores = np.array([each[name] for each in found])
            assert np.abs(scores).max() < 4, name
            assert abs(scores.mean()) * np.sqrt(SEEDS) < 4, name
        spread = [np.mean([each[name] ** 2 for each in found]) for found in (mine, other)]
        assert max(spread) < 4, name  # the mean of SEEDS squares of z-scores is about 1
    assert max(abs(each["neighbours"]) for each in mine) / np.sqrt(size) < 0.01


def test_small_epochs_are_permuted_evenly() -> None:
    """All 24 orders of four samples come, about equally often."""
    code = np.array([64, 16, 4, 1])
    counts = np.bincount([int(sample_index(seed, 0, np.arange(4), 4) @ code) for seed in range(2400)])
    counts = counts[counts > 0]
    assert len(counts) == 24
    assert ((counts - 100) ** 2 / 100).sum() < 23 + 4 * np.sqrt(46)


def test_batches_of_a_blend_are_composed_as_by_chance() -> None:
    """Within a block the counts are exact; over batches of a quarter of a block they vary as drawing without replacement."""
    block, share = 4 * BATCH, 0.25
    order = BlendOrder((10**6, 10**6), (Stage(0, whole_weights([share, 1 - share])),), 3, block)
    counts = (order.choose(np.arange(400 * block))[0] == 0).reshape(-1, BATCH).sum(1)
    assert (counts.reshape(-1, 4).sum(1) == block * share).all()
    variance = BATCH * share * (1 - share) * (block - BATCH) / (block - 1)
    chi2 = ((counts - BATCH * share) ** 2 / variance).sum()
    freedom = len(counts) * 3 / 4  # the fourth batch of a block follows from the others
    assert abs(chi2 * 3 / 4 - freedom) < 4 * np.sqrt(2 * freedom)


def few_rounds(seed: int, size: int) -> Permutation:
    """A network of two rounds: a bijection, but no shuffle."""
    bits = (size - 1).bit_length() // 2
    low = np.uint64((1 << bits) - 1)
    value = np.arange(1 << 2 * bits, dtype=np.uint64)
    left, right = value >> np.uint64(bits), value & low
    left ^= mix64_array(right + np.uint64(seed)) & low
    right ^= mix64_array(left) & low
    joined = ((left << np.uint64(bits)) | right).astype(np.int64)
    return joined[joined < size]


@pytest.mark.parametrize(
    "bad",
    [
        lambda seed, size: np.arange(size),
        lambda seed, size: np.arange(size) * 7919 % size,
        lambda seed, size: np.arange(size).reshape(-1, BATCH)[theirs(seed, size // BATCH)].ravel(),
        few_rounds,
    ],
    ids=["none", "a stride", "whole batches", "two rounds"],
)
def test_the_figures_tell_a_bad_shuffle(bad: Callable[[int, int], Permutation]) -> None:
    scores = figures(bad(1, 1 << 16))
    assert max(map(abs, scores.values())) > 8
