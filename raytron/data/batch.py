"""What a training step is fed: a batch of samples, and the interface of whatever makes them.

Every sample of a run has a number, its *id*: 0, 1, 2, … without end. The step that begins after C consumed samples owns
the ids [C, C + global batch). A data-parallel rank reads one *part* of that range: contiguous, and as equal as can be,
micro-batches staying whole (`raytron.deal`).

    ids  0 1 2 3 4 5 6   cut in 3 parts   →   0 1 2 | 3 4 | 5 6

What a sample holds depends on its id (and on the seed) alone, never on the number of parts. So another mesh reads the
same samples, and the only state that a resume needs is C.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from raytron.data.bounds import Bounds
from raytron.deal import Deal


class Batch(NamedTuple):
    """Some samples of a step; n is their number (it may be 0) and S the sequence length in tokens."""

    ids: NDArray[np.int64]  # (n,) sample ids, ascending
    tokens: NDArray[np.int64]  # (n, S)
    labels: NDArray[np.int64]  # (n, S) the token that follows each of `tokens`
    weights: NDArray[np.float32]  # (n, S) 1 where the label counts in the loss, 0 where it does not
    documents: Bounds | None = None  # of n rows of S tokens; None: they are not kept apart


class TokenStream(Protocol):
    """An endless sequence of samples, read by id. Implementations are pure: the same arguments, the same batch."""

    @property
    def sequence_length(self) -> int:
        """S: tokens of a sample."""
        ...

    @property
    def samples_per_epoch(self) -> int:
        """Number of consecutive ids, from a multiple of itself on, that visit every sample of the data set once; of a
        blend, samples of all its sources together."""
        ...

    def batch(self, first: int, count: int, part: int = 0, parts: int = 1) -> Batch:
        """Part `part` of `parts` of the samples with ids [first, first + count). Raises DataError."""
        ...


class Around:
    """What a TokenStream is that gives the samples of another one: `inner`, unless said otherwise."""

    def __init__(self, inner: TokenStream):
        self.inner = inner

    @property
    def sequence_length(self) -> int:
        return self.inner.sequence_length

    @property
    def samples_per_epoch(self) -> int:
        return self.inner.samples_per_epoch


def part_of(first: int, count: int, part: int, parts: int, unit: int = 1) -> tuple[int, int]:
    """The ids [start, stop) of one part: contiguous, in order, ⌈units / parts⌉ units of ids in the first parts, else ⌊⌋.

    unit: ids that stay together. Raises ValueError where the part is not in [0, parts), a number is negative, or the
    samples are no whole units.
    """
    if first < 0 or count < 0 or not 0 <= part < parts or count % unit:
        raise ValueError(f"no part {part} of {parts} in {count} samples from id {first} on, in units of {unit}")
    units = Deal(count // unit, parts).of(part)
    return first + unit * units.start, first + unit * units.stop
