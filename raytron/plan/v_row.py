"""Writes the row of one rank of a V, action by action: micro-batches of each chunk and operation come in order.

ZB-V (Qi et al., arXiv 2405.15362) can be written down so for 2p - 1 micro-batches and more, `a` a rank's first chunk:

    1  Fa            2(p - r) - 1 times       4  Fa Ia W Fb Ib W      until all forwards are done
    2  Fb Fa         r                        5  Ia Ib                r
    3  Fb Ib W       p - r                    6  Ia W, then W         p - r, what is left

With F = I = W no rank idles between its first action and its last.
"""

from __future__ import annotations

from collections import deque

from raytron.plan.actions import Action, Op, Row, Schedule, v_shape


class VRow:
    """The row of one of `pp` ranks, whose two chunks, 0 and 1, are stages r and 2·pp - 1 - r."""

    def __init__(self, rank: int, pp: int):
        self.rank, self.pp = rank, pp
        self.stages = (rank, 2 * pp - 1 - rank)
        self.actions: list[Action] = []
        self.forwards, self.backwards = [0, 0], [0, 0]  # done, by chunk
        self.put_off: deque[Action] = deque()

    def forward(self, chunk: int) -> None:
        """The next forward of a chunk."""
        self.actions.append(Action(Op.F, self.stages[chunk], self.forwards[chunk]))
        self.forwards[chunk] += 1

    def backward(self, chunk: int, split: bool = False) -> None:
        """The next backward of a chunk, whole, or its input gradient alone with the weight gradient put off."""
        number = self.backwards[chunk]
        self.backwards[chunk] += 1
        self.actions.append(Action(Op.I if split else Op.B, self.stages[chunk], number))
        if split:
            self.put_off.append(Action(Op.W, self.stages[chunk], number))

    def weights(self) -> None:
        """The oldest weight gradient that was put off."""
        self.actions.append(self.put_off.popleft())

    def finished(self) -> Row:
        """The row, after all weight gradients that are left."""
        while self.put_off:
            self.weights()
        return tuple(self.actions)


def zb_v_as_written(pp: int, microbatches: int) -> Schedule | None:
    """ZB-V rank by rank; None for less than 2·pp - 1 micro-batches."""
    if microbatches < 2 * pp - 1:
        return None
    rows = tuple(_zb_v_row(VRow(rank, pp), microbatches) for rank in range(pp))
    return Schedule("zb-v", rows, v_shape(pp), microbatches)


def _zb_v_row(row: VRow, microbatches: int) -> Row:
    rank, after = row.rank, row.pp - row.rank
    for _ in range(2 * after - 1):
        row.forward(0)
    for _ in range(rank):
        row.forward(1)
        row.forward(0)
    for _ in range(after):
        row.forward(1)
        row.backward(1, split=True)
        row.weights()
    while row.forwards[1] < microbatches:
        if row.forwards[0] < microbatches:
            row.forward(0)
        for chunk in (0, 1):
            if chunk:
                row.forward(1)
            row.backward(chunk, split=True)
            row.weights()
    for _ in range(rank):
        row.backward(0, split=True)
        row.backward(1, split=True)
    for _ in range(after):
        row.backward(0, split=True)
        row.weights()
    return row.finished()
