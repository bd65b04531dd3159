"""All schedules by name.

    name            chunks   stages   backward   in flight at most, in micro-batches of a rank's whole share
    gpipe           1        loop     B          m
    1f1b            1        loop     B          p
    interleaved     2 …      loop     B          p + (p - 1) / v, a little more where p does not divide m
    looped-bfs      2 …      loop     B          m
    zb-h1           1        loop     I, W       p
    zb-h2           1        loop     I, W       2p - 1
    interleaved-zb  2 …      loop     I, W       p
    zb-v            2        v        I, W       p
    v-half          2        v        I, W       p/2 + 1
    v-min           2        v        I, W       p/3 + 1
    dualpipe-v      2        v        B, I, W    p + 1/2

The generators are in `patterns`, `greedy` and `dualpipe`, what a schedule is in `actions`. `raytron.plan.simulate` proves
that one ends and times it; `raytron.plan.auto` chooses one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from raytron.config import SCHEDULE_CHUNKS, V_SHAPED
from raytron.errors import ScheduleError
from raytron.plan import greedy, patterns
from raytron.plan.actions import Action, Op, Row, Schedule, round_robin, v_shape
from raytron.plan.cost import UNIT, Cost
from raytron.plan.dualpipe import dualpipe_v
from raytron.plan.patterns import forward_only, interleaved

__all__ = ["Action", "Op", "Row", "Schedule", "forward_only", "generate", "interleaved", "placement"]


class _Size(NamedTuple):
    pp: int
    chunks: int
    microbatches: int
    cost: Cost


GENERATORS: dict[str, Callable[[_Size], Schedule]] = {
    "gpipe": lambda size: patterns.gpipe(size.pp, size.microbatches),
    "1f1b": lambda size: patterns.one_f_one_b(size.pp, size.microbatches),
    "interleaved": lambda size: interleaved(size.pp, size.chunks, size.microbatches),
    "looped-bfs": lambda size: patterns.looped_bfs(size.pp, size.chunks, size.microbatches),
    "zb-h1": lambda size: patterns.zb_h1(size.pp, size.microbatches),
    "zb-h2": lambda size: patterns.zb_h2(size.pp, size.microbatches),
    "interleaved-zb": lambda size: greedy.interleaved_zb(size.pp, size.chunks, size.microbatches, size.cost),
    "zb-v": lambda size: greedy.zb_v(size.pp, size.microbatches, size.cost),
    "v-half": lambda size: greedy.v_half(size.pp, size.microbatches, size.cost),
    "v-min": lambda size: greedy.v_min(size.pp, size.microbatches, size.cost),
    "dualpipe-v": lambda size: dualpipe_v(size.pp, size.microbatches),
}


def generate(name: str, pp: int, virtual_stages: int, microbatches: int, cost: Cost = UNIT) -> Schedule:
    """The schedule of this name for `pp` ranks with `virtual_stages` model chunks each.

    cost: what the schedules that are found by running them are found for; the others don't depend on it. Raises
    ScheduleError for an unknown name, and for numbers that the schedule is not made for.
    """
    if min(pp, virtual_stages, microbatches) < 1:
        raise ScheduleError("a schedule needs at least one rank, one chunk and one micro-batch")
    if name not in GENERATORS:
        raise ScheduleError(f"{name!r} is not a schedule: use {', '.join(GENERATORS)}")
    least, most = SCHEDULE_CHUNKS[name]
    if virtual_stages < least or (most is not None and virtual_stages > most):
        wanted = (
            f"{least} or more model chunks" if most is None else "one model chunk" if most == 1 else "two model chunks"
        )
        raise ScheduleError(f"{name} has {wanted} on a rank, not {virtual_stages}")
    if least > 1 and pp < 2:
        raise ScheduleError(f"{name} needs 2 or more ranks, not {pp}")
    return GENERATORS[name](_Size(pp, virtual_stages, microbatches, cost))


def placement(name: str, pp: int, virtual_stages: int) -> tuple[int, ...]:
    """The rank of each stage under a schedule."""
    return v_shape(pp) if name in V_SHAPED else round_robin(pp, virtual_stages)
