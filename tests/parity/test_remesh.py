"""From mesh to mesh, live and through memory: what disk gives to the bit, and training goes on the same.

Live is what the ranks park when they leave their mesh; memory is what they had written at their last step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_checkpoint_meshes import config_of as dense
from test_checkpoint_meshes import trainer_of
from test_expert_checkpoints import config_of as mixture

from raytron.checkpoint.gather import read_windows
from raytron.checkpoint.sources import MemoryGeneration, choose, survey
from raytron.config import RunConfig
from raytron.errors import CheckpointError
from raytron.plan.mesh import MeshShape
from raytron.training.engine import NORM
from raytron.training.trainer import Trainer

STEPS, EPOCH = 3, 7
CONFIGS: dict[str, RunConfig] = {
    "one": dense({}),
    "tp2": dense({"mesh.tp": 2, "data_parallel.zero": 0}),
    "pp2": dense({"mesh.pp": 2, "pipeline.schedule": "zb-h1", "pipeline.split": [3, 1]}),
    "dp2": dense({"mesh.dp": 2, "data_parallel.zero": 2}),
    "tp2 pp2": dense(
        {"mesh.tp": 2, "mesh.pp": 2, "pipeline.schedule": "interleaved", "pipeline.virtual_stages": 2},
    ),
    "tp4": dense({"mesh.tp": 4, "mesh.sequence_parallel": False}),
    "dp3": dense({"mesh.dp": 3, "micro_batch_size": 1, "data_parallel.zero": 0}),
    "cp2": dense({"mesh.cp": 2, "data_parallel.zero": 2}),
    "zero 3": dense({"mesh.dp": 2, "mesh.tp": 2, "data_parallel.zero": 3}),
    "hybrid, offload": dense(
        {"mesh.dp": 4, "mesh.replicate": 2, "data_parallel.offload": True, "micro_batch_size": 1},
    ),
    "experts, one": mixture({"data_parallel.zero": 0}),
    "experts, ep2": mixture({"mesh.dp": 2, "mesh.ep": 2, "data_parallel.zero": 2}),
    "experts, tp2 ep2 etp2": mixture({"mesh.dp": 2, "mesh.tp": 2, "mesh.ep": 2, "mesh.etp": 2}),
    "experts, pp2 ep2": mixture({"mesh.pp": 2, "mesh.dp": 2, "mesh.ep": 2, "pipeline.schedule": "zb-h1"}),
    "experts, zero 3": mixture({"mesh.dp": 4, "mesh.ep": 2, "data_parallel.zero": 3, "micro_batch_size": 1}),
}
PAIRS = [
    ("one", "tp2"), ("tp2", "pp2"), ("pp2", "dp2"), ("dp2", "tp2 pp2"), ("tp2 pp2", "zero 3"), ("zero 3", "dp3"),
    ("dp3", "cp2"), ("cp2", "hybrid, offload"), ("hybrid, offload", "tp4"), ("tp4", "one"), ("dp2", "one"),
    ("experts, one", "experts, tp2 ep2 etp2"), ("experts, ep2", "experts, pp2 ep2"),
    ("experts, tp2 ep2 etp2", "experts, zero 3"), ("experts, pp2 ep2", "experts, one"),
    ("experts, zero 3", "experts, ep2"),
]  # fmt: skip


def fetch(node: str, path: str, seal: str, windows: Any) -> Any:
    return read_windows(path, seal, windows)


def place(folder: Path, rank: int) -> tuple[str, Path]:
    """Two nodes: the even and the odd ranks."""
    return f"node {rank % 2}", folder / f"node-{rank % 2}"


def copy_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: part.tensor.clone() for name, part in trainer.state().items()}


def differences(trainer: Trainer, other: dict[str, torch.Tensor]) -> list[str]:
    mine = copy_of(trainer)
    assert mine.keys() == other.keys()
    return [name for name in mine if not torch.equal(mine[name], other[name])]


def choice(folder: Path, live: bool | None = None) -> MemoryGeneration:
    """live: only what was parked, or only what was not."""
    surveys = [survey(place(folder, rank)[1], place(folder, rank)[0]) for rank in range(2)]
    held = [each for found in surveys for each in found.held]
    generation, reasons = choose(each for each in held if live is None or live == ("parked" in each.path))
    assert generation is not None, reasons
    return generation


def write(rank: int, config: RunConfig, folder: Path) -> tuple[str, list[str], float]:
    """Trains with replicas and saves to disk; what a trainer that goes on from memory has otherwise than one that just
    went on, and the loss that this one had."""
    trainer = trainer_of(rank, config)
    trainer.open_replicas(place(folder, rank)[1], EPOCH)
    for _ in range(STEPS):
        trainer.train_step()
    path = trainer.save(folder / "checkpoints")
    trainer.park(range(trainer.mesh.shape.world))
    trainer.close_replicas()
    losses = [trainer.train_step()["loss"] for _ in range(2)]
    end = copy_of(trainer)
    again = trainer_of(rank, config)
    again.restore(choice(folder), place(folder, rank)[0], fetch)
    found = [f"loss {loss}" for loss in losses if again.train_step()["loss"] != loss]
    return str(path), found + differences(again, end), losses[0]


@pytest.fixture(scope="module")
def written(world, tmp_path_factory):
    """By mesh: where it left its segments, its checkpoint, and the loss of the step after."""
    made: dict[str, Any] = {}

    def get(name: str) -> tuple[Path, str, float]:
        if name not in made:
            config, folder = CONFIGS[name], tmp_path_factory.mktemp(name.replace(" ", "-").replace(",", ""))
            results = world.run(MeshShape.of(config.mesh).world, write, config, folder)
            assert [found for _, found, _ in results] == [[]] * len(results)
            made[name] = (folder, results[0][0], results[0][2])
        return made[name]

    return get


def read(rank: int, config: RunConfig, folder: Path, path: str) -> tuple[list[str], int, int, float]:
    """What memory, and what was parked, gives otherwise than disk, at once and two steps later."""
    disk = trainer_of(rank, config)
    disk.load(path)
    start, wanted = copy_of(disk), disk.facts()
    losses = [disk.train_step()["loss"] for _ in range(2)]
    found = []
    for live in (False, True):
        memory = trainer_of(rank, config)
        memory.restore(choice(folder, live), place(folder, rank)[0], fetch)
        kept = memory.facts()
        found += differences(memory, start) + [key for key in wanted if wanted[key] != kept[key]]
        found += [f"loss {loss}" for loss in losses if memory.train_step()["loss"] != loss]
        found += differences(memory, copy_of(disk))
    return found, kept["step"], kept["consumed"], losses[0]


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_live_and_memory_give_what_disk_gives(world, written, source, target):
    folder, path, loss = written(source)
    config = CONFIGS[target]
    results = world.run(MeshShape.of(config.mesh).world, read, config, folder, path)
    assert [found for found, *_ in results] == [[]] * len(results)
    assert results[0][1:3] == (STEPS, STEPS * config.global_batch_size)
    assert results[0][3] == pytest.approx(loss, rel=1e-5)


# ---- parked


class Broken(Exception):
    """What a test throws into a step."""


def breaks(*_: Any, **__: Any) -> Any:
    raise Broken


def parked_after(rank: int, config: RunConfig, folder: Path, where: str) -> tuple[str, list[str]]:
    """Breaks a step at a place, parks, and goes on from what was parked: the reason why that is impossible, or what is
    otherwise than in a trainer that was not disturbed."""
    trainer, calm = trainer_of(rank, config), trainer_of(rank, config)
    trainer.open_replicas(place(folder, rank)[1], EPOCH)
    for each in (trainer, calm):
        for _ in range(STEPS):
            each.train_step()
    engine = trainer.engine
    owner, name = {"forward": (engine, "forward_backward"), "sum": (engine, "_over_world"),
                   "update": (engine.optimizer, "publish")}[where]  # fmt: skip
    setattr(owner, name, breaks)
    with pytest.raises(Broken):
        trainer.train_step()
    try:
        trainer.park(range(trainer.mesh.shape.world))
    except CheckpointError as error:
        return str(error), []
    again = trainer_of(rank, config)
    torch.distributed.barrier()
    again.restore(choice(folder), place(folder, rank)[0], fetch)
    calm.settle()
    found = []
    while again.step < STEPS:
        again.train_step()
        again.settle()
    found += differences(again, copy_of(calm))
    return "", found + [key for key, value in calm.facts().items() if again.facts()[key] != value]


LIVE = dense({"mesh.dp": 2, "recovery.memory_every": None})


@pytest.mark.parametrize("where", ["forward", "sum"])
def test_a_state_that_no_update_touched_is_parked(world, tmp_path, where):
    assert world.run(2, parked_after, LIVE, tmp_path, where) == [("", [])] * 2


def test_a_state_in_the_middle_of_an_update_is_refused(world, tmp_path):
    for error, _ in world.run(2, parked_after, LIVE, tmp_path, "update"):
        assert "caught in the middle of a change" in error


def test_at_once_parks_what_all_have_heard_of(world, tmp_path):
    config = LIVE.replace(**{"optimizer.at_once": True, "optimizer.clip_norm": None})
    assert world.run(2, parked_after, config, tmp_path, "forward") == [("", [])] * 2
    assert choice(tmp_path).step == STEPS - 1


def test_at_once_refuses_what_was_heard_and_not_taken_in(world, tmp_path):
    config = LIVE.replace(**{"optimizer.at_once": True, "optimizer.clip_norm": None})
    for error, _ in world.run(2, parked_after, config, tmp_path, "update"):
        assert "caught in the middle of a change" in error


def skipped(rank: int, config: RunConfig, folder: Path) -> tuple[int, int, list[str]]:
    """The second step's gradient is not finite; where memory then stands, and what is otherwise after going on from it."""

    def poisoned(trainer: Trainer) -> Trainer:
        values = trainer.engine.values
        trainer.engine.values = lambda *args: values(*args) | ({NORM: float("inf")} if trainer.step == 1 else {})
        return trainer

    trainer, again = poisoned(trainer_of(rank, config)), poisoned(trainer_of(rank, config))
    trainer.open_replicas(place(folder, rank)[1], EPOCH)
    for _ in range(2 if trainer.at_once is None else 3):
        trainer.train_step()
    torch.distributed.barrier()
    generation = choice(folder)
    again.restore(generation, place(folder, rank)[0], fetch)
    trainer.close_replicas()
    while again.step < trainer.step:
        again.train_step()
    for each in (trainer, again):
        each.train_step()
        each.settle()
    found = differences(again, copy_of(trainer))
    found += [key for key, value in trainer.facts().items() if again.facts()[key] != value]
    return generation.step, generation.facts["skipped_steps"], found


