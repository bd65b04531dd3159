"""The desk of a run: what its clients ask, and what they ask for, at any time and whatever the run is doing.

    client ──► desk, in the group `ctl`          answers at once, from what the run has put there
                 ▲ phase, plan, step, outcome     │ stop, checkpoint, pause, another mesh, another learning rate
                 └────────── the story ◄──────────┘ looks twice a second (`raytron.actors.controller`)

A client may go and come back: nothing here belongs to one. With `observe.port` the desk answers over HTTP, too
(`raytron.observe.endpoint`).
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Mapping
from typing import Any

import ray

from raytron.actors.checkpoints import Checkpoints
from raytron.actors.chronicle import Chronicle, Cursor, News
from raytron.actors.cluster import survey, token
from raytron.actors.control import control
from raytron.actors.gang import Gang, failed
from raytron.actors.lines import Lines
from raytron.actors.moves import AS_ASKED, Moves, Wanted
from raytron.actors.tiers import Memory
from raytron.actors.worker import Request
from raytron.config import RunConfig, flatten, to_mapping
from raytron.errors import ClusterError, ConfigError, Problem
from raytron.observe.endpoint import Endpoint
from raytron.observe.records import Record
from raytron.observe.result import Result
from raytron.plan.plan import Plan, make_plan
from raytron.rules import problems
from raytron.training.run_directory import RunDirectory

SHOWN = 10  # losses
REMESHED = ("mesh.", "pipeline.", "data_parallel.", "memory.", "micro_batch_size")  # keys that may change in a live run


class Desk:
    """Of one run. config: settled (`raytron.training.run_directory.settle`); a re-mesh changes it."""

    def __init__(self, config: RunConfig):
        self.config, self.directory = config, RunDirectory.of(config)
        self.chronicle = Chronicle(config, self.directory)
        self.lines = Lines(ray.util.get_node_ip_address())
        self.memory = Memory(config.name, config.recovery, self._say, self.lines)
        self.checkpoints = Checkpoints(config, self.directory, self._say)
        self._phase, self._asked = "starting", Request.NONE
        self._plan: Plan | None = None
        self._wanted: Wanted | None = None  # the plan to go on with
        self._rates: dict[str, Any] = {}  # keys of lr that shall have other values from the next step on
        self._paused = False  # as clients want it
        self._gang: Gang | None = None
        self._moves: Moves | None = None
        self._step = self._epoch = self._restarts = 0
        self._lost: deque[Record] = deque(maxlen=SHOWN)  # the newest losses
        self._endpoint: Endpoint | None = None
        self._outcome: Result | Exception | None = None

    def _say(self, kind: str, message: str, **facts: Any) -> None:
        self.chronicle.say(kind, message, **facts)

    def _at_work(self, what: str) -> None:
        """Raises ClusterError where no step will follow."""
        over = self._outcome is not None or self._step >= self.config.steps
        if over or self._asked & Request.STOP:
            why = f"its last step is done ({self._phase})" if over else "it is about to stop"
            raise ClusterError(f"{self.config.name} can't {what}: {why}")

    def _with_rates(self, keys: Mapping[str, Any], step: int) -> RunConfig:
        """The configuration with other values of some keys of lr after `step` steps. Raises ConfigError in terms of lr."""
        given = to_mapping(self.config.lr)["changes"]
        same = [each for each in given if each["start_step"] == step]
        others = [each for each in given if each["start_step"] != step]
        earlier = sum(each["start_step"] < step for each in others)
        entry = {**(same[0] if same else {}), **keys, "start_step": step}
        changes = [*others[:earlier], entry, *others[earlier:]]
        try:
            config = self.config.replace(**{"lr.changes": changes})
            found = [problem for problem in problems(config) if problem.where.startswith("lr.")]
        except ConfigError as error:
            config, found = self.config, list(error.problems)
        if found:
            where = f"lr.changes[{earlier}]"
            raise ConfigError([Problem(*(text.replace(where, "lr") for text in problem)) for problem in found])
        return config

    def _note(self, what: str, **facts: Any) -> None:
        """Writes down what a client asks for before it is done: a controller that is started again knows of it
        (`raytron.actors.adoption.outstanding`)."""
        step = int(self.chronicle.last.get("step", self._step))
        self._say("asked", f"asked for {what} after step {step}", step=step, **facts)

    def _want(self, wanted: Wanted) -> None:
        """Another plan, from the next step on."""
        self._wanted = wanted
        self._asked |= Request.PAUSE

    @control
    def status(self) -> Record:
        """Where the run stands."""
        last = self.chronicle.last
        return {
            "name": self.config.name,
            "phase": self._phase,
            "step": int(last.get("step", self._step)),
            "steps": self.config.steps,
            "loss": last.get("loss"),
            "tokens_per_s": last.get("tokens_per_s"),
            "step_time_s": last.get("step_time_s"),
            "mesh": None if self._plan is None else str(self._plan.mesh),
            "workers": 0 if self._gang is None else len(self._gang.ranks),
            "spares": 0 if self._gang is None else len(self._gang.spares),
            "restarts": self._restarts,
            "checkpoint_step": self.checkpoints.step or None,
            "run_dir": self.config.run_dir,
            "endpoint": None if self._endpoint is None else self._endpoint.address,
        }

    def facts(self) -> Record:
        """The status, and what is for machines to read: the epoch, who has which rank, the newest losses."""
        ranks = {} if self._gang is None else self._gang.facts
        where = {rank: {"host": each.host, "node": each.node_id, "pid": each.pid} for rank, each in ranks.items()}
        return {**self.status(), "epoch": self._epoch, "ranks": where, "lost": list(self._lost)}

    def _listen_at(self) -> None:
        """Opens the status endpoint, where the configuration asks for one. Raises ConfigError where it can't, or may not."""
        asked, secret = self.config.observe, token()
        if asked.port is None:
            return
        self._endpoint = Endpoint(
            self.facts, lambda: self.chronicle.last, self.directory.events,
            host=asked.host, port=asked.port, token=secret,
        )  # fmt: skip
        address, host = self._endpoint.address, socket.gethostname()
        text = f"status endpoint: {address} on {host}" + (", with Ray's token" if secret else "")
        self._say("endpoint", text, address=address, host=host, token=bool(secret))

    @control
    def lives(self) -> bool:
        """A sign of life, for those whose lease it renews."""
        return True

    @control
    def drain(self, cursor: Cursor) -> News:
        """What happened since `cursor`."""
        return self.chronicle.since(cursor, self._outcome is not None)

    @control
    def request(self, request: int) -> str:
        """Asks for a checkpoint or a stop (with a checkpoint); returns the phase that it met."""
        for each in (Request.CHECKPOINT, Request.STOP):
            if each & request:
                self._note("a checkpoint" if each is Request.CHECKPOINT else "the end", request=int(each))
        self._asked |= Request(request)
        return self._phase

    @control
    def remesh(self, overrides: dict[str, Any]) -> str:
        """Asks for another mesh, from the next step on; returns the page of its plan.

        Raises ConfigError where the keys may not change in a live run, or the plan has problems.
        """
        found = [
            Problem(key, "can't be changed while the run is at work", "stop the run, and start it again with it")
            for key in overrides
            if not key.startswith(REMESHED)
        ]
        if found:
            raise ConfigError(found)
        config = self.config.replace(**overrides)
        changed = flatten(to_mapping(config)) != flatten(to_mapping(self.config))
        plan = make_plan(config, survey())
        if changed:
            self.config = config
            self.directory.write_config(config)
            self._note(f"mesh {plan.mesh}", mesh=str(plan.mesh))
            if self._moves is not None:
                self._moves.begin(config, plan)
            self._want(Wanted(plan, AS_ASKED))
        return str(plan)

    @control
    def pause(self) -> str:
        """Asks the ranks to wait after the step that is under way; returns the phase that it met. Raises ClusterError where
        no step will follow."""
        self._at_work("be paused")
        self._note("a pause", paused=True)
        self._paused = True
        self._asked |= Request.PAUSE
        return self._phase

    @control
    def resume(self) -> None:
        """A paused run goes on. Raises ClusterError where it is not paused."""
        self._at_work("go on")
        if not self._paused:
            raise ClusterError(f"{self.config.name} is not paused ({self._phase})")
        self._note("going on", paused=False)
        self._paused = False

    @control
    def set_lr(self, keys: dict[str, Any]) -> None:
        """Asks for other values of some keys of lr, from the next step on. Raises ConfigError where they can't be,
        ClusterError where no step will follow."""
        self._at_work("have another learning rate")
        if "start_step" in keys:
            raise ConfigError([Problem("lr.start_step", "is the next step", "leave it out")])
        wanted = {**self._rates, **keys}
        self._with_rates(wanted, max(self._step, int(self.chronicle.last.get("step", 0))))
        self._note(", ".join(f"lr.{key} {value}" for key, value in keys.items()), rates=keys)
        self._rates = wanted
        self._asked |= Request.PAUSE

    @control
    def stacks(self) -> dict[int, str]:
        """The stacks of all threads of all workers that answer within 5 s."""
        calls = {} if self._gang is None else {w.stacks.remote(): rank for rank, w in self._gang.workers.items()}
        done = ray.wait(list(calls), num_returns=len(calls), timeout=5.0)[0] if calls else []
        return {calls[call]: ray.get(call) for call in done if not failed(call)}

    @control
    def clear(self) -> None:
        """Ends all workers and keepers, and what they have in memory, at once: this run is given up."""
        if self._gang is not None:
            self._gang.close()
        self.memory.close()

    @control
    def outcome(self) -> Result | Exception | None:
        """How the run ended; None: it goes on."""
        return self._outcome
