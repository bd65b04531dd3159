"""What was saved on any mesh loads on any other: weights, moments, position; and training goes on the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import pieces, whole
from models import batch_of, tiny

from raytron.config import RunConfig
from raytron.data.batch import Batch, part_of
from raytron.errors import CheckpointError
from raytron.parallel.mesh import Mesh
from raytron.plan.mesh import MeshShape
from raytron.plan.plan import make_plan
from raytron.training.trainer import Trainer

MESHES: dict[str, dict[str, Any]] = {
    "one": {},
    "tp2": {"mesh.tp": 2, "data_parallel.zero": 0},
    "pp2": {"mesh.pp": 2, "pipeline.schedule": "zb-h1"},
    "dp2": {"mesh.dp": 2, "data_parallel.zero": 2},
    "tp2 pp2": {"mesh.tp": 2, "mesh.pp": 2, "pipeline.schedule": "interleaved", "pipeline.virtual_stages": 2},
    "tp2 dp2": {"mesh.tp": 2, "mesh.dp": 2},
    "pp2 dp2": {"mesh.pp": 2, "mesh.dp": 2, "pipeline.split": [3, 1]},
    "tp2 pp2 dp2": {"mesh.tp": 2, "mesh.pp": 2, "mesh.dp": 2, "data_parallel.zero": 2},
    "tp4": {"mesh.tp": 4, "mesh.sequence_parallel": False},
    "dp3": {"mesh.dp": 3, "micro_batch_size": 1},
    "cp2": {"mesh.cp": 2, "data_parallel.zero": 2},
    "zero 3": {"mesh.dp": 2, "mesh.tp": 2, "data_parallel.zero": 3},
    "hybrid, offload": {
        "mesh.dp": 4,
        "mesh.replicate": 2,
        "data_parallel.zero": 3,
        "data_parallel.offload": True,
        "micro_batch_size": 1,
    },
}


class RandomStream:
    """The tests' random tokens as a TokenStream."""

    def __init__(self, config: RunConfig):
        self.config = config
        self.sequence_length, self.samples_per_epoch = config.sequence_length, 1 << 40

    def batch(self, first: int, count: int, part: int = 0, parts: int = 1) -> Batch:
        step, at = divmod(first, self.config.global_batch_size)
        assert at + count <= self.config.global_batch_size
        whole = batch_of(self.config, step)
        start, stop = part_of(at, count, part, parts)
        return Batch(*(None if field is None else field[start:stop] for field in whole))


def trainer_of(rank: int, config: RunConfig) -> Trainer:
    mesh = Mesh(MeshShape.of(config.mesh), rank)
    return Trainer(make_plan(config, None), mesh, RandomStream(config), RandomStream(config), data_digest="random")


def save(rank: int, config: RunConfig, folder: Path, steps: int) -> tuple[list[Any], str, float]:
    trainer = trainer_of(rank, config)
    for _ in range(steps):
        trainer.train_step()
    state = pieces(trainer.state())
    path = trainer.save(folder)
    return state, str(path), trainer.train_step()["loss"]


def load_all(rank: int, config: RunConfig, paths: list[str]) -> list[tuple[list[Any], float, int, int]]:
    trainer = trainer_of(rank, config)
    out = []
    for path in paths:
        trainer.load(path)
        state = pieces(trainer.state())
        at = (trainer.step, trainer.consumed)
        out.append((state, trainer.train_step()["loss"], *at))
    return out


def config_of(mesh: dict[str, Any]) -> RunConfig:
    model = {"layers": 4, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 48, "vocab": 67, "qk_norm": True,
             "qkv_bias": True, "tied_embeddings": True}  # fmt: skip
    return tiny(model, **{"global_batch_size": 12, **mesh})


@pytest.fixture(scope="module")
def saved(world, tmp_path_factory):
    """Each mesh's whole state after 3 steps, where it saved it, and the loss of the step after."""
    out = {}
    for name, mesh in MESHES.items():
        config = config_of(mesh)
        folder = tmp_path_factory.mktemp(name.replace(" ", "-"))
        results = world.run(MeshShape.of(config.mesh).world, save, config, folder, 3)
        out[name] = (whole([result[0] for result in results]), results[0][1], results[0][2])
    return out


@pytest.mark.parametrize("target", MESHES)
def test_loads_what_every_mesh_saved(world, saved, target):
    config = config_of(MESHES[target])
    results = world.run(MeshShape.of(config.mesh).world, load_all, config, [path for _, path, _ in saved.values()])
    for number, (state, _, loss) in enumerate(saved.values()):
        mine = whole([result[number][0] for result in results])
        assert mine.keys() == state.keys()
        assert all(torch.equal(mine[name], state[name]) for name in state)
        assert results[0][number][2:] == (3, 3 * config.global_batch_size)
        assert results[0][number][1] == pytest.approx(loss, rel=1e-5)


def test_padding_is_not_saved(saved):
    for state, _, _ in saved.values():
        assert state["embed.weight"].shape == (67, 32)
        assert {name.split(".")[0] for name in state} >= {"embed", "layers", "norm", "adam"}


def refuse(rank: int, config: RunConfig, path: str) -> str:
    trainer = trainer_of(rank, config)
    before = pieces(trainer.state())
    with pytest.raises(CheckpointError) as caught:
        trainer.load(path)
    after = pieces(trainer.state())
    assert all(np.array_equal(a[3], b[3]) for a, b in zip(before, after, strict=True))
    return str(caught.value)


def test_another_model_is_refused_and_nothing_changes(world, saved):
    config = config_of({"mesh.tp": 2, "model.ffn": 64})
    message = world.run(2, refuse, config, saved["one"][1])[0]
    assert "layers.0.mlp.up.weight" in message
