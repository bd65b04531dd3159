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

from raytron.errors import ScheduleError
from raytron.plan.actions import Row, Schedule, v_shape
from raytron.plan.v_row import VRow


def dualpipe_v(pp: int, microbatches: int) -> Schedule:
    """The schedule of `pp` ranks with two stages each. Raises ScheduleError for less than 2·pp micro-batches."""
    if microbatches < 2 * pp:
        raise ScheduleError(f"dualpipe-v needs at least {2 * pp} micro-batches on {pp} ranks, not {microbatches}")
    rows = tuple(_dualpipe_row(VRow(rank, pp), microbatches) for rank in range(pp))
    return Schedule("dualpipe-v", rows, v_shape(pp), microbatches)


def _dualpipe_row(row: VRow, microbatches: int) -> Row:
    after, here = row.pp - 1 - row.rank, row.rank + 1
    for _ in range(2 * after):
        row.forward(0)
    for _ in range(here):
        row.forward(0)
        row.forward(1)
    for _ in range(after):
        row.backward(1, split=True)
        row.weights()
        row.forward(1)
    for _ in range(microbatches - 2 * row.pp + here):
        row.forward(0)
        row.backward(1)
        row.forward(1)
        row.backward(0)
    for _ in range(after):
        row.backward(1)
        row.forward(1)
        row.backward(0)
    for turn in range(2 * here):
        row.backward(1 - turn % 2, split=turn >= here)
    for _ in range(after):
        row.weights()
        row.backward(0, split=True)
    return row.finished()
