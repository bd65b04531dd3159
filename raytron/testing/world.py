"""Warm ranks for tests: a pool of processes that play any mesh on gloo.

A process costs two seconds to start, so the pool starts once and each test re-meshes it: joining a fresh world takes a
tenth of a second. Processes come from a fork server that has torch loaded.

    with World() as world:
        results = world.run(4, function, *arguments)      # function(rank, *arguments) on ranks 0 … 3
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import multiprocessing
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import cloudpickle
import torch
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from raytron.parallel.mesh import close_world, open_world


class World:
    """A pool of ranks on this machine. Ranks that fail or hang are ended with the pool and started anew."""

    def __init__(self, timeout_s: float = 60.0):
        self.timeout_s = timeout_s
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["torch", "torch.distributed", "raytron.testing.world"])
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._epochs = itertools.count()
        self._ranks: list[tuple[Any, Connection]] = []

    def __enter__(self) -> World:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def run(self, ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """function(rank, *arguments) on `ranks` ranks of one world; the results by rank.

        Raises RuntimeError with the traceback of the first rank that failed, or for a rank that takes too long.
        """
        self._grow(ranks)
        task = cloudpickle.dumps((function, arguments))
        header = (sys.path, self._store.port, next(self._epochs), ranks, self.timeout_s, task)
        for rank in range(ranks):
            self._ranks[rank][1].send((rank, *header))
        results: list[Any] = []
        failures: list[str] = []
        for rank in range(ranks):
            connection = self._ranks[rank][1]
            if not connection.poll(self.timeout_s + 10):
                failures.append(f"rank {rank} of {ranks} gave no answer in {self.timeout_s + 10:.0f} s")
                break
            try:
                done, value = connection.recv()
            except EOFError:
                done, value = False, f"rank {rank} of {ranks} died"
            (results if done else failures).append(value)
        if failures:
            self.close()
            raise RuntimeError("\n".join(failures))
        return results

    def close(self) -> None:
        """Ends all ranks."""
        for process, connection in self._ranks:
            connection.close()
            process.kill()
            process.join()
        self._ranks.clear()

    def _grow(self, ranks: int) -> None:
        while len(self._ranks) < ranks:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._ranks.append((process, ours))


def _serve(connection: Connection) -> None:
    """The life of one rank: a world for each task."""
    torch.set_num_threads(1)
    while True:
        try:
            rank, path, port, epoch, ranks, timeout_s, task = connection.recv()
        except (EOFError, OSError):
            return
        sys.path[:] = path
        try:
            client = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=timeout_s))
            open_world(PrefixStore(str(epoch), client), rank, ranks, timeout_s=timeout_s)
            function, arguments = cloudpickle.loads(task)
            answer = (True, function(rank, *arguments))
        except Exception:
            answer = (False, f"rank {rank} of {ranks}:\n{traceback.format_exc()}")
        with contextlib.suppress(Exception):
            close_world()
        gc.collect()  # meshes and groups refer to each other; else the threads of every world left stay
        connection.send(answer)
