"""A keeper: one actor on each node that owns the run's folder in that node's memory.

    node A   ranks 0, 1 ─ write ─► folder A   keeper A ── pulls ──► copies of B's segments
    node B   ranks 2, 3 ─ write ─► folder B   keeper B ── pulls ──► copies of A's segments        (a ring over nodes)

It outlives the ranks: when they are lost it tells what is there (`held`), and gives the bytes that other nodes need
(`read`), both only of its own folder. It follows a partner node, so that a node that is lost leaves its ranks' steps with
another one; the ranks wait for that (`raytron.checkpoint.pulled`). The controller makes the keepers, one `spawn` for each
node, tells them whom to follow before the ranks of an epoch are built, and closes them when the run ends.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import ray
from numpy.typing import NDArray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytron.actors.cluster import NAMESPACE
from raytron.actors.control import control
from raytron.actors.drain import listen
from raytron.actors.lease import Lease, ask_for, exit_now
from raytron.actors.lines import Line, LineTo
from raytron.actors.metadata import Kind
from raytron.actors.notices import Watcher
from raytron.checkpoint import folder as folders
from raytron.checkpoint.copies import Follower, Found, News, piece
from raytron.checkpoint.files import is_plain_name
from raytron.checkpoint.folder import COPIES, memory_folder
from raytron.checkpoint.gather import Fetch, Window, read_windows
from raytron.checkpoint.sources import Survey, survey
from raytron.errors import CheckpointError

F = TypeVar("F", bound=Callable[..., object])
NEWS_S = 2.0  # that a question for news may wait
READ_S = 60.0  # for some bytes from another node


def _in(group: str) -> Callable[[F], F]:
    """Marks a method of an actor as one of a concurrency group."""

    def mark(function: F) -> F:
        return cast(F, ray.method(concurrency_group=group)(function))

    return mark


class Place(NamedTuple):
    """Where a keeper keeps."""

    node: str
    folder: str


class Keeper:
    """Owns the folder of a run on one node. folder: None: on that node's tmpfs. lease: the name of the controller that it
    works for, and for how many seconds it goes on without it; None: whoever made it closes it."""

    def __init__(self, run: str, node: str, folder: str | None = None, lease: tuple[str, float] | None = None):
        self.node = node
        self.folder = memory_folder(run, node) if folder is None else Path(folder)
        self._lock = threading.Lock()
        self._news: News | None = None
        self._follower: Follower | None = None
        self._watcher: Watcher | None = None
        self._line: Line | None = None
        folders.sweep(self.folder.parent)
        folders.use(self.folder)
        self._lease = None if lease is None else Lease(ask_for(lease[0]), lease[1], self._leave)

    def place(self) -> Place:
        """The name of its node, and the folder in which the ranks there write."""
        return Place(self.node, str(self.folder))

    @control
    def listen(self, kind: Kind) -> None:
        """From here on tells Ray of what this node's cloud says about its end."""
        if kind != "none" and self._watcher is None:
            self._watcher = listen(kind, self.node)

    @control
    def hold(self, line: LineTo, name: str) -> None:
        """Opens a line to the controller, under a name."""
        old, self._line = self._line, Line(line, name)
        if old is not None:
            old.close()

    # ---- after a loss

    @_in("ctl")
    def held(self, digests: bool = True) -> Survey:
        """All complete segments here: of this node's ranks, and copies. digests: every byte is checked."""
        own, copies = (survey(folder, self.node, digests=digests) for folder in (self.folder, self.folder / COPIES))
        return Survey(own.held + copies.held, own.passed_over + copies.passed_over)

    @_in("read")
    def read(self, path: str, seal: str, windows: Sequence[Window]) -> NDArray[np.uint8]:
        """The windows of a segment of this keeper, one after another. Raises CheckpointError."""
        where = Path(path)
        if where.parent not in (self.folder, self.folder / COPIES) or not is_plain_name(where.name):
            raise CheckpointError(f"{path[:200]!r} is no segment of the keeper of {self.folder}")
        return read_windows(where, seal, windows)

    @_in("ctl")
    def forget(self, before: int) -> None:
        """Removes what epochs before `before` left here, copies too: call it when all ranks have written in a later one."""
        folders.forget(self.folder, before)

    # ---- copies on a partner

    @_in("ctl")
    def offer(self, epoch: int, world: int) -> None:
        """A partner is about to follow the ranks of an epoch; from here on they wait for it."""
        with self._lock:
            self._end_offer()
            self._news = News(self.folder, epoch, world)
            self._news.board.reset()

    @_in("ctl")
    def alone(self) -> None:
        """The partner that followed is gone: the ranks wait for it no longer."""
        with self._lock:
            self._end_offer(leave=True)

    @_in("ctl")
    def follow(self, partner: Any, epoch: int, world: int) -> None:
        """Copies what the ranks on the partner's node write in an epoch of `world` ranks; ends what it followed before. The
        ranks of the partner have to be built after this returns. Raises RayActorError where the partner is dead."""
        self.unfollow()
        ray.get(partner.offer.remote(epoch, world))
        with self._lock:
            self._follower = Follower(self.folder, epoch, _Partner(partner))

    @_in("ctl")
    def unfollow(self) -> None:
        """Ends copying; the copies stay."""
        with self._lock:
            if self._follower is not None:
                self._follower.stop()
            self._follower = None

    @_in("news")
    def news(self, epoch: int, got: list[Found]) -> list[Found]:
        """What is whole here and not among `got`, which is on the partner. Raises CheckpointError for a dead epoch."""
        news = self._news
        if news is None or news.epoch != epoch:
            raise CheckpointError(f"epoch {epoch} is not offered here")
        return news.wait(got, NEWS_S)

    @_in("read")
    def piece(self, name: str, seal: str, first: int, count: int) -> NDArray[np.uint8]:
        """Some bytes of a segment of this node's ranks. Raises CheckpointError where it has been written again."""
        return piece(self.folder, name, seal, first, count)

    def _end_offer(self, *, leave: bool = False) -> None:
        if self._news is not None:
            self._news.over = True
            if leave:
                self._news.board.leave()
        self._news = None

    def _leave(self) -> None:
        self.close()
        exit_now()

    def close(self) -> None:
        """The run is over: the folder goes."""
        if self._lease is not None:
            self._lease.close()
        if self._watcher is not None:
            self._watcher.close(timeout_s=0)
        self.unfollow()
        with self._lock:
            self._end_offer(leave=True)
        folders.remove(self.folder)


