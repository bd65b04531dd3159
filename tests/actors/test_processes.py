"""Runs seen from outside: signals, other processes, Ray Jobs. Those that are ended by a signal have a Ray of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
import yaml

from raytron.observe.records import read_records

TINY_RUN = [
    "steps=2000", "global_batch_size=4", "micro_batch_size=2", "sequence_length=16", "model.layers=2", "model.hidden=32",
    "model.heads=2", "model.kv_heads=null", "model.ffn=48", "model.vocab=300", "mesh.pp=2", "mesh.tp=1",
    "evaluate.batches=1", "cluster.cpus_per_worker=0.5", "data.validation_fraction=0.2", "data.tokenizer.vocab=300",
]  # fmt: skip


@pytest.fixture(scope="module")
def prepared(local_ray, corpus, tmp_path_factory):
    """A data set, tokenized by the command line."""
    run_dir = tmp_path_factory.mktemp("prepared") / "run"
    run("tokenize", "quickstart_4xcpu", *TINY_RUN, f"data.sources=[{corpus}]", f"run_dir={run_dir}", env=joined())
    return run_dir / "data"


def alone():
    """The environment of a command that finds no Ray."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return {**clean, "PYTHONUNBUFFERED": "1"}


def joined():
    """The environment of a command that joins the tests' Ray."""
    return {**os.environ, "PYTHONUNBUFFERED": "1", "RAY_ADDRESS": ray.get_runtime_context().gcs_address}


def command(*arguments):
    return [sys.executable, "-m", "raytron.cli", *map(str, arguments)]


def run(*arguments, env=None):
    done = subprocess.run(command(*arguments), capture_output=True, text=True, env=env or alone(), timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def train(prepared, run_dir, *changes, env=None):
    """`raytron train` in a process group of its own, as from a shell."""
    arguments = command(
        "train", "quickstart_4xcpu", *TINY_RUN, f"data.dataset={prepared}", f"run_dir={run_dir}", *changes
    )
    pipe = subprocess.PIPE
    return subprocess.Popen(
        arguments,
        stdout=pipe,
        stderr=subprocess.STDOUT,
        text=True,
        env=env or alone(),
        start_new_session=True,
    )


def reach(process, run_dir, step, timeout_s=90):
    deadline = time.monotonic() + timeout_s
    while len(read_records(run_dir / "metrics.jsonl")) < step:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)


def processes_of(session):
    """Processes that were started in the session of a run: Ray's daemons and actors among them."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[3] == str(session) and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def all_gone(session, timeout_s=15):
    deadline = time.monotonic() + timeout_s
    while processes_of(session):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


@pytest.mark.recovery
def test_control_c_saves_stops_and_leaves_no_process(prepared, tmp_path):
    """Another process sees the run, though its Ray is its own."""
    process = train(prepared, tmp_path)
    reach(process, tmp_path, 3)
    assert len(processes_of(process.pid)) > 5, "Ray's processes are not where this test looks for them"
    status = json.loads(run("status", tmp_path, "--json"))
    assert status["step"] >= 3, status
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to all
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    step = read_records(tmp_path / "metrics.jsonl")[-1]["step"]
    assert list((tmp_path / "checkpoints").glob(f"step-{step:08d}-*/COMMIT"))
    assert "saves a checkpoint first" in said
    assert all_gone(process.pid)


@pytest.mark.recovery
def test_a_second_control_c_leaves_at_once(prepared, tmp_path):
    process = train(prepared, tmp_path)
    reach(process, tmp_path, 1)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode != 0
    assert all_gone(process.pid)


def test_another_process_stops_a_run(prepared, local_ray, tmp_path):
    process = train(prepared, tmp_path, "name=stopped", env=joined())
    reach(process, tmp_path, 2)
    run("stop", "stopped", env=joined())
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "stopped at step" in said
    assert all_gone(process.pid)
    deadline = time.monotonic() + 15
    while left := [actor["name"] for actor in ray.util.list_named_actors(True) if "stopped" in actor["name"]]:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def test_a_ray_job_trains(prepared, tmp_path, monkeypatch):
    job = pytest.importorskip("ray.job_submission")
    for key in [key for key in os.environ if key.startswith("RAY_")]:
        monkeypatch.delenv(key)
    config = tmp_path / "config.yaml"
    arguments = dict(item.split("=", 1) for item in TINY_RUN)
    nested = {}
    for key, value in {
        **arguments,
        "steps": "4",
        "data.dataset": str(prepared),
        "run_dir": str(tmp_path / "run"),
    }.items():
        *parents, leaf = key.split(".")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = yaml.safe_load(str(value))
    config.write_text(yaml.safe_dump(nested), encoding="utf-8")
    ray.shutdown()
    context = ray.init(address="local", num_cpus=4, include_dashboard=True, dashboard_port=0, log_to_driver=False)
    try:
        client = job.JobSubmissionClient(f"http://{context.address_info['webui_url']}")
        deadline = time.monotonic() + 180
        ident = submitted(client, " ".join(command("train", config)), deadline)
        while not client.get_job_status(ident).is_terminal():
            assert time.monotonic() < deadline, client.get_job_logs(ident)
            time.sleep(0.5)
        assert client.get_job_status(ident) == job.JobStatus.SUCCEEDED, client.get_job_logs(ident)
        assert "complete at step 4 of 4" in client.get_job_logs(ident)
    finally:
        ray.shutdown()


def submitted(client, entrypoint, deadline):
    """A job, as soon as Ray has an agent for it, which starts after Ray has."""
    while True:
        try:
            return client.submit_job(entrypoint=entrypoint)
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.5)
