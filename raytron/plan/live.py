"""Follows the activations of a rank through its row of a schedule: what is kept after each action, in bytes.

    F    adds what a micro-batch keeps in the stage
    B    takes it away
    I    takes it away, and leaves what the weight gradients are made of, until W

A stage keeps its input, but not its output. What goes from one stage to another of the same rank (V-shaped schedules)
waits until it is taken; an activation is then the other stage's input. What is sent to another rank may go when it has
arrived; gloo does not say so before the end of a step, so there (`sends_stay`) it stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from raytron.plan.schedule import Op, Schedule


class Held(NamedTuple):
    """Bytes that one micro-batch keeps in one stage: on the device from F to B or I, on the host as long, and on the
    device from I to W; and in both of the device's what the loss keeps beside."""

    device: int
    host: int
    deferred: int
    loss: int = 0
    loss_deferred: int = 0


class Kept(NamedTuple):
    """Bytes: on the device without the loss, of the loss, on the host."""

    device: int
    loss: int
    host: int


def kept_after_each(schedule: Schedule, rank: int, held: Sequence[Held], message: int, sends_stay: bool) -> list[Kept]:
    """What a rank keeps after each action of its row. message: bytes of what goes between stages."""
    rank_of, last = schedule.rank_of, schedule.num_stages - 1
    device = loss = host = 0
    out = []
    for op, stage, _ in schedule.rows[rank]:
        each = held[stage]
        if op is Op.F:
            device, loss, host = device + each.device, loss + each.loss, host + each.host
        elif op is Op.W:
            device, loss = device - each.deferred, loss - each.loss_deferred
        else:
            device, loss, host = device - each.device, loss - each.loss, host - each.host
            if op is Op.I:
                device, loss = device + each.deferred, loss + each.loss_deferred
        if op is not Op.W:
            before, after = (stage - 1, stage + 1) if op is Op.F else (stage + 1, stage - 1)
            if 0 <= before <= last and rank_of[before] == rank:
                device -= message  # it waited, and is taken
            if 0 <= after <= last and (rank_of[after] == rank or sends_stay):
                device += message
        out.append(Kept(device, loss, host))
    return out


def incoming(schedule: Schedule, rank: int) -> int:
    """On how many channels a rank receives; each always has a receive posted."""
    pairs = list(zip(schedule.rank_of, schedule.rank_of[1:], strict=False))
    activations = {a for a, b in pairs if b == rank != a}
    gradients = {b for a, b in pairs if a == rank != b}
    return len(activations | gradients)
