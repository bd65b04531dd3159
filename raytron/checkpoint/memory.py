"""The memory tier: every few steps each rank copies its part of the state into a segment on its node's tmpfs.

    step     k              k+1             k+2
    rank     ─ update ─┬──── update ─┬────── update ─┬──
    buffer 0           S k           ┆               S k+2          two segments in turn: while one is written
    buffer 1                         S k+1           ┆              the other is whole
    partner              ◄─ pull ─►  ▲
                                     └ no rank takes part in the sum that commits k+1 before its S k is on the partner

So a process that dies leaves the step that it had committed, or the one before, and the same step is whole on all ranks:
whoever has committed k+1 knows that everybody had written k, and that all partners hold it. What several ranks hold alike
is dealt to one of them, as a checkpoint does it, once for a mesh. When a world breaks, survivors *park*: they write what
they hold at the step at which they stand, whoever it had been dealt to.

A segment carries the number of its epoch: the life of one mesh from one build or load to the next. In one epoch a step is
written once; who goes back to an older step begins another epoch.

On a GPU the buffers are page-locked: the copy runs on a stream of its own beside the next forward, the next update waits
for it on the device, and a thread makes the digest. (Written for real; not run yet on a GPU.)
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import xxhash

from raytron.checkpoint import folder as folders
from raytron.checkpoint.coverage import Box
from raytron.checkpoint.deal import deal as deal_out
from raytron.checkpoint.files import to_json
from raytron.checkpoint.peers import Peers
from raytron.checkpoint.planner import offer
from raytron.checkpoint.pulled import Pulled
from raytron.checkpoint.segment import SUFFIX, Inventory, Origin, Part, SegmentFile
from raytron.checkpoint.store import Hook, no_hook
from raytron.errors import CheckpointError
from raytron.parallel.layout import Slice

FACTS_ROOM = 1 << 18  # bytes by which facts may grow
NOTES_ROOM = 1 << 18  # bytes of all notes beside one step
PATIENCE_S = 5.0  # for a partner that has a segment to pull, and so much more for its bytes:
SLOWEST = 50e6  # bytes a second
BUFFERS = 2
Notes = Sequence[bytes]  # JSON objects, each in one line
log = logging.getLogger(__name__)


def segment_name(epoch: int, rank: int, buffer: int | str) -> str:
    """The file name of one buffer of one rank in one epoch."""
    return f"{epoch:06d}-{rank:05d}-{buffer}{SUFFIX}"


# ---- who writes what


class Holding(NamedTuple):
    """A part that this rank holds, and all ranks that hold it."""

    part: Part
    holders: tuple[int, ...]
    dealt: bool  # this rank is the one that writes it


class Deal(NamedTuple):
    """What a rank holds of a mesh's state, and what the ranks hold together."""

    held: tuple[Holding, ...]
    inventory: Inventory

    def parts(self) -> list[Part]:
        """What fell to this rank."""
        return [held.part for held in self.held if held.dealt]

    def parts_among(self, rank: int, ranks: Collection[int] | None) -> list[Part]:
        """What `rank` (this one) writes if only `ranks` do; None: it counts on nobody."""
        if ranks is None:
            return [held.part for held in self.held]
        return [held.part for held in self.held if _writer(held, {*ranks, rank}) == rank]


def _writer(held: Holding, ranks: Collection[int]) -> int:
    """One of the holders among `ranks`, the same whoever asks, spread evenly over parts."""
    able = [rank for rank in held.holders if rank in ranks]
    return able[xxhash.xxh3_64_intdigest(f"{held.part.name}{held.part.box}".encode()) % len(able)]


def deal(slices: Mapping[str, Slice], group: dist.ProcessGroup | None = None) -> Deal:
    """Deals the rectangles of a state to the ranks that hold them. Collective over `group`, once for a mesh.

    Raises CheckpointError on every rank where the slices do not cover their tensors exactly.
    """
    peers = Peers(group)
    what = "the state can't be kept in memory"
    offered = peers.attempt(what, lambda: offer(slices))
    try:
        dealt_out = deal_out(offered)
    except CheckpointError as error:
        raise CheckpointError(f"{what}: {error}") from error
    mine = {(each.name, each.box) for shard in dealt_out.shards[peers.rank] for each in shard.offers}
    holders: dict[tuple[str, Box], list[int]] = defaultdict(list)
    for rank, said in enumerate(offered):
        for each in said.offers:
            holders[each.name, each.box].append(rank)
    inventory = Inventory.of(dealt_out.tensors)
    held = []
    for each in offered[peers.rank].offers:
        nowhere = 0 in each.shape  # a tensor without elements has no rectangle, and everybody says that it exists
        if each.bytes or nowhere:
            dealt = nowhere or (each.name, each.box) in mine
            held.append(Holding(Part(*each), tuple(holders[each.name, each.box]), dealt))
    return Deal(tuple(held), inventory)


# ---- writing


