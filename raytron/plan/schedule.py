"""Pipeline schedules as data: one row of actions for each pipeline rank, and a generator for each schedule.

A model is cut into stages, a batch into micro-batches. An action is one of four operations on one of each:

    F  forward        B  full backward = I + W        I  gradient of the input        W  gradient of the weights

and is written `2F0`: stage 2, forward, micro-batch 0. A row is run strictly in order; transfers between ranks are not
written down, because both ends derive them from the sender's row. The row of the first of two ranks:

    gpipe  F0 F1 F2 F3 B0 B1 B2 B3               all forwards first: all m micro-batches are live at once
    1f1b   F0 F1 B0 F2 B1 F3 B2 B3               then one forward, one backward: at most p are live
    zb-h1  F0 F1 I0 W0 F2 I1 W1 F3 I2 W2 I3 W3   later ranks put W off, to where 1f1b idles: at most p are live

`interleaved` gives each rank v model chunks (stage s stands on rank s mod p), so that the pipeline fills in a v-th of the
time. Sources: GPipe (arXiv 1811.06965), 1F1B and interleaved (Megatron-LM, arXiv 2104.04473), ZB-H1 (arXiv 2401.10241).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from raytron.errors import ScheduleError


class Op(StrEnum):
    """What an action does."""

    F = "F"  # forward
    B = "B"  # full backward
    I = "I"  # noqa: E741  input gradient only
    W = "W"  # weight gradient only


class Action(NamedTuple):
    """One operation on one micro-batch in one stage."""

    op: Op
    stage: int
    microbatch: int

    @classmethod
    def parse(cls, text: str) -> Action:
        """Reads the text form: `2F0`. Raises ScheduleError for anything else."""
        match = re.fullmatch(r"(\d+)([FBIW])(\d+)", text)
        if match is None:
            raise ScheduleError(f"{text!r} is not an action: write stage, F, B, I or W, and micro-batch, such as 2F0")
        return cls(Op(match[2]), int(match[1]), int(match[3]))

    def __str__(self) -> str:
        return f"{self.stage}{self.op.value}{self.microbatch}"


Row = tuple[Action, ...]


@dataclass(frozen=True)
class Schedule:
    """A row of actions for each pipeline rank.

    rows: by rank, run in order. rank_of: the rank of each stage. microbatches: how many there are.
    Either every stage does F and then B (or I and later W) once for every micro-batch, or every stage does F alone
    (evaluation). Raises ScheduleError where that does not hold; that no rank waits for ever is proved by `simulate`.
    """

    name: str
    rows: tuple[Row, ...]
    rank_of: tuple[int, ...]
    microbatches: int

    def __post_init__(self) -> None:
        for rank in self.rank_of:
            if not 0 <= rank < len(self.rows):
                raise ScheduleError(f"{self.name}: a stage stands on rank {rank}, but there are {len(self.rows)} rows")
        done = {action: at for row in self.rows for at, action in enumerate(row)}
        if len(done) != sum(map(len, self.rows)):
            raise ScheduleError(f"{self.name}: {_repeated(self.rows)} stands there more than once")
        for rank, row in enumerate(self.rows):
            for action in row:
                self._check_place(action, rank)
        backward = any(action.op is not Op.F for action in done)
        for stage in range(self.num_stages):
            for microbatch in range(self.microbatches):
                _check_order(self.name, done, stage, microbatch, backward)

    def _check_place(self, action: Action, rank: int) -> None:
        if action.stage >= self.num_stages or action.microbatch >= self.microbatches:
            limits = f"{self.num_stages} stages and {self.microbatches} micro-batches"
            raise ScheduleError(f"{self.name}: {action} on rank {rank} is outside {limits}")
        if self.rank_of[action.stage] != rank:
            owner = self.rank_of[action.stage]
            raise ScheduleError(f"{self.name}: {action} is in the row of rank {rank}, its stage on rank {owner}")

    @property
    def num_stages(self) -> int:
        return len(self.rank_of)

    @property
    def num_ranks(self) -> int:
        return len(self.rows)

    @property
    def forward_only(self) -> bool:
        """Whether no action is a backward."""
        return all(action.op is Op.F for row in self.rows for action in row)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages of a rank, ascending: its model chunks."""
        return tuple(stage for stage, owner in enumerate(self.rank_of) if owner == rank)

    def __str__(self) -> str:
        head = f"{self.name}: {self.num_stages} stages on {self.num_ranks} ranks, {self.microbatches} micro-batches"
        return "\n".join([head, *(f"  {rank}: " + " ".join(map(str, row)) for rank, row in enumerate(self.rows))])


def _repeated(rows: Sequence[Row]) -> Action:
    seen: set[Action] = set()
    for row in rows:
        for action in row:
            if action in seen:
                return action
            seen.add(action)
    raise AssertionError("no action is repeated")


def _check_order(name: str, done: dict[Action, int], stage: int, microbatch: int, backward: bool) -> None:
    """Raises ScheduleError unless this stage does F, then B or I then W, for this micro-batch."""
    forward, full, inputs, weights = (done.get(Action(op, stage, microbatch)) for op in Op)
    text = f"{name}: stage {stage}, micro-batch {microbatch}"
    if forward is None:
        raise ScheduleError(f"{text} has no forward")
    if not backward:
        return
    if full is not None:
        if inputs is not None or weights is not None:
            raise ScheduleError(f"{text} has a full backward and a part of one")
        if full < forward:
            raise ScheduleError(f"{text} goes backward before its forward")
    elif inputs is None or weights is None:
        missing = "backward" if inputs is weights else "input gradient" if inputs is None else "weight gradient"
        raise ScheduleError(f"{text} has no {missing}")
    elif not forward < inputs < weights:
        raise ScheduleError(f"{text} must do F, I and W in this order")