KeeperActor: Any = ray.remote(
    num_cpus=0, max_restarts=0, concurrency_groups={"ctl": 4, "read": 4, "news": 2}
)(Keeper)  # fmt: skip


class _Partner:
    """Another node's keeper as a follower asks it."""

    def __init__(self, actor: Any):
        self.actor = actor

    def news(self, epoch: int, got: Sequence[Found]) -> list[Found]:
        found: list[Found] = ray.get(self.actor.news.remote(epoch, list(got)))
        return found

    def piece(self, name: str, seal: str, first: int, count: int) -> NDArray[np.uint8]:
        data: NDArray[np.uint8] = ray.get(self.actor.piece.remote(name, seal, first, count))
        return data


# ---- for the controller


def spawn(
    run: str,
    node: str,
    *,
    label: str | None = None,
    folder: str | None = None,
    name: str | None = None,
    lease: tuple[str, float] | None = None,
) -> Any:
    """The handle of a new keeper on the node with this id of Ray's.

    run: see `memory_folder`. label: what surveys call the node, if not its id; folder: if not on tmpfs; name: the actor's;
    lease: see `Keeper`: it then is a detached actor, which needs a name.

    A keeper that takes a dead one's place finds the folder as that one left it.
    """
    place = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
    options: dict[str, Any] = {"name": name, "namespace": NAMESPACE} if name else {}
    options |= {"lifetime": "detached"} if lease else {}
    return KeeperActor.options(scheduling_strategy=place, **options).remote(run, label or node, folder, lease)


def partners(nodes: Sequence[str]) -> dict[str, str]:
    """Who follows whom: a ring over the nodes; nobody where there is one node only. {follower: source}"""
    if len(nodes) < 2:
        return {}
    return {node: nodes[index - 1] for index, node in enumerate(nodes)}


def fetch_through(keepers: Mapping[str, Any]) -> Fetch:
    """The way to segments on other nodes, for `Trainer.restore`. keepers: by the name of their node."""

    def fetch(node: str, path: str, seal: str, windows: Sequence[Window]) -> NDArray[np.uint8]:
        if node not in keepers:
            raise CheckpointError(f"{path}: node {node} has no keeper")
        try:
            data: NDArray[np.uint8] = ray.get(keepers[node].read.remote(path, seal, list(windows)), timeout=READ_S)
        except ray.exceptions.RayTaskError as error:
            raise CheckpointError(str(error.cause)) from None
        except (ray.exceptions.RayError, TimeoutError) as error:
            raise CheckpointError(f"{path}: the keeper of node {node} gave nothing: {error}") from None
        return data

    return fetch


def _sweep(root: str | None) -> list[str]:
    return [str(gone) for gone in folders.sweep(Path(root) if root else memory_folder("", "").parent)]


_sweep_there: Any = ray.remote(num_cpus=0, max_retries=0)(_sweep)


def sweep(node: str, root: str | None = None) -> Callable[[], list[str]]:
    """Starts to remove, on a node that lives though its keeper may not, the folders of which no user lives; call the result
    to wait for it and learn which they were."""
    place = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
    call = _sweep_there.options(scheduling_strategy=place).remote(root)
    return lambda: ray.get(call)
