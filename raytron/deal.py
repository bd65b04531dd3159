"""How the micro-batches of a step are dealt to data-parallel ranks: in contiguous runs, the first ranks getting one more.

    7 micro-batches on 3 ranks     rank 0   0 1 2
                                   rank 1   3 4
                                   rank 2   5 6

So any number of ranks up to the number of micro-batches does a step of the same samples: a run that loses a rank goes on
with the same global batch. Whoever asks which samples, losses or gradients are whose asks here.
"""

from __future__ import annotations

from typing import NamedTuple


class Deal(NamedTuple):
    """`total` micro-batches of a step on `ranks` data-parallel ranks."""

    total: int
    ranks: int

    def of(self, rank: int) -> range:
        """The numbers of a rank's micro-batches. Raises ValueError for a rank that does not exist."""
        if not 0 <= rank < self.ranks:
            raise ValueError(f"no rank {rank} of {self.ranks}")
        each, longer = divmod(self.total, self.ranks)
        start = rank * each + min(rank, longer)
        return range(start, start + each + (rank < longer))

    @property
    def most(self) -> int:
        """Micro-batches of the first rank, of which none has more."""
        return len(self.of(0))

    @property
    def fewest(self) -> int:
        """Micro-batches of the last rank."""
        return len(self.of(self.ranks - 1))

    def __str__(self) -> str:
        if self.most == self.fewest:
            return f"{self.most} on each of {self.ranks}"
        longer = self.total % self.ranks
        return f"{self.most} on {longer} and {self.fewest} on {self.ranks - longer} of {self.ranks}"
