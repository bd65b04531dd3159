"""Experts together with what the other parts of a run may be: recomputation, ZeRO 3, replicas, Muon, bf16, exact sums."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import check_equal, run_mesh
from models import batch_of, tiny
from test_experts import DEEPSEEK, MIXTRAL, QWEN_MOE, SWITCH

from raytron.config import RunConfig
from raytron.parallel.mesh import Mesh
from raytron.plan.mesh import MeshShape
from raytron.plan.plan import make_plan
from raytron.training.engine import Engine

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "recompute full": (DEEPSEEK, {"memory.recompute": "full", "mesh.dp": 2, "mesh.ep": 2}),
    "recompute selective": (QWEN_MOE, {"memory.recompute": "selective", "mesh.tp": 2, "mesh.ep": 2}),
    "offload": (SWITCH, {"memory.offload_activations": True, "memory.offload_min_mb": 0, "mesh.dp": 2, "mesh.ep": 2}),
    "zero 3": (DEEPSEEK, {"data_parallel.zero": 3, "mesh.dp": 4, "mesh.ep": 2, "micro_batch_size": 1}),
    "zero 3 gather": (
        QWEN_MOE,
        {"data_parallel.zero": 3, "mesh.dp": 2, "mesh.tp": 2, "mesh.ep": 2, "mesh.expert_dispatch": "all_gather"},
    ),
    "replicas": (MIXTRAL, {"mesh.dp": 4, "mesh.replicate": 2, "mesh.ep": 2, "micro_batch_size": 1}),
    "muon": (
        MIXTRAL,
        {"optimizer.name": "muon", "optimizer.newton_schulz": "fp32", "mesh.dp": 2, "mesh.tp": 2, "mesh.ep": 2,
         "mesh.etp": 2},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_options_do_not_change_a_result(world, case):
    model, changes = CASES[case]
    check_equal(world, tiny(model, **changes), steps=6)


def test_canonical_sums_are_equal_to_the_bit(world):
    config = tiny(DEEPSEEK, determinism="canonical", micro_batch_size=1, **{"cluster.threads_per_worker": 1})
    outcomes = [run_mesh(world, config.replace(**mesh), 4) for mesh in ({}, {"mesh.dp": 2}, {"mesh.dp": 4})]
    for other in outcomes[1:]:
        assert other.losses == outcomes[0].losses
        assert all(torch.equal(other.weights[name], weight) for name, weight in outcomes[0].weights.items())


def test_bf16_stays_near_fp32(world):
    config = tiny(DEEPSEEK, **{"mesh.dp": 2, "mesh.ep": 2})
    exact = run_mesh(world, config, 6)
    rough = run_mesh(world, config.replace(**{"precision.dtype": "bf16"}), 6)
    assert max(abs(a - b) for a, b in zip(exact.losses, rough.losses, strict=True)) < 0.02


def metrics(rank: int, config: RunConfig) -> list[dict[str, float]]:
    mesh = Mesh(MeshShape.of(config.mesh), rank)
    engine = Engine(make_plan(config, None), mesh)
    return [engine.step(batch_of(config, s, mesh.coords.dp, mesh.shape.dp), 1e-3).metrics for s in range(2)]


def test_load_is_told_alike_on_every_mesh(world):
    meshes = [
        {}, {"mesh.dp": 2, "mesh.ep": 2, "mesh.tp": 2}, {"mesh.pp": 2, "pipeline.schedule": "zb-h1"},
        {"mesh.dp": 3, "mesh.tp": 2, "mesh.ep": 2, "mesh.etp": 3, "mesh.expert_dispatch": "all_gather"},
    ]  # fmt: skip
    found = []
    for mesh in meshes:
        config = tiny(SWITCH, **mesh)
        results = world.run(MeshShape.of(config.mesh).world, metrics, config)
        assert all(result == results[0] for result in results)
        found.append(results[0])
    for steps in found[1:]:
        for step, first in zip(steps, found[0], strict=True):
            assert step == pytest.approx(first, rel=1e-4)
    assert 0 < found[0][0]["experts/dropped"] < 0.5
    assert 1 < found[0][0]["experts/load_max_over_mean"] <= 4
    assert found[0][0]["experts/aux_loss"] == pytest.approx(1, abs=0.2)
