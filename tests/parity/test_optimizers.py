"""Every optimizer, on every kind of mesh, does what its plain form does on one device."""

from __future__ import annotations

from typing import Any

import pytest
from harness import check_equal, run_mesh
from models import LLAMA, tiny

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "muon": {"optimizer.name": "muon"},
    "lion": {"optimizer.name": "lion", "optimizer.beta2": 0.99, "lr.peak": 1e-3},
    "sgd": {"optimizer.name": "sgd", "optimizer.momentum": 0.9, "lr.peak": 0.05},
}
MESHES: dict[str, dict[str, Any]] = {
    "one": {},
    "tp2-dp2": {"mesh.tp": 2, "mesh.dp": 2},
    "dp2-zero0": {"mesh.dp": 2, "data_parallel.zero": 0},
    "tp4-repeated-kv": {"mesh.tp": 4},
    "cp2-tp2": {"mesh.cp": 2, "mesh.tp": 2},
    "dp3-uneven": {"mesh.dp": 3, "global_batch_size": 6, "micro_batch_size": 1},
    "pp2-dp2-zero2": {"mesh.pp": 2, "mesh.dp": 2, "data_parallel.zero": 2, "pipeline.schedule": "zb-h1"},
    "dp4-replicate2-zero3": {"mesh.dp": 4, "mesh.replicate": 2, "data_parallel.zero": 3, "micro_batch_size": 1},
    "dp2-offload": {"mesh.dp": 2, "data_parallel.offload": True},
    "gpt2-pp2-tp2-dp2": {"mesh.pp": 2, "mesh.tp": 2, "mesh.dp": 2},
}
CASES = [("muon", mesh) for mesh in MESHES] + [
    (name, mesh) for name in ("lion", "sgd") for mesh in ("one", "pp2-dp2-zero2", "tp2-dp2")
]


@pytest.mark.parametrize(("optimizer", "mesh"), CASES)
def test_every_optimizer(world, optimizer, mesh):
    model = "gpt2" if mesh.startswith("gpt2") else "llama"
    check_equal(world, tiny(model, **OPTIMIZERS[optimizer], **MESHES[mesh]))


EXPERTS = {**LLAMA, "layers": 2, "experts": {"count": 4, "top_k": 2, "ffn": 24, "shared_ffn": 16, "shared_gate": True}}
EXPERT_MESHES = [
    {"mesh.dp": 2, "mesh.tp": 2, "mesh.ep": 2, "mesh.etp": 2, "data_parallel.zero": 2},
    {"mesh.dp": 4, "mesh.ep": 2, "micro_batch_size": 1},
]


@pytest.mark.parametrize("mesh", EXPERT_MESHES, ids=str)
def test_muon_takes_each_experts_matrices(world, mesh):
    check_equal(world, tiny(EXPERTS, **OPTIMIZERS["muon"], **mesh))


GROUPS = [
    {"match": "layers.1.*", "freeze": True},
    {"match": "embed.weight", "lr": 0.25},
    {"match": "*norm.weight", "weight_decay": 0.5, "lr": 2.0},
]


@pytest.mark.parametrize(("optimizer", "mesh"), [("adamw", {}), ("muon", {"mesh.tp": 2, "mesh.pp": 2, "mesh.dp": 2})])
def test_groups_by_name(world, optimizer, mesh):
    check_equal(world, tiny("llama", **{"optimizer.name": optimizer, "optimizer.groups": GROUPS, **mesh}))


def test_muon_gives_the_same_bits_on_any_number_of_ranks(world):
    canonical = {
        "determinism": "canonical",
        "cluster.threads_per_worker": 1,
        "global_batch_size": 6,
        "micro_batch_size": 1,
    }
    one, three = (
        run_mesh(world, tiny("llama", **OPTIMIZERS["muon"], **canonical, **{"mesh.dp": dp}), 3) for dp in (1, 3)
    )
    assert one.losses == three.losses
    assert all((one.weights[name] == three.weights[name]).all() for name in one.weights)
