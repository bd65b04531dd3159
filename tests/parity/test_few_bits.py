"""Types of fewer bits stay near fp32, round the same way on every mesh, and a step that overflows is skipped by all."""

from __future__ import annotations

import math

import pytest
import torch
from harness import bare, run_mesh, run_twin
from models import batch_of, tiny

from raytron.config import RunConfig
from raytron.parallel.mesh import Mesh
from raytron.plan.mesh import MeshShape
from raytron.plan.plan import make_plan
from raytron.training.engine import Engine

FEW_BITS = {
    "fp16": ({"precision.dtype": "fp16"}, 2e-3, 0.02),
    "fp16 on a mesh": ({"precision.dtype": "fp16", "mesh.tp": 2, "mesh.pp": 2, "mesh.dp": 2}, 2e-3, 0.02),
    "bf16, rounded by chance": (
        {"precision.dtype": "bf16", "precision.stochastic_rounding": True, "mesh.tp": 2, "mesh.dp": 2}, 0.03, 0.1,
    ),
    "bf16 moments": (
        {"precision.moments": "bf16", "precision.stochastic_rounding": True, "mesh.pp": 2, "mesh.dp": 2}, 0.01, 1e-5,
    ),
    "muon with bf16 moments": ({"optimizer.name": "muon", "precision.moments": "bf16", "mesh.tp": 2}, 0.02, 1e-5),
}  # fmt: skip


@pytest.mark.parametrize("case", list(FEW_BITS))
def test_few_bits_stay_near_fp32(world, case):
    changes, by_loss, by_gradient = FEW_BITS[case]
    config = tiny("llama", **changes)
    mine, truth = run_mesh(world, config, 10), run_twin(bare(config), 10)
    assert max(abs(a - b) for a, b in zip(mine.losses, truth.losses, strict=True)) < by_loss
    for name, gradient in truth.gradients.items():
        assert (mine.gradients[name] - gradient).norm() <= by_gradient * gradient.norm(), name


@pytest.mark.parametrize("optimizer", ["adamw", "lion"])
def test_a_share_rounds_as_the_whole_does(world, optimizer):
    """Two ranks add the same two numbers at every ZeRO level: all that differs is who owns, and rounds, an element. (Norms
    are summed up in another order, so nothing is clipped.)"""
    few = {"precision.moments": "bf16", "precision.dtype": "bf16", "precision.stochastic_rounding": True}
    changes = {"optimizer.name": optimizer, "optimizer.clip_norm": None, "mesh.dp": 2, **few}
    runs = [run_mesh(world, tiny("gpt2", **changes, **{"data_parallel.zero": zero}), 4) for zero in (0, 1)]
    assert runs[0].losses == runs[1].losses
    assert all(torch.equal(runs[0].weights[name], runs[1].weights[name]) for name in runs[0].weights)


def overflow(rank: int, config: RunConfig) -> tuple[list[bool], int, float, bool]:
    """Three steps, in the second of which one share of one rank is infinite."""
    engine = Engine(make_plan(config, None), Mesh(MeshShape.of(config.mesh), rank))
    batch = batch_of(config, 0, engine.mesh.coords.dp, engine.mesh.shape.dp)
    skipped, kept = [], True
    run = engine.forward_backward
    for step in range(3):
        before = [share.master.clone() for share in engine.optimizer.shares]
        if step == 1 and rank == 1:

            def broken(*arguments):
                out = run(*arguments)
                engine.buckets.owned[0].gradient[0] = math.inf
                return out

            engine.forward_backward = broken
        skipped.append(engine.step(batch, 1e-3).skipped)
        engine.forward_backward = run
        same = all(torch.equal(old, share.master) for old, share in zip(before, engine.optimizer.shares, strict=True))
        kept = kept and same == (step == 1)
    return skipped, engine.optimizer.updates, engine.loss_scale.value, kept


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_an_overflow_on_one_rank_is_skipped_by_all(world, dtype):
    config = tiny("llama", **{"precision.dtype": dtype, "mesh.pp": 2, "mesh.dp": 2})
    config = config.replace(**{"precision.loss_scale": 1024} if dtype == "fp16" else {})
    for skipped, updates, scale, kept in world.run(4, overflow, config):
        assert (skipped, updates, kept) == ([False, True, False], 2, True)
        assert scale == (512 if dtype == "fp16" else 1)


def scales(rank: int, config: RunConfig) -> list[tuple[bool, float]]:
    engine = Engine(make_plan(config, None), Mesh(MeshShape.of(config.mesh), rank))
    out = []
    for step in range(24):
        batch = batch_of(config, step, engine.mesh.coords.dp, engine.mesh.shape.dp)
        out.append((engine.step(batch, 1e-3).skipped, engine.loss_scale.value))
    return out


def test_the_loss_scale_finds_its_place(world):
    """It begins far too high: halved step by step, until gradients fit, and doubled from there."""
    config = tiny("llama", **{"precision.dtype": "fp16", "mesh.tp": 2, "precision.loss_scale": 2.0**30,
                              "precision.loss_scale_window": 3})  # fmt: skip
    results = world.run(2, scales, config)
    assert results[0] == results[1]
    skipped = [each for each, _ in results[0]]
    first = skipped.index(False)
    assert 0 < first < 20
    assert not all(skipped[first:])
    assert results[0][first - 1][1] == 2.0 ** (30 - first)
    assert results[0][first + 2][1] in (2.0 ** (31 - first), 2.0 ** (29 - first), 2.0 ** (30 - first))
