"""What each of four gloo processes does for the tests of checkpoints on several ranks."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from checkpoint_cases import flip_bit, shards, share, tensors, wrong

from raytron.checkpoint import checkpointer
from raytron.checkpoint.catalog import prune
from raytron.checkpoint.whole import read_whole
from raytron.errors import CheckpointError
from raytron.parallel.layout import Slice

RANKS = 4
Case = Callable[[int, Path], Any]


def outcome(function: Callable[[], Any]) -> str:
    """The CheckpointError that a call ends with; an empty string where it succeeds."""
    try:
        function()
    except CheckpointError as error:
        return str(error)
    return ""


def save_on_4_load_on_any(rank: int, directory: Path) -> dict[str, Any]:
    path = checkpointer.save(directory, 3, share(tensors(), RANKS, rank), {"step": 3})
    found: dict[str, Any] = {"path": path.name}
    for size in (4, 3, 2, 1):
        group = dist.new_group(list(range(size)), backend="gloo")
        if rank < size:
            held = share(tensors(), size, rank, blank=True)
            found[f"facts {size}"] = checkpointer.load(path, held, group)
            found[f"wrong {size}"] = wrong(tensors(), held)
            dist.destroy_process_group(group)
    if rank == 2:  # one rank alone, while the others do not take part
        found["whole"] = torch.equal(read_whole(path)["gate_up"], tensors()["model.gate_up"])
    return found


def save_on_3_of_4(rank: int, directory: Path) -> dict[str, Any]:
    group = dist.new_group([1, 2, 3], backend="gloo")
    if rank == 0:
        return {"outside": outcome(lambda: checkpointer.save(directory, 1, {}, {}, group))}
    path = checkpointer.save(directory, 1, share(tensors(), 3, rank - 1), {}, group)
    held = share(tensors(), 3, rank - 1, blank=True)
    checkpointer.load(path, held, group)
    return {"wrong": wrong(tensors(), held), "path": path.name}


def replicas_are_written_once(rank: int, directory: Path) -> str:
    state = {f"layer.{i}": Slice((1000 + i,), (0,), torch.full((1000 + i,), float(i))) for i in range(16)}
    return checkpointer.save(directory, 1, state, {}).name


def pipeline_stages_hold_other_names(rank: int, directory: Path) -> dict[str, Any]:
    whole = {f"stage.{r}.weight": torch.full((3, 2), float(r)) for r in range(RANKS)}
    mine = f"stage.{rank}.weight"
    path = checkpointer.save(directory, 1, {mine: Slice((3, 2), (0, 0), whole[mine])}, {})
    shifted = f"stage.{(rank + 1) % RANKS}.weight"
    held = {shifted: Slice((3, 2), (0, 0), torch.zeros(3, 2))}
    checkpointer.load(path, held)
    unwanted = {mine: Slice((3, 2), (0, 0), torch.zeros(3, 2))} if rank < 2 else {"stage.9": held[shifted]}
    return {"wrong": wrong(whole, held), "error": outcome(lambda: checkpointer.load(path, unwanted))}


def one_rank_fails(rank: int, directory: Path) -> dict[str, str]:
    """By the failing rank and phase: the error that this rank saw."""
    seen = {}
    for failing, phase in ((2, "write"), (0, "write"), (0, "publish")):

        def fail(at: str, failing: int = failing, phase: str = phase) -> None:
            if rank == failing and at == phase:
                raise OSError(errno.ENOSPC, "No space left on device", "rank-file")

        case = directory / f"{failing}-{phase}"
        seen[f"{failing} {phase}"] = outcome(
            lambda case=case, fail=fail: checkpointer.save(case, 1, share(tensors(), RANKS, rank), {}, hook=fail)
        )
    return seen


def directory_can_not_be_made(rank: int, directory: Path) -> str:
    if rank == 0:
        (directory / "file").write_text("in the way")
    dist.barrier()
    return outcome(lambda: checkpointer.save(directory / "file" / "checkpoints", 1, share(tensors(), RANKS, rank), {}))


def coverage_is_exact(rank: int, directory: Path) -> dict[str, str]:
    slices = {
        "overlap": Slice((8,), (rank * 2,), torch.zeros(3 if rank == 1 else 2)),
        "same offset": Slice((8,), (rank // 2 * 4,), torch.zeros(4 if rank % 2 else 3)),
        "gap": Slice((8,), (rank * 2,), torch.zeros(1 if rank == 1 else 2)),
        "shape": Slice((8 + rank // 3,), (rank * 2,), torch.zeros(2)),
        "dtype": Slice((8,), (rank * 2,), torch.zeros(2, dtype=torch.float16 if rank else torch.float32)),
    }
    return {
        name: outcome(lambda name=name, piece=piece: checkpointer.save(directory, 1, {name: piece}, {}))
        for name, piece in slices.items()
    }


def damaged_on_one_rank(rank: int, directory: Path) -> dict[str, Any]:
    """Ranks that read other files only must not change either."""
    path = checkpointer.save(directory, 1, share(tensors(), RANKS, rank), {})
    if rank == 0:
        flip_bit(shards(path)[3])
    dist.barrier()
    held = share(tensors(), RANKS, rank, blank=True)
    error = outcome(lambda: checkpointer.load(path, held))
    return {"error": error, "untouched": all(bool((piece.tensor == 1).all()) for piece in held.values() if piece.shape)}


def one_rank_fails_to_read(rank: int, directory: Path) -> dict[str, Any]:
    path = checkpointer.save(directory, 1, share(tensors(), RANKS, rank), {})

    def fail(_phase: str) -> None:
        if rank == 1:
            raise OSError(errno.EIO, "Input/output error", "disk")

    held = share(tensors(), RANKS, rank, blank=True)
    error = outcome(lambda: checkpointer.load(path, held, hook=fail))
    return {"error": error, "untouched": all(bool((piece.tensor == 1).all()) for piece in held.values() if piece.shape)}


def how_long(rank: int, directory: Path) -> dict[str, float]:
    """Seconds of a save and a load of 200 small tensors."""
    state = {f"layer.{i}.weight": Slice((256, 64), (rank * 64, 0), torch.zeros(64, 64)) for i in range(200)}
    checkpointer.save(directory, 1, state, {})
    dist.barrier()
    begin = time.perf_counter()
    path = checkpointer.save(directory, 2, state, {})
    saved = time.perf_counter()
    checkpointer.load(path, state)
    return {"save": saved - begin, "load": time.perf_counter() - saved}


CASES: tuple[Case, ...] = (
    save_on_4_load_on_any,
    save_on_3_of_4,
    replicas_are_written_once,
    pipeline_stages_hold_other_names,
    one_rank_fails,
    directory_can_not_be_made,
    coverage_is_exact,
    damaged_on_one_rank,
    one_rank_fails_to_read,
    how_long,
)


def run(rank: int, root: Path) -> dict[str, Any]:
    """Run every case on one rank; what it returns, by the case's name."""
    found = {}
    for case in CASES:
        directory = root / case.__name__
        directory.mkdir(exist_ok=True)
        found[case.__name__] = case(rank, directory)
        dist.barrier()
    return found


def die_while_saving(rank: int, root: Path) -> None:
    """Rank 1 dies as it begins to write; rank 0 writes down what it saw and what a later prune removed."""
    store = dist.FileStore(str(root / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=20))

    def die(_phase: str) -> None:
        if rank == 1:
            os._exit(9)

    try:
        checkpointer.save(root / "checkpoints", 1, share(tensors(), 2, rank), {}, hook=die)
    except Exception as error:
        left = sorted(path.name for path in (root / "checkpoints").glob("*/*"))
        seen = {"error": type(error).__name__, "left": left, "pruned": len(prune(root / "checkpoints", 1))}
        (root / "seen.json").write_text(json.dumps(seen))
