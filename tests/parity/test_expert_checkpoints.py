"""Experts that were saved on any mesh load on any other, their moments and balancing biases with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import whole
from models import LLAMA, tiny
from test_checkpoint_meshes import load_all, save

from raytron.config import RunConfig
from raytron.plan.mesh import MeshShape

MODEL = {
    **LLAMA, "layers": 2,
    "experts": {
        "count": 4, "top_k": 2, "ffn": 16, "shared_ffn": 16, "first_dense": 1, "score": "sigmoid", "bias_rate": 0.01,
    },
}  # fmt: skip
MESHES: dict[str, dict[str, Any]] = {
    "one": {"data_parallel.zero": 0},
    "ep2": {"mesh.dp": 2, "mesh.ep": 2, "data_parallel.zero": 2},
    "tp2 ep2 etp2": {"mesh.dp": 2, "mesh.tp": 2, "mesh.ep": 2, "mesh.etp": 2},
    "pp2 ep2": {"mesh.pp": 2, "mesh.dp": 2, "mesh.ep": 2, "pipeline.schedule": "zb-h1"},
    "zero3": {"mesh.dp": 4, "mesh.ep": 2, "data_parallel.zero": 3, "micro_batch_size": 1},
}


def config_of(mesh: dict[str, Any]) -> RunConfig:
    return tiny(MODEL, **mesh)


@pytest.fixture(scope="module")
def saved(world, tmp_path_factory):
    """Each mesh's whole state after 3 steps, where it saved it, and the loss of the step after."""
    out = {}
    for name, mesh in MESHES.items():
        config, folder = config_of(mesh), tmp_path_factory.mktemp(name.replace(" ", "-"))
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
        assert mine["layers.1.mlp.router.bias"].abs().max() == pytest.approx(0.03, abs=0.021)
        assert results[0][number][1] == pytest.approx(loss, rel=1e-5)


def test_the_state_names_experts_whole(saved):
    state = saved["tp2 ep2 etp2"][0]
    assert state["layers.1.mlp.experts.up.weight"].shape == (4, 2, 16, 32)
    assert state["adam.v.layers.1.mlp.experts.down.weight"].shape == (4, 32, 16)
