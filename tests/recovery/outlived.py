"""A detached run outlives the process that launched it, and then its controller; another process attaches. What is left of
it, as JSON.

python outlived.py DATASET FOLDER [ADDRESS]      with the address of a cluster: launches the run, and waits for it
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import ray
from fault_runs import configured, told
from ray.cluster_utils import Cluster

from raytron.actors.controller import Seams
from raytron.actors.run import attach, launch
from raytron.observe.records import read_records
from raytron.testing.faults import Faults
from raytron.testing.ledger import Ledger

CHANGES = {"mesh.dp": 2, "steps": 16, "cluster.detached": True}
HEAD = {"num_cpus": 4, "include_dashboard": False, "_system_config": {"worker_niceness": 0}}


def launch_and_wait(dataset: Path, folder: Path, address: str) -> None:
    config = configured(dataset, folder / "run", f"outlived-{folder.name}", **CHANGES, **{"cluster.address": address})
    faults = Faults(["slow rank 0 in every forward"], folder / "faults")
    launch(config, seams=Seams(open_trainer=Ledger(faults, folder / "run" / "ledger"))).wait()


def reach(folder: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while len(read_records(folder / "run" / "metrics.jsonl")) < step:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def outlive(dataset: Path, folder: Path) -> None:
    cluster = Cluster(initialize_head=True, head_node_args=HEAD)
    process = subprocess.Popen([sys.executable, __file__, dataset, folder, cluster.address])
    reach(folder, 3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with attach(str(folder / "run"), cluster.address) as run:
        reach(folder, run.status()["step"] + 2)
        call = run._controller.__ray_call__.options(concurrency_group="ctl")
        os.kill(ray.get(call.remote(lambda self: os.getpid())), signal.SIGKILL)
        story = told(run, run.wait(timeout_s=120))
    ray.shutdown()
    cluster.shutdown()
    weights = {name: values.tobytes().hex() for name, values in story.weights.items()}
    answer = {"losses": story.result.losses, "events": story.events, "samples": story.samples, "weights": weights}
    (folder / "answer.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    if len(sys.argv) > 3:
        launch_and_wait(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
    else:
        outlive(Path(sys.argv[1]), Path(sys.argv[2]))