def generate(name: str, pp: int, virtual_stages: int, microbatches: int) -> Schedule:
    """The schedule of this name for `pp` ranks with `virtual_stages` model chunks each.

    gpipe, 1f1b and zb-h1 take any number of micro-batches, and one chunk; interleaved takes more than one chunk, more
    than one rank and a multiple of `pp` micro-batches. Raises ScheduleError otherwise, and for an unknown name.
    """
    if min(pp, virtual_stages, microbatches) < 1:
        raise ScheduleError("a schedule needs at least one rank, one chunk and one micro-batch")
    if name == "interleaved":
        return interleaved(pp, virtual_stages, microbatches)
    simple = {"gpipe": gpipe, "1f1b": one_f_one_b, "zb-h1": zb_h1}
    if name not in simple:
        raise ScheduleError(f"{name!r} is not a schedule: use {', '.join(simple)} or interleaved")
    if virtual_stages != 1:
        raise ScheduleError(f"{name} has one model chunk on a rank, not {virtual_stages}: use interleaved")
    return simple[name](pp, microbatches)


def gpipe(pp: int, microbatches: int) -> Schedule:
    """All forwards, then all backwards."""
    rows = tuple(
        tuple(Action(op, rank, batch) for op in (Op.F, Op.B) for batch in range(microbatches)) for rank in range(pp)
    )
    return Schedule("gpipe", rows, tuple(range(pp)), microbatches)


def one_f_one_b(pp: int, microbatches: int) -> Schedule:
    """As many forwards as ranks follow, then one forward and one backward in turn, then the rest backward."""
    rows = []
    for rank in range(pp):
        forwards = [Action(Op.F, rank, batch) for batch in range(microbatches)]
        backwards = [Action(Op.B, rank, batch) for batch in range(microbatches)]
        rows.append(tuple(_alternate(forwards, backwards, warmup=pp - rank - 1)))
    return Schedule("1f1b", tuple(rows), tuple(range(pp)), microbatches)


def zb_h1(pp: int, microbatches: int) -> Schedule:
    """1F1B with the backward in two: rank r puts a weight gradient off until r more input gradients are done."""
    rows = []
    for rank, row in enumerate(one_f_one_b(pp, microbatches).rows):
        rows.append(tuple(_defer_weights(row, delay=rank)))
    return Schedule("zb-h1", tuple(rows), tuple(range(pp)), microbatches)


def interleaved(pp: int, virtual_stages: int, microbatches: int) -> Schedule:
    """1F1B over v chunks on each rank; the micro-batches pass chunk by chunk in groups of `pp`."""
    if pp < 2 or virtual_stages < 2:
        raise ScheduleError(f"interleaved needs 2 or more ranks and chunks, not {pp} and {virtual_stages}")
    if microbatches % pp:
        raise ScheduleError(f"interleaved needs a multiple of {pp} micro-batches, not {microbatches}")
    rows = []
    for rank in range(pp):
        forwards = [Action(Op.F, c * pp + rank, b) for c, b in _grouped(pp, virtual_stages, microbatches)]
        last = virtual_stages - 1
        backwards = [Action(Op.B, (last - c) * pp + rank, b) for c, b in _grouped(pp, virtual_stages, microbatches)]
        warmup = 2 * (pp - rank - 1) + (virtual_stages - 1) * pp
        rows.append(tuple(_alternate(forwards, backwards, warmup)))
    return Schedule("interleaved", tuple(rows), _round_robin(pp, virtual_stages), microbatches)


def forward_only(pp: int, virtual_stages: int, microbatches: int) -> Schedule:
    """Forwards alone, for evaluation, with the stages placed as in training; any number of micro-batches."""
    if min(pp, virtual_stages, microbatches) < 1:
        raise ScheduleError("a schedule needs at least one rank, one chunk and one micro-batch")
    rows = tuple(
        tuple(Action(Op.F, c * pp + rank, batch) for c, batch in _grouped(pp, virtual_stages, microbatches))
        for rank in range(pp)
    )
    return Schedule("forward", rows, _round_robin(pp, virtual_stages), microbatches)


def _round_robin(pp: int, virtual_stages: int) -> tuple[int, ...]:
    return tuple(stage % pp for stage in range(pp * virtual_stages))


def _grouped(pp: int, chunks: int, microbatches: int) -> Iterator[tuple[int, int]]:
    """(chunk, micro-batch): groups of `pp` micro-batches go through all chunks, one group after the other."""
    for first in range(0, microbatches, pp):
        for chunk in range(chunks):
            for batch in range(first, min(first + pp, microbatches)):
                yield chunk, batch


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
    for action in row:
        if action.op is Op.F:
            yield action
            continue
        yield action._replace(op=Op.I)
        waiting.append(action._replace(op=Op.W))
        if len(waiting) > delay:
            yield waiting.pop(0)
    yield from waiting
