"""DualPipeV: forwards and backwards of different micro-batches side by side, on stages placed as a V.

From DeepSeek's DualPipe (arXiv 2412.19437), cut in half: a rank holds two stages, r and 2p - 1 - r, and the parameters
once. In the middle of a batch a forward of the one chunk stands beside a backward of the other, so that the transfers of
the one travel while the other computes; at both ends of the batch backwards are cut in I and W to fill what would idle.

Eight phases make the row of a rank, `a` its first chunk, `b` its second, a pair side by side written `F&B`:

    1  Fa             2(p - 1 - r) times      5  Bb, then Fb&Ba     p - 1 - r
    2  Fa Fb          r + 1                   6  Bb Ba              r + 1, the second half as I, W put off
    3  Ib Wb Fb       p - 1 - r               7  W, then Ia         p - 1 - r, the oldest W
    4  Fa&Bb Fb&Ba    m - 2p + r + 1          8  W                  r + 1

It takes at least 2p micro-batches. In a row a pair is two neighbouring actions. DualPipe proper runs the batch from both
ends of the pipeline at once and so holds the parameters twice; it is not here: DualPipeV idles as little with them once.
"""

from __future__ import annotations

from collections import deque

from raytron.errors import ScheduleError
from raytron.plan.actions import Action, Op, Row, Schedule, v_shape


def dualpipe_v(pp: int, microbatches: int) -> Schedule:
    """The schedule of `pp` ranks with two stages each. Raises ScheduleError for less than 2·pp micro-batches."""
    if microbatches < 2 * pp:
        raise ScheduleError(f"dualpipe-v needs at least {2 * pp} micro-batches on {pp} ranks, not {microbatches}")
    rows = tuple(_Writer(rank, pp).row(microbatches) for rank in range(pp))
    return Schedule("dualpipe-v", rows, v_shape(pp), microbatches)


class _Writer:
    """Writes the row of one rank; micro-batches of each chunk and kind come in order."""

    def __init__(self, rank: int, pp: int):
        self.rank, self.pp = rank, pp
        self.stages = (rank, 2 * pp - 1 - rank)
        self.actions: list[Action] = []
        self.count = {(op, chunk): 0 for op in Op for chunk in (0, 1)}
        self.put_off: deque[Action] = deque()

    def row(self, microbatches: int) -> Row:
        after, here = self.pp - 1 - self.rank, self.rank + 1
        for _ in range(2 * after):
            self.forward(0)
        for _ in range(here):
            self.forward(0)
            self.forward(1)
        for _ in range(after):
            self.backward(1, split=True)
            self.weights()
            self.forward(1)
        for _ in range(microbatches - 2 * self.pp + here):
            self.forward(0)
            self.backward(1)
            self.forward(1)
            self.backward(0)
        for _ in range(after):
            self.backward(1)
            self.forward(1)
            self.backward(0)
        for turn in range(2 * here):
            self.backward(1 - turn % 2, split=turn >= here)
        for _ in range(after):
            self.weights()
            self.backward(0, split=True)
        while self.put_off:
            self.weights()
        return tuple(self.actions)

    def forward(self, chunk: int) -> None:
        self.actions.append(self._next(Op.F, chunk))

    def backward(self, chunk: int, split: bool = False) -> None:
        action = self._next(Op.B, chunk)
        if split:
            self.put_off.append(action._replace(op=Op.W))
            action = action._replace(op=Op.I)
        self.actions.append(action)

    def weights(self) -> None:
        self.actions.append(self.put_off.popleft())

    def _next(self, op: Op, chunk: int) -> Action:
        number = self.count[op, chunk]
        self.count[op, chunk] += 1
        return Action(op, self.stages[chunk], number)
