"""A rank of a real world that is stopped half of the time, or sleeps in its forward, is the one that is flagged."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import contextmanager

import pytest

from raytron.config import from_mapping
from raytron.observe.stragglers import Stragglers
from raytron.parallel.mesh import Mesh
from raytron.plan.mesh import MeshShape
from raytron.plan.plan import make_plan
from raytron.testing.streams import RandomStream
from raytron.training.trainer import Trainer

CONFIG = from_mapping(
    {"model": {"layers": 2, "hidden": 16, "heads": 4, "ffn": 16, "vocab": 31}, "sequence_length": 8,
     "global_batch_size": 4, "micro_batch_size": 1, "data": {"dataset": "random"}}
)  # fmt: skip
SLOW = 2
TICKS = 60  # ms that a forward takes: in small sleeps, which a stopped process does not get on with, nor a busy machine slow


def busy_of(rank, changes, steps, slow_steps):
    """What each step took this rank; in `slow_steps` rank SLOW takes twice as long for a forward."""
    config = CONFIG.replace(**changes)
    trainer = Trainer(make_plan(config, None), Mesh(MeshShape.of(config.mesh), rank), RandomStream(31, 8))

    def work(*_):
        twice = rank == SLOW and trainer.step + 1 in slow_steps
        for _ in range(TICKS * (1 + twice)):
            time.sleep(0.001)

    for stage in trainer.engine.model.stages.values():
        stage.register_forward_pre_hook(work)
    for _ in range(steps):
        trainer.train_step()
    return [(seen.step, seen.busy_s) for seen in trainer.clock.seen]


@contextmanager
def stopped_half_of_the_time(pid, period_s=0.03):
    """Duty-cycles a process of ours."""
    over = threading.Event()

    def cycle():
        while not over.is_set():
            os.kill(pid, signal.SIGSTOP)
            time.sleep(period_s)
            os.kill(pid, signal.SIGCONT)
            time.sleep(period_s)

    thread = threading.Thread(target=cycle)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def changes_of(seen, changes):
    stragglers = Stragglers.of(make_plan(CONFIG.replace(**changes), None), 1.5)
    return [change for rank, steps in enumerate(seen) for change in stragglers.heard(rank, steps)]


@pytest.mark.recovery
@pytest.mark.parametrize(
    "changes", [{"mesh.dp": 4}, pytest.param({"mesh.pp": 2, "mesh.dp": 2}, marks=pytest.mark.slow)], ids=str
)
def test_a_rank_that_is_stopped_half_of_the_time_is_flagged(world, changes):
    world.run(4, lambda rank: rank)
    with stopped_half_of_the_time(world._ranks[SLOW][0].pid):
        seen = world.run(4, busy_of, changes, 14, ())
    found = changes_of(seen, changes)
    assert {change.rank for change in found} == {SLOW}
    assert found[0].step <= 10


def test_a_rank_that_sleeps_in_its_forward_is_flagged_and_forgiven(world):
    changes = {"mesh.tp": 2, "mesh.dp": 2}
    found = changes_of(world.run(4, busy_of, changes, 40, range(11, 26)), changes)
    assert [(change.rank, change.slow) for change in found] == [(SLOW, True), (SLOW, False)]
    assert 11 <= found[0].step <= 20
    assert 26 <= found[1].step <= 40
