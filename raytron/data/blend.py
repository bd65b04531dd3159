"""Several sources blended by weight, and weights that change on the way: still a pure function of (seed, sample id).

    sample id ──► block of B ids ──► how many of each source ──► which slot ──► running index j of the source
                                                                                 │
                                     shuffle of epoch (j mod n) ◄── epoch = j // n ◄──┘

Exact counts: weights are whole numbers of 2⁻³², W their running sums. Of the first n samples, ⌊W₁n⌋ are of the first
source, ⌊W₂n⌋ - ⌊W₁n⌋ of the second, and so on (*cascade rounding*): every count is within one sample of weight · n for
every n, and a block's counts are differences of two such rows, computed for any block without those before it.

Within a block the samples are dealt to slots by sorting pseudo-random numbers, keyed by (seed, block). A source's
samples are numbered in the order of their slots, so however far a run has come, what it has read of a source are the
indices 0 … j without a gap; each epoch of n of them is a permutation of its own (`raytron.data.order`).

A *stage* begins at a sample id with other weights and counts its blocks from there; indices go on. Nothing before it
changes, whether stages or sources are added. No index is stored: the state is O(sources), a block is made when it is
asked for. A blend of one source has the order of that source alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from raytron.data.order import GOLDEN, Place, derive_key, mix64_array, permute_each

UNIT = 1 << 32  # of weights
BLOCKS = 16  # made at once: more would not stay in the processor's cache
DEALS = 0x626C656E64  # sets the keys of blocks apart from those of epochs


@dataclass(frozen=True)
class Stage:
    """Weights that hold from one sample on."""

    start: int  # the first sample id
    weights: tuple[int, ...]  # of each source, in 2⁻³²; together 2³²

    def running(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """(n, sources + 1): of the first `samples` (n,) of this stage, how many are of the sources before each."""
        edges = np.cumsum([0, *self.weights], dtype=np.uint64)
        high, low = (samples >> 32).astype(np.uint64)[:, None], (samples & (UNIT - 1)).astype(np.uint64)[:, None]
        return (high * edges + (low * edges >> np.uint64(32))).astype(np.int64)


def whole_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """Weights in 2⁻³², together exactly 2³²: each rounded down, the heaviest takes what is left.

    Raises ValueError where one is negative, or none is above 0.
    """
    total = sum(weights)
    if not total > 0 or min(weights) < 0:
        raise ValueError(f"no weights: {list(weights)}")
    whole = [int(weight / total * UNIT) for weight in weights]
    whole[whole.index(max(whole))] += UNIT - sum(whole)
    return tuple(whole)


@dataclass(frozen=True)
class BlendOrder:
    """The order of a blend. An epoch of each source is in an order of its own.

    sizes: samples of each source. stages: by ascending start, the first from 0 on. block: ids among which each source
    has its exact share; a weight above 0 is at least 1 / block.
    """

    sizes: tuple[int, ...]
    stages: tuple[Stage, ...]
    seed: int
    block: int

    def locate(self, ids: NDArray[np.int64]) -> Place:
        source, index = self.choose(ids)
        epoch, position = np.divmod(index, np.array(self.sizes, np.int64)[source])
        return Place(source, epoch, self._shuffled(source, epoch, position))

    def choose(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of sample ids (n,): the source (n,), and how many samples of it come before (n,)."""
        source, index = np.empty_like(ids), np.empty_like(ids)
        at = np.searchsorted([stage.start for stage in self.stages], ids, side="right") - 1
        for number in range(len(self.stages)):
            here = slice(None) if len(self.stages) == 1 else np.flatnonzero(at == number)
            if len(ids[here]):
                source[here], index[here] = self._choose(number, ids[here] - self.stages[number].start)
        return source, index

    def taken(self, samples: int) -> NDArray[np.int64]:
        """(sources,): how many of the first `samples` samples are of each."""
        number = max(n for n, stage in enumerate(self.stages) if stage.start <= samples)
        return self._bases[number] + self._taken_in(number, samples - self.stages[number].start)

    def first_beyond(self, source: int, count: float, samples: int) -> int | None:
        """The first sample id below `samples` with which more than `count` samples of a source are read, or None."""
        if self.taken(samples)[source] <= count:
            return None
        low, high = 0, samples  # more than `count` within the first `high`, not within the first `low`
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.taken(middle)[source] > count else (middle, high)
        return high - 1

    @cached_property
    def _bases(self) -> list[NDArray[np.int64]]:
        """Of each stage, how many samples (sources,) come before it."""
        bases = [np.zeros(len(self.sizes), np.int64)]
        for number, (stage, after) in enumerate(zip(self.stages, self.stages[1:], strict=False)):
            bases.append(bases[-1] + self._taken_in(number, after.start - stage.start))
        return bases

    @cached_property
    def _source_keys(self) -> NDArray[np.uint64]:
        return np.array([derive_key(self.seed, source) for source in range(len(self.sizes))], np.uint64)

    def _shuffled(
        self, source: NDArray[np.int64], epoch: NDArray[np.int64], position: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """What `sample_index` gives, for many sources and epochs at once; keys are made for each pair of them, once."""
        if not len(position):
            return position
        first, sources = epoch.min(), len(self.sizes)
        which = source + (epoch - first) * sources
        pairs = np.arange(which.max() + 1) if which.max() < 2 * len(position) else None
        if pairs is None:
            pairs, which = np.unique(which, return_inverse=True)
        of, epochs = pairs % sources, pairs // sources + first
        keys = mix64_array((self._source_keys[of] ^ epochs.astype(np.uint64)) + np.uint64(GOLDEN))
        return permute_each(position, which, np.array(self.sizes, np.int64)[of], keys)

    def _taken_in(self, number: int, samples: int) -> NDArray[np.int64]:
        """Of each source, how many of the first `samples` of a stage, if it lasted."""
        blocks, rest = divmod(samples, self.block)
        whole: NDArray[np.int64] = np.diff(self.stages[number].running(np.array([blocks * self.block])))[0]
        if not rest:
            return whole
        source, _ = self._deal(number, np.array([blocks]))
        whole += np.bincount(source[0, :rest], minlength=len(self.sizes))
        return whole

    def _choose(self, number: int, local: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """`choose` for ids that are counted from the beginning of a stage, and are at least 0."""
        source, index = np.empty_like(local), np.empty_like(local)
        block, slot = np.divmod(local, self.block)
        for blocks, here in _in_pieces(block):
            row = np.searchsorted(blocks, block[here])
            sources, indices = self._deal(number, blocks)
            source[here], index[here] = sources[row, slot[here]], indices[row, slot[here]]
        return source, index + self._bases[number][source]

    def _deal(self, number: int, blocks: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Whole blocks (b,) of a stage: each slot's source (b, block), and how many of it come before in the stage."""
        stage, size, count = self.stages[number], self.block, len(self.sizes)
        before = stage.running(blocks * size)
        ends = stage.running((blocks + 1) * size) - before  # (b, sources + 1) in a block, of the sources before each
        counts = np.diff(ends)
        if counts.min() < 0:
            raise ValueError(f"a weight is below one sample in a block of {size}")
        drawn = np.repeat(np.tile(np.arange(count), len(blocks)), counts.ravel()).reshape(-1, size)  # source by source
        shift = np.diff(before) - ends[:, :-1]
        running = np.repeat(shift.ravel(), counts.ravel()).reshape(-1, size) + np.arange(size)
        high = drawn << np.int64(size.bit_length())
        dealt = np.sort(high | self._slots(stage, blocks), axis=1) - high  # a source's slots ascend
        source, index = np.empty_like(drawn), np.empty_like(drawn)
        np.put_along_axis(source, dealt, drawn, 1)
        np.put_along_axis(index, dealt, running, 1)
        return source, index

    def _slots(self, stage: Stage, blocks: NDArray[np.int64]) -> NDArray[np.int64]:
        """A permutation of the slots of each block (b,): (b, block)."""
        base = np.uint64(derive_key(self.seed, DEALS, stage.start, self.block))
        keys = mix64_array(base + (blocks.astype(np.uint64) + np.uint64(1)) * np.uint64(GOLDEN))
        slots = np.arange(self.block, dtype=np.uint64)
        low = np.uint64((1 << (self.block - 1).bit_length()) - 1)  # these bits of a number tell its slot
        noise = mix64_array(keys[:, None] + (slots + np.uint64(1)) * np.uint64(GOLDEN))
        return (np.sort(noise & ~low | slots, axis=1) & low).astype(np.int64)


def _in_pieces(block: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.intp]]]:
    """At most BLOCKS different blocks, ascending, and where in `block` (n,) they are: pieces that cover all of it."""
    order = np.argsort(block, kind="stable")
    ascending = block[order]
    different = ascending[np.flatnonzero(np.diff(ascending, prepend=-1))]
    for start in range(0, len(different), BLOCKS):
        blocks = different[start : start + BLOCKS]
        begin, end = np.searchsorted(ascending, (blocks[0], blocks[-1] + 1))
        yield blocks, order[begin:end]
