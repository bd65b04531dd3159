"""Seconds that a run needs to come back, beside Ray Train: python benchmarks/recovery.py --trials 20 (about half an hour)

    fault ──── see ────► lost ──── remesh ────► workers ──► first step after it
      └────────────────────────── resume ───────────────────────►┘

Every figure is of faults that happen inside one run, of two data-parallel workers, one after another with steps of half a
second between them, so that spares are ready again. Faults are those of `raytron.testing.faults`: rank 0 or 1 in the
forward of a step, by turns. Ray Train's `TorchTrainer` trains a plain DDP model of the same size on the same machine, saves
a checkpoint every few steps, and loses a worker by SIGKILL at the same steps; `FailureConfig(max_failures=-1)` restarts it.

Nodes are those of `ray.cluster_utils`, whose health Ray checks every second: all processes of one are killed at once, or Ray
is told that it will leave; a spare waits on another one, and a new node takes the lost one's place.

Each kind of fault is measured in a process of its own, which has a limit of time, and what it has found is written when it
ends: benchmarks/results/recovery.json keeps what other kinds have found before on this machine, with date and load.

`constants` are those that benchmarks/goodput.py simulates a fleet with.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import ray
import torch
from context import RESULTS, context, write
from plain import PlainLlama
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, ScalingConfig
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchTrainer, prepare_model

from raytron.actors.controller import Seams
from raytron.actors.run import Run, launch, tokenize
from raytron.config import RunConfig, load
from raytron.observe.records import Record, read_records
from raytron.testing.faults import Faults
from raytron.testing.ledger import Ledger
from raytron.testing.nodes import descendants, lose

FIRST, APART = 8, 12  # the step of the first fault, and steps between two
SAVED_EVERY = 5  # steps between checkpoints of Ray Train's run, and of Raytron's
STEP_S = 0.5  # that every step takes at least
REMESHES = ({"mesh.dp": 1}, {"mesh.dp": 2})
TEXT = "the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs\n"
MODEL = {"layers": 2, "hidden": 64, "heads": 2, "ffn": 128, "vocab": 300}
RESULT = RESULTS / "recovery.json"
Tell = Callable[[Sequence[dict[str, float]]], None]  # the trials so far


def configured(folder: Path, steps: int, **changes: Any) -> RunConfig:
    made: dict[str, Any] = {
        "steps": steps,
        "run_dir": str(folder / "data"),
        "global_batch_size": 4,
        "micro_batch_size": 1,
        "sequence_length": 32,
        "determinism": "canonical",
        "model": MODEL,
        "mesh": {"dp": 2},
        "checkpoint": {"every": SAVED_EVERY},
        "evaluate": {"batches": 0},
        "recovery": {"max_restarts": 100_000},
        "cluster": {"cpus_per_worker": 0.5, "timeout_s": 60, "device": "cpu", "threads_per_worker": 1},
        "data": {"sources": [str(folder / "corpus")], "validation_fraction": 0.2, "tokenizer": {"vocab": 300}},
    }
    return load(made).replace(**changes)


def prepare(folder: Path) -> Path:
    (folder / "corpus").mkdir()
    for number in range(24):
        text = f"document {number}\n" + TEXT * (number % 5 + 3)
        (folder / "corpus" / f"{number}.txt").write_text(text, encoding="utf-8")
    return tokenize(configured(folder, 1), lambda fraction, message: None)


# ---- Raytron


@contextmanager
def local_ray() -> Iterator[None]:
    ray.init(
        address="local", num_cpus=6, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR,
        _system_config={"preload_python_modules": ["torch"]},
    )  # fmt: skip
    yield
    ray.shutdown()


def faulty_run(folder: Path, dataset: Path, trials: int, limit_s: float, tell: Tell, verb: str, spares: int) -> None:
    """One run with a fault every APART steps; how long it took to come back from each. limit_s: those until then."""
    name = f"{verb}-{spares}"
    steps = [FIRST + APART * trial for trial in range(trials)]
    sentences = [f"{verb} rank {(trial + 1) % 2} in the forward of step {step}" for trial, step in enumerate(steps)]
    faults = Faults([*sentences, "slow rank 0 in every forward"], folder / f"account-{name}")
    own = {"name": f"recovery-{name}", "run_dir": str(folder / name), "data.dataset": str(dataset), "data.sources": []}
    config = configured(folder, steps[-1] + 4, **own, **{"recovery.spares": spares})
    drawn = folder / f"ledger-{name}"
    run = launch(config, seams=Seams(open_trainer=Ledger(faults, drawn)))
    try:
        with suppress(TimeoutError):
            run.wait(timeout_s=limit_s)
        events = run.events()
    finally:
        run.close()
    happened = [faults.when(trial) for trial in range(len(faults.happened()))]
    ends, starts = [*happened[1:], math.inf], began(drawn)
    ended = len(happened) == trials and bool(events) and events[-1]["event"] == "complete"
    whole = happened if ended else happened[:-1]
    tell([came_back(fault, ends[trial], steps[trial], events, starts) for trial, fault in enumerate(whole)])


def came_back(
    fault: float, end: float, step: int, events: Sequence[Record], began: Sequence[tuple[float, int]]
) -> dict[str, float]:
    """The way back from one fault in some step, in seconds. began: of each step of each rank."""
    after = [event for event in events if fault <= event["time"] < end]
    lost = next(event for event in after if event["event"] == "lost")
    ready = next(event for event in after if event["event"] == "workers")
    resumed = min(at for at, number in began if at >= ready["time"] - 0.001)
    return {
        "see_s": lost["time"] - fault,
        "remesh_s": ready["time"] - lost["time"],
        "gather_s": ready["gather_s"],
        "restore_s": ready["build_s"],
        "resume_s": resumed - fault,
        "redone_steps": step - 1 - ready["step"],
    }


def remeshed_run(folder: Path, dataset: Path, trials: int, limit_s: float, tell: Tell) -> None:
    """Another mesh on command, there and back."""
    own = {
        "name": "recovery-remesh",
        "run_dir": str(folder / "remesh"),
        "data.dataset": str(dataset),
        "data.sources": [],
    }
    faults = Faults(["slow rank 0 in every forward"], folder / "account-remesh")
    run = launch(configured(folder, 100_000, **own), seams=Seams(open_trainer=faults))
    found: list[dict[str, float]] = []
    try:
        reach(run, 3)
        for trial in range(trials):
            known = len(built(run))
            asked = time.time()
            run.remesh(**REMESHES[trial % 2])
            until(run, lambda known=known: len(built(run)) > known)
            ready = built(run)[-1]
            mesh = [event for event in run.events() if event["event"] == "mesh"][-1]
            found.append(
                {
                    "see_s": mesh["time"] - asked,
                    "remesh_s": ready["time"] - mesh["time"],
                    "restore_s": ready["build_s"],
                    "redone_steps": mesh["step"] - ready["step"],
                }
            )
            tell(found)
            reach(run, ready["step"] + 3)
    finally:
        run.close()


def built(run: Run) -> list[Record]:
    return [event for event in run.events() if event["event"] == "workers"]


def reach(run: Run, step: int) -> None:
    until(run, lambda: run.status()["step"] >= step)


def until(run: Run, holds: Callable[[], bool]) -> None:
    """Waits until something holds of a run. Raises RuntimeError where the run is over before."""
    while not holds():
        if run.status()["phase"] == "over":
            raise RuntimeError(f"the run is over: {run.events()[-1]}")
        time.sleep(0.05)


# ---- nodes

HEALTH = {"health_check_period_ms": 1000, "health_check_timeout_ms": 2000, "health_check_failure_threshold": 3}
DRAIN_PREEMPTION = 2  # what Ray calls the reason
NOTICE_S = 30


def fleet_run(folder: Path, dataset: Path, trials: int, limit_s: float, tell: Tell, what: str) -> None:
    """Nodes are lost (`kill`), or leave with a notice (`drain`), one after another."""
    system = {**HEALTH, "worker_niceness": 0, "preload_python_modules": ["torch"]}
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": system}
    )
    nodes = {node.node_id: node for node in (cluster.add_node(num_cpus=1) for _ in range(3))}
    name = f"node-{what}"
    own = {"name": f"recovery-{name}", "run_dir": str(folder / name), "data.dataset": str(dataset), "data.sources": []}
    own |= {"cluster.address": cluster.address, "cluster.cpus_per_worker": 1, "recovery.spares": 1}
    faults, drawn = Faults(["slow rank 0 in every forward"], folder / f"account-{name}"), folder / f"ledger-{name}"
    run = launch(configured(folder, 100_000, **own), seams=Seams(open_trainer=Ledger(faults, drawn)))
    found: list[dict[str, float]] = []
    try:
        for _ in range(trials):
            until(run, lambda: run.status()["spares"] >= 1)
            reach(run, run.status()["step"] + APART)  # by then the spare's node has a keeper, too
            known, victim = len(built(run)), nodes.pop(built(run)[-1]["nodes"]["1"])
            step, fault = run.status()["step"] + 1, time.time()
            if what == "drain":
                deadline_ms = int((fault + NOTICE_S) * 1000)
                GcsClient(address=cluster.address).drain_node(victim.node_id, DRAIN_PREEMPTION, "taken", deadline_ms)
            else:
                lose(cluster, victim)
            until(run, lambda known=known: len(built(run)) > known)
            reach(run, built(run)[-1]["step"] + 2)
            found.append(left_node(fault, step, what, run.events(), began(drawn)))
            tell(found)
            if what == "drain":
                cluster.remove_node(victim)
            node = cluster.add_node(num_cpus=1)
            nodes[node.node_id] = node
    finally:
        run.close()
        ray.shutdown()
        cluster.shutdown()


def left_node(
    fault: float, step: int, what: str, events: Sequence[Record], began: Sequence[tuple[float, int]]
) -> dict[str, float]:
    """As `came_back`; after a notice `stall_s` is what training stood still for."""
    after = [event for event in events if event["time"] >= fault]
    if what == "kill":
        again = sum(event["last"] - event["first"] + 1 for event in after if event["event"] == "redo")
        return {**came_back(fault, math.inf, step, events, began), "redone_steps": again}
    seen = next(event for event in after if event["event"] == "notice")
    mesh = next(event for event in after if event["event"] == "mesh")
    ready = next(event for event in after if event["event"] == "workers")
    resumed = min(at for at, _ in began if at >= ready["time"] - 0.001)
    return {
        "see_s": seen["time"] - fault,
        "remesh_s": ready["time"] - mesh["time"],
        "stall_s": resumed - mesh["time"],
        "resume_s": resumed - fault,
        "redone_steps": mesh["step"] - ready["step"],
    }


def began(drawn: Path) -> list[tuple[float, int]]:
    """When each rank began each step, in order."""
    lines = [line for path in drawn.glob("*.jsonl") for line in read_records(path)]
    return sorted((line["time"], line["step"]) for line in lines)


# ---- Ray Train


def train_loop(given: dict[str, Any]) -> None:
    """What one worker of Ray Train does: a plain DDP loop from the newest checkpoint on, which kills itself by plan."""
    config, folder = load(given["config"]), Path(given["folder"])
    rank = ray.train.get_context().get_world_rank()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = prepare_model(PlainLlama(config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr.peak)
    first, newest = 1, ray.train.get_checkpoint()
    if newest is not None:
        with newest.as_directory() as place:
            state = torch.load(Path(place) / "state.pt")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"] + 1
    rng = torch.Generator().manual_seed(rank)
    for step in range(first, config.steps + 1):
        with (folder / f"began-{rank}.jsonl").open("a") as file:
            file.write(json.dumps({"time": time.time(), "step": step, "pid": os.getpid()}) + "\n")
        mark = folder / f"killed-{step}"
        if given["kills"].get(str(step)) == rank and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        tokens = torch.randint(0, config.model.vocab, (2, config.sequence_length + 1), generator=rng)
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
        time.sleep(STEP_S if rank == 0 else 0)
        if step % SAVED_EVERY == 0:
            save(step, model, optimizer, rank)


def save(step: int, model: Any, optimizer: Any, rank: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        checkpoint = None
        if rank == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            torch.save(state, Path(place) / "state.pt")
            checkpoint = Checkpoint.from_directory(place)
        ray.train.report({"step": step}, checkpoint=checkpoint)


def ray_train_run(folder: Path, dataset: Path, trials: int, limit_s: float, tell: Tell) -> None:
    """The same kills under Ray Train; from each to the begin of the first step after the restart."""
    folder = folder / "peer"
    steps = [FIRST + APART * trial for trial in range(trials)]
    config = {"steps": steps[-1] + 4, "sequence_length": 32, "model": MODEL}
    kills = {str(step): (trial + 1) % 2 for trial, step in enumerate(steps)}
    folder.mkdir()
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={"config": config, "kills": kills, "folder": str(folder)},
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.5}),
        run_config=RayRunConfig(
            name="peer",
            storage_path=str(folder / "storage"),
            failure_config=FailureConfig(max_failures=-1),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    trainer.fit()
    lines = [line for path in folder.glob("began-*.jsonl") for line in read_records(path)]
    found = []
    for step in steps:
        killed = (folder / f"killed-{step}").stat().st_mtime
        before = {line["pid"] for line in lines if line["time"] <= killed}
        first = min((line for line in lines if line["pid"] not in before), key=lambda line: line["time"])
        found.append({"resume_s": first["time"] - killed, "redone_steps": step - first["step"]})
    tell(found)


# ---- what is told


def summary(found: Sequence[dict[str, float]]) -> dict[str, Any]:
    """For each figure its 50th and 95th percentile."""
    values = {key: sorted(each[key] for each in found) for key in found[0]}
    return {"trials": len(found)} | {
        key: {"p50": round(at(told, 0.50), 3), "p95": round(at(told, 0.95), 3)} for key, told in values.items()
    }


def at(ordered: Sequence[float], share: float) -> float:
    """The smallest value that `share` of all do not exceed."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