@pytest.mark.parametrize("at_once", [False, True])
def test_a_skipped_step_is_remembered_as_skipped(world, tmp_path, at_once):
    config = dense({"mesh.dp": 2, "optimizer.at_once": at_once, "guard.on_nonfinite": "skip"})
    config = config.replace(**{"optimizer.clip_norm": None})
    assert world.run(2, skipped, config, tmp_path) == [(2, 1, [])] * 2


def survivors(rank: int, config: RunConfig, folder: Path) -> None:
    """Of four ranks the last leaves nothing but what it had written; the others park what they hold."""
    trainer = trainer_of(rank, config)
    trainer.open_replicas(folder, EPOCH)
    for _ in range(STEPS):
        trainer.train_step()
    if rank < 3:
        trainer.park()
    torch.distributed.barrier()


def from_survivors(rank: int, config: RunConfig, folder: Path, epoch_parked: bool) -> int:
    trainer = trainer_of(rank, config)
    generation = choose(survey(folder, "here").held).generation
    assert generation is not None
    trainer.restore(generation, "here")
    return trainer.step


@pytest.mark.parametrize(("zero", "every", "whole"), [(0, None, True), (1, None, False), (1, 1, True)])
def test_survivors_hold_all_or_a_segment_does(world, tmp_path, zero, every, whole):
    config = dense({"mesh.dp": 4, "data_parallel.zero": zero, "recovery.memory_every": every, "micro_batch_size": 1})
    world.run(4, survivors, config, tmp_path)
    found = choose(survey(tmp_path, "here").held)
    assert (found.generation is not None) == whole, found.reasons
    if whole:
        assert found.generation.step == STEPS
        assert world.run(1, from_survivors, dense({}), tmp_path, False) == [STEPS]
    else:
        assert "are covered by nobody" in found.reasons[0]
        assert "nothing is there of rank 3" in found.reasons[0]
