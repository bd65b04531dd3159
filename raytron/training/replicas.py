"""The state that a trainer gives to the memory tier: the newest one that all ranks are known to have committed.

A step that waits commits by its sum over all ranks: after the step the live state is committed, unless an update was
interrupted. Under `optimizer.at_once` a rank is ahead of what it knows: the live state may be undone, and what is committed
is the copy from before the last update, or the live state after it was settled.

    waits      … sum of k │ update ─► state k, committed: a segment is written
    at once    … sum of k-1 heard ─► state k-1, committed: a segment is written │ update ─► state k, not settled yet
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from raytron.errors import CheckpointError
from raytron.observe.records import Record
from raytron.parallel.layout import Slice
from raytron.training.at_once import AtOnce
from raytron.training.engine import Engine


class Position(NamedTuple):
    """How far a state has come."""

    step: int  # committed steps
    consumed: int  # samples of committed steps
    updates: int
    skipped_steps: int


class Committed(NamedTuple):
    """A committed state and where it stands."""

    state: Mapping[str, Slice]
    at: Position


def committed(engine: Engine, at_once: AtOnce | None, now: Position, unsettled: list[int]) -> Committed:
    """The newest committed state of a trainer that stands at `now`.

    unsettled: sequences of each step that was begun and has no record yet, oldest first.

    Raises CheckpointError where there is none: an update or a load was interrupted, or a result was heard and not taken in.
    """
    unheard = None if at_once is None else at_once.unheard
    if unheard is not None and len(unsettled) == 1:
        at = Position(now.step - 1, now.consumed - unsettled[0], unheard.before.updates, now.skipped_steps)
        return Committed(unheard.before.state, at)
    if unsettled or not engine.whole:
        raise CheckpointError(f"the state after step {now.step} was caught in the middle of a change")
    return Committed(engine.state(), now)


def check_same_optimizer(facts: Record, name: str) -> None:
    """Raise CheckpointError where a state belongs to another optimizer than `name`."""
    saved = str(facts["config"]["optimizer"]["name"])
    if saved != name:
        raise CheckpointError(f"the checkpoint holds the state of {saved}, and the run is to go on with {name}")
