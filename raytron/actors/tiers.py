"""Where the state of a run comes from: the nodes' memory first, then disk.

    memory   segments of ranks, dead or parked, that keepers have on their nodes        at most a step behind
    disk     verified generations                                                     at most a checkpoint behind

The newest whole step counts; of equal ones, memory's. Memory that could not be read, or led to something bad soon after
(`raytron.actors.probation`), is not asked again until a later epoch has trained well for a while, and never again for what
it held until then.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import ray

from raytron.actors import keeper
from raytron.actors.cluster import controller_name
from raytron.actors.lines import Lines
from raytron.actors.memory_records import choose_told
from raytron.actors.probation import PROBATION
from raytron.actors.recovery import WorkersLost, first_line
from raytron.checkpoint.sources import Choice, Held, MemoryGeneration, Survey
from raytron.config import RecoveryConfig
from raytron.errors import ClusterError

ANSWER_S = 20.0  # for a keeper to read all that it holds
SETTLE_S = 0.3  # for more answers when those that are there will do; or half of what they took, if longer
PRESENT_S = 5.0  # for a keeper to say that it is there
POLL_S = 0.05
START_S = 60.0  # for a keeper to start

Say = Callable[..., None]  # (kind of event, message, **facts)


class Memory:
    """The keepers of a run, one on each of its nodes. Without `recovery.memory_every` there are none."""

    def __init__(self, run: str, config: RecoveryConfig, say: Say, lines: Lines | None = None):
        """lines: of the controller; a keeper whose line is broken is not asked. None: keepers have none."""
        self.name, self.config, self.say, self.lines = run, config, say, lines
        self.run = f"{run}-{secrets.token_hex(4)}"
        self.keepers: dict[str, Any] = {}  # by node id
        self.folders: dict[str, str] = {}
        self.line_of: dict[str, str] = {}  # the name on the line of each node's keeper
        self._starting: dict[str, tuple[Any, Any]] = {}  # keepers, and the calls that say where they keep
        self._distrusted = 0  # the newest epoch of which nothing is used
        self._trusted_from: int | None = 0  # steps of later ones that are used; None: not known yet

    @property
    def on(self) -> bool:
        return self.config.memory_every is not None

    def prepare(self, epoch: int, world: int, nodes: Collection[str]) -> None:
        """Before the ranks of an epoch are built on some nodes: a keeper on each, following the one before it in a ring.

        Raises WorkersLost where a node is lost meanwhile.
        """
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
        try:
            calls = [self.keepers[node].follow.remote(self.keepers[of], epoch, world) for node, of in ring.items()]
            ray.get(calls, timeout=START_S)
        except (ray.exceptions.RayActorError, TimeoutError) as error:
            raise WorkersLost((), f"a keeper does not follow another one: {first_line(error)}") from None

    def adopt(self, keepers: Mapping[str, Any]) -> None:
        """Takes in the keepers of a controller that has died, those that answer."""
        self.keepers = dict(keepers)
        answers = self._ask("place")
        self.keepers = {node: actor for node, actor in keepers.items() if node in answers}
        self.folders = {node: place.folder for node, place in answers.items()}
        for node, actor in self.keepers.items():
            self._give_line(node, actor)

    def lose(self, node: str) -> None:
        """A node is lost, whether or not Ray knows it: its keeper is given up."""
        actors = [self.keepers.pop(node, None), self._starting.pop(node, (None,))[0]]
        self.folders.pop(node, None)
        self.line_of.pop(node, None)
        for actor in actors:
            if actor is not None:
                ray.kill(actor)

    def greet(self, nodes: Iterable[str]) -> None:
        """Starts keepers on nodes that have none, where workers wait that may soon have a rank."""
        for node in nodes:
            if self.on and node not in self.keepers and node not in self._starting:
                name = f"raytron/{self.name}/keeper-{node[:8]}-{secrets.token_hex(2)}"
                lease = controller_name(self.name), self.config.lease_s
                actor = keeper.spawn(self.run, node, name=name, lease=lease)
                self._starting[node] = actor, actor.place.remote()
                actor.listen.remote(self.config.notices)
                self._give_line(node, actor)

    def _give_line(self, node: str, actor: Any) -> None:
        if self.lines is not None:
            self.line_of[node] = f"keeper-{node}-{secrets.token_hex(2)}"
            actor.hold.remote(self.lines.to, self.line_of[node])

    def _is_gone(self, node: str) -> bool:
        """Whether the keeper of a node is known to be dead."""
        return self.lines is not None and self.lines.broke(self.line_of.get(node, ""))

    def newest(self, up_to: int, *, later_of: int | None = None) -> MemoryGeneration | None:
        """The newest whole step of at most `up_to`; what was passed over is told.

        later_of: the epoch of which later steps count, too, if their records are there: then `up_to` is the newest one that
            is recorded. None: no epoch.
        """
        trusted = self._trusted_from
        if not self.on or trusted is None:
            return None

        def choose(answers: Mapping[str, Survey]) -> Choice:
            held: list[Held] = [each for found in answers.values() for each in found.held]
            held = [each for each in held if each.epoch > self._distrusted and each.step >= trusted]
            return choose_told(held, up_to, later_of)

        def enough(answers: Mapping[str, Survey]) -> bool:
            generation = choose(answers).generation
            return generation is not None and generation.step >= up_to

        answers = self._ask("held", enough=enough)
        for found in answers.values():
            for reason in found.passed_over:
                self.say("damaged", f"passed over in memory: {reason}")
        chosen = choose(answers)
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
        alive = self._ask("place", limit_s=PRESENT_S)
        for node in set(self.keepers) - set(alive):
            self.say("keeper", f"the keeper of node {node} is gone", node=node)
            self.lose(node)

    def _ask(
        self,
        method: str,
        *,
        limit_s: float = ANSWER_S,
        enough: Callable[[Mapping[str, Any]], bool] | None = None,
    ) -> Mapping[str, Any]:
        """The answers of all keepers that give one in time, by node. All are asked at once, but those that are gone.

        enough: whether some answers will do: then the others are given a moment more.
        """
        start = time.monotonic()
        asked = {node: actor for node, actor in self.keepers.items() if not self._is_gone(node)}
        calls = {getattr(actor, method).remote(): node for node, actor in asked.items()}
        answers: dict[str, Any] = {}
        waiting, end = list(calls), start + limit_s
        while waiting and time.monotonic() < end:
            done, waiting = ray.wait(waiting, num_returns=1, timeout=POLL_S)
            for call in done:
                try:
                    answers[calls[call]] = ray.get(call)
                except ray.exceptions.RayError as error:
                    self.say("keeper", f"the keeper of node {calls[call]} gives no answer: {first_line(error)}")
            waiting = [call for call in waiting if not self._is_gone(calls[call])]
            if done and waiting and enough is not None and enough(answers):
                now = time.monotonic()
                end = min(end, now + max(SETTLE_S, (now - start) / 2))
                enough = None
        return answers
