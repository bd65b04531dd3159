"""Ray as Raytron uses it: join or start a cluster, see what it has, hold a gang of workers on it, leave nothing behind.

A cluster is joined when `cluster.address` or RAY_ADDRESS says so (inside a Ray job it does); otherwise a local Ray is
started, and stopped with the run. Bundle order promises nothing about neighbourhood: ranks are dealt out after the
placement groups stand, by node address and device id.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._private import state as ray_state  # no public call tells what is free on each node
from ray._raylet import Config as RayConfig  # type: ignore[attr-defined]  # nothing public rereads the environment
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raytron.actors import placement
from raytron.actors.recovery import WorkersLost
from raytron.actors.versions import mismatches, versions
from raytron.actors.worker import Facts, OpenTrainer, WorkerActor
from raytron.config import ClusterConfig
from raytron.errors import ClusterError
from raytron.plan.cluster import ClusterShape, NodeShape
from raytron.plan.plan import Plan
from raytron.training.open import open_trainer

NAMESPACE = "raytron"
STORE_BYTES = 512 * 2**20  # of a local Ray: descriptions travel through it, tensors don't
AUTH_MODE = "RAY_AUTH_MODE"
KNOCK_S = 10.0
LOCAL_CPUS_PER_CORE, FEWEST_LOCAL_CPUS = 4, 8  # that a local Ray may say it has, for workers that share cores
PATIENCE_S = 10.0  # before a wait is explained
POLL_S = 0.5

Say = Callable[..., None]  # (kind of event, message, **facts)


@dataclass(frozen=True)
class Session:
    """A connection to Ray. local: a Ray of our own, which ends with it; owned: whether `close` disconnects."""

    address: str
    local: bool
    owned: bool

    def close(self) -> None:
        if self.owned and ray.is_initialized():
            ray.shutdown()


def own_room(config: ClusterConfig) -> ClusterShape | None:
    """What a local Ray of the run's own may hold: a few workers on each core, so that small meshes can be tried anywhere.
    None where a cluster will be joined, which knows for itself."""
    if ray.is_initialized() or config.address or os.environ.get("RAY_ADDRESS"):
        return None
    return ClusterShape.local(max(FEWEST_LOCAL_CPUS, LOCAL_CPUS_PER_CORE * (os.cpu_count() or 1)))


def connect(config: ClusterConfig, workers: int) -> Session:
    """Uses the connection that the process has, joins a cluster, or starts a local Ray with room for `workers`.

    Raises ClusterError where a cluster can't be reached.
    """
    if ray.is_initialized():
        return Session(ray.get_runtime_context().gcs_address, local=False, owned=False)
    address = config.address or os.environ.get("RAY_ADDRESS")
    if address:
        return join(address)
    cpus = max(os.cpu_count() or 1, round(workers * config.cpus_per_worker + 0.49) + 2)
    ray.init(
        address="local",
        namespace=NAMESPACE,
        num_cpus=cpus,
        include_dashboard=False,
        object_store_memory=STORE_BYTES,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _system_config={"worker_niceness": 0, "preload_python_modules": ["torch"]},
    )
    return Session(ray.get_runtime_context().gcs_address, local=True, owned=True)


def join(address: str) -> Session:
    """Joins a cluster. Raises ClusterError where none answers."""
    try:
        _knock(address)
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        remedy = (
            "remedy: start it (ray start --head), or unset cluster.address and RAY_ADDRESS to use this machine alone"
        )
        raise ClusterError(f"no Ray cluster answers at {address}: {error}\n    {remedy}") from None
    return Session(ray.get_runtime_context().gcs_address, local=False, owned=True)


def follow_auth(mode: str | None) -> None:
    """Talks to a Ray as whoever started it does: a local Ray asks for the token of its user, and `join` offers none."""
    if mode and AUTH_MODE not in os.environ:
        os.environ[AUTH_MODE] = mode
        RayConfig.initialize("")


def _knock(address: str) -> None:
    """Raises OSError at once where nothing listens on host:port, for which Ray would wait."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_S).close()


def survey() -> ClusterShape:
    """The living nodes, by address, with what they have in all."""
    return ClusterShape(tuple(_node(node, node["Resources"]) for node in _alive()))


def free() -> list[NodeShape]:
    """The living nodes with what is free on them now."""
    left = ray_state.available_resources_per_node()
    return [_node(node, left.get(node["NodeID"], {})) for node in _alive()]


def _alive() -> list[dict[str, Any]]:
    nodes = [node for node in ray.nodes() if node["Alive"]]
    return sorted(nodes, key=lambda node: (placement.address_key(node["NodeManagerAddress"]), node["NodeID"]))


def _node(node: dict[str, Any], resources: dict[str, float]) -> NodeShape:
    kinds = [key.partition(":")[2] for key in node["Resources"] if key.startswith("accelerator_type:")]
    return NodeShape(
        name=node["NodeManagerAddress"],
        cpus=resources.get("CPU", 0.0),
        gpus=resources.get("GPU", 0.0),
        memory_bytes=int(resources.get("memory", 0)),
        device_name=kinds[0] if kinds else None,
    )


@dataclass(frozen=True)
class Seat:
    """A place for one worker: a bundle of a placement group."""

    group: Any
    bundle: int


