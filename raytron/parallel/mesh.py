"""Named process groups over a mesh shape, inside a worker.

A `Mesh` is an argument, never a global: two meshes may stand in one process's life, one after another, each between
`open_world` and `close_world`. Groups are made when they are first asked for, and only by their own members, so every
member has to ask for the same groups in the same order; the constructor asks for the axes that all code uses.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from raytron.plan.mesh import Axis, Coords, MeshShape


@dataclass(frozen=True)
class Group:
    """Ranks that talk to each other. A group of one talks to nobody and needs no process group."""

    ranks: tuple[int, ...]  # in the world, ascending
    index: int  # of this rank among `ranks`
    process_group: dist.ProcessGroup | None = None

    @property
    def size(self) -> int:
        return len(self.ranks)


def open_world(store: Any, rank: int, world: int, backend: str = "gloo", timeout_s: float = 120.0) -> None:
    """Joins the world of one mesh. `store` must be fresh: one PrefixStore for each epoch. A collective that takes longer
    than `timeout_s` fails."""
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)


def close_world() -> None:
    """Leaves the world and drops all its groups; harmless where none is open."""
    if dist.is_initialized():
        dist.destroy_process_group()


class Mesh:
    """One rank's view of a mesh: its coordinates and its groups.

    Raises ValueError where the open world has another size than the shape.
    """

    def __init__(self, shape: MeshShape, rank: int, device: torch.device | None = None):
        world = dist.get_world_size() if dist.is_initialized() else 1
        if world != shape.world:
            raise ValueError(f"the mesh {shape} needs {shape.world} ranks, the open world has {world}")
        self.shape = shape
        self.rank = rank
        self.device = torch.device("cpu") if device is None else device
        self.coords: Coords = shape.coords(rank)
        self._groups: dict[tuple[int, ...], Group] = {}
        self.world = self.group(tuple(range(world)))
        self.tp = self.axis("tp")
        self.dp = self.axis("dp")

    def axis(self, *axes: Axis) -> Group:
        """The group of ranks that differ from this one on `axes` only."""
        return self.group(self.shape.group(self.rank, *axes))

    def group(self, ranks: tuple[int, ...]) -> Group:
        """The group of some ranks, this one among them. Members have to ask for their groups in one common order."""
        if ranks not in self._groups:
            index = ranks.index(self.rank)
            if len(ranks) == 1:
                made = Group(ranks, index)
            elif len(ranks) == self.shape.world:
                made = Group(ranks, index, dist.group.WORLD)
            else:
                made = Group(ranks, index, self.new_process_group(ranks))
            self._groups[ranks] = made
        return self._groups[ranks]

    def new_process_group(self, ranks: tuple[int, ...]) -> dist.ProcessGroup:
        """A process group that shares nothing with others over the same ranks (one for each directed pair, say)."""
        made = dist.new_group(list(ranks), use_local_synchronization=True)
        assert isinstance(made, dist.ProcessGroup)
        return made

    def __str__(self) -> str:
        return f"{self.shape} rank {self.rank} ({self.coords})"
