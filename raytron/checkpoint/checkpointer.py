"""Save and load the state of a run: collective, verified, all or nothing.

    save   rank 0 makes a generation directory → the ranks' rectangles are dealt out → every rank writes, fsyncs, digests
           → rank 0 checks the files → COMMIT
    load   every rank opens the same COMMIT → torch plans who reads what → digests are checked, shadows filled
           → all ranks succeeded → shadows are copied into the live tensors

torch's `dcp.load` runs the loading, with a planner and a storage of our own: it plans on rank 0, resolves every re-sharding,
and carries the failure of one rank to all. Saving is `raytron.checkpoint.saver`'s: its plan outlives a save, and it can go
on behind the training, which torch's protocol of collectives can't.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from raytron.checkpoint.catalog import Generation, newest_good, open_generation
from raytron.checkpoint.peers import Hook, Peers, no_hook
from raytron.checkpoint.planner import ShadowPlanner
from raytron.checkpoint.saver import Saver
from raytron.checkpoint.store import SafetensorsReader
from raytron.errors import CheckpointError
from raytron.parallel.layout import Slice

__all__ = ["facts", "load", "newest_good", "save"]
T = TypeVar("T")


def save(
    directory: Path | str,
    step: int,
    slices: Mapping[str, Slice],
    facts: dict[str, Any],
    group: dist.ProcessGroup | None = None,
    *,
    hook: Hook = no_hook,
) -> Path:
    """Save a new committed generation under `directory` and return its path. Collective over `group`.

    group: the ranks that hold the slices (default: the default group; a single process where there is none); a gloo
        group serves best. step, directory and facts (a JSON object) are rank 0's.
    hook: told "write" on every rank, "publish" and "published" on rank 0, as these phases begin.

    Raises CheckpointError on every rank, naming rank and file, if anything fails on any; the generation is then removed,
    or if that is impossible left uncommitted. The live tensors must not change meanwhile.
    """
    return Saver(group, hook=hook).save(directory, step, slices, facts).path


def load(
    generation: Generation | Path | str,
    slices: Mapping[str, Slice],
    group: dist.ProcessGroup | None = None,
    *,
    convert: bool = False,
    partial: bool = False,
    hook: Hook = no_hook,
) -> dict[str, Any]:
    """Fill the slices' tensors from a committed generation and return its facts. Collective over `group`.

    slices: what this rank holds; on any mesh, however cut. Together the ranks must ask for every tensor of the
        checkpoint, unless `partial`.
    convert: a stored floating-point dtype is converted to the target's; otherwise another dtype is refused.
    hook: told "load" on every rank before it reads.

    Raises CheckpointError on every rank if anything does not verify, fit or read on any; no tensor has then changed.
    Needs host memory for one more copy of this rank's slices.
    """
    return _load(Peers(group), generation, slices, convert=convert, partial=partial, hook=hook)


def load_alone(
    generation: Generation | Path | str, slices: Mapping[str, Slice], *, convert: bool = False, partial: bool = False
) -> dict[str, Any]:
    """`load` by this process for itself, though it may be a rank of a process group."""
    return _load(Peers(alone=True), generation, slices, convert=convert, partial=partial, hook=no_hook)


def _load(
    peers: Peers,
    generation: Generation | Path | str,
    slices: Mapping[str, Slice],
    *,
    convert: bool,
    partial: bool,
    hook: Hook,
) -> dict[str, Any]:
    place = generation.path if isinstance(generation, Generation) else Path(generation)
    what = f"the checkpoint {place.name} was not loaded"
    opened: list[Generation] = []

    def open_here() -> tuple[str, str]:
        opened.append(open_generation(place))
        return str(len(opened[0].records.tensors)), opened[0].metadata.digest

    if len(set(peers.attempt(what, open_here))) > 1:
        raise CheckpointError(f"{what}: the ranks do not see the same generation at {place}")
    planner = ShadowPlanner(str(place), slices, convert=convert, partial=partial)
    reader = SafetensorsReader(opened[0], hook=hook)
    _run(
        peers,
        what,
        lambda: dcp_load({}, storage_reader=reader, planner=planner, process_group=peers.group, no_dist=peers.alone),
    )
    planner.swap()
    return opened[0].facts


def facts(generation: Generation | Path | str) -> dict[str, Any]:
    """What a generation says about itself. Raises CheckpointError where it is not committed."""
    return generation.facts if isinstance(generation, Generation) else open_generation(generation).facts


def _run(peers: Peers, what: str, function: Callable[[], T]) -> T:
    """Run a torch checkpoint function; failures that it carried here from any rank become CheckpointError."""
    try:
        with _quiet(peers.alone):
            return function()
    except CheckpointException as failure:  # a BaseException
        for exception, _ in failure.failures.values():
            if isinstance(exception, KeyboardInterrupt | SystemExit) and peers.size == 1:
                raise exception from None
        raise peers.translate(what, failure) from failure


@contextlib.contextmanager
def _quiet(alone: bool) -> Iterator[None]:
    """torch warns of every checkpoint that one process makes for itself."""
    if not alone:
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
