"""Which meshes a run could have on a number of workers, given the one that it was made for.

    as configured   tp, pp and cp stay; dp is what there is room for
    others          narrower or wider tp and pp, a divisor of cp, and the dp that is left

Experts fold the ranks anew, so ep and etp shrink where dp · cp · tp no longer divides by them. A tp group stays on one node,
where a node holds one. Of the numbers of data-parallel ranks that run equally many micro-batches at most, and so take
equally long, the smallest comes first: who is left over waits as a spare.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from raytron.config import SCHEDULE_CHUNKS, MeshConfig, RunConfig, divisors
from raytron.rules import problems

Workers = Sequence[int]  # how many stand on each node


class Option(NamedTuple):
    """Meshes that differ in dp only and run `most` micro-batches on a rank at most; fewer workers first."""

    meshes: tuple[MeshConfig, ...]
    most: int

    def bound(self) -> float:
        """No step is shorter than this: in time of a whole batch's micro-batch on one rank."""
        mesh = self.meshes[0]
        return self.most / (mesh.pp * mesh.tp * mesh.cp)


def as_configured(config: RunConfig, workers: Workers) -> Iterator[Option]:
    """Options with tp, pp and cp as they are, most data-parallel ranks first."""
    mesh = config.mesh
    top = _ranks(config, workers, mesh.pp, mesh.cp, mesh.tp)
    yield from (_option(config, mesh.pp, mesh.cp, mesh.tp, dps) for dps in _alike(config, top))


def others(config: RunConfig, workers: Workers) -> Iterator[Option]:
    """For each other tp, pp and cp the option with most data-parallel ranks; no tp is wider than a node, or as it was."""
    widest = max(config.mesh.tp, *workers)
    for tp in (size for size in divisors(config.model.heads) if size <= widest):
        for cp in divisors(config.mesh.cp):
            for pp in range(1, config.model.layers + 1):
                top = _ranks(config, workers, pp, cp, tp)
                if top == 0:
                    break
                if (tp, cp, pp) != (config.mesh.tp, config.mesh.cp, config.mesh.pp):
                    yield _option(config, pp, cp, tp, next(_alike(config, top)))


def groups(workers: Workers, tp: int) -> int:
    """How many tensor-parallel groups some workers make, none of them across nodes unless no node holds a whole one."""
    return sum(count // tp for count in workers) or sum(workers) // tp


def standing(workers: Workers, tp: int, world: int) -> tuple[int, ...]:
    """How many workers of each node a mesh of `world` takes: whole groups from one node after another."""
    unit = tp if any(count >= tp for count in workers) else 1
    left, taken = world, []
    for count in workers:
        taken.append(min(left, count // unit * unit))
        left -= taken[-1]
    return tuple(taken)


def on_mesh(config: RunConfig, mesh: MeshConfig) -> RunConfig | None:
    """The configuration on another mesh, with the keys that follow from it; None where no rule admits it."""
    moved = dataclasses.replace(config, mesh=mesh)
    if mesh.dp == 1:
        moved = dataclasses.replace(moved, observe=dataclasses.replace(config.observe, gradient_noise=False))
    if mesh.pp == config.mesh.pp:
        return None if problems(moved) else moved
    moved = dataclasses.replace(moved, memory=dataclasses.replace(config.memory, recompute_stages=None))
    for name in dict.fromkeys((config.pipeline.schedule, "1f1b")):
        if SCHEDULE_CHUNKS[name][0] * mesh.pp <= config.model.layers:
            changes: dict[str, Any] = {"schedule": name, "virtual_stages": None, "split": None, "layout": None}
            tried = dataclasses.replace(moved, pipeline=dataclasses.replace(config.pipeline, **changes))
            if not problems(tried):
                return tried
    return None


def _ranks(config: RunConfig, workers: Workers, pp: int, cp: int, tp: int) -> int:
    """The most data-parallel ranks: none without a micro-batch, at the smallest batch of the run."""
    return min(groups(workers, tp) // (pp * cp), config.batch_sizes[0] // config.micro_batch_size)


def _alike(config: RunConfig, top: int) -> Iterator[range]:
    """The numbers of ranks up to `top`, by how many micro-batches a rank runs at most, fewest first."""
    count = config.deal().total
    while top > 0:
        most = -(-count // top)
        least = -(-count // most)
        yield range(least, top + 1)
        top = least - 1


def _option(config: RunConfig, pp: int, cp: int, tp: int, dps: range) -> Option:
    most = -(-config.deal().total // dps[-1])
    return Option(tuple(_fold(config, pp, dp, cp, tp) for dp in dps), most)


def _fold(config: RunConfig, pp: int, dp: int, cp: int, tp: int) -> MeshConfig:
    """A mesh with these axes, replicas and experts' axes as near to the configured ones as they divide."""
    mesh = config.mesh
    shard = mesh.dp // mesh.replicate
    replicate = dp // shard if mesh.replicate > 1 and dp % shard == 0 else _divisor(dp, mesh.replicate)
    plane = dp * cp * tp // replicate
    etp = max(size for size in divisors(mesh.etp) if plane % size == 0)
    ep = next(size for size in range(mesh.ep, 0, -1) if plane % (size * etp) == 0 == config.model.experts.count % size)
    changes: dict[str, Any] = {} if ep * etp > 1 else {"expert_dispatch": MeshConfig().expert_dispatch}
    parts = _divisor(cp, mesh.cp_all_to_all)
    return dataclasses.replace(
        mesh, pp=pp, dp=dp, cp=cp, tp=tp, ep=ep, etp=etp, replicate=replicate, cp_all_to_all=parts, **changes
    )


def _divisor(number: int, limit: int) -> int:
    """The largest divisor up to a limit."""
    return next(size for size in range(min(number, limit), 0, -1) if number % size == 0)
