"""The saves of one mesh: dealt out once, written while ranks wait or while they train on.

    step k      begin    a directory is made                                          a moment
    k … k+1              a thread on each rank copies the tensors to host memory
    k+1         hold     before the update: if the copy is not whole, ranks wait      what is left of it
    k+1 … k+3            the threads digest, write, fsync
    k+3         advance  all threads have ended: ranks tell which files they wrote    a moment
    k+3 … k+4            rank 0's thread checks the directory and writes COMMIT
    k+4         advance  all ranks hear how it ended                                  a moment

Its *stall* is the sum of these waits. No thread talks to another rank. That all have ended is known without a barrier: while
its thread works a rank sets a bit (`busy`) in the scalar all-reduce that ends every step, so that all ranks see at the same
step that nobody sets it, and call `advance` there, on their main threads. A failure on any rank, such as a full disk, is the
same on all ranks in the end: the generation is removed, older ones stay, training goes on.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import chain
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from raytron.checkpoint import generation
from raytron.checkpoint.deal import Deal, Offered, Shard, deal, records
from raytron.checkpoint.files import storage_of
from raytron.checkpoint.owner import WRITING
from raytron.checkpoint.peers import Hook, Peers, brief, message_of, no_hook
from raytron.checkpoint.planner import offer
from raytron.checkpoint.record import VALIDATION, FileRecord, Records
from raytron.checkpoint.safetensors_file import layout, raw_bytes, write
from raytron.checkpoint.staging import Blocks, Staging
from raytron.errors import CheckpointError
from raytron.parallel.layout import Slice

T = TypeVar("T")
log = logging.getLogger(__name__)


class Saved(NamedTuple):
    """How a save ended; equal on all ranks. error: why nothing was committed.

    seconds: from its begin to its commit; stall_s: of these, those in which the slowest rank did nothing else; bytes: of all
    files.
    """

    path: Path
    step: int
    seconds: float
    stall_s: float
    bytes: int
    error: str | None = None


class Phase(IntEnum):
    """Of a save behind the training; equal on all ranks."""

    IDLE = 0
    WRITING = 1
    PUBLISHING = 2


class _Task(Generic[T]):
    """A function in a thread of its own; what it returned, or why it failed."""

    def __init__(self, name: str, function: Callable[[], T]):
        self.result: T | None = None
        self.error: str | None = None
        self._function: Callable[[], T] | None = function
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        assert self._function is not None
        try:
            self.result = self._function()
        except BaseException as error:
            self.error = brief(error)
        self._function = None

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> None:
        self._thread.join()


@dataclass
class _Job:
    """A save that is under way."""

    path: Path
    step: int
    facts: dict[str, Any]
    began: float
    stall_s: float = 0.0
    phase: Phase = Phase.WRITING
    task: _Task[Any] | None = None
    hold: Callable[[], None] | None = None
    given_up: threading.Event = field(default_factory=threading.Event)

    @property
    def what(self) -> str:
        return f"the checkpoint of step {self.step} was not saved"


class Saver:
    """Saves the slices of one mesh. All its methods are collective over `group`, but for `busy` and `phase`.

    group: the ranks that hold the slices (default: the default group; a single process where there is none); a gloo group
        serves best. device: where most slices live.
    hook: told "write" on every rank, "publish" and "published" on rank 0, as these phases begin.
    """

    def __init__(
        self, group: dist.ProcessGroup | None = None, device: torch.device | None = None, *, hook: Hook = no_hook
    ):
        self.peers, self.hook = Peers(group), hook
        self._staging = Staging(device or torch.device("cpu"))
        self._offered: Offered | None = None  # what the deal was made for
        self._shards: list[Shard] = []  # this rank's
        self._deal: Deal | None = None  # rank 0's
        self._jobs: list[_Job] = []  # the one under way
        weakref.finalize(self, _give_up, self._jobs, self.peers.rank)

    # ---- ranks wait

    def save(self, directory: Path | str, step: int, slices: Mapping[str, Slice], facts: dict[str, Any]) -> Saved:
        """A committed generation, when this returns. step, directory and facts (a JSON object) are rank 0's.

        Raises CheckpointError on every rank, naming rank and file, if anything fails on any; the generation is then removed,
        or if that is impossible left uncommitted. The live tensors must not change meanwhile.
        """
        began = time.perf_counter()
        job = self._open(directory, step, slices, facts, began)
        try:
            live = _from(slices)
            files = self.peers.attempt(job.what, lambda: write_shards(job.path, step, self._shards, live, self.hook))
            saved = self.peers.attempt(job.what, lambda: self._publish_now(job, files) if self._deal else None)[0]
            if self._deal:
                self.hook("published")
        except CheckpointError:
            if self.peers.rank == 0:  # every rank has stopped writing, for all have heard of the failure
                generation.remove(job.path)
            raise
        except BaseException:
            if self.peers.rank == 0:  # others may still be writing
                generation.abandon(job.path)
            raise
        assert saved is not None
        return saved

    def _publish_now(self, job: _Job, files: list[list[FileRecord]]) -> Saved:
        total = self._publish(job, files)()
        seconds = time.perf_counter() - job.began
        return Saved(job.path, job.step, seconds, seconds, total)

    # ---- ranks train on

    @property
    def phase(self) -> Phase:
        """Of the save under way."""
        return self._jobs[0].phase if self._jobs else Phase.IDLE

    @property
    def step(self) -> int | None:
        """Of the save under way; None: there is none."""
        return self._jobs[0].step if self._jobs else None

    @property
    def busy(self) -> bool:
        """Whether this rank's thread is at work."""
        return any(job.task is not None and not job.task.done for job in self._jobs)

    def begin(self, directory: Path | str, step: int, slices: Mapping[str, Slice], facts: dict[str, Any]) -> Path:
        """Starts to save what the slices hold now; where it will be, once `advance` has said so. Needs `phase` IDLE. The
        live tensors must not change before `hold` was called.

        step, directory and facts (a JSON object) are rank 0's. Raises CheckpointError on every rank if it can't begin.
        """
        assert self.phase == Phase.IDLE, "one save at a time"
        began = time.perf_counter()
        job = self._open(directory, step, slices, facts, began)
        self._jobs.append(job)
        shards, hook = self._shards, self.hook
        try:
            copy = self._staging.copy(shards, slices)
        except Exception as error:  # such as no memory: told like a writer's failure
            job.task = _Task("checkpoint", _failing(error))
            return job.path

        def run() -> list[FileRecord]:
            copy.run()
            return write_shards(job.path, step, shards, _until(job.given_up, copy.blocks), hook)

        job.hold, job.task = copy.hold, _Task(f"checkpoint of step {step}", run)
        job.stall_s = time.perf_counter() - began
        return job.path

    def hold(self) -> None:
        """The slices are about to change: returns when they are copied. No collective."""
        for job in self._jobs:
            if job.hold is not None:
                began = time.perf_counter()
                job.hold()
                job.hold = None
                job.stall_s += time.perf_counter() - began

    def advance(self) -> Saved | None:
        """The next phase, when no rank is busy: how the save ended, when it has."""
        job, began = self._jobs[0], time.perf_counter()
        task, job.task = job.task, None
        if task is not None:
            task.wait()
        if job.phase == Phase.WRITING:
            assert task is not None
            said = self.peers.gather((task.result, task.error, job.stall_s))
            errors = {rank: error for rank, (_, error, _) in enumerate(said) if error is not None}
            job.phase = Phase.PUBLISHING
            if self._deal is not None:
                job.task = self._conclude(job, [files for files, _, _ in said], errors)
            job.stall_s = max(stall for _, _, stall in said) + time.perf_counter() - began
            return None
        ended = None if task is None else self._ended(job, task, began)
        self._jobs.clear()
        return self.peers.gather(ended)[0]

    def _ended(self, job: _Job, task: _Task[Any], began: float) -> Saved:
        """On rank 0: how it went."""
        published, error = task.result or (0, task.error)
        now = time.perf_counter()
        return Saved(job.path, job.step, now - job.began, job.stall_s + now - began, published, error)

    def finish(self) -> Saved | None:
        """Waits for the save under way; how it ended, None where there was none."""
        ended = None
        while self._jobs:
            ended = self.advance()
        return ended

    # ---- inside

    def _open(
        self, directory: Path | str, step: int, slices: Mapping[str, Slice], facts: dict[str, Any], began: float
    ) -> _Job:
        """A new directory, and a deal that fits the slices."""
        offered, what = offer(slices), f"the checkpoint of step {step} was not saved"

        def make() -> tuple[Path | None, bool]:
            if self.peers.rank:
                return None, offered == self._offered
            generation.check_facts(facts)
            return generation.create(directory, step), offered == self._offered

        answers = self.peers.attempt(what, make)
        path = answers[0][0]
        assert path is not None
        if not all(known for _, known in answers):
            try:
                self._shards = self.peers.at_first(what, offered, self._deal_out)
                self._offered = offered
            except CheckpointError:
                if self.peers.rank == 0:
                    generation.remove(path)
                raise
        return _Job(path, step, facts, began)

    def _deal_out(self, offered: list[Offered]) -> list[list[Shard]]:
        self._deal = deal(offered)
        return self._deal.shards

    def _publish(self, job: _Job, files: list[list[FileRecord]]) -> Callable[[], int]:
        """On rank 0: what checks and commits, and tells the bytes of all files."""
        made, ranks, hook = self._deal, self.peers.size, self.hook
        assert made is not None

        def run() -> int:
            found = records(made, job.step, files)
            check_directory(job.path, found)
            hook("publish")
            if job.given_up.is_set():
                raise CheckpointError("given up")
            generation.commit(job.path, job.step, ranks, job.facts, found)
            return sum(file.size for file in found.files.values())

        return run

    def _conclude(self, job: _Job, files: list[Any], errors: dict[int, str]) -> _Task[tuple[int, str | None]]:
        """On rank 0: a thread that commits, or that removes what a failure left."""
        publish, ranks, hook = self._publish(job, files), self.peers.size, self.hook

        def run() -> tuple[int, str | None]:
            failed = dict(errors)
            if not failed:
                try:
                    published = publish()
                    hook("published")
                    return published, None
                except Exception as error:
                    failed = {0: brief(error)}
            generation.remove(job.path)
            return 0, message_of(job.what, failed, ranks)

        return _Task(f"commit of step {job.step}", run)


