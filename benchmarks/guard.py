"""What it costs a healthy run to be watched: python benchmarks/guard.py

    step     the same step with and without a look at each rank's own gradients (`guard`), in pairs whose order alternates
    check    one comparison of all replicas' parameters (`guard.digest_every`), alone

Two ranks (dp 2) on gloo. Wall and processor time of the first rank; medians and quartiles over the pairs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from context import context, write

from raytron.config import RunConfig, from_mapping
from raytron.parallel.mesh import Mesh
from raytron.plan.mesh import MeshShape
from raytron.plan.plan import make_plan
from raytron.testing.streams import RandomStream
from raytron.testing.world import World
from raytron.training.trainer import Trainer

RANKS, LENGTH, VOCAB = 2, 128, 2048
SIZES = {
    "small": {"layers": 4, "hidden": 128, "heads": 4, "ffn": 384, "vocab": VOCAB},
    "medium": {"layers": 6, "hidden": 384, "heads": 6, "ffn": 1024, "vocab": VOCAB},
}


class Taken(NamedTuple):
    """Seconds."""

    wall: float
    cpu: float


def config_of(size: str) -> RunConfig:
    return from_mapping(
        {"model": SIZES[size], "mesh": {"dp": RANKS}, "sequence_length": LENGTH, "global_batch_size": 8,
         "micro_batch_size": 2, "data": {"dataset": "random"}, "lr": {"peak": 1e-3}}
    )  # fmt: skip


def step(trainer: Trainer, watched: bool) -> Taken:
    """One step; unwatched as if nobody looked at its gradients."""
    guard, buckets = trainer.engine.guard, trainer.engine.buckets.buckets
    own, observers = guard.own, [bucket.observers for bucket in buckets]
    if not watched:
        guard.own = None
        for bucket in buckets:
            bucket.observers = []
    dist.barrier()
    start, cpu = time.perf_counter(), time.process_time()
    trainer.train_step()
    taken = Taken(time.perf_counter() - start, time.process_time() - cpu)
    guard.own = own
    for bucket, kept in zip(buckets, observers, strict=True):
        bucket.observers = kept
    return taken


def measure(rank: int, size: str, pairs: int) -> dict[str, Any]:
    config = config_of(size)
    trainer = Trainer(make_plan(config, None), Mesh(MeshShape.of(config.mesh), rank), RandomStream(VOCAB, LENGTH))
    assert trainer.digest is not None
    for _ in range(3):
        trainer.train_step()
    both, checks = [], []
    for pair in range(pairs):
        first, second = step(trainer, bool(pair % 2)), step(trainer, not pair % 2)
        both.append((first, second) if pair % 2 else (second, first))
    for _ in range(10):
        dist.barrier()
        start = time.perf_counter()
        trainer.digest.check(trainer.step, {}, 100)
        checks.append(time.perf_counter() - start)
    return {
        "parameters": sum(param.numel() for param in trainer.engine.model.params),
        "pairs": pairs,
        "step_ms": round(1e3 * statistics.median(without.wall for _, without in both), 2),
        "wall_ratio": spread([watched.wall / without.wall for watched, without in both]),
        "cpu_ratio": spread([watched.cpu / without.cpu for watched, without in both]),
        "check_ms": round(1e3 * statistics.median(checks[1:]), 2),
    }


def spread(values: list[float]) -> dict[str, Any]:
    """The median and the quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": round(middle, 4), "quartiles": [round(low, 4), round(high, 4)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=40)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with World(timeout_s=600) as world:
        runs = {size: world.run(RANKS, measure, size, arguments.pairs)[0] for size in SIZES}
    write("guard", {"context": context(ranks=RANKS), "runs": runs})


if __name__ == "__main__":
    main()
