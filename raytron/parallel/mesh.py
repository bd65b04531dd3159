"""Named process groups over a mesh shape, inside a worker.

A `Mesh` is an argument, never a global: two meshes may stand in one process's life, one after another, each between
`open_world` and `close_world`.

Groups are made when they are first asked for, and by their own members only, so that a large mesh costs no more than a
small one. torch then names a group by its ranks and by how many groups the process has made, so all ranks of a mesh have
to make equally many in the same order: a rank that has no part in a group stands by (`stand_by`).
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from raytron.parallel.layout import Place
from raytron.parallel.waiting import Waiting
from raytron.plan.mesh import Axis, Coords, MeshShape


@dataclass(frozen=True)
class Group:
    """Ranks that talk to each other. A group of one talks to nobody and needs no process group."""

    ranks: tuple[int, ...]  # in the world, ascending
    index: int  # of this rank among `ranks`
    process_group: dist.ProcessGroup | None = None
    waiting: Waiting = field(default_factory=Waiting, compare=False, repr=False)  # its mesh's

    @property
    def size(self) -> int:
        return len(self.ranks)


class Reduction(NamedTuple):
    """Over whom the gradients of a kind of parameter are summed: every rank = those that share it out × the replicas."""

    every: Group
    shard: Group
    replicate: Group


def open_world(store: Any, rank: int, world: int, backend: str = "gloo", timeout_s: float = 120.0) -> None:
    """Joins the world of one mesh. `store` must be fresh: one PrefixStore for each epoch. A collective that takes longer
    than `timeout_s` fails on a CPU; on CUDA it lasts until `abort_world`."""
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")  # else a lost peer ends this process, too
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)


def close_world() -> None:
    """Leaves the world and drops all its groups; harmless where none is open."""
    if dist.is_initialized():
        dist.destroy_process_group()


def abort_world(mesh: Mesh | None = None) -> None:
    """Gives up the open world, and the mesh over it, while another thread may wait in its collectives.

    Of NCCL they end at once, as if all were well, with whatever is in their buffers by then: so `mesh` is marked first, and
    its `check` raises from here on. Of gloo they do not end: it hears of a lost peer by itself.
    """
    if mesh is not None:
        mesh.abandoned = True
    if dist.is_initialized() and "nccl" in dist.get_backend_config():
        dist.distributed_c10d._abort_process_group()


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
        self.waiting = Waiting()  # for other ranks, on the host
        self.abandoned = False  # by `abort_world`
        self._groups: dict[tuple[int, ...], Group] = {}
        self.world = self.group(tuple(range(world)))
        self.tp = self.axis("tp")
        self.dp = self.axis("dp")
        axes: tuple[Axis, ...] = ("tp", "ep", "etp")
        self.place: Place = {axis: (shape.size(axis), shape.index(rank, axis)) for axis in axes}
        self.dense = self._reduction("dp", "shard", "cp")
        self.control = self._control_group()

    def check(self) -> None:
        """Call it before what collectives have brought is committed. Raises ConnectionAbortedError where the mesh was given
        up: then it may be anything."""
        if self.abandoned:
            raise ConnectionAbortedError("the mesh was given up while its ranks waited for each other")

    def axis(self, *axes: Axis) -> Group:
        """The group of ranks that differ from this one on `axes` only."""
        return self.group(self.shape.group(self.rank, *axes))

    @functools.cached_property
    def experts(self) -> Reduction:
        """Over whom gradients of experts are summed. All ranks of a mesh have to ask for it at the same point."""
        return self._reduction("edp", "eshard")

    def _reduction(self, every: Axis, shard: Axis, *also: Axis) -> Reduction:
        return Reduction(self.axis(every, *also), self.axis(shard, *also), self.axis("replicate"))

    def _control_group(self) -> dist.ProcessGroup | None:
        """A gloo group over the world for objects on the host, such as a checkpoint's plan."""
        if self.world.size == 1 or dist.get_backend() == "gloo":
            return self.world.process_group
        made = dist.new_group(backend="gloo")
        assert isinstance(made, dist.ProcessGroup)
        return made

    def group(self, ranks: tuple[int, ...]) -> Group:
        """The group of some ranks, this one among them; asked for again it is the same."""
        if ranks not in self._groups:
            index = ranks.index(self.rank)
            if len(ranks) == 1:
                made = Group(ranks, index, None, self.waiting)
            elif len(ranks) == self.shape.world:
                made = Group(ranks, index, dist.group.WORLD, self.waiting)
            else:
                made = Group(ranks, index, self.new_process_group(ranks), self.waiting)
            self._groups[ranks] = made
        return self._groups[ranks]

    def neighbours(self, run: int) -> Group:
        """The run of this many neighbouring tp ranks that this one is among: holders of the same slice."""
        first = self.coords.tp // run * run
        return self.group(self.tp.ranks[first : first + run])

    def new_process_group(self, ranks: tuple[int, ...]) -> dist.ProcessGroup:
        """A process group of its own, that shares nothing with others over the same ranks."""
        made = dist.new_group(list(ranks), use_local_synchronization=True)
        assert isinstance(made, dist.ProcessGroup)
        return made

    def stand_by(self) -> None:
        """Makes a group of this rank alone, while other ranks make one in which it has no part."""
        self.new_process_group((self.rank,))

    def __str__(self) -> str:
        return f"{self.shape} rank {self.rank} ({self.coords})"
