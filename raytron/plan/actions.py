"""Pipeline schedules as data: a row of actions for each pipeline rank.

A model is cut into stages, a batch into micro-batches. An action is one of four operations on one of each:

    F  forward        B  full backward = I + W        I  gradient of the input        W  gradient of the weights

and is written `2F0`: stage 2, forward, micro-batch 0. A row is run strictly in order; transfers between ranks are not
written down, because both ends derive them from the sender's row. Where the stages stand (`rank_of`) is one of two things,
here four stages on two ranks, each with two model chunks:

    loop   0 1 0 1   stage s on rank s mod p
    v      0 1 1 0   down the ranks and up again: the first rank holds the first and the last stage
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from raytron.errors import ScheduleError

Row = tuple["Action", ...]


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


def round_robin(pp: int, chunks: int) -> tuple[int, ...]:
    """The loop placement: stage s on rank s mod pp."""
    return tuple(stage % pp for stage in range(pp * chunks))


def v_shape(pp: int) -> tuple[int, ...]:
    """The V placement of two chunks: rank r holds the stages r and 2·pp - 1 - r."""
    return (*range(pp), *reversed(range(pp)))
