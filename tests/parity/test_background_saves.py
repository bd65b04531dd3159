"""Checkpoints that are written behind the training: what they hold, how they end, and that training does not notice."""

from __future__ import annotations

import errno
import gc
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import pieces, whole
from models import tiny
from test_checkpoint_meshes import RandomStream, load_all, trainer_of

from raytron.checkpoint.catalog import committed, newest_good, prune
from raytron.checkpoint.saver import Phase
from raytron.config import RunConfig
from raytron.parallel.mesh import Mesh
from raytron.plan.mesh import MeshShape
from raytron.plan.plan import make_plan
from raytron.training.trainer import Trainer

MESHES: dict[str, dict[str, Any]] = {
    "one": {},
    "dp2": {"mesh.dp": 2, "data_parallel.zero": 2},
    "tp2 pp2": {"mesh.tp": 2, "mesh.pp": 2},
    "pp2, at once": {
        "mesh.pp": 2,
        "pipeline.schedule": "zb-h2",
        "optimizer.at_once": True,
        "optimizer.clip_norm": None,
    },
}


class Gate:
    """A hook that holds the writers of one rank back until it is opened, and may then fail."""

    def __init__(self, error: OSError | None = None):
        self.open, self.error = threading.Event(), error

    def __call__(self, phase: str) -> None:
        if phase == "write":
            assert self.open.wait(60)
            if self.error is not None:
                raise self.error


def gated(rank: int, config: RunConfig, gate: Gate) -> Trainer:
    mesh = Mesh(MeshShape.of(config.mesh), rank)
    return Trainer(make_plan(config, None), mesh, RandomStream(config), data_digest="random", hook=gate)


def trained(trainer: Trainer, steps: int) -> list[float]:
    """The losses of some steps, settled."""
    records = [trainer.train_step() for _ in range(steps)] + [trainer.settle()]
    assert all(record["request"] == 0 for record in records if record)
    return [record["loss"] for record in records if record]


def until_reported(trainer: Trainer) -> list[Any]:
    """Trains until something is reported."""
    for _ in range(200):
        trained(trainer, 1)
        reports = trainer.reports()
        if reports:
            return reports
        time.sleep(0.005)
    raise AssertionError("nothing was ever reported")


def save_behind(rank: int, config: RunConfig, folder: Path) -> dict[str, Any]:
    """Saves after 2 steps behind 3 more, of which the writers of the last rank see none."""
    last = rank == MeshShape.of(config.mesh).world - 1
    gate = Gate()
    if not last:
        gate.open.set()
    trainer = gated(rank, config, gate)
    losses = trained(trainer, 2)
    state = pieces(trainer.state())
    path = trainer.begin_save(folder)
    losses += trained(trainer, 3)
    early = (trainer.reports(), len(committed(folder)), trainer.saves.phase)
    gate.open.set()
    reports = until_reported(trainer)
    return {"state": state, "path": str(path), "losses": losses, "early": early, "reports": reports}


def undisturbed(rank: int, config: RunConfig) -> list[float]:
    return trained(trainer_of(rank, config), 5)


@pytest.mark.parametrize("name", MESHES)
def test_a_checkpoint_holds_the_step_at_which_it_began(world, tmp_path, name):
    config = tiny("llama", **MESHES[name])
    ranks = MeshShape.of(config.mesh).world
    found = world.run(ranks, save_behind, config, tmp_path)
    assert all(rank["early"] == ([], 0, Phase.WRITING) for rank in found)
    assert all(rank["reports"] == found[0]["reports"] for rank in found)
    (report,) = found[0]["reports"]
    assert (report["event"], report["step"], report["error"]) == ("checkpoint", 2, None)
    assert report["path"] == found[0]["path"]
    assert 0 < report["stall_s"] < report["seconds"]
    good = newest_good(tmp_path)
    assert good is not None
    assert (str(good.path), good.step, good.facts["step"]) == (report["path"], 2, 2)
    assert report["bytes"] == sum(file.size for file in good.records.files.values())
    assert found[0]["losses"] == world.run(ranks, undisturbed, config)[0]
    loaded = world.run(ranks, load_all, config.replace(**{"optimizer.at_once": False}), [report["path"]])
    mine, truth = whole([rank[0][0] for rank in loaded]), whole([rank["state"] for rank in found])
    assert mine.keys() == truth.keys()
    assert all(torch.equal(mine[key], truth[key]) for key in truth)


