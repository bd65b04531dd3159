"""Who works and who waits: the busy time of a rank is its wall time without the time that it waited for others."""

import time

import pytest

from raytron.config import from_mapping
from raytron.parallel.mesh import Mesh
from raytron.plan.mesh import MeshShape
from raytron.plan.plan import make_plan
from raytron.testing.streams import RandomStream
from raytron.training.trainer import Trainer

CONFIG = from_mapping(
    {"model": {"layers": 4, "hidden": 16, "heads": 4, "ffn": 16, "vocab": 31}, "sequence_length": 8,
     "global_batch_size": 4, "micro_batch_size": 1, "data": {"dataset": "random"}}
)  # fmt: skip
SLEEP_S, SLOW = 0.15, 1


def busy_of(rank, changes, slow):
    config = CONFIG.replace(**changes)
    trainer = Trainer(make_plan(config, None), Mesh(MeshShape.of(config.mesh), rank), RandomStream(31, 8))
    if rank == slow:
        for stage in trainer.engine.model.stages.values():
            stage.register_forward_pre_hook(lambda *_: time.sleep(SLEEP_S))
    for _ in range(4):
        trainer.train_step()
    trainer.settle()
    return [tuple(seen) for seen in trainer.clock.seen][1:]  # the first step is unlike others


MESHES = [
    {"mesh.dp": 4},
    {"mesh.tp": 2, "mesh.dp": 2},
    pytest.param({"mesh.pp": 2, "mesh.dp": 2}, marks=pytest.mark.slow),
    {"mesh.pp": 2, "mesh.dp": 2, "data_parallel.zero": 2, "optimizer.at_once": True, "optimizer.clip_norm": None},
    {"mesh.cp": 2, "mesh.dp": 2},
    pytest.param({"mesh.dp": 4, "data_parallel.zero": 3}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_whoever_is_slow_is_busy_and_the_others_wait(world, mesh):
    seen = world.run(4, busy_of, mesh, SLOW)
    calls = 4 // mesh["mesh.dp"]  # of the slow stage in a step
    for rank, steps in enumerate(seen):
        assert [step for step, _, _ in steps] == [2, 3, 4]
        for _, busy, wall in steps:
            assert 0 < busy <= wall
            if rank == SLOW:
                assert busy >= calls * SLEEP_S
    fastest = [min(busy for _, busy, _ in steps) for steps in seen]
    assert max(fastest) == fastest[SLOW]
    assert sorted(fastest)[-2] < 0.7 * fastest[SLOW]


def test_alone_a_rank_is_always_busy():
    assert all(busy == wall for _, busy, wall in busy_of(0, {}, None))
