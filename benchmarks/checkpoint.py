"""How long a checkpoint holds training up, against torch's: python benchmarks/checkpoint.py

The same tensors, each cut over the same ranks, go to the same folder in four ways, one after the other in each round, so
that what disturbs the machine disturbs all:

    raytron          Saver.save: digested, fsynced, checked, committed
    raytron behind   Saver.begin, the same from a copy by a thread; Saver.hold before the tensors may change
    dcp              torch.distributed.checkpoint.save (fsynced; no digests, no commit)
    dcp async        torch.distributed.checkpoint.async_save; its call returns when all is copied

    stall   in which ranks do nothing else: all of it in the foreground; else the call, and `hold` after one step
    added   by which some steps of work take longer with a save behind them than without: the stall, and what the
            thread takes from the processor
    saved   until everything is on disk, where nothing else is done

A step is a loop of matrix products. Figures are medians over rounds of the slowest rank; the first round, in which buffers
are made, stands apart.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from context import context, write
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from raytron.checkpoint.saver import Saver
from raytron.parallel.layout import Slice
from raytron.testing.world import World

ROWS, COLUMNS = 1024, 1280  # of a tensor
STALL, ADDED, SAVED = range(3)
PRODUCTS = 40  # of two matrices of 512 × 512, in a step


class Times(NamedTuple):
    """Seconds of one save and the steps beside it."""

    stall: float
    all: float


class Bench:
    """One rank's tensors, and the four ways to save them."""

    def __init__(self, rank: int, ranks: int, tensors: int, folder: str):
        self.folder, self.count = Path(folder), 0
        rows = ROWS // ranks
        self.local = {f"layers.{number}.weight": torch.randn(rows, COLUMNS) for number in range(tensors)}
        self.slices = {
            name: Slice((rows * ranks, COLUMNS), (rank * rows, 0), tensor) for name, tensor in self.local.items()
        }
        mesh = init_device_mesh("cpu", (ranks,))
        self.state: dict[str, Any] = {
            name: DTensor.from_local(tensor, mesh, [Shard(0)]) for name, tensor in self.local.items()
        }
        self.saver = Saver()
        self.left, self.right = torch.randn(512, 512), torch.empty(512, 512)
        self.ways: dict[str, Callable[[int], Times]] = {
            "raytron": self.raytron,
            "raytron behind": self.raytron_behind,
            "dcp": self.dcp,
            "dcp async": self.dcp_async,
        }

    def raytron(self, steps: int) -> Times:
        begin = time.perf_counter()
        self.saver.save(self.folder, self.count, self.slices, {})
        end = time.perf_counter()
        self.work(steps)
        return Times(end - begin, time.perf_counter() - begin)

    def raytron_behind(self, steps: int) -> Times:
        begin = time.perf_counter()
        self.saver.begin(self.folder, self.count, self.slices, {})
        free = time.perf_counter()
        self.work(min(1, steps))
        due = time.perf_counter()
        self.saver.hold()
        held = time.perf_counter()
        self.work(steps - 1)
        saved = self.saver.finish()
        assert saved is not None
        assert saved.error is None
        return Times(free - begin + held - due, time.perf_counter() - begin)

    def dcp(self, steps: int) -> Times:
        begin = time.perf_counter()
        dcp.save(self.state, checkpoint_id=self.folder / f"dcp-{self.count}")
        end = time.perf_counter()
        self.work(steps)
        return Times(end - begin, time.perf_counter() - begin)

    def dcp_async(self, steps: int) -> Times:
        begin = time.perf_counter()
        future: Any = dcp.async_save(self.state, checkpoint_id=self.folder / f"dcp-{self.count}")
        free = time.perf_counter()
        self.work(steps)
        future.result()
        return Times(free - begin, time.perf_counter() - begin)

    def nothing(self, steps: int) -> Times:
        begin = time.perf_counter()
        self.work(steps)
        return Times(0.0, time.perf_counter() - begin)

    def work(self, steps: int) -> None:
        """Some steps of a training that uses one processor."""
        for _ in range(steps * PRODUCTS):
            torch.mm(self.left, self.left, out=self.right)

    def once(self, way: Callable[[int], Times], steps: int) -> Times:
        """Of the slowest rank."""
        self.count += 1
        dist.barrier()
        took = torch.tensor(way(steps), dtype=torch.float64)
        dist.all_reduce(took, dist.ReduceOp.MAX)
        if dist.get_rank() == 0:
            for path in self.folder.iterdir():
                shutil.rmtree(path, ignore_errors=True)
        dist.barrier()
        return Times(*took.tolist())

    def round(self, steps: int) -> dict[str, list[float]]:
        """For each way: stall, added, saved, in seconds."""
        alone = self.once(self.nothing, steps).all
        found = {}
        for name, way in self.ways.items():
            busy, idle = self.once(way, steps), self.once(way, 0)
            found[name] = [busy.stall, busy.all - alone, idle.all]
        return found


def run(rank: int, ranks: int, tensors: int, rounds: int, steps: int, folder: str) -> list[dict[str, list[float]]]:
    bench = Bench(rank, ranks, tensors, folder)
    return [bench.round(steps) for _ in range(rounds + 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tensors", type=int, default=40, help=f"of {ROWS} × {COLUMNS} in fp32")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=10, help="of work beside each save")
    parser.add_argument(
        "--directory", help="where checkpoints are written; else the system's folder for temporary files"
    )
    given = parser.parse_args()
    folder = tempfile.mkdtemp(dir=given.directory)
    size = given.tensors * ROWS * COLUMNS * 4
    try:
        with World(timeout_s=600) as world:
            rounds = world.run(given.ranks, run, given.ranks, given.tensors, given.rounds, given.steps, folder)[0]
    finally:
        shutil.rmtree(folder, ignore_errors=True)

    def ratio(of: str, to: str, which: int) -> float:
        return round(statistics.median(each[of][which] / each[to][which] for each in rounds[1:]), 4)

    ratios = {
        "stall: raytron behind / raytron": ratio("raytron behind", "raytron", STALL),
        "stall: raytron behind / dcp": ratio("raytron behind", "dcp", STALL),
        "stall: raytron behind / dcp async": ratio("raytron behind", "dcp async", STALL),
        "stall: dcp async / dcp": ratio("dcp async", "dcp", STALL),
        "added: raytron behind / dcp async": ratio("raytron behind", "dcp async", ADDED),
        "saved: raytron / dcp": ratio("raytron", "dcp", SAVED),
        "saved: raytron behind / dcp async": ratio("raytron behind", "dcp async", SAVED),
    }
    told = context(ranks=given.ranks, mib=size >> 20, rounds=given.rounds, steps=given.steps, threads_per_rank=1)
    ways = {way: summary([each[way] for each in rounds], size) for way in rounds[0]}
    write("checkpoint", {"context": told, "ways": ways, "ratio_medians": ratios})


def summary(times: list[list[float]], size: int) -> dict[str, float]:
    stall, added, saved = (statistics.median(column) for column in zip(*times[1:], strict=True))
    return {
        "stall_ms": round(stall * 1e3, 1),
        "added_ms": round(added * 1e3, 1),
        "saved_ms": round(saved * 1e3, 1),
        "mb_per_s": round(size / saved / 1e6, 1),
        "first_stall_ms": round(times[0][STALL] * 1e3, 1),
    }


if __name__ == "__main__":
    main()
