"""In which order samples are read: a pure function of (seed, sample id), computed, never stored.

    sample id ──► epoch = id // n ──► index = shuffle of epoch (id mod n) ──► shard, offset

Each epoch visits every one of the n samples exactly once, in an order of its own. The shuffle is a *keyed permutation*
of [0, n): an alternating Feistel network (Luby and Rackoff, 1988) over the smallest power of two that holds n,

    left ^= F(right, key 0);   right ^= F(left, key 1);   left ^= F(right, key 2);   …

where each line can be undone, so the whole is a bijection for any F; ours is the finalizer of SplitMix64 (Steele, Lea
and Flood, OOPSLA 2014). A value that falls outside [0, n) is put through the network again until it lands inside
("cycle walking": Black and Rogaway, CT-RSA 2002), fewer than two passes on average. Memory is O(1) for any n, and
nothing depends on the number of ranks, on the batch size or on how long the run is, so extending a run never reorders it.

Several sources: an `Order` names a source number beside the index. The orders here have the one source 0; a blend is
another Order whose `locate` also chooses the source.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

ROUNDS = 8
MIN_BITS = 4  # of the network: fewer make a poor shuffle
MASK64 = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: the step of SplitMix64's counter


class Place(NamedTuple):
    """Where samples lie; n is the number of ids asked for."""

    source: NDArray[np.int64]  # (n,) number of the source, 0 where there is one
    epoch: NDArray[np.int64]  # (n,) how many times that source had been read before
    sample: NDArray[np.int64]  # (n,) sample of that source, in [0, its size)


class Order(Protocol):
    """A pure mapping from sample ids to places."""

    def locate(self, ids: NDArray[np.int64]) -> Place:
        """The places of ids (n,), each at least 0."""
        ...


class InRuns:
    """Another order, asked for a run of ids at a time: numpy's calls cost more than what they do to a small batch.

    length: of a run; the newest ones are remembered.
    """

    def __init__(self, order: Order, length: int = 1024, remembered: int = 4):
        self.order, self.length = order, length
        self._places = lru_cache(remembered)(self._run)

    def locate(self, ids: NDArray[np.int64]) -> Place:
        """See `Order.locate`; ids are neighbours, ascending."""
        if not 0 < len(ids) < self.length:
            return self.order.locate(ids)
        first, last = int(ids[0]), int(ids[-1])
        start = first // self.length
        parts = [self._places(number) for number in range(start, last // self.length + 1)]
        whole = parts[0] if len(parts) == 1 else Place(*map(np.concatenate, zip(*parts, strict=True)))
        at = slice(first - start * self.length, last + 1 - start * self.length)
        return Place(whole.source[at], whole.epoch[at], whole.sample[at])

    def _run(self, number: int) -> Place:
        return self.order.locate(np.arange(number * self.length, (number + 1) * self.length, dtype=np.int64))


@dataclass(frozen=True)
class ShuffledOrder:
    """One source of `size` samples, every epoch in another order."""

    size: int
    seed: int
    source: int = 0

    def locate(self, ids: NDArray[np.int64]) -> Place:
        epoch, position = np.divmod(ids, self.size)
        index = np.empty_like(position)
        for one in np.unique(epoch):
            here = epoch == one
            index[here] = sample_index(self.seed, int(one), position[here], self.size, self.source)
        return Place(np.full_like(ids, self.source), epoch, index)


@dataclass(frozen=True)
class FixedOrder:
    """One source of `size` samples, first to last, then again: what evaluation reads."""

    size: int
    source: int = 0

    def locate(self, ids: NDArray[np.int64]) -> Place:
        epoch, index = np.divmod(ids, self.size)
        return Place(np.full_like(ids, self.source), epoch, index)


def sample_index(seed: int, epoch: int, position: ArrayLike, size: int, source: int = 0) -> NDArray[np.int64]:
    """The samples, of [0, size), that stand at `position` (n,), also in [0, size), of one epoch's order."""
    return permute(position, size, derive_key(seed, source, epoch))


