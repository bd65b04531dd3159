"""Silent corruption: do all ranks that must hold equal parameters hold equal ones, to the bit?

Every `guard.digest_every` steps each rank makes a 64-bit fingerprint of what it holds together with each set of other ranks,
and all exchange them in one small all-gather:

    column-parallel weights    the data- and context-parallel ranks of the same tp slice
    norms, biases              those of all tp ranks
    experts                    the expert-data-parallel ranks of the same experts
    a tied embedding           the holders of both copies

The fingerprint of several parameters is the sum of theirs (`raytron.parallel.bits`), each times an odd number from its name,
so one flipped bit always changes it.

What is found, and what is not: compared is what ranks compute with, right before a step.

    ZeRO 0       what differs once, in parameters or in moments, differs for good, and is found at the next check
    ZeRO 1, 2    masters and moments are held once: a bit that flips there goes to all alike and is not found (but among the
                 replicas of hybrid sharding). A bit that flips in a rank's parameters lives until the next update gathers
                 them anew: it is found if the check comes first, else it leaves one wrong gradient, which all share
    ZeRO 3       no rank holds a parameter whole: compared are the shares of the replicas of hybrid sharding, and of tp ranks
                 that hold equal slices
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from raytron.config import RunConfig
from raytron.model.assemble import Assembly
from raytron.observe.replicas import Check, by_key, compare
from raytron.parallel.bits import fingerprint, odd_numbers
from raytron.parallel.buckets import GradientBuckets, Owned
from raytron.parallel.collectives import all_gather
from raytron.parallel.layout import Layout
from raytron.parallel.mesh import Group, Mesh
from raytron.parallel.random import key_of
from raytron.plan.mesh import Axis

COLUMNS = 8  # sets of other ranks that one rank may share parameters with


class ReplicaDigest:
    """Compares the parameters of one rank with those of its replicas. All ranks of a mesh make it, and check, together."""

    def __init__(self, model: Assembly, buckets: GradientBuckets, mesh: Mesh):
        self.mesh, self.buckets = mesh, buckets
        self.hosts = Group(mesh.world.ranks, mesh.rank, mesh.control, mesh.waiting)
        self.sets: dict[tuple[int, ...], list[Owned]] = {}
        for owned in buckets.owned:
            copies = model.tied[1].ranks if model.tied is not None and model.tied[0] is owned.param else (mesh.rank,)
            ranks = {rank for copy in copies for rank in holders(owned.param.cut, mesh, copy, owned.value is not None)}
            if len(ranks) > 1:
                self.sets.setdefault(tuple(sorted(ranks)), []).append(owned)
        assert len(self.sets) <= COLUMNS

    @classmethod
    def wanted(cls, model: Assembly, buckets: GradientBuckets, mesh: Mesh, config: RunConfig) -> ReplicaDigest | None:
        """One, where it is asked for and anything is held twice; alike on all ranks."""
        twice = mesh.world.size > mesh.shape.pp or (config.model.tied_embeddings and mesh.shape.pp > 1)
        return cls(model, buckets, mesh) if twice and config.guard.digest_every is not None else None

    @functools.cached_property
    def weights(self) -> Tensor:
        return odd_numbers(self.mesh.device)

    @torch.no_grad()
    def check(self, step: int, trail: Mapping[int, int], length: int) -> Check:
        """Compares the parameters as they stand after `step` steps, gathering those that are not there yet. Collective over
        the world, between two steps.

        trail: by step, what this rank's own gradients were (`guard.OwnGradients`), of which `length` steps travel along.
        """
        for weights in self.buckets.weights:
            if weights.lasting:
                weights.enter()
                weights.leave(free=False)
        sums = [self._fingerprint(held) for held in self.sets.values()]
        values: list[int] = torch.stack(sums).tolist() if sums else []
        pairs = [(key_of(*ranks), value) for ranks, value in zip(self.sets, values, strict=True)]
        pairs += [(0, 0)] * (COLUMNS - len(pairs))
        mine = [*itertools.chain(*pairs), *(trail.get(number, 0) for number in range(step - length + 1, step + 1))]
        rows = all_gather(torch.tensor(mine), self.hosts).view(self.hosts.size, -1)
        held, trails = rows[:, : 2 * COLUMNS].view(-1, COLUMNS, 2).tolist(), rows[:, 2 * COLUMNS :].tolist()
        return compare(step, by_key(enumerate(held)), dict(enumerate(map(tuple, trails))))

    def _fingerprint(self, held: Sequence[Owned]) -> Tensor:
        total = torch.zeros((), dtype=torch.int64, device=self.mesh.device)
        for owned in held:
            if owned.value is None:
                part = owned.param.cut.slice(owned.param.detach(), self.mesh.place)
            else:
                part = owned.slice(owned.value, self.mesh)
            total += fingerprint(part.tensor, self.weights) * (key_of(owned.param.full_name) | 1)
        return total


def holders(layout: Layout, mesh: Mesh, rank: int, shared_out: bool) -> set[int]:
    """The ranks that hold what `rank` holds of a parameter. shared_out: each holds a share only (ZeRO 3)."""
    shape, width = mesh.shape, layout.width_axis
    place = {axis: (shape.size(axis), shape.index(rank, axis)) for axis in mesh.place}
    run = layout.holders(place)
    first = shape.index(rank, width) // run * run
    across: tuple[Axis, ...] = ("replicate",) if shared_out else ("edp",) if layout.expert else ("dp", "cp")
    return {
        other
        for neighbour in shape.group(rank, width)[first : first + run]
        for other in shape.group(neighbour, *across)
    }
