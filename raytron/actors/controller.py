"""The controller: an actor of its own that tells the whole story of a run, in `fit`.

    data set ─► plan ─► gang of workers ─► build ─► segments, checkpoints, evaluations ─► done
                  ▲                                      │ workers are lost, a node will leave, another mesh is wanted
                  └───── survivors stay, go on from the newest good state ◄──────────────┘

It holds the rendezvous store (so rank 0 may die), writes metrics.jsonl and events.jsonl, and answers clients while it works
(`raytron.actors.desk`). Its only talk with running workers is twice a second: what happened, and what is asked for. It may
die, too: Ray starts it again, and it adopts the workers, which have trained on (`raytron.actors.adoption`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from raytron.actors import adoption, patience
from raytron.actors.budget import Budget, Kind
from raytron.actors.casualties import Casualties
from raytron.actors.cluster import survey
from raytron.actors.desk import Desk
from raytron.actors.exhausted import Exhaustion
from raytron.actors.gang import ROOM_S, Gang
from raytron.actors.health import Health
from raytron.actors.memory_records import untold
from raytron.actors.moves import AS_ASKED, Moves, Wanted
from raytron.actors.patience import Patience
from raytron.actors.probation import Probation
from raytron.actors.recovery import WorkersLost, first_line
from raytron.actors.supervisor import Supervisor
from raytron.actors.worker import Beat, OpenTrainer, Orders, Request
from raytron.checkpoint.catalog import Generation, committed
from raytron.checkpoint.sources import MemoryGeneration
from raytron.config import RunConfig
from raytron.data.blend_check import epochs_notice
from raytron.data.ensure import ensure_data
from raytron.data.run_data import RunData, open_run_data
from raytron.errors import (
    ClusterError,
    ConfigError,
    GuardError,
    OutOfMemoryError,
    RaytronError,
    WorkerError,
)
from raytron.observe.records import Record, read_records
from raytron.observe.result import NAMED, Result, read_result
from raytron.observe.trace import MEASURED
from raytron.plan.cluster import ClusterShape
from raytron.plan.draw import plural
from raytron.plan.elastic import best_plan
from raytron.plan.flops import mfu, peak_flops
from raytron.plan.mesh import MeshShape
from raytron.plan.plan import Plan, make_plan, replan
from raytron.plan.relief import explained
from raytron.plan.times import FOLDER, read_times
from raytron.training.generate import generate
from raytron.training.guard import Rollback
from raytron.training.open import open_trainer
from raytron.training.run_directory import RunDirectory

LONGEST_SEGMENT = 1000  # steps
Source = MemoryGeneration | Generation | None  # of a state to go on from
PAUSED = "paused"  # a phase
ACTS = Request.STOP | Request.CHECKPOINT  # what a paused run does at once
LEAVE_S = 8.0  # for survivors to come back from a broken collective


@dataclass(frozen=True)
class Seams:
    """What tests replace."""

    prepare: Callable[..., Path] = ensure_data
    open_trainer: OpenTrainer = open_trainer
    linger_s: float = 120.0  # how long the controller of a detached run tells of the end


class Controller(Desk):
    """One run. config: settled (`raytron.training.run_directory.settle`); place: the folder that relative paths mean."""

    def __init__(self, config: RunConfig, place: str, seams: Seams | None = None):
        if Path(place).is_dir():
            os.chdir(place)
        self._again = ray.get_runtime_context().was_current_actor_reconstructed
        if self._again:  # a re-mesh may have changed it since
            config = RunDirectory.of(config).stored() or config
        super().__init__(config)
        self.seams = seams or Seams()
        self.patience = Patience(config.cluster.timeout_s, config.recovery.heartbeat_s)
        self.budget = Budget(config.recovery.max_restarts, config.recovery.window_s)
        self.health = Health(config.guard, self._say)
        self.probation = Probation()
        self.exhaustion = Exhaustion(config.recovery)
        self._relieved: Plan | None = None  # the plan to go on with after a loss, since memory ran out
        self._measure = config.pipeline.schedule == "auto"  # until this launch has chosen
        self._supervisor: Supervisor | None = None
        self._casualties: Casualties
        self._recorded = 0  # the newest step of this epoch that was recorded
        self._stood = 0  # the newest epoch that was built
        self._resting = False  # whether it was told that the run is paused, and not yet that it goes on
        self._choose_at: int | None = None  # the step at which `schedule: auto` has been measured
        self._skip: set[int] = set()  # steps that the run was rolled back for
        self._back_to: int | None = None  # the newest step that may be gone on from
        if self._again:  # nobody calls `fit` a second time, and a call of its own, made here, may get lost in Ray
            threading.Thread(target=self.fit, name="fit", daemon=True).start()

    def __repr__(self) -> str:
        return f"Controller({self.config.name if hasattr(self, 'config') else 'not started'})"

    # ---- the story

    def fit(self) -> None:
        """The whole run. Its outcome, a Result or an exception, is fetched with `outcome`."""
        try:
            self._open_endpoint()
            if self._again and (ended := self._ended()) is not None:
                self._finish(ended)
                return
            self.directory.write_config(self.config)
            data = self._prepare()
            plan = self._adopt() if self._again else None
            if plan is None:
                adoption.end_all(self.config.name)
                plan = self._make_plan()
            while plan is not None:
                try:
                    self._build(plan, data)
                    plan = self._train(plan)
                except WorkersLost as lost:
                    assert plan is not None
                    plan = self._recover(plan, lost)
                except Rollback as back:
                    self._roll_back(back)
            self._finish(self._complete())
        except Exception as error:
            self._finish(self._failed(error))

    def _open_endpoint(self) -> None:
        """As the configuration asks. A run that has been at work goes on where it can't be opened again."""
        try:
            self._listen_at()
        except ConfigError as error:
            if not self._again:
                raise
            self._say("endpoint_failed", f"no status endpoint: {error.problems[0].what}")

    def _prepare(self) -> RunData:
        """The data, made now if it is not there."""
        self._enter("preparing data")
        data = open_run_data(self.config, self.seams.prepare(self.config, self._preparing))
        first = data.sources[0]
        if first.tokenizer.exists():
            shutil.copyfile(first.tokenizer, self.directory.tokenizer)
        held = sum(each.tokens("validation") for each in data.sources)
        text = (
            f"data: {'about ' if data.notices else ''}{data.tokens:,} tokens to train on, {held:,} to validate; unigram "
            f"entropy {data.unigram_entropy:.3f} nats per token (the loss of counting tokens alone)"
        )
        facts = {"tokens": data.tokens, "unigram_entropy": data.unigram_entropy, "path": first.name}
        tokens = self.config.samples_after(self.config.steps) * self.config.sequence_length
        if not self._again:
            self._say("data", text, **facts, sources=[each.name for each in data.sources])
            for notice in data.notices:
                self._say("text", notice)
            if self.config.data.blend or tokens > data.tokens:
                self._say("epochs", epochs_notice(data))
        self._evaluates = bool(data.held)
        return data

    def _make_plan(self) -> Plan:
        plan = self._first_plan(survey())
        shutil.rmtree(self.directory.path / FOLDER, ignore_errors=True)  # what an earlier run has measured
        self._say("plan", f"plan: {plan.mesh}", page=str(plan), mesh=str(plan.mesh))
        return plan

    def _first_plan(self, cluster: ClusterShape) -> Plan:
        """The plan of the configured mesh; of an elastic run on too small a cluster, the best one that it holds."""
        slots = [node.slots(self.config.cluster, cluster.device(self.config.cluster)) for node in cluster.nodes]
        if self.config.elastic.on and sum(slots) < MeshShape.of(self.config.mesh).world:
            resized = best_plan(self.config, slots, cluster)
            self._say("mesh", f"mesh: {resized.plan.mesh} for {sum(slots)} workers", page=str(resized))
            return resized.plan
        return make_plan(self.config, cluster, report=lambda text: self._enter(f"choosing a schedule: {text}"))

    def _ended(self) -> Result | Exception | None:
        """How the run ended before this controller was started again; None: it goes on."""
        events = adoption.of_this_launch(read_records(self.directory.events))
        last = next((event for event in reversed(events) if event["event"] in ("complete", "stopped", "error")), None)
        if last is None:
            return None
        if last["event"] == "error":
            return ClusterError("\n".join(part for part in (last["message"], last["detail"]) if part))
        self._step = int(last["step"])
        return self._result(stopped=last["event"] == "stopped", step=self._step)

    def _adopt(self) -> Plan | None:
        """Started again: the plan that the workers are at, who leave their mesh and park their state in memory. None where
        nobody is left: then the run goes on from its checkpoints, as after any start."""
        self._enter("adopting workers")
        heirs = adoption.find(self.config.name, self.directory.config)
        if heirs is None:
            return None
        orders = heirs.orders
        plan = self._plan = orders.plan
        self._epoch = self._stood = orders.epoch
        self._skip = set(orders.skip)
        self._step = self._recorded = self.chronicle.last_step
        self.checkpoints.step = getattr(self.directory.newest(), "step", None)
        events = adoption.of_this_launch(read_records(self.directory.events))
        self._measure = self._measure and not any(event["event"] == "schedule" for event in events)
        told = adoption.losses(events)
        self.budget.restore(told)
        self._restarts = len(told)
        self._lost.extend(adoption.lost(events))
        self._resting = adoption.is_resting(events)
        self._open_gang(plan)
        assert self._gang is not None
        self._gang.adopt(heirs.ranks, heirs.spares, orders.seats)
        self._casualties.nodes = {*orders.nodes, *orders.keepers}
        self.memory.adopt(orders.keepers)
        self._reported(adoption.pause(heirs.ranks, self._recorded))
        self._take_up(adoption.outstanding(events))
        whole = len(heirs.ranks) == plan.mesh.world
        return self._recover(
            plan, WorkersLost(heirs.missing, "the controller died and was started again"), finish=whole
        )

    def _take_up(self, asked: adoption.Outstanding) -> None:
        """What the controller before was asked for, and had not done."""
        self._paused, self._rates = asked.paused, asked.rates
        self._asked |= asked.requests | (Request.PAUSE if asked.rates else Request.NONE)
        if asked.remesh:
            try:
                self._want(Wanted(make_plan(self.config, survey()), AS_ASKED))
            except ConfigError as error:
                self._say("mesh_refused", f"the mesh stays: {error.problems[0].what}")

    def _build(self, plan: Plan, data: RunData) -> None:
        """Fills the gang, and builds one epoch of the mesh from the newest good state."""
        self._enter("starting workers")
        start = time.monotonic()
        gang = self._gather(plan)
        gathered = time.monotonic()
        self._enter("building")
        self._plan, self._epoch = plan.retuned(self.config.lr), self._epoch + 1
        source = self._source(data)
        chosen = time.monotonic()
        self.probation.begin(self._epoch, source)
        nodes = tuple(facts.node_id for _, facts in sorted(gang.facts.items()))
        self.memory.prepare(self._epoch, plan.mesh.world, set(nodes))
        found = time.monotonic()
        self._casualties.nodes = set(nodes)
        self._supervisor = Supervisor(
            gang.workers, self.patience, self._heard, self._asks, self._look, self._casualties.look
        )
        memory = ray.put(source) if isinstance(source, MemoryGeneration) else None
        built = self._together(
            "build", lambda rank: (self._orders(rank, nodes, data, source), memory), patience.BUILDING
        )
        self._step = self._recorded = built[0].step
        self._stood = self._epoch
        self.probation.stands()
        self.memory.stood(self._step)
        self._back_to = None
        self.checkpoints.step = source.step if isinstance(source, Generation) else self.checkpoints.step
        if built[0].problem is not None:
            self._say("memory", f"no copies of the state in memory: {built[0].problem}")
        elif self.memory.on:
            self.memory.forget(self._epoch)
        if self._measure:
            asked = plan.config.observe.trace_steps
            self._choose_at = self._step + MEASURED[1] if asked is None else asked[1]
        self._rewind(self._step)
        self.patience.begin()
        self.health.begin(plan, self._step, {rank: facts.host for rank, facts in gang.facts.items()})
        parts = {"fill_s": gathered - start, "source_s": chosen - gathered, "keepers_s": found - chosen}
        self._tell_built(plan, gang, source, parts, gather_s=found - start, build_s=time.monotonic() - found)

    def _orders(self, rank: int, nodes: tuple[str, ...], data: RunData, source: Source) -> Orders:
        gang, plan = self._gang, self._plan
        assert gang is not None
        assert plan is not None
        where = (ray.util.get_node_ip_address(), self._store.port)
        path = source.path if isinstance(source, Generation) else None
        folder = Path(self.memory.folders[nodes[rank]]) if self.memory.on else None
        dataset = Path(data.sources[0].name)
        return Orders(
            plan, rank, self._epoch, where, dataset, path, gang.device, nodes, folder,
            self.memory.keepers, self.health.retrace, tuple(sorted(self._skip)), gang.seats, self.lines.to,
        )  # fmt: skip

    def _tell_built(self, plan: Plan, gang: Gang, source: Source, parts: Record, **seconds: float) -> None:
        """parts: of gather_s."""
        text = f"{plural(plan.mesh.world, 'worker')} ready in {sum(seconds.values()):.1f} s"
        if source is not None:
            text += f", going on from step {source.step}"
        origin = None if source is None else "memory" if isinstance(source, MemoryGeneration) else "disk"
        text += f" in {origin}" if origin else ""
        hosts = sorted({facts.host for facts in gang.facts.values()})
        pids = {rank: facts.pid for rank, facts in sorted(gang.facts.items())}
        facts = {"epoch": self._epoch, "step": self._step, "mesh": str(plan.mesh), "source": origin}
        nodes = {rank: facts.node_id for rank, facts in sorted(gang.facts.items())}
        self._say("workers", text, **facts, hosts=hosts, pids=pids, nodes=nodes, **seconds, **parts)

    def _gather(self, plan: Plan) -> Gang:
        """Enough workers for a plan, with their ranks. When the run begins spares are made, too; later on that is done while
        it trains (`Moves.look`), not in the way of ranks that wait."""
        if self._gang is None:
            self._open_gang(plan)
        assert self._gang is not None
        gang, world = self._gang, plan.mesh.world
        gang.fill(world, self.directory.config)
        gang.deal(plan.mesh)
        if not self._stood:
            gang.start(world + self.config.recovery.spares, self.directory.config, wait=False, room_s=ROOM_S)
        return gang

    def _open_gang(self, plan: Plan) -> None:
        self._store = TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False)
        self._gang = Gang(self.config.name, plan, self._say, self.seams.open_trainer, self.lines.to)
        self._casualties = Casualties(self._gang, self.memory, self.lines, self._say)
        self._moves = Moves(self.config, self._gang, self._say, self.directory.config)
        self._moves.begin(self.config, plan)

    def _train(self, plan: Plan) -> Plan | None:
        """Segments of steps; between them, what is due. None at the end, else the plan to go on with."""
        while not self._over():
            if self._paused:
                self._rest()
            else:
                self._segment()
            after = None if self._over() else self._turn(plan)
            if after is not None:
                self._leave()
                return after
        if self.checkpoints.step != self._step:
            self._save(wait=True)
        return None

    def _over(self) -> bool:
        return self._step >= self.config.steps or bool(self._asked & Request.STOP)

    def _segment(self) -> None:
        """Steps up to the next one where something is due, or asked for; then that."""
        if self._resting:
            self._say("resumed", f"resumed at step {self._step}", step=self._step)
            self._resting = False
        self._enter("training")
        reached = self._together("run", lambda rank: (self._next_stop(),), patience.STEP)[0]
        self._step, asked = reached.step, Request(reached.request)
        self._treat()
        self._asked &= ~asked | Request.STOP
        ended = self._step >= self.config.steps
        if self._over() or asked & Request.CHECKPOINT or _due(self._step, self.config.checkpoint.every):
            self._save(wait=self._over())
        if self._evaluates and (ended or _due(self._step, self.config.evaluate.every)):
            self._evaluate()

    def _rest(self) -> None:
        """Paused: the ranks wait after a committed step, with all that they hold, until something is asked for."""
        begins = self._phase != PAUSED
        self._enter(PAUSED)
        self._together("settle", lambda rank: (), patience.SAVING)
        self._listen()
        if begins:
            self._say("paused", f"paused at step {self._step}", step=self._step)
        self._resting = True
        assert self._supervisor is not None
        try:
            self._supervisor.attend(lambda: not self._paused or self._wanted or self._rates or self._asked & ACTS)
        except (WorkerError, GuardError, Rollback) as error:
            raise self._otherwise(error) from None
        asked, self._asked = self._asked, self._asked & Request.STOP
        if asked & Request.CHECKPOINT and self.checkpoints.step != self._step:
            self._save()
            self._enter(PAUSED)

    def _retune(self) -> None:
        """The learning rate that was asked for, on all ranks from the next step on."""
        keys, self._rates = self._rates, {}
        before = self.config.lr.at(self._step)
        try:
            self.config = self._with_rates(keys, self._step)
        except ConfigError as error:  # a change that was planned for a later step has come in between
            self._say("lr_refused", f"the learning rate stays: {error.problems[0].what}", step=self._step)
            return
        self.directory.write_config(self.config)
        after = self.config.lr.at(self._step)
        changes = {key: [getattr(before, key), getattr(after, key)] for key in keys}
        text = ", ".join(f"lr.{key} {old} → {new}" for key, (old, new) in changes.items())
        self._say("lr", f"learning rate after step {self._step}: {text}", step=self._step, changes=changes)
        self._together("retune", lambda rank: (self.config.lr,), patience.SAVING)

    def _leave(self) -> None:
        """All ranks leave the mesh, their state in memory or else saved."""
        self._together("settle", lambda rank: (), patience.SAVING)
        self._listen()
        if not self.memory.on and self.checkpoints.step != self._step:
            self._save(wait=True)
        self._together("leave", lambda rank: (self.memory.on,), patience.SAVING)

    def _turn(self, plan: Plan) -> Plan | None:
        """Between two segments: the plan to build anew, because a client, the cluster or measurements want it; or None. A
        learning rate needs no other plan."""
        if self._rates:
            self._retune()
        if self._wanted is not None:
            (after, why), self._wanted = self._wanted, None
            facts = {"page": str(after), "mesh": str(after.mesh), "why": why, "step": self._step}
            self._say("mesh", f"mesh: {after.mesh} after {plan.mesh}: {why}", **facts)
            return after
        return self._choose(plan) if self._choose_at == self._step else None

    def _choose(self, plan: Plan) -> Plan | None:
        """`schedule: auto`, once the first steps are measured: another plan, or None."""
        self._enter("choosing a schedule")
        self._choose_at, self._measure = None, False
        try:
            after, why = replan(plan, read_times(self.directory.path, plan.config))
        except ConfigError as error:
            self._say("schedule", f"schedule: {plan.schedule.name} stays: {error.problems[0].what}")
            return None
        self._say("schedule", f"schedule: {why}", page=str(after), schedule=after.schedule.name)
        return None if after is plan else after

    def _save(self, *, wait: bool = False) -> None:
        """Begins a checkpoint; reports say how it ended. wait: until it is committed, or raise."""
        self._enter("saving")
        self._together("save", lambda rank: (self.directory.checkpoints, wait), patience.SAVING)
        if wait:
            self._listen()

    def _evaluate(self) -> None:
        self._enter("evaluating")
        record = self._together("evaluate", lambda rank: (), patience.EVALUATION)[0]
        text = f"validation loss {record['validation_loss']:.4f} at step {self._step}"
        named = [f"{key.removeprefix(NAMED)} {loss:.4f}" for key, loss in record.items() if key.startswith(NAMED)]
        self._say("evaluate", text + (f": {', '.join(named)}" if named else ""), **record)
        self.checkpoints.validated(self._step, record["validation_loss"])

    def _recover(self, plan: Plan, lost: WorkersLost, *, finish: bool = False) -> Plan:
        """After a loss: who comes back stays, who does not is killed; then the next plan. Raises where it is hopeless.

        finish: the checkpoint under way ends first; all ranks are there for it.
        """
        self._restarts += 1
        facts = {"ranks": list(lost.ranks), "why": str(lost), "loss": str(lost.kind), "cause": lost.why}
        self._say("lost", f"lost {lost}" if lost.ranks else str(lost), **facts, step=self._recorded)
        self._lost.append({"step": self._recorded, "ranks": list(lost.ranks), "why": lost.why})
        self._enter("recovering")
        assert self._gang is not None
        gang = self._gang
        limit_s = LEAVE_S + 2 * float(self.chronicle.last.get("step_time_s", 0.0))
        limit_s += self.patience.limit(patience.SAVING) if finish else 0.0
        left = self._casualties.call_back(self._epoch, lost.ranks, self.memory.on, finish, limit_s)
        for each in left:
            self._hear(each.records)
            self._reported(each.reports)
        judged = self.budget.judge(lost.kind, self._recorded, lost.why)
        if not judged.goes_on and not (judged.stuck and self._blame_memory(self._recorded, lost.why)):
            planned = f"\n    {explained(plan, lost.ranks[0])}" if judged.stuck and lost.ranks else ""
            raise ClusterError(f"the run stops: {judged.why}\n    the last loss: {lost}{planned}")
        again = judged.why if judged.goes_on else "once more, from disk"
        self.probation.lost(lost.kind)
        kept = sorted(gang.ranks)
        text = f"restart {self._restarts}: {plural(len(kept), 'worker')} left ({again})"
        parked = sum(each.parked for each in left)
        self._say("restart", text, kept=kept, spares=len(gang.spares), parked=parked, step=self._recorded)
        assert self._moves is not None
        plan, self._relieved = self._relieved or plan, None
        return self._moves.after_loss(plan)

    def _roll_back(self, back: Rollback) -> None:
        """A step had bad numbers, twice: to an older state, from which it will be skipped. Raises where that is hopeless."""
        judged = self.budget.judge(Kind.FAILED, back.step - 1, str(back))
        if not judged.goes_on:
            raise ClusterError(f"the run stops: {judged.why}")
        self._say("rollback", str(back), step=back.step, back_to=back.back_to, why=f"step {back.step} was bad")
        self._skip.add(back.step)
        self._back_to = back.back_to
        assert self._supervisor is not None
        self._supervisor.together("leave", lambda rank: (), patience.SAVING)

    def _complete(self) -> Result:
        """The end of the story: workers leave, the prompt is continued, the result is read from the run directory."""
        if self._gang is not None:
            self._gang.close()
        newest = self.directory.newest()
        stopped = self._step < self.config.steps
        if newest is not None and self.config.evaluate.prompt and not stopped:
            self._enter("continuing the prompt")
            text = generate(newest.path, self.config.evaluate.prompt, self.config.evaluate.prompt_tokens)
            shown = f"continuation of {self.config.evaluate.prompt!r}:\n{self.config.evaluate.prompt}{text}"
            self._say("continuation", shown, text=text, prompt=self.config.evaluate.prompt)
        kind = "stopped" if stopped else "complete"
        self._say(kind, f"{kind} at step {self._step} of {self.config.steps}", step=self._step)
        return self._result(stopped=stopped, step=self._step)

    def _result(self, *, stopped: bool, step: int) -> Result:
        newest = self.directory.newest()
        path = None if newest is None else str(newest.path)
        return read_result(self.config.name, self.config.run_dir, self.config.steps, path, step, stopped)

    def _failed(self, error: Exception) -> Exception:
        if not isinstance(error, RaytronError):
            error = ClusterError(f"the controller failed: {type(error).__name__}: {error}\n{traceback.format_exc()}")
        first, _, rest = str(error).partition("\n")
        self._say("error", first, type=type(error).__name__, detail=rest)
        return error

    def _finish(self, outcome: Result | Exception) -> None:
        if self._gang is not None:
            self._gang.close()
        self.memory.close()
        self.checkpoints.close()
        self.lines.close()
        self.chronicle.close()
        self._enter("over")
        self._outcome = outcome
        if self.config.cluster.detached:
            self.directory.write_controller(None)
            leave = threading.Timer(self.seams.linger_s, ray.kill, [ray.get_runtime_context().current_actor])
            leave.daemon = True
            leave.start()

    # ---- what the story is made of

    def _source(self, data: RunData) -> Source:
        """The newest good state: in memory, on disk, or none. No step of which there is no record."""
        memory = self._in_memory()
        doubt = self.probation.verdict(self._recorded)
        if doubt is not None and self._blame_memory(self._recorded, doubt, at_once=True):
            memory = None
        up_to = self._recorded if self._back_to is None else self._back_to
        if memory is not None and memory.step == up_to:
            return memory
        disk = self.checkpoints.newest_good(
            data, self._recorded if self._stood and self._back_to is None else self._back_to
        )
        return memory if memory is not None and (disk is None or memory.step >= disk.step) else disk

    def _in_memory(self) -> MemoryGeneration | None:
        """The newest good state in memory; steps that only memory tells of are recorded."""
        if self._back_to is not None:
            return self.memory.newest(self._back_to)
        found = self.memory.newest(self._recorded, later_of=self._stood)
        if found is None or found.step <= self._recorded:
            return found
        first, records = self._recorded + 1, untold(found, self._recorded)
        self._say("recorded", f"steps {first} to {found.step} are told of by memory", first=first, last=found.step)
        self._hear(records or ())
        sick = self.health.take()
        if sick is None or sick.back_to is None:
            return found
        self._back_to = sick.back_to  # these records say that the state is wrong
        return self.memory.newest(self._back_to)

    def _rewind(self, step: int) -> None:
        """Takes back the records of steps after `step`: they will be done again."""
        dropped = self.chronicle.rewind(step)
        if dropped:
            last = max(record["step"] for record in dropped)
            self._say("redo", f"steps {step + 1} to {last} are done again", first=step + 1, last=last)

    def _next_stop(self) -> int:
        """Where the next segment ends: at the next step where something is due."""
        every = [n for n in (self.config.checkpoint.every, self.config.evaluate.every) if n]
        ends = [(self._step // n + 1) * n for n in (*every, LONGEST_SEGMENT)]
        if self._choose_at is not None and self._choose_at > self._step:
            ends.append(self._choose_at)
        return min(self.config.steps, *ends)

    def _together(self, method: str, arguments: Callable[[int], tuple[Any, ...]], phase: str) -> dict[int, Any]:
        """Calls a method of all ranks and watches them. Raises WorkersLost or WorkerError."""
        assert self._supervisor is not None
        start = time.monotonic()
        try:
            answers = self._supervisor.together(method, arguments, phase)
        except (WorkerError, GuardError, Rollback) as error:
            raise self._otherwise(error) from None
        if phase == patience.STEP:
            self._listen()
        else:
            self.patience.saw(phase, time.monotonic() - start)
        return answers

    def _look(self) -> None:
        """While ranks train: whether one is sick, and whether the mesh has to change, or may."""
        self._treat()
        assert self._moves is not None
        assert self._plan is not None
        if self._wanted is None and (wanted := self._moves.look(self._plan)) is not None:
            self._want(wanted)
        assert self._gang is not None
        self.memory.greet({member.facts.node_id for member in self._gang.ready if member.facts is not None})

    def _treat(self) -> None:
        """Raises WorkersLost where a rank is sick, or steps have to be done again to tell which is."""
        doubt = self.probation.take()
        if doubt is not None and self._blame_memory(self._recorded, doubt, at_once=True):
            raise WorkersLost((), doubt)
        sick = self.health.take()
        if sick is not None:
            self._back_to = sick.back_to
            raise WorkersLost(sick.ranks, sick.why)

    def _otherwise(self, error: WorkerError | GuardError | Rollback) -> Exception:
        """What to raise for an exception of the ranks' own: WorkersLost where something else can be tried, else itself."""
        if isinstance(error, OutOfMemoryError):
            return self._relieve(error)
        if self.probation.since is not None:
            with contextlib.suppress(Exception):
                self._listen()
        step = error.step - 1 if isinstance(error, Rollback) else self._recorded
        why = first_line(error)
        if not self._blame_memory(step, why):
            return error
        return WorkersLost((error.rank,) if isinstance(error, WorkerError) else (), why)

    def _relieve(self, error: OutOfMemoryError) -> Exception:
        """A rank is out of memory: lost, where another plan may help; else the run stops, with what had been planned."""
        plan = self._plan
        assert plan is not None
        relief = self.exhaustion.relief(error, plan)
        if relief is None:
            return self.exhaustion.explained(error, plan)
        self.config = self.config.replace(**relief.changes)
        self.directory.write_config(self.config)
        if self._moves is not None:
            self._moves.begin(self.config, relief.plan)
        self._relieved = relief.plan
        if self._wanted is not None:
            wanted = self._wanted.plan
            self._wanted = self._wanted._replace(
                plan=make_plan(wanted.config.replace(**relief.changes), wanted.cluster)
            )
        why = f"out of memory ({error.where}): {first_line(error)}"
        text = f"rank {error.rank} is {why}; {explained(plan, error.rank)}; the run goes on with {relief}"
        self._say("relief", text, rank=error.rank, where=error.where, changes=relief.changes, page=str(relief.plan))
        return WorkersLost((error.rank,), f"out of memory in {error.where}")

    def _blame_memory(self, step: int, why: str, *, at_once: bool = False) -> bool:
        """Something went wrong after `step` committed ones: whether memory may have led to it, and disk, which then has to
        have something, is to be tried. at_once: the first is known."""
        since = self.probation.since
        if since is None or not (at_once or self.probation.suspects(step)):
            return False
        if all(generation.step > since for generation in committed(self.directory.checkpoints)):
            return False
        self.memory.demote(self.probation.epoch, why)
        self.health.absolve()
        self.probation.begin(self.probation.epoch, None)
        self._back_to = since if self._back_to is None else min(since, self._back_to)
        return True

    def _listen(self) -> None:
        """Hears what rank 0 has to tell by now."""
        assert self._supervisor is not None
        self._supervisor.last_words()

    def _asks(self, rank: int) -> tuple[int, int]:
        """What a beat carries to a rank: the newest step that is known of, and what is asked for."""
        return self._recorded, int(self._asked) if rank == 0 and self._phase != PAUSED else 0

    def _heard(self, rank: int, beat: Beat) -> None:
        self._hear(beat.records)
        self.health.busy(rank, beat.busy)
        self._reported(beat.reports)

    def _reported(self, reports: Iterable[Record]) -> None:
        for report in reports:
            self.checkpoints.reported(report)

    def _hear(self, records: Iterable[Record]) -> None:
        """Records of steps, in order; those that are known already are passed over."""
        for record in records:
            if record["step"] > self._recorded:
                self._recorded = int(record["step"])
                self.patience.saw(patience.STEP, record["step_time_s"])
                self.probation.saw(record)
                self.health.record(record)
                rate = self._mfu(record)
                self.chronicle.record(record if rate is None else {**record, "mfu": rate})
                if "rerun" in record:
                    self._say("guard", f"step {record['step']}: {record['rerun']['message']}", step=record["step"])

    def _mfu(self, record: Record) -> float | None:
        plan = self._plan
        assert plan is not None
        assert plan.cluster is not None
        given, name = self.config.observe.peak_tflops, plan.cluster.device_name
        peak = given * 1e12 if given else peak_flops(name, self.config.precision.dtype)
        return mfu(record["tokens_per_s"], plan.flops_per_token, plan.mesh.world, peak) if peak else None

    def _enter(self, phase: str) -> None:
        self._phase = phase

    def _preparing(self, fraction: float, message: str) -> None:
        self.chronicle.whisper("preparing", message, fraction=fraction)


def _due(step: int, every: int | None) -> bool:
    return bool(every) and step % int(every or 1) == 0


ControllerActor: Any = ray.remote(num_cpus=0, max_restarts=-1, concurrency_groups={"ctl": 4})(Controller)
