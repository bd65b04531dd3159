"""Every way to share out state over data-parallel ranks gives what one device gives, and keeps what it should free."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from harness import bare, check_equal, run_mesh, run_twin
from models import batch_of, tiny
from test_experts import DEEPSEEK, MIXTRAL

from raytron.config import RunConfig
from raytron.parallel.buckets import Bucket, GradientBuckets
from raytron.parallel.layout import Layout
from raytron.parallel.mesh import Mesh
from raytron.parallel.parameter import Param
from raytron.plan.mesh import MeshShape
from raytron.plan.plan import make_plan
from raytron.training.engine import Engine

ZERO3 = {"mesh.dp": 2, "data_parallel.zero": 3}
ONCE = {**ZERO3, "data_parallel.reduce": "last_microbatch"}
HYBRID = {"mesh.dp": 4, "mesh.replicate": 2, "micro_batch_size": 1}
CASES = {
    "zero 3": tiny("llama", **ZERO3),
    "zero 3, no prefetch, tp": tiny("qwen3", **ZERO3, **{"mesh.tp": 2, "data_parallel.prefetch": 0}),
    "zero 3, far prefetch, dropout": tiny("dropped", **ZERO3, **{"data_parallel.prefetch": 9, "micro_batch_size": 1}),
    "zero 3, untied gpt2, 1f1b": tiny("gpt2", **ZERO3, **{"mesh.pp": 2, "model.tied_embeddings": False}),
    "zero 3, tied over stages, gpipe": tiny("gpt2", **ZERO3, **{"mesh.pp": 2, "pipeline.schedule": "gpipe"}),
    "zero 3, zb-h1": tiny("llama", **ZERO3, **{"mesh.pp": 2, "pipeline.schedule": "zb-h1", "micro_batch_size": 1}),
    "zero 3, interleaved, tp": tiny(
        "qwen3",
        **ZERO3,
        **{"mesh.pp": 2, "mesh.tp": 2, "pipeline.schedule": "interleaved", "pipeline.virtual_stages": 2},
    ),
    "zero 3, dp that divides nothing": tiny("gpt2", **{"mesh.dp": 3, "data_parallel.zero": 3, "global_batch_size": 6,
                                                       "micro_batch_size": 1}),
    "zero 3, reduced once": tiny("qwen3", **ONCE, **{"mesh.tp": 2, "micro_batch_size": 1}),
    "zero 3, reduced once, zb-h1": tiny("llama", **ONCE, **{"mesh.pp": 2, "pipeline.schedule": "zb-h1"}),
    "zero 3, reduced once, hybrid, offload": tiny(
        "gpt2", **ONCE | HYBRID | {"data_parallel.offload": True}
    ),
    "zero 3, experts": tiny(MIXTRAL, **ZERO3, **{"mesh.ep": 2, "mesh.pp": 2, "pipeline.schedule": "zb-h1"}),
    "hybrid, zero 3, shared experts": tiny(DEEPSEEK, **HYBRID, **{"mesh.ep": 2, "data_parallel.zero": 3}),
    "hybrid, zero 1": tiny("llama", **HYBRID),
    "hybrid, zero 2, pp": tiny("qwen3", **HYBRID, **{"mesh.pp": 2, "data_parallel.zero": 2}),
    "hybrid, zero 3": tiny("gpt2", **HYBRID, **{"data_parallel.zero": 3}),
    "replicas alone": tiny("llama", **{"mesh.dp": 2, "mesh.replicate": 2, "data_parallel.zero": 3}),
    "offload": tiny("llama", **{"mesh.dp": 2, "data_parallel.zero": 2, "data_parallel.offload": True}),
    "offload alone, zero 3 keys": tiny("llama", **{"data_parallel.zero": 3, "data_parallel.offload": True}),
}  # fmt: skip


@pytest.mark.parametrize("config", list(CASES.values()), ids=list(CASES))
def test_equal_to_one_device(world, config):
    check_equal(world, config)


NEAR = {
    "gradients in bf16": {"mesh.dp": 2, "data_parallel.reduce_dtype": "bf16"},
    "gradients in bf16, zero 0": {"mesh.dp": 2, "data_parallel.reduce_dtype": "bf16", "data_parallel.zero": 0},
    "gradients in bf16, hybrid": {**HYBRID, "data_parallel.reduce_dtype": "bf16", "data_parallel.zero": 3},
    "weights in bf16, zero 3": {**ZERO3, "precision.dtype": "bf16", "mesh.tp": 2},
}


@pytest.mark.parametrize("changes", list(NEAR.values()), ids=list(NEAR))
def test_bf16_stays_near_fp32(world, changes):
    """bf16 has 8 bits: what is rounded is off by up to 2⁻⁹ of itself, each of the parts that are summed and the sum."""
    config = tiny("llama", **changes)
    mine, truth = run_mesh(world, config, 10), run_twin(bare(config), 10)
    assert max(abs(a - b) for a, b in zip(mine.losses, truth.losses, strict=True)) < 0.02
    limit = 0.1 if config.precision.dtype == "bf16" else 2**-7
    for name, gradient in truth.gradients.items():
        difference = (mine.gradients[name] - gradient).norm()
        assert 0 < difference <= limit * gradient.norm(), name


@pytest.mark.parametrize("zero", [2, 3])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputed_blocks_find_their_weights(world, zero, recompute):
    config = tiny("dropped", **{"mesh.dp": 2, "data_parallel.zero": zero})
    mine = run_mesh(world, config.replace(**{"memory.recompute": recompute}), 3)
    plain = run_mesh(world, config, 3)
    assert mine.losses == plain.losses
    assert all(torch.equal(mine.weights[name], plain.weights[name]) for name in plain.weights)


class Room(NamedTuple):
    """Bytes of whole parameters and of gradient sums on one rank."""

    between: set[int]  # as seen between two actions
    in_blocks: list[int]  # of parameters, as seen inside each block, forward and recomputed alike
    units: list[int]  # what each block has
    sums: set[int]  # between two actions


def measure(rank: int, config: RunConfig) -> Room:
    mesh = Mesh(MeshShape.of(config.mesh), rank)

    def held() -> int:
        return sum(param.untyped_storage().nbytes() for param in engine.model.params)

    def look() -> None:
        between.add(held())
        sums.add(sum(bucket.sums.nbytes for bucket in engine.buckets.buckets if bucket.sums is not None))

    class Look:
        """Looks after every action."""

        active = True

        def now(self) -> float:
            return 0.0

        def saw(self, *_: object) -> None:
            look()

    between: set[int] = set()
    sums: set[int] = set()
    inside: list[int] = []
    engine = Engine(make_plan(config, None), mesh, watch=Look())
    look()
    layers = [layer for stage in engine.model.stages.values() for layer in stage.layers]
    for layer in layers:
        layer.register_forward_hook(lambda *_: inside.append(held()), prepend=True)
        layer.register_full_backward_hook(lambda *_: inside.append(held()))
    for step in range(2):
        engine.step(batch_of(config, step, mesh.coords.dp, mesh.shape.dp), 1e-3)
    engine.evaluate(batch_of(config, 0, mesh.coords.dp, mesh.shape.dp))
    look()
    return Room(between, inside, [sum(param.nbytes for param in layer.parameters()) for layer in layers], sums)


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_zero_3_holds_one_block_at_a_time(world, schedule):
    config = tiny("llama", **ZERO3, **{"micro_batch_size": 1, "mesh.pp": 2, "pipeline.schedule": schedule})
    for room in world.run(4, measure, config):
        assert room.between == {0}
        assert max(room.in_blocks) == max(room.units)
        assert len(room.in_blocks) > 2 * 4 * len(room.units)  # two steps of four micro-batches, there and back
        assert 0 in room.sums
        if schedule == "1f1b":
            assert room.sums == {0}  # reduced with each backward


def test_zero_2_frees_sums_and_keeps_weights(world):
    config = tiny("llama", **{"mesh.dp": 2, "data_parallel.zero": 2})
    for room in world.run(2, measure, config):
        assert len(room.between) == 1
        assert 0 not in room.between
        assert room.sums == {0}


def test_zero_3_that_reduces_once_keeps_sums_and_frees_weights(world):
    config = tiny("llama", **ONCE)
    for room in world.run(2, measure, config):
        assert room.between == {0}
        assert len(room.sums) == 1
        assert 0 not in room.sums


def count_reductions(rank: int, config: RunConfig) -> list[int]:
    """How often each bucket is reduced in a step."""
    mesh = Mesh(MeshShape.of(config.mesh), rank)
    engine = Engine(make_plan(config, None), mesh)
    counts = [0] * len(engine.buckets.buckets)

    def count(bucket: Bucket) -> None:
        counts[engine.buckets.buckets.index(bucket)] += 1

    for bucket in engine.buckets.buckets:
        bucket.observers.append(count)
    engine.forward_backward(batch_of(config, 0, mesh.coords.dp, mesh.shape.dp))
    return counts


@pytest.mark.parametrize(("how", "times"), [(ZERO3, 2), (ONCE, 1)], ids=["each micro-batch", "the last"])
def test_zero_3_reduces_as_often_as_asked(world, how, times):
    for counts in world.run(2, count_reductions, tiny("llama", **how)):
        assert set(counts) == {times}


def update_ahead(rank: int, config: RunConfig) -> tuple[int, int, int]:
    """How many gathers are under way after a step: of all, and of the first units; and weights that are stale."""
    mesh = Mesh(MeshShape.of(config.mesh), rank)
    engine = Engine(make_plan(config, None), mesh)
    engine.step(batch_of(config, 0, mesh.coords.dp, mesh.shape.dp), 1e-3)
    weights = engine.buckets.weights
    first = [one for unit in engine.gathering.rows[0][: 1 + config.data_parallel.prefetch] for one in unit.weights]
    return len([one for one in weights if one.under_way]), len({*first}), len([one for one in weights if one.stale])


@pytest.mark.parametrize("zero", [1, 3])
def test_only_the_first_weights_are_gathered_before_they_are_needed(world, zero):
    config = tiny("llama", **{"mesh.dp": 2, "data_parallel.zero": zero, "data_parallel.prefetch": 1})
    for under_way, first, stale in world.run(2, update_ahead, config):
        assert under_way == first < stale


def with_a_host(rank: int, config: RunConfig) -> list[tuple[str, str]]:
    """Where shares and masters live, with parameters on a device that is not the host."""
    mesh = Mesh(MeshShape.of(config.mesh), rank, torch.device("meta"))
    layout = Layout((4, 6))
    param = Param(torch.zeros(4, 6, dtype=torch.bfloat16, device="meta"), "weight", layout, True)
    buckets = GradientBuckets([param], mesh, config.data_parallel)
    assert buckets.owned[0].gradient.device.type == "cpu"
    assert param.main_grad is not None
    return [(owned.gradient.device.type, param.main_grad.device.type) for owned in buckets.owned]


def test_offload_keeps_shares_on_the_host(world):
    config = tiny("llama", **{"data_parallel.offload": True, "data_parallel.zero": 1})
    assert world.run(1, with_a_host, config) == [[("cpu", "meta")]]
