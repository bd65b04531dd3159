"""`optimizer.at_once`: no rank waits for all others before it updates, and every update is that of a run that waits."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
from harness import bare, pieces, run_twin, whole
from models import batch_of, tiny
from test_checkpoint_meshes import trainer_of

from raytron.config import RunConfig
from raytron.data.batch import Batch
from raytron.optim.lr import learning_rate
from raytron.parallel.mesh import Mesh
from raytron.plan.mesh import MeshShape
from raytron.plan.plan import make_plan
from raytron.training.at_once import AtOnce
from raytron.training.engine import Engine, StepResult

FREE = {"optimizer.clip_norm": None}
MESHES = {
    "one": {},
    "zb-h2": {"mesh.pp": 2, "pipeline.schedule": "zb-h2", "micro_batch_size": 1},
    "zb-v, zero 3": {"mesh.pp": 2, "mesh.dp": 2, "pipeline.schedule": "zb-v", "data_parallel.zero": 3,
                     "micro_batch_size": 1},
    "shared unevenly": {"mesh.dp": 3, "data_parallel.zero": 3},  # 4 micro-batches
    "hybrid in bf16": {"mesh.dp": 4, "mesh.replicate": 2, "precision.dtype": "bf16", "micro_batch_size": 1},
}  # fmt: skip


def overflowing(batch: Batch, factor: float) -> Batch:
    """A batch whose gradient is not finite, with as many real tokens as before."""
    weights = batch.weights.copy()
    first = np.argwhere(weights > 0)[:2]
    weights[tuple(first[0])], weights[tuple(first[1])] = factor, 2 - factor
    return batch._replace(weights=weights)


def train(rank: int, config: RunConfig, steps: int, bad: int | None, at_once: bool) -> tuple[list[Any], list[Any], int]:
    """Results, weights and number of updates after some steps, of which number `bad` overflows."""
    mesh = Mesh(MeshShape.of(config.mesh), rank)
    engine = Engine(make_plan(config, None), mesh)
    late = AtOnce(engine)
    results: list[StepResult | None] = []
    for step in range(steps):
        batch = batch_of(config, step, mesh.coords.dp, mesh.shape.dp)
        if step == bad:
            batch = overflowing(batch, 3e38)
        lr = learning_rate(config.lr, config.lr_horizon, step)
        results.append(late.step(batch, lr) if at_once else engine.step(batch, lr))
    results.append(late.settle())
    known = [result._replace(noise=None, own=0) for result in results if result is not None]  # own: of runs that wait
    return known, pieces(engine.optimizer.state()), engine.optimizer.updates


@pytest.mark.parametrize("bad", [None, 2, 4], ids=["all finite", "one overflows", "the last overflows"])
@pytest.mark.parametrize("mesh", list(MESHES.values()), ids=list(MESHES))
def test_equal_to_the_bit_to_a_run_that_waits(world, mesh, bad):
    config = tiny("llama", **FREE, **mesh)
    size = MeshShape.of(config.mesh).world
    waits = world.run(size, train, config, 5, bad, False)
    mine = world.run(size, train, config, 5, bad, True)
    for a, b in zip(mine, waits, strict=True):
        assert [result.skipped for result in a[0]] == [step == bad for step in range(5)]
        assert a[2] == b[2] == (5 if bad is None else 4)
        assert all(x.skipped == y.skipped and (x.skipped or x == y) for x, y in zip(a[0], b[0], strict=True))
    weights, others = whole([result[1] for result in mine]), whole([result[1] for result in waits])
    assert all(torch.equal(weights[name], others[name]) for name in others)


def test_equal_to_one_device(world):
    config = tiny("gpt2", **FREE, **MESHES["zb-h2"])
    results, truth = world.run(2, train, config, 20, None, True)[0][0], run_twin(bare(config), 20)
    assert max(abs(a.loss - b) / b for a, b in zip(results, truth.losses, strict=True)) <= 1e-5


def records_of(rank: int, config: RunConfig) -> list[Any]:
    trainer = trainer_of(rank, config)
    return [*(trainer.train_step() for _ in range(3)), trainer.settle()]


def test_a_record_comes_with_the_next_step(world):
    config = tiny("llama", **FREE)
    mine = world.run(1, records_of, config.replace(**{"optimizer.at_once": True}))[0]
    waits = world.run(1, records_of, config)[0]
    assert mine[0] is None
    assert waits[-1] is None
    for a, b in zip(mine[1:], waits[:-1], strict=True):
        assert {key: a[key] for key in a if "_s" not in key} == {key: b[key] for key in b if "_s" not in key}


def timed(rank: int, config: RunConfig, at_once: bool) -> tuple[float, float]:
    """When this rank has updated after its first step, and when it was done with its backward; the last rank idles there."""
    mesh = Mesh(MeshShape.of(config.mesh), rank)
    engine = Engine(make_plan(config, None), mesh)
    forward_backward, done = engine.forward_backward, []

    def slow(*arguments: Any) -> tuple[float, int]:
        out = forward_backward(*arguments)
        time.sleep(0.5 if rank == mesh.shape.world - 1 else 0)
        done.append(time.monotonic())
        return out

    engine.forward_backward = slow
    step = AtOnce(engine).step if at_once else engine.step
    step(batch_of(config), 1e-3)
    return time.monotonic(), done[0]


@pytest.mark.parametrize("at_once", [True, False])
def test_the_first_rank_does_not_wait_for_the_last(world, at_once):
    config = tiny("llama", **FREE, **MESHES["zb-h2"])
    (updated, _), (_, last_done) = world.run(2, timed, config, at_once)
    assert (updated < last_done) == at_once
