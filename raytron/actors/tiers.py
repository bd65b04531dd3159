"""Where the state of a run comes from: the nodes' memory first, then disk.

    memory   segments of ranks, dead or parked, that keepers have on their nodes        at most a step behind
    disk     verified generations                                                     at most a checkpoint behind

The newest whole step counts; of equal ones, memory's. Memory that could not be read, or led to something bad soon after
(`raytron.actors.probation`), is not asked again until a later epoch has trained well for a while, and never again for what
it held until then.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import ray

from raytron.actors import keeper
from raytron.actors.cluster import controller_name
from raytron.actors.memory_records import choose_told
from raytron.actors.probation import PROBATION
from raytron.checkpoint.sources import Held, MemoryGeneration
from raytron.config import RecoveryConfig
from raytron.errors import ClusterError

ANSWER_S = 20.0  # for a keeper to read all that it holds
START_S = 60.0  # for a keeper to start

Say = Callable[..., None]  # (kind of event, message, **facts)


class Memory:
    """The keepers of a run, one on each of its nodes. Without `recovery.memory_every` there are none."""

    def __init__(self, run: str, config: RecoveryConfig, say: Say):
        self.name, self.config, self.say = run, config, say
        self.run = f"{run}-{secrets.token_hex(4)}"
        self.keepers: dict[str, Any] = {}  # by node id
        self.folders: dict[str, str] = {}
        self._starting: dict[str, tuple[Any, Any]] = {}  # keepers, and the calls that say where they keep
        self._distrusted = 0  # the newest epoch of which nothing is used
        self._trusted_from: int | None = 0  # steps of later ones that are used; None: not known yet

    @property
    def on(self) -> bool:
        return self.config.memory_every is not None

    def prepare(self, epoch: int, world: int, nodes: Collection[str]) -> None:
        """Before the ranks of an epoch are built on some nodes: a keeper on each, following the one before it in a ring."""
        if not self.on:
            return
        self._forget_dead()
        self.greet(nodes)
        for node in [node for node in self._starting if node in nodes]:
            actor, place = self._starting.pop(node)
            try:
                self.folders[node] = ray.get(place, timeout=START_S).folder
                self.keepers[node] = actor
            except (ray.exceptions.RayError, TimeoutError) as error:
                raise ClusterError(f"no keeper can be started on node {node}: {error}") from None
        ring = keeper.partners(sorted(nodes))
        ray.get([self.keepers[node].follow.remote(self.keepers[of], epoch, world) for node, of in ring.items()])

    def adopt(self, keepers: Mapping[str, Any]) -> None:
        """Takes in the keepers of a controller that has died, those that answer."""
        self.keepers = dict(keepers)
        answers = self._ask("place")
        self.keepers = {node: actor for node, actor in keepers.items() if node in answers}
        self.folders = {node: place.folder for node, place in answers.items()}

    def greet(self, nodes: Iterable[str]) -> None:
        """Starts keepers on nodes that have none, where workers wait that may soon have a rank."""
        for node in nodes:
            if self.on and node not in self.keepers and node not in self._starting:
                name = f"raytron/{self.name}/keeper-{node[:8]}-{secrets.token_hex(2)}"
                lease = controller_name(self.name), self.config.lease_s
                actor = keeper.spawn(self.run, node, name=name, lease=lease)
                self._starting[node] = actor, actor.place.remote()
                actor.listen.remote(self.config.notices)

    def newest(self, up_to: int, *, later_of: int | None = None) -> MemoryGeneration | None:
        """The newest whole step of at most `up_to`; what was passed over is told.

        later_of: the epoch of which later steps count, too, if their records are there: then `up_to` is the newest one that
            is recorded. None: no epoch.
        """
        trusted = self._trusted_from
        if not self.on or trusted is None:
            return None
        held: list[Held] = []
        for found in self._ask("held").values():
            held += found.held
            for reason in found.passed_over:
                self.say("damaged", f"passed over in memory: {reason}")
        held = [each for each in held if each.epoch > self._distrusted and each.step >= trusted]
        chosen = choose_told(held, up_to, later_of)
        if chosen.generation is None and chosen.reasons:
            self.say("memory", f"memory holds no whole step: {chosen.reasons[0]}", reasons=chosen.reasons[:5])
        return chosen.generation

    def demote(self, epoch: int, why: str) -> None:
        """This tier led to something bad: what epochs up to this one have left is not used, nor what the next one writes in
        its first steps."""
        self._distrusted, self._trusted_from = epoch, None
        self.say("demoted", f"what memory holds is not used: {why}", epoch=epoch)

    def stood(self, step: int) -> None:
        """A mesh was built, and goes on from a step."""
        if self._trusted_from is None:
            self._trusted_from = step + PROBATION

    def forget(self, before: int) -> None:
        """All ranks have written in epoch `before`: what earlier ones left goes."""
        for actor in self.keepers.values():
            actor.forget.remote(before)

    def close(self) -> None:
        """Ends all keepers; their folders go."""
        self._ask("close")
        for actor in [*self.keepers.values(), *(actor for actor, _ in self._starting.values())]:
            ray.kill(actor)
        self.keepers.clear()
        self.folders.clear()

    def _forget_dead(self) -> None:
        alive = self._ask("place")
        for node in set(self.keepers) - set(alive):
            self.say("keeper", f"the keeper of node {node} is gone", node=node)
            del self.keepers[node], self.folders[node]

    def _ask(self, method: str) -> Mapping[str, Any]:
        """The answers of all keepers that give one in time, by node."""
        calls = {getattr(actor, method).remote(): node for node, actor in self.keepers.items()}
        done = ray.wait(list(calls), num_returns=len(calls), timeout=ANSWER_S)[0] if calls else []
        answers = {}
        for call in done:
            try:
                answers[calls[call]] = ray.get(call)
            except ray.exceptions.RayError as error:
                self.say("keeper", f"the keeper of node {calls[call]} gives no answer: {str(error).splitlines()[0]}")
        return answers
