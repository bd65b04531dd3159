"""A rank's own timeline: recorded in the steps that are asked for, written once, joined and compared."""

import json
from pathlib import Path

import numpy as np
import pytest

from raytron.config import RunConfig
from raytron.data.batch import Batch
from raytron.observe.trace import Tracer
from raytron.parallel.mesh import Mesh
from raytron.plan.actions import Op
from raytron.plan.mesh import MeshShape
from raytron.plan.plan import make_plan
from raytron.plan.times import read_times
from raytron.plan.trace import merge, read_trace
from raytron.training.trainer import Trainer

TINY = RunConfig().replace(
    **{"model.layers": 4, "model.hidden": 32, "model.heads": 2, "model.ffn": 48, "model.vocab": 64},
    **{"sequence_length": 8, "data.dataset": "none", "lr.decay_steps": 10, "mesh.pp": 2},
    **{"global_batch_size": 6, "steps": 10},
)


class Stream:
    """The same tokens in every step."""

    sequence_length = 8

    def batch(self, first, count, part=0, parts=1):
        tokens = np.arange(count * 9).reshape(count, 9) % 64
        ids = np.arange(first, first + count)
        return Batch(ids, tokens[:, :-1].copy(), tokens[:, 1:].copy(), np.ones((count, 8), dtype=np.float32))


def train(rank, config, steps):
    mesh = Mesh(MeshShape.of(config.mesh), rank)
    plan = make_plan(config, None)
    trainer = Trainer(plan, mesh, Stream(), tracer=Tracer.wanted(plan, mesh))
    for _ in range(steps):
        trainer.train_step()
    return plan


@pytest.mark.parametrize("name", ["1f1b", "zb-v"])
def test_a_run_records_its_steps_and_compares_them(world, tmp_path, name):
    keys = {"pipeline.schedule": name, "observe.trace_steps": [2, 3], "run_dir": str(tmp_path)}
    config = TINY.replace(**keys)
    plan, _ = world.run(2, train, config, 4)
    events, compared = merge(read_trace(tmp_path))
    assert [item.step for item in compared] == [2, 3]
    for item in compared:
        assert 0 < item.simulated < 2 * item.measured
    ran = [event["name"] for event in events if event["ph"] == "X" and event["pid"] < 100_000]
    assert sorted(ran) == sorted(2 * [str(action) for row in plan.schedule.rows for action in row])
    times = read_times(tmp_path, config)
    assert times.stages == plan.stages
    assert times.steps == (2, 3)
    assert all(value is not None and value > 0 for value in times.seconds[Op.F])
    assert (times.seconds[Op.I][0] is None) == (name == "1f1b")
    assert f"the times of {name}, measured in steps 2 to 3" in str(
        make_plan(config.replace(**{"pipeline.schedule": "auto"}), None, times)
    )


def test_auto_measures_and_nothing_else_does(world, tmp_path):
    auto = TINY.replace(**{"pipeline.schedule": "auto", "run_dir": str(tmp_path)})
    world.run(2, train, auto, 4)
    assert not (Path(tmp_path) / "trace").exists()
    record = json.loads((Path(tmp_path) / "times" / "rank-0.json").read_text())
    assert record["steps"] == [2, 4]
    assert Tracer.wanted(make_plan(TINY, None), None) is None