class Kind(NamedTuple):
    """Of a fault. trial_s: what a trial takes about; its limit is three times that."""

    measure: Callable[..., None]  # (folder, dataset, trials, limit in seconds, tell, *more)
    more: tuple[Any, ...]
    trial_s: float
    local: bool = True  # on a local Ray; else it starts a cluster of its own


KILL, COLD, STOP = "SIGKILL, with a spare", "SIGKILL, without spares", "SIGSTOP, with a spare"
REMESH, TRAIN = "another mesh on command", "Ray Train, SIGKILL"
LOST, NOTICE = "a node is lost, with a spare", "a node leaves with a notice"
KINDS = {
    KILL: Kind(faulty_run, ("kill", 2), 8),
    COLD: Kind(faulty_run, ("kill", 0), 10),
    STOP: Kind(faulty_run, ("stop", 2), 11),
    REMESH: Kind(remeshed_run, (), 4),
    TRAIN: Kind(ray_train_run, (), 15),
    LOST: Kind(fleet_run, ("kill",), 15, local=False),
    NOTICE: Kind(fleet_run, ("drain",), 15, local=False),
}
START_S = 120  # for Ray and the first workers to start
GRACE_S = 60  # beyond its limit, for a process to end by itself


def measure(name: str, trials: int, out: Path) -> None:
    """One kind, in this process; `out` has all trials so far."""
    kind = KINDS[name]

    def tell(found: Sequence[dict[str, float]]) -> None:
        part = out.with_suffix(".part")
        part.write_text(json.dumps(list(found)))
        part.rename(out)

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        with local_ray():
            dataset = prepare(folder)
            if kind.local:
                kind.measure(folder, dataset, trials, limit_s(name, trials), tell, *kind.more)
        if not kind.local:
            kind.measure(folder, dataset, trials, limit_s(name, trials), tell, *kind.more)


