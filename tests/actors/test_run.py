"""Whole runs on a local Ray: two workers, a tiny model, real data."""

from __future__ import annotations

import os
import signal
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import ray
from tiny_run import TINY

from raytron.actors.controller import Seams
from raytron.actors.run import attach, launch, train
from raytron.errors import ClusterError, ConfigError, WorkerError
from raytron.observe.records import read_records
from raytron.training.open import open_trainer

SLOW_STEP_S = 0.15
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers can't import this module


class Troubled:
    """A real trainer with something done to it before a step."""

    def __init__(self, trainer, before):
        self._trainer, self._before = trainer, before

    def __getattr__(self, name):
        return getattr(self._trainer, name)

    def train_step(self, request=0):
        self._before(self._trainer)
        return self._trainer.train_step(request)


def troubled(before):
    return Seams(open_trainer=lambda plan, mesh, dataset: Troubled(open_trainer(plan, mesh, dataset), before))


def slow(trainer):
    time.sleep(SLOW_STEP_S)


def steps_of(run_dir):
    return [record["step"] for record in read_records(Path(run_dir) / "metrics.jsonl")]


def kinds_of(run_dir):
    return [record["event"] for record in read_records(Path(run_dir) / "events.jsonl")]


@pytest.fixture
def start(config):
    """Launches runs and ends them with the test; `start(steps=9)`."""
    runs = []

    def begin(before=slow, **changes):
        runs.append(launch(config.replace(**changes), seams=troubled(before)))
        return runs[-1]

    yield begin
    for run in runs:
        run.close()


def reach(run, step, timeout_s=60.0):
    deadline = time.monotonic() + timeout_s
    while run.status()["step"] < step:
        assert time.monotonic() < deadline, f"step {step} was not reached: {run.status()}"
        time.sleep(0.05)


@pytest.fixture(scope="session")
def undisturbed(dataset, tmp_path_factory):
    """The losses of 12 steps without trouble."""

    from raytron.config import load

    run_dir = str(tmp_path_factory.mktemp("undisturbed") / "run")
    made = {**TINY, "name": "undisturbed", "run_dir": run_dir, "steps": 12, "data": {"dataset": str(dataset)}}
    return train(load(made), quiet=True)


def test_a_run_leaves_its_numbers_its_story_and_its_checkpoint(undisturbed):
    assert undisturbed.status == "complete"
    run_dir = Path(undisturbed.run_dir)
    assert steps_of(run_dir) == list(range(1, 13))
    assert {"data", "plan", "workers", "checkpoint", "evaluate", "complete"} <= set(kinds_of(run_dir))
    assert {"config.yaml", "tokenizer.json", "checkpoints"} <= {path.name for path in run_dir.iterdir()}
    assert undisturbed.final_loss < undisturbed.metrics[0]["loss"]
    assert undisturbed.validation_loss > 0
    assert Path(undisturbed.checkpoint).is_dir()
    assert len(list((run_dir / "checkpoints").iterdir())) == 3  # keep_last
    assert "svg" in undisturbed._repr_html_()


def test_a_complete_run_is_complete_and_goes_on_with_more_steps(config, capsys):
    train(config.replace(steps=2), quiet=True)
    again = train(config.replace(steps=2))
    assert "is complete" in capsys.readouterr().out
    assert again.step == 2
    more = train(config.replace(steps=3), quiet=True)
    assert more.step == 3
    assert steps_of(config.run_dir) == [1, 2, 3]
    with pytest.raises(ConfigError, match="was begun with"):
        train(config.replace(steps=4, seed=7), quiet=True)


@pytest.mark.recovery
def test_a_killed_worker_is_replaced_and_the_losses_are_those_of_an_undisturbed_run(start, undisturbed):
    run = start(steps=12)
    reach(run, 5)
    pids = next(event["pids"] for event in run.events() if event["event"] == "workers")
    os.kill(pids["1"], signal.SIGKILL)
    result = run.wait(timeout_s=90)
    assert result.restarts == 1
    assert steps_of(result.run_dir) == list(range(1, 13))
    assert result.losses == undisturbed.losses
    assert "lost" in kinds_of(result.run_dir)


@pytest.mark.recovery
def test_a_run_gives_up_after_so_many_restarts(start):
    def die(trainer):
        if trainer.step == 2 and trainer.mesh.rank == 1:
            os._exit(1)

    run = start(die, **{"recovery.max_restarts": 1})
    with pytest.raises(ClusterError, match=r"crashed too often, 2 of 1 in 1 hour"):
        run.wait(timeout_s=90)


def test_an_exception_in_a_worker_names_rank_stage_and_step(start):
    def fail(trainer):
        if trainer.step == 2 and trainer.mesh.rank == 1:
            raise ZeroDivisionError("a bug")

    with pytest.raises(WorkerError) as caught:
        start(fail).wait(timeout_s=60)
    first, _, rest = str(caught.value).partition("\n")
    assert first == "rank 1 (stage 1, step 3): ZeroDivisionError: a bug"
    assert "Traceback" in rest
    assert "train_step" in rest


