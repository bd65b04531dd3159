"""Ray is told that a node will leave, and tells; nodes are processes of this machine."""

from __future__ import annotations

import time

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytron.actors.drain import RayDrain, drain, listen
from raytron.actors.notices import Notice


@ray.remote(num_cpus=1)
class Busy:
    """Without something to do a drained node ends at once."""

    def node(self):
        return ray.get_runtime_context().get_node_id()


@pytest.mark.slow
def test_a_notice_reaches_all_through_ray():
    ray.shutdown()  # of the Ray that tests share: they start it again
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        cluster.connect()
        head = ray.get_runtime_context().get_node_id()
        (other,) = [node["NodeID"] for node in ray.nodes() if node["NodeID"] != head]
        busy = Busy.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=other, soft=False)).remote()
        assert ray.get(busy.node.remote()) == other
        source = RayDrain(other)
        assert source.poll() is None
        drain(Notice(other, None, "maybe", certain=False))
        assert source.poll() is None
        deadline = time.time() + 600
        drain(Notice(other, deadline, "a spot instance is taken"))
        found = source.poll()
        assert found is not None
        assert found.deadline == pytest.approx(deadline, abs=0.01)
        assert RayDrain(head).poll() is None
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_who_listens_to_nobody_ends():
    watcher = listen("none", "node")
    watcher.close()
    assert watcher.standing == {}