def limit_s(name: str, trials: int) -> float:
    return START_S + 3 * KINDS[name].trial_s * trials


def measured(name: str, trials: int) -> dict[str, Any]:
    """One kind, in a process of its own that ends in time, with all that it has started."""
    load = round(os.getloadavg()[0], 2)
    began_at = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "trials.json"
        command = [sys.executable, __file__, "--measure", name, "--trials", str(trials), "--out", str(out)]
        child = subprocess.Popen(command)
        try:
            problem = f"it ended with {child.returncode}" if child.wait(limit_s(name, trials) + GRACE_S) else None
        except subprocess.TimeoutExpired:
            problem = f"it was not over after {limit_s(name, trials) + GRACE_S:.0f} s"
        finally:
            for pid in descendants([child.pid] if child.poll() is None else []):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            child.wait()
        found = json.loads(out.read_text()) if out.exists() else []
    facts = {
        "when": time.strftime("%Y-%m-%d"),
        "load_average_before": load,
        "seconds": round(time.monotonic() - began_at),
    }
    facts |= (
        {} if problem is None and len(found) == trials else {"asked": trials, "problem": problem or "some are missing"}
    )
    return {**(summary(found) if found else {"trials": 0}), **facts}


def found_before(path: Path) -> dict[str, Any]:
    """What is known of each kind, if it is of this machine and these versions."""
    known = json.loads(path.read_text()) if path.exists() else {"context": {}, "runs": {}}
    here = context()
    same = all(known["context"].get(key) == here[key] for key in ("cpu", "cores", "python", "torch"))
    if not same and known["runs"]:
        print(f"{path} is of another machine, {known['context']}: it is begun anew", flush=True)
    return dict(known["runs"]) if same else {}


