"""Whether a plan's ranks fit their devices, and which treatment of activations would make them fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import get_args

from raytron.config import MemoryConfig, RecomputeName, RunConfig
from raytron.plan import draw
from raytron.plan.activations import Device
from raytron.plan.memory import Memory, estimate
from raytron.plan.schedule import Schedule
from raytron.plan.split import Range

PIECES = 8  # of the loss, as an alternative


def alternatives(memory: MemoryConfig) -> dict[str, MemoryConfig]:
    """Other treatments of activations by name: other recomputation, or what is not done yet beside it."""

    plain = dataclasses.replace(
        memory, recompute_parts=MemoryConfig().recompute_parts, recompute_every=1, recompute_stages=None
    )
    out = {name: dataclasses.replace(plain, recompute=name) for name in get_args(RecomputeName)}
    if not memory.offload_activations:
        out["offload"] = dataclasses.replace(memory, offload_activations=True)
    if memory.loss_chunks == 1:
        out[f"{PIECES} loss chunks"] = dataclasses.replace(memory, loss_chunks=PIECES)
    return out


def compared(config: RunConfig, stages: Sequence[Range], schedule: Schedule, device: Device) -> dict[str, Memory]:
    """The memory of the same plan with each alternative."""
    return {
        name: estimate(dataclasses.replace(config, memory=memory), stages, schedule, device)
        for name, memory in alternatives(config.memory).items()
    }


def table(memory: Memory, others: dict[str, Memory]) -> str:
    """The fullest rank as configured and with each alternative."""
    every = {"as configured": memory, **others}
    rows = [["on the device", *(draw.size(each.largest) for each in every.values())]]
    if any(rank.host for each in every.values() for rank in each.ranks):
        rows.append(["on its host", *(draw.size(max(rank.host for rank in each.ranks)) for each in every.values())])
    return draw.table(["fullest rank", *every], rows)


def warnings(
    config: RunConfig, limit: int | None, device: Device, memory: Memory, others: Callable[[], dict[str, Memory]]
) -> Iterator[str]:
    """Ranks that are too large, with what would make them fit. limit: bytes that a worker may fill, None: not known;
    others: as `compared` gives."""
    if device == "cpu" and config.memory.offload_activations:
        yield "offloaded activations stay in the same memory where the device is a CPU"
    needed = {rank: held.total + (held.host if device == "cpu" else 0) for rank, held in enumerate(memory.ranks)}
    fullest = max(needed, key=lambda rank: needed[rank])
    if limit is not None and needed[fullest] > limit:
        who = f"pipeline rank {fullest}" if len(needed) > 1 else "a rank"
        what = f"{who} needs about {draw.size(needed[fullest])}, and a worker may fill {draw.size(limit)}"
        yield f"{what}: {_remedy(memory, others(), limit)}"


def _remedy(memory: Memory, others: dict[str, Memory], room: int) -> str:
    """The alternative that fits and costs the least time."""
    for name, setting in _SETTINGS.items():
        if name in others and others[name].largest <= room:
            return f"set {setting} ({draw.size(others[name].largest)})"
    fullest = max(memory.ranks, key=lambda rank: rank.total)
    state = fullest.weights + fullest.gradients + fullest.optimizer
    if state > room:
        return (
            f"weights, gradients and optimizer state alone take {draw.size(state)}; raise mesh.tp, mesh.pp or mesh.dp"
        )
    return "lower micro_batch_size, raise mesh.tp or mesh.cp, or join memory.recompute full with memory.loss_chunks"


_SETTINGS = {  # by what they cost
    f"{PIECES} loss chunks": f"memory.loss_chunks to {PIECES}",
    "selective": "memory.recompute to selective",
    "offload": "memory.offload_activations to true",
    "full": "memory.recompute to full",
}