class Replicas:
    """The segments of one rank in one epoch.

    every: steps between two segments; None: none, only `park`. hook: told "replicate" before a segment is written,
    "replicated" before it counts.
    """

    def __init__(
        self,
        folder: Path | str,
        epoch: int,
        slices: Mapping[str, Slice],
        facts: dict[str, Any],
        *,
        mesh: str = "",
        group: dist.ProcessGroup | None = None,
        every: int | None = 1,
        device: torch.device | None = None,
        hook: Hook = no_hook,
    ):
        """slices: the live state; its tensors stay where they are as long as this lives. Collective over `group`.

        Raises CheckpointError on every rank where there is no room, or the slices don't cover their tensors.
        """
        peers = Peers(group)
        self.folder, self.slices, self.every, self.hook = Path(folder), dict(slices), every, hook
        self.deal = deal(slices, group)
        self.origin = Origin(epoch, peers.rank, peers.size, mesh, self.deal.inventory)
        self.step: int | None = None  # of the newest segment that was begun
        self._facts_bytes = len(to_json(facts)) + FACTS_ROOM
        self._copies = _Copies(device or torch.device("cpu"))
        parts = self.deal.parts()
        self._sources = [self.slices[part.name].tensor.detach() for part in parts]
        self._files: list[SegmentFile] = []
        peers.attempt("no segments for the state", lambda: self._make(parts, BUFFERS if every else 0))
        self._pulled = Pulled(self.folder, epoch, peers.rank)

    def _make(self, parts: Sequence[Part], buffers: int) -> None:
        folders.use(self.folder)
        for buffer in range(buffers):
            path = self.folder / segment_name(self.origin.epoch, self.origin.rank, buffer)
            file = SegmentFile(path, self.origin, parts, self._facts_bytes, NOTES_ROOM)
            self._copies.lock(file)
            self._files.append(file)

    @property
    def bytes(self) -> int:
        """Of this rank's part of the state, in one segment."""
        return self._files[0].data_bytes if self._files else 0

    @property
    def newest(self) -> Path:
        """The segment that was written last; needs `every`."""
        return self._files[-1].path

    def due(self, step: int) -> bool:
        """Whether a segment is to be written at a committed step."""
        return bool(self.every) and step % int(self.every or 1) == 0 and step != self.step

    def write(self, step: int, facts: dict[str, Any], notes: Notes = ()) -> None:
        """Writes the state, which all ranks have committed as that of `step`. On a GPU it is under way when this returns:
        call `before_update` before the state changes, and `wait` before the sum that commits the next step.

        notes: JSON objects, each in one line, that this rank alone keeps beside it, together at most NOTES_ROOM bytes.
        """
        self._copies.finish()
        file = self._files[0]
        self._files.append(self._files.pop(0))
        self.step = step
        self.hook("replicate")
        file.begin()
        self._copies.start(file.targets, self._sources, lambda: self._publish(file, step, facts, notes))

    def _publish(self, file: SegmentFile, step: int, facts: dict[str, Any], notes: Notes) -> None:
        self.hook("replicated")
        try:
            file.publish(step, facts, notes)
        except (CheckpointError, ValueError, TypeError) as error:  # training goes on; the segment before still counts
            log.error("the state of step %d is not in memory: %s", step, error)
            self._files.remove(file)
            self._files.insert(0, file)  # the next one goes there, not over the one that counts
            self.step = None

    def before_update(self) -> None:
        """The state is about to change: the device first finishes copying it."""
        self._copies.hold_device()

    def wait(self) -> None:
        """Returns when the newest segment is whole and, if a partner pulls this rank's segments, on the partner. A partner
        that says nothing for long is not waited for again until it says something."""
        self._copies.finish()
        if self.step is not None:
            self._pulled.wait(self.step, PATIENCE_S + self.bytes / SLOWEST)

    def park(
        self,
        slices: Mapping[str, Slice],
        step: int,
        facts: dict[str, Any],
        ranks: Collection[int] | None = None,
        notes: Notes = (),
    ) -> Path:
        """Writes the state of `step` into a segment of its own and returns its path. No collective.

        ranks: those that park, between which is dealt what several hold; None: everything that this rank holds. notes: as
            of `write`.
        Raises CheckpointError where there is no room.
        """
        parts = self.deal.parts_among(self.origin.rank, ranks)
        path = self.folder / segment_name(self.origin.epoch, self.origin.rank, "parked")
        file = SegmentFile(path, self.origin, parts, self._facts_bytes, NOTES_ROOM)
        for target, part in zip(file.targets, parts, strict=True):
            target.copy_(slices[part.name].tensor.detach())
        file.publish(step, facts, notes)
        return path

    def close(self) -> None:
        """Lets go of the buffers; the files stay. What was under way ends first."""
        try:
            self._copies.close()
        except CheckpointError as error:
            log.warning("a segment was not finished: %s", error)
        self._files.clear()


class _Copies:
    """Copies into segments: at once from the host's memory, beside the work from a device's."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream: Any = None
        self._copied: Any = None
        self._under_way: Future[None] | None = None
        self._locked: list[int] = []
        self._thread: ThreadPoolExecutor | None = None
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="segments")

    def lock(self, file: SegmentFile) -> None:
        """Page-locks a segment, so that copies into it run beside the work; without that they are only slower."""
        if self.stream is None or not file.targets:
            return
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        begin = file.targets[0].data_ptr()
        if int(runtime.cudaHostRegister(begin, file.data_bytes, 0)) == 0:
            self._locked.append(begin)
        else:
            log.warning("%s can't be page-locked: copies of the state will hold up the steps", file.path)

    @torch.no_grad()
    def start(self, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], then: Callable[[], None]) -> None:
        if self.stream is None or self._thread is None:
            if targets:
                torch._foreach_copy_(list(targets), list(sources))
            then()
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=True)
            copied = self.stream.record_event()
        self._copied = copied

        def finish() -> None:
            copied.synchronize()
            then()

        self._under_way = self._thread.submit(finish)

    def hold_device(self) -> None:
        """The device's current stream waits for the copies."""
        if self._copied is not None:
            torch.cuda.current_stream(self.device).wait_event(self._copied)
            self._copied = None

    def finish(self) -> None:
        """Waits for what is under way; raises what it raised."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def close(self) -> None:
        try:
            self.finish()
        finally:
            if self._thread is not None:
                self._thread.shutdown()
            for begin in self._locked:
                torch.cuda.cudart().cudaHostUnregister(begin)  # type: ignore[no-untyped-call]
            self._locked.clear()
