"""A node that is gone by what its lines say is not waited for, whatever Ray knows."""

from __future__ import annotations

import time

import pytest
import ray

from raytron.actors.patience import STEP, Patience
from raytron.actors.recovery import WorkersLost
from raytron.actors.supervisor import GRACE_S, Supervisor
from raytron.actors.worker import Beat, PeerError


@ray.remote(num_cpus=0, concurrency_groups={"ctl": 1})
class Rank:
    """Loses its peer, or works for a minute."""

    def run(self, peer_lost):
        if peer_lost:
            raise PeerError(0, "stage 0, step 3", "RuntimeError: gloo: connection closed by peer")
        time.sleep(60)

    @ray.method(concurrency_group="ctl")
    def beat(self, *_):
        return Beat(1, "step 2", 0.1, True, [], [], [])


def test_lines_are_believed_before_ray_speaks(local_ray):
    workers = {rank: Rank.remote() for rank in (0, 1)}
    ray.get([worker.__ray_ready__.remote() for worker in workers.values()])
    start = time.monotonic()

    def gone():
        return WorkersLost((1,), "the node is gone") if time.monotonic() - start > 0.3 else None

    supervisor = Supervisor(
        workers, Patience(), lambda rank, beat: None, lambda rank: (0, 0), lambda: None, gone
    )  # fmt: skip
    with pytest.raises(WorkersLost, match="rank 1: the node is gone"):
        supervisor.together("run", lambda rank: (rank == 0,), STEP)
    assert time.monotonic() - start < GRACE_S / 2
    for worker in workers.values():
        ray.kill(worker)
