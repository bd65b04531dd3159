"""A controller that died is started again by Ray, and adopts what it had left behind: workers, with all that they know.

    controller dies ──► ranks train on to the end of their segment ──► Ray starts it again ──► who answers by name?
                                                                                                      │
    the next epoch  ◄── from the state that they parked ◄── they pause after the step under way  ◄────┘

It wrote nothing down for this. A rank was given its orders (the plan, the epoch, the seats of all, the keepers of the nodes)
when it was built, and gives them back; what had happened before stands in events.jsonl, what was committed in metrics.jsonl.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.util.placement_group import placement_group_table, remove_placement_group

from raytron.actors.budget import Kind
from raytron.actors.cluster import NAMESPACE, part_of
from raytron.actors.gang import Member
from raytron.actors.moves import AS_ASKED
from raytron.actors.worker import Orders, Request, Standing
from raytron.observe.records import Record

ANSWER_S = 20.0  # for a worker to say where it stands
GOES_S = 10.0  # for the name of a killed actor to be free
POLL_S = 0.1


class Heirs(NamedTuple):
    """What the controller before left behind. orders: of the newest epoch; ranks: its members that are at work; spares: who
    does nothing; missing: ranks of the newest epoch that are gone."""

    orders: Orders
    ranks: dict[int, Member]
    spares: list[Member]
    missing: list[int]


def find(run: str, witness: Path) -> Heirs | None:
    """The workers of a run that answer. Those that do not, and those that are still at work in an older epoch, are ended.
    None where none of them was ever given a rank: then all are ended."""
    actors = [ray.get_actor(name, namespace=NAMESPACE) for name in names(run) if "/worker-" in name]
    calls = {actor.stand.remote(witness): actor for actor in actors}
    done = ray.wait(list(calls), num_returns=len(calls), timeout=ANSWER_S)[0] if calls else []
    told: list[tuple[Member, Standing]] = []
    for call in done:
        try:
            standing: Standing = ray.get(call)
        except ray.exceptions.RayError:
            continue
        told.append((Member(standing.number, standing.seat, calls[call], None, standing.facts), standing))
    heirs = _divided(told)
    kept = [] if heirs is None else [member.actor for member in (*heirs.ranks.values(), *heirs.spares)]
    for actor in actors:
        if not any(actor is other for other in kept):
            ray.kill(actor)
    return heirs


def _divided(told: Sequence[tuple[Member, Standing]]) -> Heirs | None:
    newest = max((each.orders for _, each in told if each.orders is not None), key=lambda one: one.epoch, default=None)
    if newest is None:
        return None
    ranks, spares, present = {}, [], set()
    for member, standing in told:
        orders = standing.orders
        if orders is not None and orders.epoch == newest.epoch:
            present.add(orders.rank)
            if not standing.free:
                ranks[orders.rank] = member
        if standing.free:
            spares.append(member)
    missing = [rank for rank in range(newest.plan.mesh.world) if rank not in present]
    return Heirs(newest, ranks, spares, missing)


def pause(ranks: Mapping[int, Member], recorded: int) -> list[Record]:
    """Asks ranks to end their segment after the step under way. What rank 0 reports of checkpoints that have ended."""
    calls = {rank: member.actor.beat.remote(recorded, int(Request.PAUSE)) for rank, member in ranks.items()}
    try:
        reports: list[Record] = ray.get(calls[0], timeout=ANSWER_S).reports if 0 in calls else []
    except (ray.exceptions.RayError, TimeoutError):
        return []
    return reports


def names(run: str) -> list[str]:
    """The names of all actors of a run but its controller."""
    named = ray.util.list_named_actors(all_namespaces=True)
    return [each["name"] for each in named if each["namespace"] == NAMESPACE and part_of(each["name"]) == run]


def end_all(run: str) -> None:
    """Ends what a run of this name has left behind, its places too, and waits until it is gone."""
    for group in placement_group_table().values():
        if group["name"].startswith(f"raytron/{run}/group-") and group["state"] != "REMOVED":
            with contextlib.suppress(ValueError):  # of another namespace
                remove_placement_group(ray.util.get_placement_group(group["name"]))
    deadline = time.monotonic() + GOES_S
    while left := names(run):
        for name in left:
            try:
                ray.kill(ray.get_actor(name, namespace=NAMESPACE))
            except ValueError:
                continue
        if time.monotonic() > deadline:
            return
        time.sleep(POLL_S)


def of_this_launch(events: Sequence[Record]) -> list[Record]:
    """The events since the run was launched last."""
    first = max((at for at, event in enumerate(events) if event["event"] == "plan"), default=0)
    return list(events[first:])


def lost(events: Iterable[Record]) -> list[Record]:
    """The losses that events tell of, as a status does: step, ranks, why."""
    told = [event for event in events if event["event"] == "lost"]
    return [{"step": event["step"], "ranks": event["ranks"], "why": event["cause"]} for event in told]


def is_resting(events: Sequence[Record]) -> bool:
    """Whether a run stood still when its controller died."""
    told = [event["event"] for event in events if event["event"] in ("paused", "resumed")]
    return told[-1:] == ["paused"]


class Outstanding(NamedTuple):
    """What clients had asked for when the controller died, and was not done. rates: keys of lr; remesh: the mesh that the
    configuration has by then; requests: a checkpoint, the end."""

    paused: bool
    rates: dict[str, Any]
    remesh: bool
    requests: Request


def outstanding(events: Iterable[Record]) -> Outstanding:
    """As the events of a launch tell it."""
    paused, remesh, requests, asked_at = False, False, Request.NONE, 0
    rates: dict[str, Any] = {}
    for event in events:
        kind = event["event"]
        if kind == "asked":
            paused = event.get("paused", paused)
            rates = {**rates, **event.get("rates", {})}
            remesh = remesh or "mesh" in event
            requests |= Request(event.get("request", 0))
            asked_at = event["step"] if event.get("request") == Request.CHECKPOINT else asked_at
        elif kind in ("lr", "lr_refused"):
            rates = {}
        elif kind == "mesh" and event.get("why") == AS_ASKED:
            remesh = False
        elif kind == "checkpoint" and event["step"] >= asked_at:
            requests &= ~Request.CHECKPOINT
    return Outstanding(paused, rates, remesh, requests)


def losses(events: Iterable[Record]) -> list[tuple[str, int, str, float]]:
    """The losses that events tell of, as a budget takes them (`raytron.actors.budget.Budget.restore`)."""
    found = []
    for event in events:
        if event["event"] == "lost":
            found.append((str(event["loss"]), int(event["step"]), str(event["cause"]), float(event["time"])))
        elif event["event"] == "rollback":
            found.append((str(Kind.FAILED), int(event["step"]) - 1, str(event["message"]), float(event["time"])))
    return found
