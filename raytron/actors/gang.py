"""The workers of a run: who lives, who sits where, who has which rank in this epoch, who waits as a spare.

    node A  [0] [1] [2] [3]        seats, in the order of ranks; each is a place in a bundle of a placement group
    node B  [4] [5] [6] [7]        a member is a worker on a seat
            rank 0 … 6      spare  `deal` gives ranks to members; those without one are spares

Bundle order promises nothing about neighbourhood: seats are numbered after the placement groups stand, by node address and
device id. The first placement makes one group for each smallest set of nodes that holds whole replicas; what is added
later, one for each node. Members are detached actors, and groups are detached, too: they outlive their controller, which
adopts them when Ray has started it again (`raytron.actors.adoption`).
"""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raytron.actors import placement
from raytron.actors.cluster import NAMESPACE, controller_name, free, living
from raytron.actors.lines import LineTo
from raytron.actors.seat import Seat, homes
from raytron.actors.versions import mismatches, versions
from raytron.actors.worker import Facts, Left, OpenTrainer, WorkerActor, end_process
from raytron.errors import ClusterError
from raytron.plan.mesh import MeshShape
from raytron.plan.plan import Plan
from raytron.training.open import open_trainer

PATIENCE_S = 10.0  # before a wait is explained
POLL_S = 0.5
LOOK_S = 0.1
ROOM_S = 3.0  # for a place that is free
AT_ONCE_S = 0.1  # for one that nobody is waiting for
DOUBT_S = 120.0  # for Ray to find that a node is dead that counts as lost; after that it is used again
ATTEMPTS = 3  # for a worker to start

Say = Callable[..., None]  # (kind of event, message, **facts)


@dataclass
class Member:
    """A worker that was made. facts: None while it starts."""

    number: int
    seat: Seat
    actor: Any
    asked: Any  # the call that brings its facts
    facts: Facts | None = None


@dataclass
class _Asked:
    """Places that were asked for and are not there yet. sets: the bundles of each group."""

    sets: list[list[placement.Bundle]]
    wanted: list[dict[str, float]]
    groups: list[Any]
    calls: list[Any]
    since: float


