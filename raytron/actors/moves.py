"""When a run changes its mesh by itself: workers are lost, a node is about to leave, there is room for more.

    lost      at once     elastic: the best mesh for who is left and for spares; else the same mesh, on replaced workers
    notice    in time     the same question without the workers of that node, asked while they still work: nothing is lost
    room      unhurried   new workers start beside the training, and only when they are ready does the mesh change

What is asked of the planner is always one thing: the best mesh for so many workers on each node (`raytron.plan.elastic`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from raytron.actors.cluster import draining, survey
from raytron.actors.gang import Gang
from raytron.config import RunConfig
from raytron.errors import ConfigError
from raytron.plan.draw import plural
from raytron.plan.elastic import Candidate, Resized, best_plan
from raytron.plan.growth import Growth
from raytron.plan.plan import Plan

LOOK_S = 1.0  # between two looks at the cluster
AS_ASKED = "as asked"  # why, where a client wants it

Say = Callable[..., None]  # (kind of event, message, **facts)


class Wanted(NamedTuple):
    """Another plan to go on with, and why."""

    plan: Plan
    why: str


class Moves:
    """Of one run. config: with the mesh that it was made for; witness: a file that all workers have to see."""

    def __init__(
        self, config: RunConfig, gang: Gang, say: Say, witness: Path, clock: Callable[[], float] = time.monotonic
    ):
        self.config, self.gang, self.say, self.witness, self.clock = config, gang, say, witness, clock
        self.stop_s = 5.0  # that the last change of mesh took; until there was one, a guess
        self._growth = Growth(config.elastic)
        self._current: Resized | None = None  # of an elastic run
        self._growing: Wanted | None = None
        self._looked = 0.0
        self._leaving: dict[str, float] = {}  # nodes that will leave: their deadlines

    def begin(self, config: RunConfig, plan: Plan) -> None:
        """The run begins, or goes on as a client asked, with this plan, the measure of all later ones."""
        self.config, self._growing = config, None
        if config.elastic.on:
            deal, world = plan.config.deal(), plan.mesh.world
            self._current = Resized(plan, (world,), (world,), (Candidate(plan.mesh, deal.most, deal.fewest, 1.0),))

    def after_loss(self, plan: Plan) -> Plan:
        """What to go on with, with the workers that are ready; an elastic run waits where they are too few for any mesh."""
        self._growing = None
        if not self.config.elastic.on:
            return plan
        self.gang.fill(self.config.elastic.fewest, self.witness)
        self._current = resized = self._best(self.gang.on_nodes())
        after, left = resized.plan, sum(resized.workers)
        if after.mesh != plan.mesh:
            text = f"mesh: {after.mesh} after {plan.mesh}: {plural(left, 'worker')} left"
            self.say("mesh", text, page=str(resized), mesh=str(after.mesh))
        return after

    def look(self, plan: Plan) -> Wanted | None:
        """While the run trains, from time to time: another plan, once all its workers are ready."""
        now = self.clock()
        if now - self._looked < LOOK_S:
            return None
        self._looked = now
        self.gang.settle()
        wanted = self._avoid(plan) or self._grow(plan, now)
        if wanted is None and self._growing is None and self.config.recovery.spares:  # those that had no room before
            self.gang.start(plan.mesh.world + self.config.recovery.spares, self.witness, wait=False)
        return wanted

    # ---- a node is about to leave

    def _avoid(self, plan: Plan) -> Wanted | None:
        for node, deadline in draining().items():
            if node not in self._leaving:
                self._leaving[node] = deadline
                left = deadline - time.time()
                text = f"node {self.gang.address(node)} leaves" + (f" in {left:.0f} s" if deadline else "")
                self.say("notice", text, node=node, deadline=deadline)
                self.gang.retire(node)
        if not self.gang.ranks_on(self._leaving):
            return None
        why = f"node {', '.join(self.gang.address(node) for node in self._leaving)} leaves"
        if self.config.elastic.on:
            try:
                resized = self._best(self.gang.on_nodes())
            except ConfigError:
                return None  # it will be lost like any other, and waited for
            self._current = resized
            return Wanted(resized.plan, why)
        self.gang.start(plan.mesh.world, self.witness, wait=False)
        return Wanted(plan, why) if len(self.gang.ready) >= plan.mesh.world else None

    # ---- there is room for more

    def _grow(self, plan: Plan, now: float) -> Wanted | None:
        if self._current is None:
            return None
        if self._growing is None:
            self._growth.saw(now, self.gang.capacity())
            verdict = self._growth.look(now, self._current, self._best, self.stop_s)
            if verdict.resized is None:
                return None
            self._growing = Wanted(verdict.resized.plan, verdict.why)
            self._next = verdict.resized
            self.say("growing", f"growing: {verdict.why}", mesh=str(verdict.resized.plan.mesh))
        world = self._growing.plan.mesh.world
        self.gang.start(world, self.witness, wait=False)
        if len(self.gang.ready) < world:
            return None
        wanted, self._growing, self._current = self._growing, None, self._next
        return wanted

    _next: Resized  # what is being grown to

    def _best(self, workers: Any) -> Resized:
        return best_plan(self.config, tuple(workers), survey())
