"""A run on a small cluster of nodes on this machine, one of which is drained or lost: what is left of it, as JSON.

python fleet.py DATASET FOLDER (drain|kill|unplug|behead|none)   behead: unplug, and the controller dies at the same time
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
import time
from pathlib import Path

import ray
from fault_runs import configured, told
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster

from raytron.actors.controller import Seams
from raytron.actors.run import launch
from raytron.testing.apart import Apart
from raytron.testing.faults import Faults
from raytron.testing.nodes import lose

DRAIN_PREEMPTION = 2  # what Ray calls the reason
NOTICE_S = 30
APART = ("unplug", "behead")  # of a node with a network of its own
CHANGES = {"mesh.dp": 2, "cluster.cpus_per_worker": 1, "steps": 32, "recovery.spares": 0}


def reach(run, step):
    deadline = time.monotonic() + 120
    while run.status()["step"] < step:
        assert time.monotonic() < deadline, run.status()
        time.sleep(0.05)


def main() -> None:
    dataset, folder, what = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    fast = {"health_check_period_ms": 1000, "health_check_timeout_ms": 2000, "health_check_failure_threshold": 3}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": {**fast, "worker_niceness": 0}},
    )
    nodes = [cluster.add_node(num_cpus=1) for _ in range(1 if what in APART else 3)]
    config = configured(dataset, folder / "run", "fleet", **CHANGES, **{"cluster.address": cluster.address})
    apart = None
    if what in APART:  # the one node here has one rank, the node apart the other
        ray.init(cluster.address)
        apart = Apart(cluster.address, 1, folder / "apart.txt")
        atexit.register(apart.close)  # however this ends
        apart.node_id()
    faults = Faults(["slow rank 0 in every forward"], folder / "faults")
    with launch(config, seams=Seams(open_trainer=faults)) as run:
        reach(run, 3)
        ids = {node.node_id: node for node in nodes}
        call = run._controller.__ray_call__.options(concurrency_group="ctl")
        controller = ray.get(call.remote(lambda self: ray.get_runtime_context().get_node_id()))
        if apart is not None:
            cluster.add_node(num_cpus=1)
        busy = [facts for facts in run.events() if facts["event"] == "workers"][-1]["nodes"]
        gone = apart.node_id() if apart is not None else next(node for node in busy.values() if node != controller)
        told_at = time.time()
        if what == "drain":
            deadline_ms = int((told_at + NOTICE_S) * 1000)
            accepted, why = GcsClient(address=cluster.address).drain_node(gone, DRAIN_PREEMPTION, "a test", deadline_ms)
            assert accepted, why
        elif what == "kill":
            lose(cluster, ids[gone])
        elif apart is not None:
            assert gone in busy.values(), busy
            apart.unplug()
            if what == "behead":
                os.kill(ray.get(call.remote(lambda self: os.getpid())), signal.SIGKILL)
        story = told(run, run.wait(timeout_s=180))
    ray.shutdown()
    cluster.shutdown()
    left = [path.name for path in Path("/dev/shm").glob("raytron-fleet-*")]
    answer = {"losses": story.result.losses, "restarts": story.result.restarts, "events": story.events, "left": left}
    answer |= {"victim": gone, "controller": controller, "told_at": told_at}
    (folder / "answer.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
