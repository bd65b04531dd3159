"""One rank as an actor: builds its trainer, runs segments of steps, saves, leaves. It holds no policy.

The default concurrency group does the work, one call at a time; a call to `run` lasts many steps, so that no Ray call
stands between two steps. The group `ctl` answers at any time, even while a collective hangs: status, drain, request, stacks.

A request (stop, checkpoint) reaches one rank. It rides the all-reduce of the next step as a bit, so that all ranks see it
after the same step and end their segment there.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from enum import IntFlag
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import ray
import torch
import torch.distributed as dist
from ray.util.placement_group import remove_placement_group
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from raytron.actors.control import control
from raytron.actors.exhausted import where_exhausted
from raytron.actors.keeper import fetch_through
from raytron.actors.lease import Lease, ask_for, exit_now
from raytron.actors.lines import Line, LineTo
from raytron.actors.network import bind_to, cut
from raytron.actors.seat import Seat
from raytron.actors.versions import Versions, versions
from raytron.checkpoint.gather import Fetch
from raytron.checkpoint.sources import MemoryGeneration
from raytron.config import LearningRateConfig
from raytron.errors import CheckpointError, GuardError, OutOfMemoryError, WorkerError
from raytron.observe.busy import Busy, BusyClock
from raytron.observe.records import Record
from raytron.parallel.mesh import Mesh, abort_world, close_world, open_world
from raytron.plan.mesh import MeshShape
from raytron.plan.plan import Plan
from raytron.training.guard import Rollback

BACKEND = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
IDLE = "waiting"
WAITING_IN = os.path.join("torch", "distributed")
PHASES = {"samples": "reading its samples", "forward": "forward and backward"}  # of a step, in words
FREE_PEERS_S = 0.2  # for a rank's own error to reach the controller before those of the ranks that wait for it
PEER_WORDS = ("gloo", "nccl", "connection reset", "connection closed", "broken pipe", "store", "socket")


class Request(IntFlag):
    """What a run can be asked for while it runs."""

    NONE = 0
    STOP = 1
    CHECKPOINT = 2
    PAUSE = 4  # end the segment: the controller has something to do


class PeerError(WorkerError):
    """A worker failed because it lost touch with another one: a consequence, not a cause."""


class TrainerLike(Protocol):
    """What a worker asks of a trainer; `raytron.training.trainer.Trainer` is the one, tests bring another."""

    step: int
    phase: str
    retrace: bool
    clock: BusyClock

    def train_step(self, request: int = 0) -> Record | None: ...
    def settle(self) -> Record | None: ...
    def evaluate(self) -> Record: ...
    def save(self, directory: Path | str) -> Path: ...
    def begin_save(self, directory: Path | str) -> Path | None: ...
    def settle_saves(self) -> None: ...
    def reports(self) -> list[Record]: ...
    def skip(self, steps: Iterable[int]) -> None: ...
    def retune(self, lr: LearningRateConfig) -> None: ...
    def load(self, generation: Path | str) -> None: ...
    def restore(self, generation: MemoryGeneration, node: str, fetch: Fetch) -> None: ...
    def share_reads(self, folder: Path | str, epoch: int, here: Collection[int]) -> None: ...
    def end_reads(self) -> None: ...
    def open_replicas(self, folder: Path | str, epoch: int, known: Callable[[], int] | None = None) -> None: ...
    def close_replicas(self) -> None: ...
    def park(self) -> Path: ...


OpenTrainer = Callable[[Plan, Mesh, Path], TrainerLike]


class Facts(NamedTuple):
    """Where a worker lives."""

    host: str
    ip: str
    node_id: str
    pid: int
    gpu: str | None  # the id of its device on the node
    device_name: str | None
    versions: Versions
    sees: bool  # whether it sees the file that it was asked about


@dataclass(frozen=True)
class Orders:
    """What a rank needs to take its place in one epoch of a mesh."""

    plan: Plan
    rank: int
    epoch: int  # every rebuilt mesh has a number of its own: nothing from a dead one counts
    store: tuple[str, int]  # host and port of the rendezvous store
    dataset: Path
    generation: Path | None  # where to go on from, if not from memory; None: from the beginning
    device: str
    nodes: tuple[str, ...]  # the ids of the nodes of all ranks
    folder: Path | None  # where its segments go; None: it writes none
    keepers: Mapping[str, Any]  # the way to segments on other nodes, by their ids
    retrace: bool  # whether comparisons of replicas tell of each rank's own gradients, too
    skip: tuple[int, ...]  # steps that use up their samples and change nothing: those that the run was rolled back for
    seats: tuple[Seat, ...]  # of the whole gang
    line: LineTo | None  # to the controller

    @property
    def node(self) -> str:
        """The id of the node of this rank."""
        return self.nodes[self.rank]

    @property
    def here(self) -> list[int]:
        """The ranks on this node, this one included."""
        return [rank for rank, node in enumerate(self.nodes) if node == self.node]


class Beat(NamedTuple):
    """A sign of life: what a rank does, for how many seconds, and whether it waits for other ranks."""

    step: int | None  # committed; None: not built
    doing: str
    seconds: float
    waits: bool
    records: list[Record]  # of rank 0: the steps that the controller does not know yet
    reports: list[Record]  # of rank 0: how checkpoints have ended
    busy: list[Busy]  # for how long it worked in its newest steps


class Built(NamedTuple):
    """Where a rank stands after it was built. problem: why it keeps no copies in memory, though it was to."""

    step: int
    problem: str | None


class Left(NamedTuple):
    """What a rank leaves behind. records: of steps that the controller may not know; reports: of rank 0, of checkpoints."""

    parked: bool
    why_not: str
    records: list[Record]
    reports: list[Record]


class Standing(NamedTuple):
    """What a worker tells a controller that was started again. orders: the last ones; None: it never had a rank."""

    number: int
    seat: Seat
    facts: Facts
    orders: Orders | None
    free: bool  # it is of no mesh, and does nothing


class Reached(NamedTuple):
    """Where a segment ended, and what the ranks were asked for."""

    step: int
    request: int


class Worker:
    """A rank. `open_trainer` is given once; a worker may be built many times, after others were lost."""

    def __init__(
        self,
        number: int,
        open_trainer: OpenTrainer,
        seat: Seat,
        controller: str,
        lease_s: float,
        line: LineTo | None = None,
    ):
        """controller: the name of the actor that it works for; lease_s: how long it goes on without it; line: see
        `raytron.actors.lines`."""
        self.number, self.seat = number, seat
        self._line = None if line is None else Line(line, worker_name(number))
        self._orders: Orders | None = None
        self._lease = Lease(ask_for(controller), lease_s, self._end)
        self.rank, self.shape = -1, MeshShape()
        self._open_trainer = open_trainer
        self._trainer: TrainerLike | None = None
        self._mesh: Mesh | None = None
        self._request = Request.NONE
        self._records: deque[Record] = deque()
        self._known = 0  # the newest step of which the controller has a record
        self._doing = IDLE
        self._since = time.monotonic()
        self._thread = 0  # that does the work
        self._leaving = threading.Lock()

    def __repr__(self) -> str:
        return f"Worker({self.number})" if hasattr(self, "number") else "Worker(not started)"

    # ---- the work, one call at a time

    def build(self, orders: Orders, memory: MemoryGeneration | None = None) -> Built:
        """Joins the mesh of an epoch, opens its trainer, and goes on from memory or a generation."""
        self.rank, self.shape, self._orders = orders.rank, orders.plan.mesh, orders
        if orders.line is not None and (self._line is None or self._line.to != orders.line):
            self._line = Line(orders.line, worker_name(self.number))  # the controller was started again
        self._drop()
        config = orders.plan.config
        with self._telling("building"):
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            torch.set_num_threads(config.cluster.threads_per_worker or max(1, cores // len(orders.here)))
            bind_to(ray.util.get_node_ip_address())
            timeout = timedelta(seconds=config.cluster.timeout_s)
            store = TCPStore(*orders.store, is_master=False, timeout=timeout)
            fresh = PrefixStore(f"epoch-{orders.epoch}", store)
            world = orders.plan.mesh.world
            open_world(fresh, self.rank, world, BACKEND[orders.device], config.cluster.timeout_s)
            device = torch.device("cuda", 0) if orders.device == "cuda" else torch.device("cpu")
            if orders.device == "cuda":
                torch.cuda.set_device(device)
            self._mesh = Mesh(self.shape, self.rank, device)
            trainer = self._open_trainer(orders.plan, self._mesh, orders.dataset)
        if memory is not None:
            with self._telling(f"restoring step {memory.step} from memory"):
                trainer.restore(memory, orders.node, fetch_through(orders.keepers))
        elif orders.generation is not None:
            with self._telling(f"loading {orders.generation.name}"):
                trainer.load(orders.generation)
        trainer.skip(orders.skip)
        trainer.retrace = orders.retrace
        if orders.folder is not None:
            trainer.share_reads(orders.folder, orders.epoch, orders.here)
        problem = self._open_replicas(trainer, orders)
        self._trainer = trainer
        return Built(trainer.step, problem)

    def _open_replicas(self, trainer: TrainerLike, orders: Orders) -> str | None:
        """Keeps copies of the state in memory from here on; why it does not, where there is no room."""
        if orders.folder is None:
            return None
        with self._telling("copying the state into memory"):
            try:
                self._known = trainer.step
                trainer.open_replicas(orders.folder, orders.epoch, lambda: self._known)
            except CheckpointError as error:  # on all ranks alike
                return str(error)
        return None

    def run(self, stop: int) -> Reached:
        """Trains until step `stop` is committed, or a request has reached all ranks."""
        trainer = self._built()
        request = 0
        while trainer.step < stop and not request:
            with self._telling(f"step {trainer.step + 1}"):
                record = trainer.train_step(int(self._request))
            request = self._note(record)
        with self._telling(f"step {trainer.step}"):
            record = trainer.settle()
        return Reached(trainer.step, request | self._note(record))

    def _note(self, record: Record | None) -> int:
        """Keeps a step's record for the controller; what the ranks were asked for at that step."""
        if record is None:
            return 0
        request = int(record.pop("request", 0))
        self._request &= ~Request(request)
        self._records.append(record)
        return request

    def evaluate(self) -> Record:
        """Loss on the validation batches; together with all ranks."""
        with self._telling("evaluation"):
            return self._built().evaluate()

    def save(self, directory: Path, wait: bool) -> None:
        """Writes a generation; together with all ranks. Beats report how it ended. wait: until it is committed."""
        with self._telling("saving"):
            trainer = self._built()
            if wait:
                trainer.save(directory)
            else:
                trainer.begin_save(directory)

    def settle(self) -> None:
        """Waits for the checkpoint that is under way; together with all ranks."""
        with self._telling("saving"):
            self._built().settle_saves()

    def retune(self, lr: LearningRateConfig) -> None:
        """Another learning rate, from the next step on; the same call on all ranks, between two segments."""
        self._built().retune(lr)
        if self._orders is not None:
            self._orders = replace(self._orders, plan=self._orders.plan.retuned(lr))

    def leave(self, park: bool = False, finish: bool = False) -> Left:
        """Leaves the mesh and drops the trainer; the process stays, ready to be built again.

        park: first write the state into memory, for whoever goes on from it. finish: before that, together with all ranks,
        end the checkpoint that is under way; where one of them is lost meanwhile, it is given up.
        """
        if finish and self._trainer is not None:
            with contextlib.suppress(Exception):
                self._trainer.settle_saves()
        parked, why_not, records = False, "", list(self._records)
        reports = self._trainer.reports() if self._trainer is not None and self.rank == 0 else []
        if park and self._trainer is not None:
            try:
                self._trainer.park()
                parked = True
            except CheckpointError as error:
                why_not = str(error)
        self._drop()
        return Left(parked, why_not, records, reports)

    # ---- control, at any time

    @control
    def describe(self, witness: Path | None = None) -> Facts:
        """Where this worker lives, what it runs, and whether it sees a file that the controller wrote."""
        ids = ray.get_gpu_ids()
        gpu = str(ids[0]) if ids else None
        node = ray.get_runtime_context().get_node_id()
        name = torch.cuda.get_device_name(0) if gpu is not None and torch.cuda.is_available() else None
        ip = ray.util.get_node_ip_address()
        sees = witness is None or Path(witness).exists()
        return Facts(socket.gethostname(), ip, node, os.getpid(), gpu, name, versions(), sees)

    @control
    def stand(self, witness: Path) -> Standing:
        """What a controller that was started again has to know of this worker."""
        free = self._trainer is None and self._doing == IDLE
        return Standing(self.number, self.seat, self.describe(witness), self._orders, free)

    @control
    def beat(self, after: int, request: int) -> Beat:
        """A sign of life, with the records of steps after `after`; earlier ones are forgotten.

        request: what all ranks shall hear of with the next step.
        """
        self._request |= Request(request)
        self._known = after
        while self._records and self._records[0]["step"] <= after:
            self._records.popleft()
        step = None if self._trainer is None else self._trainer.step
        seconds = 0.0 if self._doing == IDLE else time.monotonic() - self._since
        first = self.rank == 0
        reports = self._trainer.reports() if first and self._trainer is not None else []
        busy = (
            [each for each in list(self._trainer.clock.seen) if each.step > after] if self._trainer is not None else []
        )
        return Beat(step, self._doing, seconds, self._waits(), list(self._records) if first else [], reports, busy)

    @control
    def free(self, gone: Collection[str]) -> None:
        """Frees this rank where it waits for nodes that are gone, by their addresses. Of gloo; of NCCL see `abandon`."""
        cut(gone)

    @control
    def abandon(self, epoch: int) -> None:
        """The mesh of an epoch is given up: frees this rank where it waits in NCCL."""
        with self._leaving:
            if self._orders is not None and self._orders.epoch == epoch:
                abort_world(self._mesh)

    @control
    def end(self, pid: int) -> None:
        """Kills another worker of this node."""
        end_process(pid)

    @control
    def stacks(self) -> str:
        """The stack of every thread of this process."""
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        parts = [f"rank {self.rank} ({self!r}) is at {self._doing}"]
        for ident, frame in sys._current_frames().items():
            parts.append(f"thread {names.get(ident, ident)}\n" + "".join(traceback.format_stack(frame)))
        return "\n".join(parts)

    # ---- inside

    def _end(self) -> None:
        """The controller is gone for good: gives the place back, and with it those of all who share the group."""
        with contextlib.suppress(Exception):
            remove_placement_group(self.seat.group)
        exit_now()

    def _waits(self) -> bool:
        """Whether this rank is held up by others, not by itself: in a step, or in a collective of another kind."""
        frame = sys._current_frames().get(self._thread)
        inside = frame is not None and WAITING_IN in frame.f_code.co_filename
        return inside or (self._mesh is not None and self._mesh.waiting.held)

    def _built(self) -> TrainerLike:
        if self._trainer is None:
            raise WorkerError(self.rank, "not built", "this worker has no trainer yet")
        return self._trainer

    def _drop(self) -> None:
        if self._trainer is not None:
            self._trainer.end_reads()
            self._trainer.close_replicas()
        self._trainer, self._mesh, self._request, self._doing = None, None, Request.NONE, IDLE
        self._records.clear()
        gc.collect()
        with self._leaving:
            close_world()

    @contextmanager
    def _telling(self, doing: str) -> Iterator[None]:
        """Says what this rank does; an exception becomes a WorkerError, and frees the peers that wait for this rank."""
        self._doing, self._since, self._thread = doing, time.monotonic(), threading.get_ident()
        try:
            yield
        except (Rollback, GuardError):  # on all ranks alike
            raise
        except Exception as error:
            failure = self._failure(error, f"stage {self.shape.coords(self.rank).pp}, {doing}")
            threading.Thread(target=self._free_peers, args=(self._orders,), daemon=True).start()
            raise failure from None
        self._doing, self._since = IDLE, time.monotonic()

    def _failure(self, error: Exception, where: str) -> WorkerError:
        cause, trace = f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error))
        exhausted = where_exhausted(error)
        if exhausted is None:
            kind = PeerError if is_peer_failure(error) else WorkerError
            return kind(self.rank, where, cause, trace)
        phase = "" if self._trainer is None else PHASES.get(self._trainer.phase, self._trainer.phase)
        where = f"{where}, {phase}" if phase else where
        return OutOfMemoryError(self.rank, where, cause, trace, host=exhausted == "host")

    def _free_peers(self, orders: Orders | None) -> None:
        """Closing the groups of a mesh makes gloo raise in the ranks that wait in them. orders: of that mesh; by the time
        this rank may be of another one."""
        time.sleep(FREE_PEERS_S)
        with self._leaving:
            if self._orders is orders:
                if self._trainer is not None:
                    self._trainer.end_reads()
                close_world()


def worker_name(number: int) -> str:
    """What a worker calls itself on its line."""
    return f"worker-{number}"


def end_process(pid: int) -> None:
    """Kills a process of Ray's on this node, whatever state it is in; nothing where it is gone."""
    with contextlib.suppress(OSError):
        if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::"):
            os.kill(pid, signal.SIGKILL)


def is_peer_failure(error: BaseException | None) -> bool:
    """Whether an exception, or one that it came from, is a lost connection or a collective that timed out."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, dist.DistError | ConnectionError):
            return True
        text = str(error).lower()
        if isinstance(error, RuntimeError) and any(word in text for word in PEER_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


WorkerActor: Any = ray.remote(concurrency_groups={"ctl": 4})(Worker)