def write_shards(path: Path, step: int, shards: list[Shard], blocks: Blocks, hook: Hook) -> list[FileRecord]:
    """Write a rank's files, durably. Raises CheckpointError naming the file."""
    hook("write")
    files = []
    for shard in shards:
        head, _ = layout([offer.entry for offer in shard.offers], step)
        try:
            files.append(write(path / shard.file, chain([memoryview(head)], blocks(shard))))
        except OSError as error:
            raise CheckpointError(f"{path / shard.file}: can't be written: {error.strerror or error}") from error
    storage_of(path).sync(path)
    return files


def check_directory(path: Path, found: Records) -> None:
    """The shards that were reported are there, with their sizes, and nothing else is. Raises CheckpointError."""
    sizes = {name: size for name, size in storage_of(path).sizes(path).items() if not name.startswith(".")}
    for known in (WRITING, VALIDATION):
        sizes.pop(known, None)
    strangers = sorted(set(sizes) - set(found.files))
    if strangers:
        raise CheckpointError(f"{path / strangers[0]}: this file is not part of the save")
    for file in found.files.values():
        if sizes.get(file.name) != file.size:
            raise CheckpointError(f"{path / file.name}: has {sizes.get(file.name)} bytes, not {file.size} as written")


def _from(slices: Mapping[str, Slice]) -> Blocks:
    """The live tensors, fetched one by one."""
    return lambda shard: (raw_bytes(slices[offer.name].tensor) for offer in shard.offers)


def _until(given_up: threading.Event, blocks: Blocks) -> Blocks:
    """Blocks that end in an error once nobody wants them any more."""

    def parts(shard: Shard) -> Iterator[memoryview]:
        for block in blocks(shard):
            for start in range(0, len(block), 16 << 20):
                if given_up.is_set():
                    raise CheckpointError("given up")
                yield block[start : start + (16 << 20)]

    return parts


def _failing(error: Exception) -> Callable[[], list[FileRecord]]:
    def run() -> list[FileRecord]:
        raise error

    return run


def _give_up(jobs: list[_Job], rank: int) -> None:
    """The mesh is gone and its save can't end any more: threads stop, and what they wrote does not count."""
    for job in jobs:
        job.given_up.set()
        if rank == 0:
            generation.abandon(job.path, even_committed=False)
