"""The controller: an actor of its own that tells the whole story of a run, in `fit`.

    data set ─► plan ─► gang of workers ─► build ─► segments, checkpoints, evaluations ─► done
                             ▲                           │ a worker is lost
                             └── keep survivors, go on from the newest good generation ◄┘

It holds the rendezvous store (so rank 0 may die), writes metrics.jsonl and events.jsonl, and answers clients in the `ctl`
group while it works. Its only talk with running workers is twice a second: what happened, and what is asked for.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.util.metrics import Gauge
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from raytron.actors.cluster import Gang, survey
from raytron.actors.control import control
from raytron.actors.recovery import WorkersLost, cause_of, is_death, is_settled, next_plan, verdict
from raytron.actors.worker import OpenTrainer, Orders, Request
from raytron.checkpoint.catalog import Generation, newest_good, prune
from raytron.config import RunConfig
from raytron.data.prepare import ensure_dataset
from raytron.data.shards import Dataset, open_dataset
from raytron.errors import CheckpointError, ClusterError, ConfigError, Problem, RaytronError
from raytron.observe.board import TensorBoard
from raytron.observe.records import JsonLines, Metrics, Record, event
from raytron.observe.result import Result, read_result
from raytron.observe.trace import MEASURED
from raytron.plan.flops import mfu, peak_flops
from raytron.plan.plan import Plan, make_plan, replan
from raytron.plan.times import FOLDER, read_times
from raytron.training.generate import generate
from raytron.training.open import evaluates, open_trainer
from raytron.training.run_directory import RunDirectory

POLL_S = 0.5  # between two looks at running workers
LONGEST_SEGMENT = 1000  # steps
GRACE_S = 3.0  # for the cause to arrive when a consequence came first
LEAVE_S = 8.0  # for survivors to come back from a broken collective
HELD = 20_000  # records and events kept for clients; files keep all
GAUGES = {"loss": "nats", "tokens_per_s": "tokens/s", "step_time_s": "s", "grad_norm": ""}


class News(NamedTuple):
    """What a client has not seen yet, and where to go on asking. `over`: nothing will follow."""

    events: list[Record]
    metrics: list[Record]
    cursor: tuple[int, int]
    over: bool


@dataclass(frozen=True)
class Seams:
    """What tests replace."""

    prepare: Callable[..., Path] = ensure_dataset
    open_trainer: OpenTrainer = open_trainer
    linger_s: float = 120.0  # how long the controller of a detached run tells of the end


class Log:
    """Records that clients follow by a count; only the newest are held."""

    def __init__(self) -> None:
        self._held: deque[Record] = deque(maxlen=HELD)
        self._count = 0

    def append(self, record: Record) -> None:
        self._held.append(record)
        self._count += 1

    def since(self, cursor: int) -> tuple[list[Record], int]:
        new = min(self._count - cursor, len(self._held))
        return (list(self._held)[-new:] if new > 0 else []), self._count


class Controller:
    """One run. config: settled (`raytron.training.run_directory.settle`); place: the folder that relative paths mean."""

    def __init__(self, config: RunConfig, place: str, seams: Seams | None = None):
        if Path(place).is_dir():
            os.chdir(place)
        self.config, self.seams = config, seams or Seams()
        self.directory = RunDirectory(Path(config.run_dir))
        self._lock = threading.Lock()
        self._events, self._metrics = Log(), Log()
        self._event_file, self._metric_file = JsonLines(self.directory.events), Metrics(self.directory.metrics)
        self._phase, self._asked = "starting", Request.NONE
        self._plan: Plan | None = None
        self._measure = config.pipeline.schedule == "auto"  # until this launch has chosen
        self._gang: Gang | None = None
        self._step = self._epoch = self._restarts = 0
        self._choose_at: int | None = None  # the step at which `schedule: auto` has been measured
        self._saved: int | None = None  # the step of the newest checkpoint
        self._last: Record = {}
        self._outcome: Result | Exception | None = None
        self._gauges = {key: Gauge(f"raytron_{key}", description=f"{key} {unit}".strip(), tag_keys=("run",))
                        for key, unit in GAUGES.items()} if config.observe.ray_metrics else {}  # fmt: skip
        self._board = TensorBoard(config.run_dir) if config.observe.tensorboard else None

    def __repr__(self) -> str:
        return f"Controller({self.config.name if hasattr(self, 'config') else 'not started'})"

    # ---- the story

    def fit(self) -> None:
        """The whole run. Its outcome, a Result or an exception, is fetched with `outcome`."""
        try:
            self.directory.write_config(self.config)
            data = self._prepare()
            plan = self._make_plan()
            while True:
                try:
                    self._build(plan, data)
                    after = self._train(plan)
                    if after is None:
                        break
                    plan = after
                except WorkersLost as lost:
                    plan = self._recover(plan, lost)
            self._finish(self._complete())
        except Exception as error:
            self._finish(self._failed(error))

    def _prepare(self) -> Dataset:
        """The data set, made now if it is not there."""
        self._enter("preparing data")
        dataset = open_dataset(self.seams.prepare(self.config, self._preparing))
        if dataset.tokenizer.exists():
            shutil.copyfile(dataset.tokenizer, self.directory.tokenizer)
        train, held = dataset.tokens("train"), dataset.tokens("validation")
        text = (
            f"data: {train:,} tokens to train on, {held:,} to validate; unigram entropy "
            f"{dataset.unigram_entropy:.3f} nats per token (the loss of counting tokens alone)"
        )
        self._say("data", text, tokens=train, unigram_entropy=dataset.unigram_entropy, path=str(dataset.path))
        self._evaluates = evaluates(self.config, dataset)
        return dataset

    def _make_plan(self) -> Plan:
        plan = make_plan(self.config, survey(), report=lambda text: self._enter(f"choosing a schedule: {text}"))
        shutil.rmtree(self.directory.path / FOLDER, ignore_errors=True)  # what an earlier run has measured
        self._say("plan", f"plan: {plan.mesh}", page=str(plan), mesh=str(plan.mesh))
        self._plan = plan
        return plan

    def _build(self, plan: Plan, data: Dataset) -> None:
        """Fills the gang, and builds one epoch of the mesh from the newest good generation."""
        self._enter("starting workers")
        start = time.monotonic()
        if self._gang is None:
            self._store = TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False)
            self._gang = Gang(self.config.name, plan, self._say, self.seams.open_trainer)
        self._gang.fill(self.directory.config)
        self._enter("building")
        generation = self._generation(data)
        self._epoch += 1
        where = (ray.util.get_node_ip_address(), self._store.port)
        path = None if generation is None else generation.path
        orders = {
            rank: Orders(
                plan, rank, self._epoch, where, data.path, path, self._gang.device, self._gang.neighbours(rank)
            )
            for rank in self._gang.workers
        }
        steps = self._together("build", lambda rank: (orders[rank],))
        self._step = self._saved = steps[0]
        if self._measure:
            asked = plan.config.observe.trace_steps
            self._choose_at = self._step + MEASURED[1] if asked is None else asked[1]
        self._rewind(steps[0])
        text = f"{plan.mesh.world} workers ready in {time.monotonic() - start:.1f} s"
        if generation is not None:
            text += f", going on from step {generation.step}"
        hosts = sorted({facts.host for facts in self._gang.facts.values()})
        pids = {rank: facts.pid for rank, facts in sorted(self._gang.facts.items())}
        self._say("workers", text, epoch=self._epoch, step=self._step, hosts=hosts, pids=pids)

    def _train(self, plan: Plan) -> Plan | None:
        """Segments of steps; between them, what is due. None at the end, else the plan to go on with."""
        config = plan.config
        while self._step < config.steps and not self._asked & Request.STOP:
            self._enter("training")
            reached = self._together("run", lambda rank: (self._next_stop(),))[0]
            self._step, asked = reached.step, Request(reached.request)
            self._asked &= ~asked | Request.STOP
            ended = self._step >= config.steps
            if asked or ended or _due(self._step, config.checkpoint.every):
                self._save()
            if self._evaluates and (ended or _due(self._step, config.evaluate.every)):
                self._evaluate()
            if self._choose_at == self._step and not ended and not self._asked & Request.STOP:
                after = self._choose(plan)
                if after is not plan:
                    return after
        if self._saved != self._step:
            self._save()
        return None

    def _choose(self, plan: Plan) -> Plan:
        """`schedule: auto`, once the first steps are measured: the plan to go on with, its start saved."""
        self._enter("choosing a schedule")
        self._choose_at, self._measure = None, False
        try:
            after, why = replan(plan, read_times(self.directory.path, plan.config))
        except ConfigError as error:
            self._say("schedule", f"schedule: {plan.schedule.name} stays: {error.problems[0].what}")
            return plan
        self._say("schedule", f"schedule: {why}", page=str(after), schedule=after.schedule.name)
        if after is not plan and self._saved != self._step:
            self._save()
        self._plan = after
        return after

    def _save(self) -> None:
        self._enter("saving")
        start = time.monotonic()
        path = self._together("save", lambda rank: (self.directory.checkpoints,))[0]
        seconds = time.monotonic() - start
        self._saved = self._step
        self._say("checkpoint", f"checkpoint of step {self._step} in {seconds:.1f} s", step=self._step, path=str(path))
        prune(self.directory.checkpoints, self.config.checkpoint.keep_last, digests=False)

    def _evaluate(self) -> None:
        self._enter("evaluating")
        record = self._together("evaluate", lambda rank: ())[0]
        text = f"validation loss {record['validation_loss']:.4f} at step {self._step}"
        self._say("evaluate", text, **record)

    def _recover(self, plan: Plan, lost: WorkersLost) -> Plan:
        """After a loss: who comes back stays, who does not is killed; then the next plan."""
        self._restarts += 1
        self._say("lost", f"lost {lost}", ranks=list(lost.ranks), step=self._step)
        if self._restarts > self.config.cluster.max_restarts:
            limit = (
                f"workers were lost {self._restarts} times; cluster.max_restarts is {self.config.cluster.max_restarts}"
            )
            raise ClusterError(f"{limit}\n    the last time: {lost}")
        self._enter("recovering")
        assert self._gang is not None
        self._gang.drop(lost.ranks)
        calls = {worker.leave.remote(): rank for rank, worker in self._gang.workers.items()}
        back, late = ray.wait(list(calls), num_returns=len(calls), timeout=LEAVE_S) if calls else ([], [])
        gone = [calls[call] for call in late] + [calls[call] for call in back if _failed(call)]
        self._gang.drop(gone)
        kept = sorted(self._gang.workers)
        self._say("restart", f"restart {self._restarts}: {len(kept)} workers stay, the others are replaced", kept=kept)
        return next_plan(plan, lost)

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
        path = None if newest is None else str(newest.path)
        return read_result(self.config.name, self.config.run_dir, self.config.steps, path, self._step, stopped)

    def _failed(self, error: Exception) -> Exception:
        if not isinstance(error, RaytronError):
            error = ClusterError(f"the controller failed: {type(error).__name__}: {error}\n{traceback.format_exc()}")
        first, _, rest = str(error).partition("\n")
        self._say("error", first, type=type(error).__name__, detail=rest)
        return error

    def _finish(self, outcome: Result | Exception) -> None:
        if self._gang is not None:
            self._gang.close()
        if self._board is not None:
            self._board.close()
        self._enter("over")
        self._outcome = outcome
        if self.config.cluster.detached:
            self.directory.write_controller(None)
            leave = threading.Timer(self.seams.linger_s, ray.kill, [ray.get_runtime_context().current_actor])
            leave.daemon = True
            leave.start()

    # ---- what the story is made of

    def _generation(self, data: Dataset) -> Generation | None:
        """The newest generation that verifies; damaged ones are told of. Raises for one of other data."""
        generation = newest_good(self.directory.checkpoints, self._damaged)
        if generation is None or generation.facts.get("data") in (None, "", data.hash):
            return generation
        if {"data", "data.dataset"} & set(self.config.resume.allow):
            return generation
        what = f"the data set in {data.path} is another one than {generation.path.name} was trained on"
        raise ConfigError([Problem("data", what, "use the old data, another run_dir, or resume.allow=data")])

    def _damaged(self, path: Path, error: CheckpointError) -> None:
        self._say("damaged", f"passed over {path.name}: {error}", path=str(path))

    def _rewind(self, step: int) -> None:
        """Takes back the records of steps after `step`: they will be done again."""
        dropped = self._metric_file.rewind(step)
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

    def _together(self, method: str, arguments: Callable[[int], tuple[Any, ...]]) -> dict[int, Any]:
        """Calls a method of all workers, follows them while they work, and returns their answers by rank.

        Raises WorkersLost or WorkerError.
        """
        assert self._gang is not None
        gang = self._gang
        calls = {getattr(worker, method).remote(*arguments(rank)): rank for rank, worker in gang.workers.items()}
        answers: dict[int, Any] = {}
        failures: dict[int, BaseException] = {}
        deadline = float("inf")
        while len(answers) + len(failures) < len(calls):
            waiting = [call for call, rank in calls.items() if rank not in answers and rank not in failures]
            done, _ = ray.wait(waiting, num_returns=1, timeout=POLL_S)
            for call in done:
                try:
                    answers[calls[call]] = ray.get(call)
                except Exception as error:
                    failures[calls[call]] = error
                    deadline = min(deadline, time.monotonic() + GRACE_S)
            if is_settled(failures) or time.monotonic() > deadline:
                break
            if not done and not failures:
                self._follow()
        if failures:
            raise verdict(failures, set(gang.workers) - set(answers) - set(failures))
        if method == "run":
            self._follow(wait_s=30.0)
        return answers

    def _follow(self, wait_s: float = 2.0) -> None:
        """Fetches what rank 0 has recorded, and hands it what clients ask for."""
        assert self._gang is not None
        first = self._gang.workers[0]
        try:
            records = ray.get(first.drain.remote(self._recorded), timeout=wait_s)
            if self._asked:
                ray.get(first.request.remote(int(self._asked)), timeout=wait_s)
        except ray.exceptions.GetTimeoutError:
            return
        except Exception as error:
            if is_death(error):
                return  # the call that is under way will say so
            raise cause_of(error) from None
        for record in records:
            self._record(record)

    @property
    def _recorded(self) -> int:
        return int(self._last.get("step", 0)) if self._last.get("epoch") == self._epoch else self._step

    def _record(self, record: Record) -> None:
        """One committed step."""
        rate = self._mfu(record)
        if rate is not None:
            record["mfu"] = rate
        with self._lock:
            self._metric_file.append(record)
            self._metrics.append(record)
            self._last = {**record, "epoch": self._epoch}
        for key, gauge in self._gauges.items():
            gauge.set(record[key], tags={"run": self.config.name})
        if self._board is not None:
            self._board.write(record)

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
        with self._lock:
            self._events.append(event("preparing", message, fraction=fraction))

    def _say(self, kind: str, message: str, **facts: Any) -> None:
        """An event: to the file, and to whoever follows."""
        record = event(kind, message, **facts)
        with self._lock:
            self._event_file.append(record)
            self._events.append(record)

    # ---- what clients ask, at any time

    @control
    def status(self) -> Record:
        """Where the run stands."""
        last = self._last
        return {
            "name": self.config.name,
            "phase": self._phase,
            "step": int(last.get("step", self._step)),
            "steps": self.config.steps,
            "loss": last.get("loss"),
            "tokens_per_s": last.get("tokens_per_s"),
            "step_time_s": last.get("step_time_s"),
            "mesh": None if self._plan is None else str(self._plan.mesh),
            "workers": 0 if self._gang is None else len(self._gang.workers),
            "restarts": self._restarts,
            "checkpoint_step": self._saved or None,
            "run_dir": self.config.run_dir,
        }

    @control
    def drain(self, cursor: tuple[int, int]) -> News:
        """What happened since `cursor`; (0, 0) is the beginning."""
        over = self._outcome is not None
        with self._lock:
            events, at = self._events.since(cursor[0])
            metrics, to = self._metrics.since(cursor[1])
        return News(events, metrics, (at, to), over)

    @control
    def request(self, request: int) -> str:
        """Asks for a checkpoint or a stop (with a checkpoint); returns the phase that it met."""
        self._asked |= Request(request)
        return self._phase

    @control
    def stacks(self) -> dict[int, str]:
        """The stacks of all threads of all workers that answer within 5 s."""
        calls = {} if self._gang is None else {w.stacks.remote(): rank for rank, w in self._gang.workers.items()}
        done = ray.wait(list(calls), num_returns=len(calls), timeout=5.0)[0] if calls else []
        return {calls[call]: ray.get(call) for call in done if not _failed(call)}

    @control
    def outcome(self) -> Result | Exception | None:
        """How the run ended; None: it goes on."""
        return self._outcome


def _due(step: int, every: int | None) -> bool:
    return bool(every) and step % int(every or 1) == 0


def _failed(call: Any) -> bool:
    try:
        ray.get(call)
    except Exception:
        return True
    return False


ControllerActor: Any = ray.remote(num_cpus=0, max_restarts=0, concurrency_groups={"ctl": 4})(Controller)
