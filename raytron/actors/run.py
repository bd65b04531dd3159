"""Runs from the outside: start one and wait (`train`), start one and steer it (`launch`), find one again (`attach`).

A Run is a thin client of the controller; it may go and come back. `train` is a launch that is followed on the screen.
The first Ctrl-C, or SIGTERM, saves and stops; the second leaves at once. Either way no process stays behind.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytron import presets
from raytron.actors.adoption import end_all
from raytron.actors.chronicle import BEGINNING, News
from raytron.actors.cluster import (
    AUTH_MODE,
    NAMESPACE,
    Session,
    connect,
    controller_name,
    follow_auth,
    join,
    own_room,
    part_of,
)
from raytron.actors.controller import ControllerActor, Seams
from raytron.actors.recovery import cause_of
from raytron.actors.worker import Request
from raytron.config import RunConfig
from raytron.data.check import data_problems
from raytron.data.ensure import ensure_data
from raytron.errors import ClusterError, ConfigError, Problem
from raytron.observe.draw import loss_curve, page
from raytron.observe.progress import Screen
from raytron.observe.records import Record, read_records
from raytron.observe.result import Result, read_result
from raytron.observe.table import Table
from raytron.plan.cluster import too_small
from raytron.plan.mesh import MeshShape
from raytron.plan.plan import make_plan
from raytron.rules import problems
from raytron.training.run_directory import RunDirectory, occupied, settle

CLEAR_S = 5.0  # for a run that is given up to end its workers
FOLLOW_S = 0.4  # between two looks at a run
RELEASE_S = 10.0  # for the name of a run that is over to be free again
HOME = Path("runs")  # where a run directory is looked for by the name of the run
BACK_S = 60.0  # for a controller that died to be there again
Watcher = Callable[[News], None]
Source = RunConfig | Path | str | Mapping[str, Any]  # a configuration, its file, a preset's name, or nested mappings


class Stopped(KeyboardInterrupt):
    """The user left at once, without a checkpoint."""


def train(config: Source, *, quiet: bool = False) -> Result:
    """Runs a configuration to its end, shown on the screen, and returns the result; a complete run is not run again.

    Raises ConfigError before Ray starts where the configuration has problems, WorkerError for an exception in a worker,
    ClusterError where the cluster fails.
    """
    config = preflight(presets.read(config))
    done = completed(config)
    if done is not None:
        if not quiet:
            print(f"{config.name} is complete: step {done.step} of {config.steps} in {config.run_dir}")
        return done
    run = launch(config)
    try:
        with Screen(config.steps) as screen, _signals(run):
            result = run.wait(on_news=None if quiet else screen.news)
        return dataclasses.replace(result, interrupted_by=run.interrupted_by)
    finally:
        run.close()


def launch(config: Source, *, seams: Seams | None = None) -> Run:
    """Starts a run and returns at once. Raises as `train` does, as far as it can tell at once."""
    config = preflight(presets.read(config))
    session = connect(config.cluster, MeshShape.of(config.mesh).world)
    try:
        if config.cluster.detached and session.local:
            what = "a detached run needs a cluster that outlives this process"
            raise ClusterError(
                f"{what}\n    remedy: ray start --head, then cluster.address=auto; or cluster.detached=false"
            )
        make_plan(config, None)
        controller = _start(config, seams)
    except BaseException:
        session.close()
        raise
    auth = os.environ.get(AUTH_MODE) if session.local else None
    whose = {"host": socket.gethostname(), "pid": os.getpid()}
    facts = {"address": session.address, "name": config.name, **whose, "auth": auth}
    RunDirectory(Path(config.run_dir)).write_controller(facts)
    return Run(config.name, Path(config.run_dir), controller, session, owner=not config.cluster.detached)


def attach(name: str, address: str | None = None) -> Run:
    """A run that goes on: by its name on the cluster, or by its run directory. Raises ClusterError if there is none."""
    found = _directory(name).read_controller()
    if found is not None:
        name, address = str(found["name"]), address or str(found["address"])
        follow_auth(found.get("auth"))
    session = _join(address)
    try:
        controller = ray.get_actor(controller_name(name), namespace=NAMESPACE)
        run_dir = Path(ray.get(controller.status.remote(), timeout=30)["run_dir"])
    except (ValueError, ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
        session.close()
        raise ClusterError(f"no run named {name} is at work on the cluster at {session.address}") from None
    return Run(name, run_dir, controller, session, owner=False)


def statuses(name: str | None = None, address: str | None = None) -> list[Record]:
    """Where one run stands, by its name or its run directory; None: every run at work on the cluster, else in `runs`.

    Of a run that is not at work, its directory tells. Raises ClusterError where there is neither.
    """
    if name is None:
        return _all_statuses(address)
    directory = _directory(name)
    if directory.read_controller() is None and address is None and directory.config.exists():
        return [_at_rest(directory)]
    try:
        run = attach(name, address)
    except ClusterError:
        if directory.config.exists():
            return [_at_rest(directory)]
        raise
    try:
        return [run.status()]
    finally:
        run.close()


class Run:
    """A run that is at work. owner: the run ends with this object."""

    def __init__(self, name: str, run_dir: Path, controller: Any, session: Session, *, owner: bool):
        self.name, self.run_dir, self._controller, self._session = name, run_dir, controller, session
        self._owner = owner
        self.interrupted_by: int | None = None  # the signal that came
        self._closed = False
        self._outcome: Result | Exception | None = None

    def status(self) -> Record:
        """Phase, step, loss, speed, workers, restarts. Raises ClusterError where the run is gone."""
        return dict(self._ask("status"))

    def metrics(self) -> Table:
        """One record for each committed step, from the run directory."""
        return Table(read_records(self.run_dir / "metrics.jsonl"))

    def events(self) -> list[Record]:
        """What happened, and when, from the run directory."""
        return read_records(self.run_dir / "events.jsonl")

    def stacks(self) -> dict[int, str]:
        """The stack of every thread of every worker."""
        return dict(self._ask("stacks"))

    def checkpoint(self) -> None:
        """Asks for a checkpoint after the step that is under way; returns at once."""
        self._ask("request", int(Request.CHECKPOINT))

    def stop(self) -> None:
        """Asks the run to save and stop after the step that is under way; returns at once."""
        self._ask("request", int(Request.STOP))

    def pause(self) -> None:
        """Asks the run to wait after the step that is under way; returns at once, and `status` says when it is paused.

        Workers stay where they are, with all that they hold; losses are those of a run that was never paused. A paused run
        still saves, stops, changes its mesh or its learning rate, and replaces workers that it loses. Raises ClusterError
        where no step will follow.
        """
        self._ask("pause")

    def resume(self) -> None:
        """A paused run goes on. Raises ClusterError where it is not paused."""
        self._ask("resume")

    def set_lr(self, peak: float | None = None, **keys: Any) -> None:
        """Asks for another learning rate from the next step on, in keys of lr: `run.set_lr(1e-4, final=1e-5)`.

        peak, final, decay, decay_steps and stable_fraction. The schedule goes on as if they had been so from the beginning;
        the step and the values stand in events.jsonl, and as `lr.changes` in config.yaml and in checkpoints: whatever step
        the run goes back to, they hold from the same one on. Raises ConfigError where they can't be, and then nothing
        changes; ClusterError where no step will follow.
        """
        self._ask("set_lr", {**({} if peak is None else {"peak": peak}), **keys})

    def remesh(self, **overrides: Any) -> str:
        """Asks for another mesh, live, after the step that is under way: `run.remesh(**{"mesh.tp": 4, "mesh.dp": 1})`.

        Keys of mesh, pipeline, data_parallel and memory, and micro_batch_size. Returns the page of the new plan at once.
        Raises ConfigError where that plan has problems, and then nothing changes.
        """
        return str(self._ask("remesh", overrides))

    def wait(self, timeout_s: float | None = None, on_news: Watcher | None = None) -> Result:
        """The result, once the run is over; the owner's run is then closed. Raises what it failed with, or TimeoutError.

        on_news: told what happens, about twice a second.
        """
        if self._outcome is not None:
            return _given(self._outcome)
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        cursor = BEGINNING
        while True:
            news: News = self._ask("drain", cursor)
            cursor = news.cursor
            if on_news is not None:
                on_news(news)
            if news.over:
                self._outcome = self._ask("outcome")
                if self._owner:
                    self.close()
                return _given(self._outcome)
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(f"{self.name} goes on after {timeout_s} s")
            time.sleep(FOLLOW_S)

    def close(self) -> None:
        """Lets go of the run; ends it, and a local Ray, where this object owns it."""
        if self._closed:
            return
        self._closed = True
        if self._owner and ray.is_initialized():
            with contextlib.suppress(Exception):
                if self._outcome is None:
                    ray.get(self._controller.clear.remote(), timeout=CLEAR_S)
            with contextlib.suppress(Exception):
                ray.kill(self._controller)
            with contextlib.suppress(Exception):
                end_all(self.name)
            RunDirectory(self.run_dir).write_controller(None)
        self._session.close()

    def interrupt(self, number: int) -> None:
        """What Ctrl-C does: first save and stop, then leave. Raises Stopped where there is nothing to wait for."""
        if self.interrupted_by is not None:
            raise Stopped
        self.interrupted_by = number
        phase = self._ask("request", int(Request.STOP))
        if phase in ("starting", "preparing data", "starting workers"):
            raise Stopped
        print("\nstopping: the run saves a checkpoint first (once more to leave at once)", flush=True)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        try:
            status = self.status()
        except ClusterError:
            return f"Run({self.name}: not at work, {self.run_dir})"
        return f"Run({self.name}: {status['phase']}, step {status['step']} of {status['steps']})"

    def _repr_html_(self) -> str:
        try:
            rows = list(self.status().items())
        except ClusterError:
            rows = [("run_dir", str(self.run_dir))]
        return page(f"run {self.name}", rows, loss_curve(self.metrics()))

    def _ask(self, method: str, *arguments: Any) -> Any:
        if self._closed:
            raise ClusterError(f"this Run of {self.name} is closed; its files are in {self.run_dir}")
        deadline = time.monotonic() + BACK_S
        while True:
            try:
                return ray.get(getattr(self._controller, method).remote(*arguments), timeout=60)
            except ray.exceptions.RayTaskError as error:
                raise cause_of(error) from None
            except ray.exceptions.RayActorError as error:
                if not _comes_back(self.name) or time.monotonic() > deadline:
                    first = str(error).splitlines()[0]
                    raise ClusterError(f"the controller of {self.name} is gone: {first}") from None
                time.sleep(FOLLOW_S)
            except ray.exceptions.GetTimeoutError:
                raise ClusterError(f"the controller of {self.name} did not answer for 60 s") from None


def preflight(config: RunConfig) -> RunConfig:
    """The configuration as it will be run. Raises ConfigError with every problem that can be told without Ray."""
    settled, found = settle(config)
    found = [*problems(settled), *found, *occupied(RunDirectory(Path(settled.run_dir)))]
    known = {problem.where for problem in found}
    if not any(where.startswith(("data", "model.vocab")) for where in known):
        found += data_problems(settled)
    room, shape = own_room(settled.cluster), MeshShape.of(settled.mesh)
    if room is not None and not any(where.startswith(("mesh", "cluster")) for where in known):
        least = settled.elastic.fewest if settled.elastic.on else shape.world
        found += too_small(room, settled.cluster, least, str(shape))
    if found:
        raise ConfigError(found)
    return settled


def completed(config: RunConfig) -> Result | None:
    """The result of a run that has nothing left to do; None where there is something."""
    newest = RunDirectory.of(config).newest()
    if newest is None or newest.step < config.steps:
        return None
    return read_result(config.name, config.run_dir, config.steps, str(newest.path), newest.step)


def tokenize(config: RunConfig, report: Callable[[float, str], None]) -> Path:
    """Prepares the data set of a configuration on a cluster or a local Ray; its folder."""
    found = data_problems(config)
    if config.data.blend:
        what = "names data sets that are tokenized already, or text that is tokenized as it is read"
        found = [Problem("data.blend", what, "leave it empty, and name the text in data.sources"), *found]
    if config.data.source == "text":
        what = "text is tokenized as it is read: there is no data set to prepare"
        found = [Problem("data.source", what, "train, or set data.source to tokens"), *found]
    if found:
        raise ConfigError(found)
    session = connect(config.cluster, 0)
    try:
        return ensure_data(config, report)
    finally:
        session.close()


def _start(config: RunConfig, seams: Seams | None) -> Any:
    """The controller actor of a run, at work. Raises ClusterError where the name is taken.

    It lives on this node, which sees the run directory and is the head in most clusters, as long as that has room: on a
    training node the loss of that node would be the controller's, too. It asks for one byte: Ray first offers what asks for
    nothing to any node, and one that has just joined may not know this one yet and keep it.
    """
    here = NodeAffinitySchedulingStrategy(node_id=ray.get_runtime_context().get_node_id(), soft=True)
    options: dict[str, Any] = {
        "name": controller_name(config.name),
        "namespace": NAMESPACE,
        "scheduling_strategy": here,
        "memory": 1,
    }
    if config.cluster.detached:
        options["lifetime"] = "detached"
    deadline = time.monotonic() + RELEASE_S
    while True:
        try:
            controller = ControllerActor.options(**options).remote(config, os.getcwd(), seams)
            break
        except ValueError:
            if not _is_over(controller_name(config.name)) or time.monotonic() > deadline:
                remedy = f"remedy: attach to it (raytron status {config.name}), stop it, or give this run another name"
                raise ClusterError(
                    f"a run named {config.name} is at work on this cluster already\n    {remedy}"
                ) from None
            time.sleep(0.1)
    controller.fit.remote()
    return controller


def _comes_back(run: str) -> bool:
    """Whether a controller that gave no answer lives, or is being started again."""
    try:
        ray.get_actor(controller_name(run), namespace=NAMESPACE)
    except ValueError:
        return False
    return True


def _is_over(name: str) -> bool:
    """Whether a controller has nothing left to do; its name is then set free."""
    try:
        controller = ray.get_actor(name, namespace=NAMESPACE)
        if ray.get(controller.outcome.remote(), timeout=10) is None:
            return False
        ray.kill(controller)
    except (ValueError, ray.exceptions.RayActorError):  # already gone
        return True
    except ray.exceptions.GetTimeoutError:
        return False
    return True


def _given(outcome: Result | Exception) -> Result:
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _join(address: str | None) -> Session:
    """The connection that this process has, or one to a cluster that runs. Raises ClusterError where there is none."""
    if ray.is_initialized():
        return Session(ray.get_runtime_context().gcs_address, local=False, owned=False)
    return join(address or os.environ.get("RAY_ADDRESS") or "auto")


def _all_statuses(address: str | None) -> list[Record]:
    try:
        session = _join(address)
    except ClusterError:
        here = sorted(path.parent for path in HOME.glob("*/config.yaml"))
        if address is not None or not here:
            raise
        return [status for path in here for status in statuses(str(path))]
    try:
        actors = [actor["name"] for actor in ray.util.list_named_actors(True) if actor["namespace"] == NAMESPACE]
        names = sorted(actor for actor in actors if part_of(actor) is None)
        return [dict(ray.get(ray.get_actor(actor, NAMESPACE).status.remote(), timeout=30)) for actor in names]
    finally:
        session.close()


def _directory(name: str) -> RunDirectory:
    """The run directory that a name means: a path, or a folder under `runs`."""
    below = RunDirectory(HOME / name)
    return below if below.config.exists() and not Path(name).is_dir() else RunDirectory(Path(name))


def _at_rest(directory: RunDirectory) -> Record:
    """The status of a run that is not at work, from its files."""
    config, newest = directory.stored(), directory.newest()
    assert config is not None
    step = 0 if newest is None else newest.step
    last = next(iter(read_records(directory.metrics)[-1:]), {})
    return {
        "name": config.name,
        "phase": "complete" if step >= config.steps else "not at work",
        "step": step,
        "steps": config.steps,
        "loss": last.get("loss"),
        "checkpoint_step": step or None,
        "run_dir": str(directory.path),
    }


@contextlib.contextmanager
def _signals(run: Run) -> Iterator[None]:
    """Ctrl-C and SIGTERM steer the run while it is followed. Set after ray.init, which replaces handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, _frame: FrameType | None) -> None:
        run.interrupt(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