class Gang:
    """The workers of one run. `fill` makes those that are missing, `deal` gives them ranks, `drop` ends some."""

    def __init__(
        self, run: str, plan: Plan, say: Say, open_trainer: OpenTrainer = open_trainer, line: LineTo | None = None
    ):
        """line: to the controller; None: workers open none."""
        self.run, self.plan, self.say, self.line = run, plan, say, line
        self.config = plan.config.cluster
        assert plan.cluster is not None
        self.device = plan.cluster.device(self.config)
        self._open_trainer = open_trainer
        self._groups: list[Any] = []
        self._seats: list[Seat] = []
        self._made = itertools.count()
        self.members: dict[int, Member] = {}
        self.ranks: dict[int, Member] = {}
        self._retired: set[str] = set()  # nodes that will leave: nobody there gets a rank
        self._lost: dict[str, float] = {}  # nodes that count as lost, and since when
        self._asked: _Asked | None = None

    @property
    def workers(self) -> dict[int, Any]:
        """The actors that have a rank."""
        return {rank: member.actor for rank, member in self.ranks.items()}

    @property
    def facts(self) -> dict[int, Facts]:
        """Where the ranks live."""
        return {rank: member.facts for rank, member in self.ranks.items() if member.facts is not None}

    @property
    def ready(self) -> list[Member]:
        """Members that have started, on nodes that stay."""
        away = self._away()
        started = [member for member in self.members.values() if member.facts is not None]
        return [member for member in started if _facts(member).node_id not in away]

    @property
    def spares(self) -> list[Member]:
        """Members that have started and have no rank."""
        busy = {member.number for member in self.ranks.values()}
        return [member for member in self.ready if member.number not in busy]

    @property
    def seats(self) -> tuple[Seat, ...]:
        """All seats, taken or free."""
        return tuple(self._seats)

    # ---- more of them

    def adopt(self, ranks: Mapping[int, Member], spares: Iterable[Member], seats: Iterable[Seat]) -> None:
        """Takes in the members and the seats of a gang whose controller has died."""
        members = [*ranks.values(), *spares]
        known = {seat.number: seat for seat in (*seats, *(member.seat for member in members))}
        self._seats = [seat for _, seat in sorted(known.items())]
        self._groups = list({seat.group.id: seat.group for seat in self._seats}.values())
        self.members = {member.number: member for member in members}
        self.ranks = dict(ranks)
        self._made = itertools.count(max(self.members, default=-1) + 1)
        self._world = self.plan.mesh.world

    def fill(self, count: int, witness: Path) -> None:
        """Waits until `count` members are ready, making those that are missing. witness: a file that all have to see.

        Raises ClusterError where there is no room, workers die while they start, or versions differ.
        """

        def enough() -> bool:
            self.settle()
            return len(self.ready) >= count

        for _ in range(ATTEMPTS):
            self.start(count, witness)
            if enough():
                return
            calls = [member.asked for member in self.members.values() if member.facts is None]
            self._wait(calls, "workers not ready", f"{len(calls)} are starting and importing torch", enough)
            if enough():
                return
        raise ClusterError(f"workers died while they started, {ATTEMPTS} times in a row: see their logs in Ray")

    def start(self, count: int, witness: Path, *, wait: bool = True, room_s: float = AT_ONCE_S) -> None:
        """Makes members until there are `count`, without waiting for them to be ready. wait: for room on the cluster, else
        as many as there is room for within `room_s`; what is there later is used by the next call."""
        self._look_at_asked(0.0)
        ready = {member.number for member in self.ready}
        lacking = count - sum(member.facts is None or member.number in ready for member in self.members.values())
        if lacking > 0 and len(self._usable()) < lacking:
            self._place(lacking - len(self._usable()), wait, room_s)
        for seat in self._usable()[: max(0, lacking)]:
            number = next(self._made)
            actor = self._spawn(number, seat)
            self.members[number] = Member(number, seat, actor, actor.describe.remote(witness))

    def settle(self) -> list[Member]:
        """Looks who has started since; those who died are forgotten. Raises ClusterError where versions differ."""
        self._look_at_asked(0.0)
        starting = {member.asked: member for member in self.members.values() if member.facts is None}
        done = ray.wait(list(starting), num_returns=len(starting), timeout=0)[0] if starting else []
        new = []
        for call in done:
            member = starting[call]
            try:
                member.facts = ray.get(call)
                new.append(member)
            except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError):
                del self.members[member.number]
        self._check(new)
        return new

    def capacity(self) -> dict[str, int]:
        """How many members each node could have: those that it has, on free seats, and in what is free on it."""
        out = {node.node_id: node.shape.slots(self.config, self.device) for node in free()}
        held = [*(seat.home for seat in self._usable()), *(_facts(member).node_id for member in self.ready)]
        for node in held:
            out[node] = out.get(node, 0) + 1
        away = self._away()
        return {node: count for node, count in out.items() if node not in away}

    def on_nodes(self) -> list[int]:
        """How many members are ready on each node."""
        counts: dict[str, int] = {}
        for member in self._in_order(self.ready):
            node = _facts(member).node_id
            counts[node] = counts.get(node, 0) + 1
        return list(counts.values())

    def retire(self, node: str) -> None:
        """A node will leave: its members work on, but get no rank in another mesh."""
        self._retired.add(node)

    def lose(self, node: str) -> None:
        """A node is lost, whether or not Ray knows it: its members are given up, and nobody is put there."""
        self._lost[node] = time.monotonic()
        self.drop([member for member in self.members.values() if self.home(member) == node])

    def home(self, member: Member) -> str:
        """The id of the node that a member lives on, or starts on."""
        return member.facts.node_id if member.facts is not None else member.seat.home

    def _away(self) -> set[str]:
        """Nodes that are not counted on."""
        now = time.monotonic()
        return self._retired | {node for node, since in self._lost.items() if now - since < DOUBT_S}

    def ranks_on(self, nodes: Collection[str]) -> list[int]:
        """The ranks that live on some nodes."""
        return [rank for rank, facts in self.facts.items() if facts.node_id in nodes]

    def address(self, node: str) -> str:
        """The address of a node, by its id."""
        known = {str(each["NodeID"]): str(each["NodeManagerAddress"]) for each in ray.nodes()}  # the dead, too
        return known.get(node, node[:8])

    # ---- ranks

    def deal(self, mesh: MeshShape) -> None:
        """Gives the ranks of a mesh to ready members. Where the mesh is as large as before, who had a rank keeps it."""
        self._forget_dead_spares()
        ready = self._in_order(self.ready)
        if len(ready) < mesh.world:
            raise ClusterError(f"{mesh} needs {mesh.world} workers, and {len(ready)} are ready")
        alive = {member.number for member in ready}
        kept = {rank: member for rank, member in self.ranks.items() if member.number in alive}
        if mesh.world == self._world and kept:
            taken = {member.number for member in kept.values()}
            others = iter(member for member in ready if member.number not in taken)
            self.ranks = {rank: kept[rank] if rank in kept else next(others) for rank in range(mesh.world)}
        else:
            self.ranks = dict(enumerate(ready[: mesh.world]))
        self._world = mesh.world

    _world = 0  # of the mesh that was dealt last

    def _in_order(self, members: Iterable[Member]) -> list[Member]:
        """Members by node, in the order of their seats, and by device on a node."""
        members = list(members)
        first: dict[str, int] = {}
        for member in members:
            node = _facts(member).node_id
            first[node] = min(first.get(node, member.seat.number), member.seat.number)

        def key(member: Member) -> tuple[int, int, int]:
            gpu = _facts(member).gpu
            return first[_facts(member).node_id], int(gpu) if gpu and gpu.isdigit() else 0, member.seat.number

        return sorted(members, key=key)

    def _forget_dead_spares(self) -> None:
        calls = {member.actor.describe.remote(): member for member in self.spares}
        if calls:
            back, late = ray.wait(list(calls), num_returns=len(calls), timeout=2.0)
            self.drop([calls[call] for call in late] + [calls[call] for call in back if failed(call)])

    # ---- fewer of them

    def free(self, gone: Collection[str]) -> None:
        """Frees ranks that wait for nodes which are gone, by their addresses."""
        for member in self.ranks.values():
            member.actor.free.remote(gone)

    def abandon(self, epoch: int) -> None:
        """Frees ranks that wait on their devices for others of the mesh of an epoch, which is given up."""
        for member in self.ranks.values() if self.device == "cuda" else ():
            member.actor.abandon.remote(epoch)

    def call_back(self, park: bool, finish: bool, limit_s: float, meanwhile: Callable[[], None]) -> list[Left]:
        """All ranks leave their mesh; who does not within `limit_s` is killed. What those who do have left.

        park, finish: see `Worker.leave`. meanwhile: called while they are waited for, ten times a second; it may drop some.
        """
        calls = {member.actor.leave.remote(park, finish): member for member in self.ranks.values()}
        waiting, left, end = list(calls), [], time.monotonic() + limit_s
        while waiting and time.monotonic() < end:
            done, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=LOOK_S)
            for call in done:
                if failed(call):
                    self.drop([calls[call]])
                else:
                    left.append(ray.get(call))
            meanwhile()
            waiting = [call for call in waiting if calls[call].number in self.members]
        self.drop([calls[call] for call in waiting])
        return left

    def drop(self, members: Iterable[Member]) -> None:
        """Kills some members; their seats are free again."""
        gone = [member for member in list(members) if self.members.pop(member.number, None) is not None]
        for member in gone:
            ray.kill(member.actor)
            self._end(member)
        self.ranks = {rank: member for rank, member in self.ranks.items() if member.number in self.members}

    def _end(self, member: Member) -> None:
        """Makes sure that a process ends: one that was stopped hears no call of Ray's, which gives it five seconds."""
        if member.facts is None:
            return
        if member.facts.node_id == ray.get_runtime_context().get_node_id():
            end_process(member.facts.pid)
            return
        neighbour = next((other for other in self.ready if _facts(other).node_id == member.facts.node_id), None)
        if neighbour is not None:
            neighbour.actor.end.remote(member.facts.pid)

    def close(self) -> None:
        """Kills all workers and gives their places back."""
        self.drop(self.members.values())
        self._withdraw()
        for group in self._groups:
            remove_placement_group(group)
        self._groups, self._seats = [], []

    # ---- places

    def _usable(self) -> list[Seat]:
        """Seats that nobody has, on nodes that live."""
        taken = {member.seat.number for member in self.members.values()}
        vacant = [seat for seat in self._seats if seat.number not in taken]
        alive = {node["NodeID"] for node in living()} if vacant else set()
        staying = alive - self._away()
        return [seat for seat in vacant if seat.home in staying]

    def _place(self, count: int, wait: bool, room_s: float) -> None:
        """Seats for `count` more workers. wait: until they are there; else those that are there within `room_s`, and at the
        next call those that have come since."""
        if wait:
            self._withdraw()
            self._asked = asked = self._ask(count, wait)
            what = "no room on the cluster"
            self._wait(asked.calls, what, lambda: placement.missing(asked.wanted, [node.shape for node in free()]))
            self._take(asked)
            return
        if self._asked is None:
            self._asked = self._ask(count, wait)
        self._look_at_asked(room_s)

    def _look_at_asked(self, timeout_s: float) -> None:
        """Takes the places that were asked for if they are there; gives them up where they are long in coming."""
        asked = self._asked
        if asked is None:
            return
        if not asked.calls or not ray.wait(asked.calls, num_returns=len(asked.calls), timeout=timeout_s)[1]:
            self._take(asked)
        elif time.monotonic() - asked.since > ROOM_S:  # what was free has gone since
            self._withdraw()

    def _ask(self, count: int, wait: bool) -> _Asked:
        """Asks Ray for places of `count` workers."""
        if not self._seats and count == self.plan.mesh.world:
            assert self.plan.cluster is not None
            sets = placement.groups(
                self.plan.mesh, placement.fill(count, placement.slots(self.plan.cluster, self.config))
            )
        else:
            away = self._away()
            slots = [node.shape.slots(self.config, self.device) for node in free() if node.node_id not in away]
            lacking = count - sum(slots)
            if lacking > 0 and wait:
                slots.append(lacking)  # a group that waits for its node
            sets = [[bundle] for bundle in placement.fill(min(count, sum(slots)), slots)]
        asked = [[placement.resources(bundle, self.config, self.device) for bundle in bundles] for bundles in sets]
        groups = [
            placement_group(bundles, "PACK", f"raytron/{self.run}/group-{secrets.token_hex(4)}", "detached")
            for bundles in asked
        ]
        wanted = [bundle for bundles in asked for bundle in bundles]
        return _Asked(sets, wanted, groups, [group.ready() for group in groups], time.monotonic())

    def _take(self, asked: _Asked) -> None:
        """Makes seats of places that are there."""
        self._asked, groups = None, asked.groups
        self._groups += groups
        address = {node["NodeID"]: node["NodeManagerAddress"] for node in living()}
        where = [[address.get(home, "") for _, home in sorted(homes(group).items())] for group in groups]
        found = placement.seats(asked.sets, where)
        first = max((seat.number for seat in self._seats), default=-1) + 1
        self._seats += [
            Seat(first + at, groups[group], bundle) for at, (_, (group, bundle)) in enumerate(sorted(found.items()))
        ]

    def _withdraw(self) -> None:
        """Gives up places that are not there yet."""
        for group in self._asked.groups if self._asked is not None else ():
            remove_placement_group(group)
        self._asked = None

    def _wait(
        self, calls: list[Any], what: str, why: str | Callable[[], str], enough: Callable[[], bool] = lambda: False
    ) -> None:
        """Waits for calls; says what it waits for, and why, when that takes long. Raises ClusterError in the end.

        enough: asked whenever a call comes back: whether those that are left need not be waited for.
        """
        start, told = time.monotonic(), False

        def reason() -> str:
            return why if isinstance(why, str) else why()

        while calls:
            done, calls = ray.wait(calls, num_returns=1, timeout=POLL_S)
            waited = time.monotonic() - start
            if not calls or (done and enough()):
                return
            if waited > PATIENCE_S and not told:
                told = True
                self.say("waiting", f"waiting, {what} yet: {reason()}")
            if waited > self.config.placement_timeout_s:
                limit = f"{what} after {self.config.placement_timeout_s:g} s: {reason()}"
                raise ClusterError(f"{limit}\n    remedy: stop other work, add nodes, or use a smaller mesh")

    def _spawn(self, number: int, seat: Seat) -> Any:
        return WorkerActor.options(
            name=f"raytron/{self.run}/worker-{number}",
            namespace=NAMESPACE,
            lifetime="detached",
            num_cpus=self.config.cpus_per_worker,
            num_gpus=1 if self.device == "cuda" else 0,
            max_restarts=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(seat.group, seat.bundle),
        ).remote(
            number, self._open_trainer, seat, controller_name(self.run), self.plan.config.recovery.lease_s, self.line
        )

    def _check(self, members: Iterable[Member]) -> None:
        """Raises ClusterError where workers run other code, or don't see the run directory."""
        here, found = versions(), []
        for member in members:
            facts = _facts(member)
            where = f"node {facts.ip} (worker {member.number})"
            found += [f"{where} has {text}" for text in mismatches(here, facts.versions)]
            if not facts.sees:
                found.append(f"{where} does not see the run directory")
        if found:
            remedy = "remedy: install the same versions everywhere; put run_dir on storage that all nodes share"
            raise ClusterError("\n    ".join(["the nodes of the cluster differ", *found, remedy]))


def failed(call: Any) -> bool:
    """Whether a call that has come back brings an exception."""
    try:
        ray.get(call)
    except Exception:
        return True
    return False


def _facts(member: Member) -> Facts:
    assert member.facts is not None
    return member.facts
