"""Schedules that are written down rank by rank: GPipe, 1F1B, ZB-H1, ZB-H2, interleaved 1F1B, looped breadth-first.

The row of the first of two ranks, four micro-batches:

    gpipe  F0 F1 F2 F3 B0 B1 B2 B3               all forwards first: all m micro-batches are live at once
    1f1b   F0 F1 B0 F2 B1 F3 B2 B3               then one forward, one backward: at most p are live
    zb-h1  F0 F1 I0 W0 F2 I1 W1 F3 I2 W2 I3 W3   1f1b, later ranks put W off, to where 1f1b idles: at most p are live
    zb-h2  F0 F1 F2 I0 W0 F3 I1 W1 I2 W2 I3 W3   more forwards at first, W put off twice as far: 2p - 1 are live

All but `interleaved` and `looped_bfs` have one model chunk on a rank. Those two give a rank v chunks, so that the pipeline
fills in a v-th of the time: interleaved 1F1B lets micro-batches pass chunk by chunk in groups of about p, looped
breadth-first lets all m pass through a chunk before the next one, which sends more evenly and holds all of them.

Sources: GPipe (Huang et al., arXiv 1811.06965), 1F1B and interleaved (Narayanan et al., arXiv 2104.04473), looped
breadth-first (Lamy-Poirier, arXiv 2211.05953), ZB-H1 and ZB-H2 (Qi et al., arXiv 2401.10241).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from raytron.plan.actions import Action, Op, Row, Schedule, round_robin, v_shape


def gpipe(pp: int, microbatches: int) -> Schedule:
    """All forwards, then all backwards."""
    rows = tuple(
        tuple(Action(op, rank, batch) for op in (Op.F, Op.B) for batch in range(microbatches)) for rank in range(pp)
    )
    return Schedule("gpipe", rows, tuple(range(pp)), microbatches)


def one_f_one_b(pp: int, microbatches: int) -> Schedule:
    """As many forwards as ranks follow, then one forward and one backward in turn, then the rest backward."""
    rows = tuple(_one_f_one_b(rank, microbatches, warmup=pp - rank - 1) for rank in range(pp))
    return Schedule("1f1b", rows, tuple(range(pp)), microbatches)


def zb_h1(pp: int, microbatches: int) -> Schedule:
    """1F1B with the backward in two: rank r puts a weight gradient off until r more input gradients are done."""
    rows = (_one_f_one_b(rank, microbatches, warmup=pp - rank - 1) for rank in range(pp))
    late = tuple(tuple(_defer_weights(row, delay=rank)) for rank, row in enumerate(rows))
    return Schedule("zb-h1", late, tuple(range(pp)), microbatches)


def zb_h2(pp: int, microbatches: int) -> Schedule:
    """Forwards until the first gradient could be back, and W put off by 2r: no rank idles between its first and last."""
    rows = (_one_f_one_b(rank, microbatches, warmup=2 * (pp - rank - 1)) for rank in range(pp))
    late = tuple(tuple(_defer_weights(row, delay=2 * rank)) for rank, row in enumerate(rows))
    return Schedule("zb-h2", late, tuple(range(pp)), microbatches)


def interleaved(pp: int, virtual_stages: int, microbatches: int) -> Schedule:
    """1F1B over v chunks on each rank; the micro-batches pass chunk by chunk in groups of `pp` or a little more."""
    sizes = group_sizes(pp, microbatches)
    rows = []
    for rank in range(pp):
        forwards = [Action(Op.F, c * pp + rank, b) for c, b in _grouped(sizes, virtual_stages)]
        last = virtual_stages - 1
        backwards = [Action(Op.B, (last - c) * pp + rank, b) for c, b in _grouped(sizes, virtual_stages)]
        warmup = 2 * (pp - rank - 1) + (virtual_stages - 1) * max(sizes)
        rows.append(tuple(_alternate(forwards, backwards, warmup)))
    return Schedule("interleaved", tuple(rows), round_robin(pp, virtual_stages), microbatches)


def looped_bfs(pp: int, virtual_stages: int, microbatches: int) -> Schedule:
    """All micro-batches forward through each chunk in turn, then backward through each chunk, the last one first."""
    chunks, batches = range(virtual_stages), range(microbatches)
    rows = []
    for rank in range(pp):
        forwards = [Action(Op.F, chunk * pp + rank, batch) for chunk in chunks for batch in batches]
        backwards = [Action(Op.B, chunk * pp + rank, batch) for chunk in reversed(chunks) for batch in batches]
        rows.append((*forwards, *backwards))
    return Schedule("looped-bfs", tuple(rows), round_robin(pp, virtual_stages), microbatches)


def forward_only(rank_of: Sequence[int], microbatches: int) -> Schedule:
    """Forwards alone, for evaluation, with the stages placed as in training (`round_robin` or `v_shape`)."""
    pp = max(rank_of) + 1
    chunks = len(rank_of) // pp
    if tuple(rank_of) == round_robin(pp, chunks):
        order = list(_grouped([min(pp, microbatches - at) for at in range(0, microbatches, pp)], chunks))
        rows = tuple(tuple(Action(Op.F, c * pp + rank, batch) for c, batch in order) for rank in range(pp))
    elif tuple(rank_of) == v_shape(pp):
        rows = tuple(_down_and_up(rank, pp, microbatches) for rank in range(pp))
    else:
        raise AssertionError(f"stages on ranks {tuple(rank_of)} are neither a loop nor a V")
    return Schedule("forward", rows, tuple(rank_of), microbatches)


def group_sizes(pp: int, microbatches: int) -> list[int]:
    """Micro-batches in as many groups of at least `pp` as there can be (one group if there are fewer), evenly."""
    groups = max(1, microbatches // pp)
    return [microbatches // groups + (index < microbatches % groups) for index in range(groups)]


def _down_and_up(rank: int, pp: int, microbatches: int) -> Row:
    """Forwards of a V: micro-batch b enters the first stage at time 2b, and each stage takes one unit of time."""
    up = 2 * pp - 1 - rank
    timed = [(2 * batch + stage, Action(Op.F, stage, batch)) for stage in (rank, up) for batch in range(microbatches)]
    return tuple(action for _, action in sorted(timed))


def _grouped(sizes: Sequence[int], chunks: int) -> Iterator[tuple[int, int]]:
    """(chunk, micro-batch): groups of micro-batches go through all chunks, one group after the other."""
    first = 0
    for size in sizes:
        for chunk in range(chunks):
            for batch in range(first, first + size):
                yield chunk, batch
        first += size


def _one_f_one_b(rank: int, microbatches: int, warmup: int) -> Row:
    forwards = [Action(Op.F, rank, batch) for batch in range(microbatches)]
    backwards = [Action(Op.B, rank, batch) for batch in range(microbatches)]
    return tuple(_alternate(forwards, backwards, warmup))


def _alternate(forwards: Sequence[Action], backwards: Sequence[Action], warmup: int) -> Iterator[Action]:
    """`warmup` forwards, then a forward and a backward in turn, then the backwards that are left."""
    warmup = min(warmup, len(forwards))
    yield from forwards[:warmup]
    for forward, backward in zip(forwards[warmup:], backwards, strict=False):
        yield forward
        yield backward
    yield from backwards[len(forwards) - warmup :]


def _defer_weights(row: Row, delay: int) -> Iterator[Action]:
    """A row of F and B with each B as I, and its W after `delay` further I; the last W stand at the end."""
    waiting: list[Action] = []
    at = 0
    for action in row:
        if action.op is Op.F:
            yield action
            continue
        yield action._replace(op=Op.I)
        waiting.append(action._replace(op=Op.W))
        if len(waiting) - at > delay:
            yield waiting[at]
            at += 1
    yield from waiting[at:]