class Gang:
    """The workers of one plan, each on its seat, by rank. `fill` makes those that are missing."""

    def __init__(self, run: str, plan: Plan, say: Say, open_trainer: OpenTrainer = open_trainer):
        self.run, self.plan, self.say = run, plan, say
        self.config = plan.config.cluster
        assert plan.cluster is not None
        self.device = plan.cluster.device(self.config)
        self._open_trainer = open_trainer
        self._groups: list[Any] = []
        self._seats: dict[int, Seat] = {}
        self._made = 0  # actors ever made: names stay unique
        self.workers: dict[int, Any] = {}
        self.facts: dict[int, Facts] = {}

    def fill(self, witness: Path) -> None:
        """Places and spawns what is missing. Raises ClusterError where there is no room, or versions differ."""
        if not self._groups:
            self._place()
        new = [rank for rank in range(self.plan.mesh.world) if rank not in self.workers]
        for rank in new:
            self.workers[rank] = self._spawn(rank)
        calls = {rank: self.workers[rank].describe.remote(witness) for rank in new}
        self._wait(list(calls.values()), "workers not ready", lambda: f"{len(new)} are starting and importing torch")
        for rank, call in calls.items():
            try:
                self.facts[rank] = ray.get(call)
            except ray.exceptions.RayActorError:
                raise WorkersLost([rank], "died while it started") from None
        self._check(new)
        if len(new) == self.plan.mesh.world:
            self._order()

    def neighbours(self, rank: int) -> int:
        """Workers on the node of a rank, itself included."""
        return sum(facts.node_id == self.facts[rank].node_id for facts in self.facts.values())

    def drop(self, ranks: Iterable[int]) -> None:
        """Kills some workers; their seats are free again."""
        for rank in list(ranks):
            worker = self.workers.pop(rank, None)
            self.facts.pop(rank, None)
            if worker is not None:
                ray.kill(worker)

    def close(self) -> None:
        """Kills all workers and gives their places back."""
        self.drop(list(self.workers))
        for group in self._groups:
            remove_placement_group(group)
        self._groups = []

    def _place(self) -> None:
        assert self.plan.cluster is not None
        slots = placement.slots(self.plan.cluster, self.config)
        sets = placement.groups(self.plan.mesh, placement.fill(self.plan.mesh.world, slots))
        asked = [[placement.resources(bundle, self.config, self.device) for bundle in bundles] for bundles in sets]
        self._groups = [placement_group(bundles, strategy="PACK") for bundles in asked]
        wanted = [bundle for bundles in asked for bundle in bundles]
        self._wait(
            [group.ready() for group in self._groups],
            "no room on the cluster",
            lambda: placement.missing(wanted, free()),
        )
        homes = [_addresses(group) for group in self._groups]
        found = placement.seats(sets, homes)
        self._seats = {rank: Seat(self._groups[group], bundle) for rank, (group, bundle) in found.items()}

    def _wait(self, calls: list[Any], what: str, why: Callable[[], str]) -> None:
        """Waits for calls; says what it waits for, and why, when that takes long. Raises ClusterError in the end."""
        start, told = time.monotonic(), False
        while True:
            _, left = ray.wait(calls, num_returns=len(calls), timeout=POLL_S)
            waited = time.monotonic() - start
            if not left:
                return
            if waited > PATIENCE_S and not told:
                told = True
                self.say("waiting", f"waiting, {what} yet: {why()}")
            if waited > self.config.placement_timeout_s:
                limit = f"{what} after {self.config.placement_timeout_s:g} s: {why()}"
                raise ClusterError(f"{limit}\n    remedy: stop other work, add nodes, or use a smaller mesh")

    def _spawn(self, rank: int) -> Any:
        seat = self._seats[rank]
        self._made += 1
        return WorkerActor.options(
            name=f"raytron/{self.run}/worker-{rank}" + (f".{self._made}" if self._made > self.plan.mesh.world else ""),
            namespace=NAMESPACE,
            num_cpus=self.config.cpus_per_worker,
            num_gpus=1 if self.device == "cuda" else 0,
            max_restarts=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(seat.group, seat.bundle),
        ).remote(rank, self.plan.mesh, self._open_trainer)

    def _check(self, ranks: Iterable[int]) -> None:
        """Raises ClusterError where workers run other code, or don't see the run directory."""
        here, found = versions(), []
        for rank in ranks:
            facts = self.facts[rank]
            where = f"node {facts.ip} (rank {rank})"
            found += [f"{where} has {text}" for text in mismatches(here, facts.versions)]
            if not facts.sees:
                found.append(f"{where} does not see the run directory")
        if found:
            remedy = "remedy: install the same versions everywhere; put run_dir on storage that all nodes share"
            raise ClusterError("\n    ".join(["the nodes of the cluster differ", *found, remedy]))

    def _order(self) -> None:
        """Deals ranks out anew by device id within each bundle (bundles stand in node order already)."""
        seats = {rank: (self._seats[rank].group.id.hex(), self._seats[rank].bundle) for rank in self.workers}
        first = {seat: min(rank for rank in seats if seats[rank] == seat) for seat in set(seats.values())}

        def key(rank: int) -> tuple[int, int, int]:
            gpu = self.facts[rank].gpu
            return first[seats[rank]], int(gpu) if gpu is not None and gpu.isdigit() else 0, rank

        order = sorted(self.workers, key=key)
        self.workers = {rank: self.workers[old] for rank, old in enumerate(order)}
        self.facts = {rank: self.facts[old] for rank, old in enumerate(order)}


def _addresses(group: Any) -> list[str]:
    """The node address of each bundle of a placement group that stands."""
    address = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    homes = placement_group_table(group)["bundles_to_node_id"]
    return [address.get(homes[index], "") for index in sorted(homes)]