def result_of(runs: dict[str, Any]) -> dict[str, Any]:
    """What is written: the runs, and what follows from those that are there."""
    result: dict[str, Any] = {"context": context(), "runs": {name: runs[name] for name in KINDS if name in runs}}

    def p50(name: str, figure: str) -> float | None:
        told = runs.get(name, {}).get(figure)
        return None if told is None else float(told["p50"])

    peer = p50(TRAIN, "resume_s")
    if peer is not None:
        times = {name: p50(name, "resume_s") for name in (KILL, COLD)}
        result["ratio_to_ray_train"] = {name: round(peer / told, 2) for name, told in times.items() if told}
    constants = {
        "loss_s": p50(KILL, "resume_s"), "grow_s": p50(REMESH, "remesh_s"), "notice_s": p50(NOTICE, "stall_s"),
    }  # fmt: skip
    result["constants"] = {name: told for name, told in constants.items() if told is not None}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--node-trials", type=int, help="of lost and leaving nodes; else as many as of the others")
    parser.add_argument("--only", nargs="+", choices=KINDS, metavar="KIND", help=f"some kinds: {', '.join(KINDS)}")
    parser.add_argument("--without-ray-train", action="store_true")
    parser.add_argument("--measure", choices=KINDS, help=argparse.SUPPRESS)  # in the process that is started for a kind
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        measure(given.measure, given.trials, given.out)
        return
    names = given.only or [name for name in KINDS if not (given.without_ray_train and name == TRAIN)]
    trials = {name: given.trials if KINDS[name].local else given.node_trials or given.trials for name in names}
    takes = {name: START_S / 4 + KINDS[name].trial_s * count for name, count in trials.items()}
    print(f"about {sum(takes.values()) / 60:.0f} minutes", flush=True)
    runs = found_before(RESULT)
    for name in names:
        print(f"{name}: {trials[name]} trials, about {takes[name] / 60:.1f} minutes", flush=True)
        runs[name] = measured(name, trials[name])
        write("recovery", result_of(runs))
    failed = {name: runs[name]["problem"] for name in names if "problem" in runs[name]}
    if failed:
        sys.exit(f"not all was measured: {failed}")


if __name__ == "__main__":
    main()
