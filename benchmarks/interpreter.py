"""What the interpreter of a schedule costs on the host, for each action: python benchmarks/interpreter.py

Four ranks on gloo run 8 micro-batches of a tiny model, whose stages compute next to nothing. The CPU time of each rank's
process (all of its threads) in one run of its row, by action, holds the interpreter, the sends and receives and the stages
themselves; a plain loop over the same stages and micro-batches, without schedule and transfers, is timed between the runs
and taken off. Waiting costs no CPU time, but ranks that share cores disturb each other's caches: the figure is that of the
least disturbed run, averaged over the ranks; the median run stands beside it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np
import torch
from context import context, write

from raytron.config import RunConfig, from_mapping
from raytron.data.batch import Batch
from raytron.parallel.mesh import Mesh
from raytron.plan.mesh import MeshShape
from raytron.plan.plan import make_plan
from raytron.testing.world import World
from raytron.training.engine import Engine

MODEL = {"layers": 8, "hidden": 32, "heads": 2, "ffn": 64, "vocab": 64}
SCHEDULES = ("gpipe", "1f1b", "interleaved", "looped-bfs", "zb-h1", "zb-h2", "interleaved-zb", "zb-v", "v-half", "v-min",
             "dualpipe-v")  # fmt: skip
RANKS, LENGTH = 4, 16


def config_of(schedule: str) -> RunConfig:
    return from_mapping(
        {"model": MODEL, "sequence_length": LENGTH, "global_batch_size": 8, "mesh": {"pp": RANKS},
         "pipeline": {"schedule": schedule}, "data": {"dataset": "none"}}
    )  # fmt: skip


def plain(engine: Engine, microbatches: int) -> None:
    """Every stage of this rank forward and backward on every micro-batch, and nothing else."""
    for number, bound in engine._bound.items():
        for microbatch in range(microbatches):
            x = None if number == 0 else torch.zeros(LENGTH, 1, MODEL["hidden"], requires_grad=True)
            y = bound.forward(x, microbatch)
            torch.autograd.backward(y, torch.zeros_like(y))


def measure(rank: int, config: RunConfig, rounds: int) -> tuple[int, list[float], list[float], list[float]]:
    """On one rank: actions in a run, CPU seconds of each run, of each plain loop, and seconds of each run."""
    mesh = Mesh(MeshShape.of(config.mesh), rank)
    engine = Engine(make_plan(config, None), mesh)
    tokens = np.zeros((8, LENGTH), dtype=np.int64)
    batch = Batch(np.arange(8), tokens, tokens, np.ones(tokens.shape, dtype=np.float32))
    engine.forward_backward(batch)
    shape = (LENGTH, 1, MODEL["hidden"])
    runs, loops, walls = [], [], []
    for _ in range(rounds):
        engine.buckets.begin(8, config.deal())
        torch.distributed.barrier()
        start, begin = time.perf_counter(), time.process_time()
        engine.pipeline.run(shape, torch.float32, 1.0)
        runs.append(time.process_time() - begin)
        walls.append(time.perf_counter() - start)
        engine.buckets.finish()
        engine.buckets.begin(8, config.deal())
        begin = time.process_time()
        plain(engine, 8)
        loops.append(time.process_time() - begin)
        engine.buckets.finish()
    return len(engine.plan.schedule.rows[mesh.coords.pp]), runs[2:], loops[2:], walls[2:]


def figures(world: World, schedule: str, rounds: int) -> dict[str, Any]:
    results = world.run(RANKS, measure, config_of(schedule), rounds)
    whole = [min(runs) / actions for actions, runs, _, _ in results]
    least = [(min(runs) - min(loops)) / actions for actions, runs, loops, _ in results]
    usual = [(statistics.median(runs) - statistics.median(loops)) / actions for actions, runs, loops, _ in results]
    return {
        "actions_per_rank": results[0][0],
        "interpreter_ms_per_action": round(1e3 * statistics.fmean(least), 3),
        "interpreter_ms_per_action_worst_rank": round(1e3 * max(least), 3),
        "interpreter_ms_per_action_median_run": round(1e3 * statistics.fmean(usual), 3),
        "with_stages_ms_per_action": round(1e3 * statistics.fmean(whole), 3),
        "run_ms": round(1e3 * min(min(walls) for *_, walls in results), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    with World() as world:
        runs = {name: figures(world, name, arguments.rounds) for name in SCHEDULES}
    write("interpreter", {"context": context(model=MODEL, ranks=RANKS, microbatches=8), "runs": runs})


if __name__ == "__main__":
    main()