def fail_behind(rank: int, config: RunConfig, folder: Path, failing: int) -> dict[str, Any]:
    gate = Gate()
    gate.open.set()
    trainer = gated(rank, config, gate)
    trained(trainer, 1)
    trainer.save(folder)
    trained(trainer, 1)
    if rank == failing:
        gate.error = OSError(errno.ENOSPC, "No space left on device", "the-disk")
    reports = trainer.reports()
    trainer.begin_save(folder)
    reports += until_reported(trainer)
    gate.error = None
    trainer.begin_save(folder)
    return {"reports": reports, "again": until_reported(trainer)}


@pytest.mark.parametrize("failing", [0, 1])
def test_a_writers_failure_is_reported_once_and_training_goes_on(world, tmp_path, failing):
    config = tiny("llama", **MESHES["dp2"])
    found = world.run(2, fail_behind, config, tmp_path, failing)
    assert found[0]["reports"] == found[1]["reports"]
    saved, failed = found[0]["reports"]
    assert (saved["event"], saved["step"]) == ("checkpoint", 1)
    assert (failed["event"], failed["step"]) == ("checkpoint_failed", 2)
    assert f"rank {failing}: the-disk: No space left on device" in failed["error"]
    assert not Path(failed["path"]).exists()
    assert [report["event"] for report in found[0]["again"]] == ["checkpoint"]
    assert [g.step for g in committed(tmp_path)][-1] == 1
    assert len(list(tmp_path.iterdir())) == 2


def no_place(rank: int, config: RunConfig, folder: Path) -> list[Any]:
    trainer = trainer_of(rank, config)
    trained(trainer, 1)
    assert trainer.begin_save(folder / "file") is None
    trained(trainer, 1)
    return trainer.reports()


def test_what_can_not_begin_is_reported(world, tmp_path):
    (tmp_path / "file").write_text("in the way")
    config = tiny("llama", **MESHES["dp2"])
    found = world.run(2, no_place, config, tmp_path)
    assert found[0] == found[1]
    assert found[0][0]["event"] == "checkpoint_failed"
    assert "rank 0" in found[0][0]["error"]


def two_at_a_time(rank: int, config: RunConfig, folder: Path) -> dict[str, Any]:
    trainer = trainer_of(rank, config)
    trained(trainer, 1)
    first = trainer.begin_save(folder)
    trained(trainer, 1)
    second = trainer.begin_save(folder)
    between = [report["step"] for report in trainer.reports()]
    trainer.settle_saves()
    return {"paths": (str(first), str(second)), "between": between, "after": [r["step"] for r in trainer.reports()]}


def test_the_first_of_two_ends_before_the_second_begins(world, tmp_path):
    found = world.run(2, two_at_a_time, tiny("llama", **MESHES["dp2"]), tmp_path)
    assert all((rank["between"], rank["after"]) == ([1], [2]) for rank in found)
    assert [str(g.path) for g in committed(tmp_path)] == list(reversed(found[0]["paths"]))


def in_the_foreground(rank: int, config: RunConfig, folder: Path) -> tuple[str, list[Any]]:
    trainer = trainer_of(rank, config)
    trained(trainer, 1)
    path = trainer.begin_save(folder)
    return str(path), trainer.reports()


def test_without_background_it_is_committed_at_once(world, tmp_path):
    config = tiny("llama", **MESHES["dp2"], **{"checkpoint.background": False})
    (path, (report,)), _ = world.run(2, in_the_foreground, config, tmp_path)
    assert str(committed(tmp_path)[0].path) == path == report["path"]
    assert report["stall_s"] == report["seconds"]


def left_behind(rank: int, config: RunConfig, folder: Path) -> tuple[int, list[str]]:
    """The trainer goes while rank 1 still writes, as when a mesh is rebuilt."""
    gate = Gate()
    if rank == 0:
        gate.open.set()
    trainer = gated(rank, config, gate)
    trained(trainer, 1)
    path = trainer.begin_save(folder)
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint of")]
    del trainer
    gc.collect()
    gate.open.set()
    for thread in threads:
        thread.join(30)
    assert path is not None
    return len(committed(folder)), sorted(file.name for file in path.iterdir())


def test_a_mesh_that_goes_leaves_nothing_that_counts(world, tmp_path):
    found = world.run(2, left_behind, tiny("llama", **MESHES["dp2"]), tmp_path)
    assert [committed_count for committed_count, _ in found] == [0, 0]
    assert "ABANDONED" in found[0][1]
    assert len(prune(tmp_path, 1)) == 1
    assert list(tmp_path.iterdir()) == []
