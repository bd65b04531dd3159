"""NCCL blocks at a pair's first transfer until both ends are there: all ranks have to open their channels in one order."""

from __future__ import annotations

import pytest

from raytron.config import RunConfig
from raytron.parallel.mesh import Mesh
from raytron.parallel.pipeline import Channel, Links
from raytron.plan.mesh import MeshShape
from raytron.plan.plan import make_plan


def opened(rank: int, config: RunConfig) -> list[tuple[int, int]]:
    """The (source, target) of each channel that a rank opens, in order."""
    seen: list[tuple[int, int]] = []

    def note(channel: Channel, *, sends: bool) -> None:
        seen.append((rank, channel.peer) if sends else (channel.peer, rank))

    before, Channel.open = Channel.open, note  # type: ignore[method-assign]
    try:
        plan = make_plan(config, None)
        Links(plan.schedule, Mesh(plan.mesh, rank))
    finally:
        Channel.open = before  # type: ignore[method-assign]
    return seen


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved"])
def test_two_ends_always_meet(world, schedule):
    config = RunConfig().replace(**{"mesh.pp": 4, "model.layers": 8, "pipeline.schedule": schedule,
                                    "pipeline.virtual_stages": 2 if schedule == "interleaved" else 1})  # fmt: skip
    waiting = world.run(MeshShape.of(config.mesh).world, opened, config)
    assert all(waiting)
    while any(waiting):
        first = [row[0] for row in waiting if row]
        met = next(pair for pair in first if first.count(pair) == 2)  # StopIteration: all wait for ever
        for rank in met:
            assert waiting[rank].pop(0) == met
