"""Where a rank's memory did not hold what was planned: the next stronger treatment of activations that needs less.

    none ─► selective ─► full ─► full, and what is still kept waits in host memory

Each step up costs time, and changes at most the order of some sums. It counts only if it is legal, and if by the plan's own
count the rank that ran out then needs less of what it ran out of: on a CPU nothing is won by moving activations to the host,
and a full host is not helped by what is recomputed on a device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, get_args

from raytron.config import MemoryConfig, RecomputeName, RunConfig
from raytron.errors import ConfigError, ScheduleError
from raytron.plan import draw
from raytron.plan.memory import RankMemory
from raytron.plan.plan import Plan, make_plan


class Relief(NamedTuple):
    """A plan that needs less memory, and the keys by which it differs."""

    plan: Plan
    changes: dict[str, Any]

    def __str__(self) -> str:
        return ", ".join(f"{key}={str(value).lower()}" for key, value in self.changes.items() if key != PARTS)


PARTS = "memory.recompute_parts"


def relieve(plan: Plan, rank: int, *, host: bool) -> Relief | None:
    """The plan to go on with after `rank` ran out of memory, its host's or its device's; None: nothing stronger helps."""
    before = needed(plan, rank, host=host)
    for changes in stronger(plan.config):
        try:
            after = make_plan(plan.config.replace(**changes), plan.cluster)
        except (ConfigError, ScheduleError):
            continue
        if needed(after, rank, host=host) < before:
            return Relief(after, changes)
    return None


def stronger(config: RunConfig) -> Iterator[dict[str, Any]]:
    """What saves more memory than a configuration does, the least costly first, as changes of keys."""
    names = get_args(RecomputeName)
    changes: dict[str, Any] = {}
    for name in names[names.index(config.memory.recompute) + 1 :]:
        changes["memory.recompute"] = name
        if name != "selective":  # which alone takes parts
            changes[PARTS] = MemoryConfig().recompute_parts
        yield dict(changes)
    if not config.memory.offload_activations:
        yield {**changes, "memory.offload_activations": True}


def predicted(plan: Plan, rank: int) -> RankMemory:
    """What a rank was to hold; the plan counts that of a pipeline coordinate's fullest rank."""
    return plan.memory.ranks[plan.mesh.coords(rank).pp]


def needed(plan: Plan, rank: int, *, host: bool) -> int:
    """Bytes that a rank was to take of its host's memory, or its device's: one and the same on a CPU."""
    held = predicted(plan, rank)
    if plan.device == "cpu":
        return held.total + held.host
    return held.host if host else held.total


def explained(plan: Plan, rank: int) -> str:
    """What was predicted for a rank, in words."""
    held = predicted(plan, rank)
    parts = ("weights", "gradients", "optimizer", "activations", "loss", "working")
    listed = ", ".join(f"{name} {draw.size(getattr(held, name))}" for name in parts)
    host = f", and {draw.size(held.host)} offloaded to its host" if held.host else ""
    return f"the plan had predicted {draw.size(held.total)} for rank {rank} ({listed}){host}"
