"""Tokens per second of Raytron's meshes beside PyTorch's own parallelism: python benchmarks/parallel.py

Each case runs in one world of gloo ranks: a step of Raytron, then a step of each peer (`peers.py`), and again, so that what
disturbs the machine disturbs all. Model, batch, micro-batches, threads and clipping are the same. The figure of a pair of
neighbouring steps is the slowest rank's time; the result is the median ratio (above 1: Raytron is faster), over several
worlds of new processes, since where a process's memory lies moves it by two percent either way.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from context import context, write
from overhead import SIZES, FixedStream
from peers import PEERS

from raytron.config import RunConfig, from_mapping
from raytron.data.batch import part_of
from raytron.parallel.mesh import Mesh
from raytron.plan.mesh import MeshShape
from raytron.plan.plan import make_plan
from raytron.testing.world import World
from raytron.training.engine import Engine


class Case(NamedTuple):
    mesh: dict[str, int]
    options: dict[str, Any]
    peers: tuple[str, ...]


ONCE = {"data_parallel.zero": 3, "data_parallel.reduce": "last_microbatch"}
CASES = {
    "dp2": Case({"dp": 2}, {"data_parallel.zero": 0}, ("ddp",)),
    "dp2-sharded": Case({"dp": 2}, ONCE, ("fsdp2",)),
    "dp2-sharded-each": Case({"dp": 2}, {"data_parallel.zero": 3}, ("fsdp2-each",)),
    "tp2": Case({"tp": 2}, {"mesh.sequence_parallel": False}, ("dtensor",)),
    "pp2": Case({"pp": 2}, {}, ("1f1b",)),
    "dp4": Case({"dp": 4}, {"data_parallel.zero": 0}, ("ddp",)),
    "dp4-sharded": Case({"dp": 4}, ONCE, ("fsdp2",)),
    "dp4-sharded-each": Case({"dp": 4}, {"data_parallel.zero": 3}, ("fsdp2-each",)),
    "dp2-tp2": Case({"dp": 2, "tp": 2}, {"mesh.sequence_parallel": False}, ("dtensor",)),
    "pp4": Case({"pp": 4}, {}, ("1f1b",)),
    "pp2-dp2": Case({"pp": 2, "dp": 2}, {"data_parallel.zero": 0}, ("1f1b",)),
}


def config_of(case: Case, size: str) -> RunConfig:
    layers = {"layers": 4} if SIZES[size]["layers"] % 4 else {}
    base = from_mapping(
        {"model": SIZES[size] | layers, "sequence_length": 128, "global_batch_size": 16, "micro_batch_size": 2,
         "steps": 10**6, "data": {"dataset": "random"}, "mesh": case.mesh}
    )  # fmt: skip
    return base.replace(**case.options)


def run_rank(rank: int, config: RunConfig, peers: tuple[str, ...], rounds: int, threads: int) -> list[list[float]]:
    """For Raytron and each peer the seconds of every round, as the slowest rank saw it."""
    torch.set_num_threads(threads)
    mesh = Mesh(MeshShape.of(config.mesh), rank)
    engine = Engine(make_plan(config, None), mesh)
    whole = FixedStream(config).batch(0, config.global_batch_size)
    start, stop = part_of(0, config.global_batch_size, mesh.coords.dp, mesh.shape.dp, config.micro_batch_size)
    batch = type(whole)(*(None if part is None else part[start:stop] for part in whole))
    tokens, labels = torch.from_numpy(batch.tokens), torch.from_numpy(batch.labels)
    runners = [lambda: engine.step(batch, config.lr.peak).loss]
    for name in peers:
        peer = PEERS[name](config)
        runners.append(lambda peer=peer: peer.step(tokens, labels))
    seconds: list[list[float]] = [[] for _ in runners]
    for number in range(rounds + 3):
        for runner, times in zip(runners, seconds, strict=True):
            dist.barrier()
            begin = time.perf_counter()
            loss = runner()
            slowest = torch.tensor(time.perf_counter() - begin)
            if number == 0 and loss:
                assert abs(loss - math.log(config.model.vocab)) < 0.7, f"{loss} is no loss of random tokens"
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
            if number >= 3:
                times.append(slowest.item())
    torch.set_num_threads(1)
    return seconds


def measure(case: Case, size: str, worlds: int, rounds: int, threads: int) -> dict[str, Any]:
    config = config_of(case, size)
    seen: list[list[float]] = [[] for _ in range(1 + len(case.peers))]
    for _ in range(worlds):
        with World(timeout_s=600) as world:
            found = world.run(MeshShape.of(config.mesh).world, run_rank, config, case.peers, rounds, threads)[0]
        for times, more in zip(seen, found, strict=True):
            times += more
    ours, *others = seen
    tokens = config.global_batch_size * config.sequence_length
    result: dict[str, Any] = {"raytron_tokens_per_s": round(tokens / statistics.median(ours))}
    for name, theirs in zip(case.peers, others, strict=True):
        ratios = sorted(b / a for a, b in zip(ours, theirs, strict=True))
        result[name] = {
            "tokens_per_s": round(tokens / statistics.median(theirs)),
            "speed_of_raytron_over_it": round(statistics.median(ratios), 3),
            "quartiles": [round(ratios[len(ratios) // 4], 3), round(ratios[3 * len(ratios) // 4], 3)],
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worlds", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=6, help="of each world")
    parser.add_argument("--size", choices=list(SIZES), default="medium")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--case", choices=list(CASES), nargs="*", default=list(CASES))
    arguments = parser.parse_args()
    rounds = {"worlds": arguments.worlds, "rounds_of_each": arguments.rounds}
    about = context(model=SIZES[arguments.size], **rounds, threads_per_rank=arguments.threads)
    runs: dict[str, Any] = {}
    for name in arguments.case:
        runs[name] = measure(CASES[name], arguments.size, arguments.worlds, arguments.rounds, arguments.threads)
        print(name, runs[name], flush=True)
    write("parallel", {"context": about, "runs": runs})


if __name__ == "__main__":
    main()