def permute(position: ArrayLike, size: int, key: int) -> NDArray[np.int64]:
    """The images of `position` (n,) under the permutation of [0, size) that the 64-bit `key` chooses.

    Raises ValueError for a position outside [0, size). Sizes up to 2^62.
    """
    given = np.atleast_1d(np.asarray(position, dtype=np.int64))
    if given.size and (given.min() < 0 or given.max() >= size):
        raise ValueError(f"positions must be in [0, {size})")
    bits = max((size - 1).bit_length(), MIN_BITS)
    keys = [mix64((key + number * GOLDEN) & MASK64) for number in range(1, ROUNDS + 1)]
    value = _network(given.astype(np.uint64), bits, keys)
    outside = np.flatnonzero(value >= size)
    while outside.size:
        value[outside] = _network(value[outside], bits, keys)
        outside = outside[value[outside] >= size]
    return value.astype(np.int64)


def permute_each(
    position: NDArray[np.int64], which: NDArray[np.int64], sizes: NDArray[np.int64], keys: NDArray[np.uint64]
) -> NDArray[np.int64]:
    """`permute` of each position (n,) by its own permutation: number `which` (n,) of those of sizes and keys (m,).

    Sizes up to 2^53. Positions are not checked.
    """
    bits = np.maximum(np.frexp((sizes - 1).astype(np.float64))[1], MIN_BITS).astype(np.uint64)
    half = bits // np.uint64(2)
    one = np.uint64(1)
    masks = ((one << (bits - half)) - one, (one << half) - one)
    steps = np.arange(1, ROUNDS + 1, dtype=np.uint64)[:, None] * np.uint64(GOLDEN)
    round_keys = mix64_array(keys + steps)  # (rounds, m)

    def network(value: NDArray[np.uint64], of: NDArray[np.int64]) -> NDArray[np.uint64]:
        shift, sides = half[of], (masks[0][of], masks[1][of])
        halves = [value >> shift, value & sides[1]]
        for number in range(ROUNDS):
            this, other = number % 2, 1 - number % 2
            halves[this] = halves[this] ^ (mix64_array(halves[other] + round_keys[number][of]) & sides[this])
        joined: NDArray[np.uint64] = (halves[0] << shift) | halves[1]
        return joined

    limit = sizes.astype(np.uint64)[which]
    value = network(position.astype(np.uint64), which)
    outside = np.flatnonzero(value >= limit)
    while outside.size:
        value[outside] = network(value[outside], which[outside])
        outside = outside[value[outside] >= limit[outside]]
    return value.astype(np.int64)


def derive_key(*parts: int) -> int:
    """One 64-bit key from several whole numbers; any change of one, or of their order, gives an unrelated key."""
    key = 0
    for part in parts:
        key = mix64((key ^ (part & MASK64)) + GOLDEN & MASK64)
    return key


def mix64(value: int) -> int:
    """SplitMix64's finalizer: a bijection of 64-bit numbers in which every input bit moves every output bit."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & MASK64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & MASK64
    return value ^ (value >> 31)


def mix64_array(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """`mix64` of each element of an array of any shape."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _network(value: NDArray[np.uint64], bits: int, keys: list[int]) -> NDArray[np.uint64]:
    """The Feistel network on numbers of `bits` bits, one round a key."""
    right_bits = np.uint64(bits // 2)
    masks = (np.uint64((1 << (bits - bits // 2)) - 1), np.uint64((1 << (bits // 2)) - 1))
    halves = [value >> right_bits, value & masks[1]]
    for number, key in enumerate(keys):
        this, other = number % 2, 1 - number % 2
        halves[this] = halves[this] ^ (mix64_array(halves[other] + np.uint64(key)) & masks[this])
    return (halves[0] << right_bits) | halves[1]
