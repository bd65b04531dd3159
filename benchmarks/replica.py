"""What it costs to keep the state of every step in memory, and how fast it comes back: python benchmarks/replica.py

Two ranks train; blocks of steps with segments alternate with blocks without: what disturbs the machine disturbs both.
The figure is the median over pairs of neighbouring blocks of the time with over the time without, and the same of the time
that a rank's cores were at work, which a busy machine disturbs less.

    alone     segments on this node
    partner   two keepers on a local Ray, each following one rank as if it were on another node; here they share the cores
              with the ranks, which nodes of a cluster don't
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import ray
import torch
import torch.distributed as dist
from context import context, write
from overhead import SIZES

from raytron.actors.keeper import partners, spawn
from raytron.checkpoint.folder import TMPFS
from raytron.checkpoint.gather import read_windows
from raytron.checkpoint.sources import choose, survey
from raytron.config import RunConfig, from_mapping
from raytron.parallel.mesh import Mesh
from raytron.plan.mesh import MeshShape
from raytron.plan.plan import make_plan
from raytron.testing.streams import RandomStream
from raytron.testing.world import World
from raytron.training.trainer import Trainer

RANKS, BLOCK = 2, 4
EPOCH = 1


def config_of(size: str, mesh: dict[str, Any]) -> RunConfig:
    return from_mapping(
        {"model": SIZES[size], "sequence_length": 256, "global_batch_size": 16, "micro_batch_size": 4, "steps": 10**6,
         "mesh": mesh, "data": {"dataset": "random"}, "observe": {"tensorboard": False}}
    )  # fmt: skip


def trainer_of(rank: int, config: RunConfig) -> Trainer:
    mesh = Mesh(MeshShape.of(config.mesh), rank)
    return Trainer(make_plan(config, None), mesh, RandomStream(config.model.vocab, config.sequence_length))


class Taken(NamedTuple):
    """What a block of steps took until its last segment was where it had to be; cpu_s: of this rank's cores."""

    wall_s: float
    cpu_s: float


def steps(trainer: Trainer, every: int | None) -> Taken:
    """A block of steps."""
    assert trainer.replicas is not None
    trainer.replicas.every = every
    dist.barrier()
    start, cpu = time.perf_counter(), time.process_time()
    for _ in range(BLOCK):
        trainer.train_step()
    if every:
        trainer.replicas.wait()
    dist.barrier()
    return Taken(time.perf_counter() - start, time.process_time() - cpu)


def train(rank: int, config: RunConfig, folders: list[str], pairs: int) -> dict[str, Any]:
    """Blocks with and without segments, and what one segment takes."""
    trainer = trainer_of(rank, config)
    trainer.open_replicas(folders[rank], EPOCH)
    replicas = trainer.replicas
    assert replicas is not None
    steps(trainer, 1)
    blocks = []
    for pair in range(pairs):
        first = steps(trainer, 1 if pair % 2 else None)
        second = steps(trainer, None if pair % 2 else 1)
        blocks.append((first, second) if pair % 2 else (second, first))
    writes = []
    for step in range(trainer.step + 1, trainer.step + 6):
        dist.barrier()
        start = time.perf_counter()
        replicas.write(step, {**trainer.facts(), "step": step})
        writes.append(time.perf_counter() - start)
        replicas.wait()
    return {
        "ratios": [with_.wall_s / without.wall_s for with_, without in blocks],
        "cpu_ratios": [with_.cpu_s / without.cpu_s for with_, without in blocks],
        "step_s": statistics.median(without.wall_s / BLOCK for _, without in blocks),
        "bytes": replicas.bytes,
        "write_s": statistics.median(writes),
    }


def restore(rank: int, config: RunConfig, folders: list[str]) -> dict[str, float]:
    """Seconds to find the newest step, and to fill the slices; every second rank reads as if from another node."""
    trainer = trainer_of(rank, config)
    dist.barrier()
    start = time.perf_counter()
    found = [survey(folder, str(number)) for number, folder in enumerate(folders)] if rank == 0 else []
    chosen = [choose(held for each in found for held in each.held).generation]
    middle = time.perf_counter()
    dist.broadcast_object_list(chosen)
    assert chosen[0] is not None
    begin = time.perf_counter()
    trainer.restore(chosen[0], str(rank), lambda node, path, seal, windows: read_windows(path, seal, windows))
    return {"survey_s": middle - start, "restore_s": time.perf_counter() - begin}


def spread(values: list[float]) -> dict[str, Any]:
    """The median and the quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": round(middle, 4), "quartiles": [round(low, 4), round(high, 4)]}


def run(world: World, size: str, pairs: int, *, keepers: bool) -> dict[str, Any]:
    folders = [str(TMPFS / f"raytron-benchmark-{os.getpid()}-{rank}") for rank in range(RANKS)]
    config, made = config_of(size, {"dp": RANKS}), {}
    if keepers:
        node = ray.get_runtime_context().get_node_id()
        made = {folder: spawn("benchmark", node, label=folder, folder=folder) for folder in folders}
        for follower, source in partners(folders).items():
            ray.get(made[follower].follow.remote(made[source], EPOCH, RANKS))
    try:
        ranks = world.run(RANKS, train, config, folders, pairs)
        back = {
            name: world.run(RANKS, restore, config_of(size, mesh), folders)
            for name, mesh in (("same mesh", {"dp": RANKS}), ("other mesh", {"tp": RANKS}))
        }
    finally:
        for keeper in made.values():
            ray.get(keeper.close.remote())
            ray.kill(keeper)
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
    total = sum(rank["bytes"] for rank in ranks)
    return {
        "model": SIZES[size],
        "tokens_per_step": config.global_batch_size * config.sequence_length,
        "state_mb": round(total / 1e6, 1),
        "step_ms": round(ranks[0]["step_s"] * 1e3, 1),
        "segment_ms": round(max(rank["write_s"] for rank in ranks) * 1e3, 2),
        "state_gb_per_s": round(total / max(rank["write_s"] for rank in ranks) / 1e9, 2),
        "pairs": pairs,
        "ratio": spread(ranks[0]["ratios"]),
        "cpu_ratio": spread(ranks[0]["cpu_ratios"]),
        "back": {
            name: {
                "survey_ms": round(found[0]["survey_s"] * 1e3, 1),
                "restore_ms": round(max(rank["restore_s"] for rank in found) * 1e3, 1),
            }
            for name, found in back.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--sizes", nargs="+", default=["small", "medium", "large"])
    arguments = parser.parse_args()
    assert Path(TMPFS).is_dir(), "this measures tmpfs"
    torch.set_num_threads(1)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    with World(timeout_s=600) as world:
        runs = {
            f"{size}, {'partner' if keepers else 'alone'}": run(world, size, arguments.pairs, keepers=keepers)
            for size in arguments.sizes
            for keepers in (False, True)
        }
    ray.shutdown()
    write("replica", {"context": context(ranks=RANKS, steps_per_block=BLOCK), "runs": runs})


if __name__ == "__main__":
    main()