def test_stop_saves_and_the_run_goes_on_later(start, config):
    run = start(steps=500)
    reach(run, 3)
    run.stop()
    result = run.wait(timeout_s=60)
    assert result.status == "stopped"
    assert 3 <= result.step < 500
    assert f"step-{result.step:08d}" in result.checkpoint
    more = train(config.replace(steps=result.step + 1), quiet=True)
    assert more.status == "complete"
    assert steps_of(config.run_dir) == list(range(1, result.step + 2))


def test_a_run_is_steered_while_it_trains(start):
    run = start(steps=400, **{"checkpoint.every": None})
    reach(run, 2)
    run.checkpoint()
    other = attach(run.name)
    assert "train_step" in other.stacks()[0]
    deadline = time.monotonic() + 30
    while "checkpoint" not in kinds_of(run.run_dir):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert other.status()["step"] < 400
    assert "Run(" in repr(other)
    other.stop()
    assert run.wait(timeout_s=60).status == "stopped"


def test_a_name_is_taken_once(start):
    run = start(steps=500)
    with pytest.raises(ClusterError, match="at work on this cluster already"):
        start(steps=500)
    run.stop()
    run.wait(timeout_s=60)


def test_a_cluster_without_room_says_what_is_missing(start, monkeypatch):
    holder = ray.remote(num_cpus=3.5)(type("Holder", (), {"ready": lambda self: True})).remote()
    ray.get(holder.ready.remote())
    try:
        run = start(**{"cluster.placement_timeout_s": 12})
        with pytest.raises(
            ClusterError, match=r"no room on the cluster after 12 s: wanted .*1 CPU; there is .*0.5 CPU"
        ):
            run.wait(timeout_s=60)
        assert "waiting" in kinds_of(run.run_dir)
    finally:
        ray.kill(holder)


def test_a_mesh_larger_than_the_cluster_is_refused_with_what_there_is(start):
    run = start(**{"mesh.dp": 2, "mesh.tp": 2, "cluster.cpus_per_worker": 4})
    with pytest.raises(ConfigError, match="needs 8 workers of 4 CPU each"):
        run.wait(timeout_s=60)


def test_a_detached_run_outlives_its_client_and_leaves_by_itself(config):
    seams = Seams(open_trainer=troubled(slow).open_trainer, linger_s=3)
    run = launch(config.replace(steps=8, **{"cluster.detached": True}), seams=seams)
    run.close()
    again = attach(str(run.run_dir))
    assert again.wait(timeout_s=60).step == 8
    deadline = time.monotonic() + 30
    while controllers(config.name):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def controllers(name):
    actors = ray.util.list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in actors if actor["name"].startswith(f"raytron/{name}")]


def test_nothing_is_left_when_a_run_has_ended(undisturbed):
    assert not controllers(undisturbed.name)
    assert ray.available_resources()["CPU"] == 4


def test_the_numbers_stand_where_prometheus_scrapes(start):
    """Ray's metrics agent serves them with the name of the run, within seconds."""
    run = start(steps=400)
    (node,) = [node for node in ray.nodes() if node["Alive"]]
    page = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    deadline = time.monotonic() + 90
    found: set[str] = set()
    while len(found) < 4 and time.monotonic() < deadline:
        time.sleep(1)
        with urllib.request.urlopen(page, timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        found = {
            line.split("{")[0] for line in lines if line.startswith("ray_raytron_") and f'run="{run.name}"' in line
        }
    assert found == {f"ray_raytron_{name}" for name in ("loss", "tokens_per_s", "step_time_s", "grad_norm")}


def pretending(trainer):
    """The loss head's stage seems to take no time, so that another schedule than by FLOPs is the best."""
    tracer = trainer.tracer

    def saw(action, start, end):
        tracer._seen.append((tracer._step, action, 0.0, 0.1 if action.stage else 3.0))

    tracer.saw = saw


def test_auto_measures_and_goes_on_with_another_schedule(config, undisturbed):
    """The losses are those of any other schedule, before and after the change."""
    changes = {"pipeline.schedule": "auto", "model.layers": 4, "steps": 6, "micro_batch_size": 1, "evaluate.batches": 0}
    plain = train(config.replace(**{**changes, "pipeline.schedule": "1f1b", "run_dir": config.run_dir + "-plain"}))
    result = launch(config.replace(**changes), seams=troubled(pretending)).wait()
    events = read_records(Path(result.run_dir) / "events.jsonl")
    (said,) = [record for record in events if record["event"] == "schedule"]
    built = [record["step"] for record in events if record["event"] == "workers"]
    assert "measured in steps 2 to 4" in said["message"]
    assert said["schedule"] != "zb-h2"
    assert built == [0, 4]
    assert steps_of(result.run_dir) == list(range(1, 7))
    mine, others = (read_records(Path(path) / "metrics.jsonl") for path in (result.run_dir, plain.run_dir))
    assert [m["loss"] for m in mine] == pytest.approx([o["loss"] for o in others], rel=1e-5)
