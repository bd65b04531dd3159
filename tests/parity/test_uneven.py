"""Micro-batches that data-parallel ranks cannot share equally: the twin's step, and canonically the same bits."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import bare, check_equal, pieces, run_mesh, whole
from models import batch_of, tiny
from test_experts import DEEPSEEK, MIXTRAL
from test_steps import Sequences

from raytron.config import RunConfig
from raytron.data.batch import Batch
from raytron.parallel.mesh import Mesh
from raytron.plan.elastic import best_plan
from raytron.plan.mesh import MeshShape
from raytron.plan.plan import make_plan
from raytron.testing.twin import Twin
from raytron.training.engine import Engine
from raytron.training.microbatch import filled_up, micro_batches
from raytron.training.trainer import Trainer

FIVE = {"mesh.dp": 3, "global_batch_size": 5, "micro_batch_size": 1}
SEVEN = {"mesh.dp": 3, "global_batch_size": 14, "micro_batch_size": 2}
MESHES: dict[str, tuple[Any, dict[str, Any]]] = {
    "4 on 3": ("llama", {**FIVE, "global_batch_size": 4}),
    "zero 0": ("gpt2", {**FIVE, "data_parallel.zero": 0}),
    "zero 2": ("gpt2", {**FIVE, "data_parallel.zero": 2}),
    "zero 3": ("llama", {**SEVEN, "data_parallel.zero": 3}),
    "zero 3, recompute": ("dropped", {**FIVE, "data_parallel.zero": 3, "memory.recompute": "full"}),
    "replicas, zero 3": ("llama", {**FIVE, "mesh.dp": 4, "mesh.replicate": 2, "data_parallel.zero": 3}),
    "replicas alone, zero 3": ("llama", {**FIVE, "mesh.replicate": 3, "data_parallel.zero": 3}),
    "pipeline": ("dropped", {**SEVEN, "mesh.pp": 2}),
    "pipeline, zero 3": ("llama", {**FIVE, "mesh.pp": 2, "data_parallel.zero": 3}),
    "interleaved, zero 2": (
        "llama", {**FIVE, "mesh.pp": 2, "pipeline.schedule": "interleaved", "data_parallel.zero": 2},
    ),
    "zb-v, tied": ("gpt2", {**FIVE, "mesh.pp": 2, "pipeline.schedule": "zb-v"}),
    "tensor parallel": ("qwen3", {**FIVE, "mesh.tp": 2, "data_parallel.zero": 2}),
    "ring, documents": ("llama", {**FIVE, "mesh.cp": 2, "data.document_mask": True}),
    "experts": (MIXTRAL, FIVE),
    "experts over dp": (DEEPSEEK, {**FIVE, "mesh.ep": 3, "model.experts.count": 12}),
    "experts over dp, gathered": (DEEPSEEK, {**FIVE, "mesh.dp": 2, "mesh.ep": 2, "mesh.expert_dispatch": "all_gather"}),
    "experts over dp, zero 3": (
        DEEPSEEK, {**FIVE, "mesh.dp": 4, "mesh.ep": 2, "data_parallel.zero": 3, "memory.recompute": "full"},
    ),
    "experts over tp": (DEEPSEEK, {**FIVE, "mesh.tp": 2, "mesh.ep": 2}),
}  # fmt: skip


@pytest.mark.parametrize("case", list(MESHES))
def test_a_mesh_is_the_twin(world, case):
    model, changes = MESHES[case]
    config = tiny(model, **changes)
    assert config.deal().most > config.deal().fewest
    check_equal(world, config, steps=4)


EIGHT = {"elastic.min_workers": 1, "global_batch_size": 10, "micro_batch_size": 1}
WORLDS = {
    "dense": tiny("qwen3", **EIGHT, **{"mesh.pp": 2, "mesh.dp": 2, "mesh.tp": 2, "data_parallel.zero": 2}),
    "experts": tiny(DEEPSEEK, **EIGHT, **{"mesh.dp": 4, "mesh.tp": 2, "mesh.ep": 4, "data_parallel.zero": 3}),
}
MANY = [pytest.param(workers, marks=pytest.mark.slow) for workers in (8, 7, 6, 5)]


@pytest.mark.parametrize("workers", [*MANY, 4, 3, 2, 1])
@pytest.mark.parametrize("case", list(WORLDS))
def test_every_smaller_world_goes_on_as_the_twin(world, case, workers):
    """From 8 workers down to 1: on the mesh that is best for so many."""
    config = best_plan(WORLDS[case], workers).plan.config
    assert config.global_batch_size == 10
    check_equal(world, config, steps=2)


CANONICAL = {"determinism": "canonical", "cluster.threads_per_worker": 1, "global_batch_size": 5, "micro_batch_size": 1}
SHARINGS: list[dict[str, Any]] = [
    {"mesh.dp": 2, "data_parallel.zero": 0},
    {"mesh.dp": 3, "data_parallel.zero": 2},
    {"mesh.dp": 4, "data_parallel.zero": 3},
    {"mesh.dp": 5, "data_parallel.zero": 1},
]
BITWISE = {
    "llama": tiny("llama", **CANONICAL),
    "dropped, zb-h1, tied over stages": tiny("dropped", **CANONICAL, **{"mesh.pp": 2, "pipeline.schedule": "zb-h1"}),
    "experts": tiny(DEEPSEEK, **CANONICAL),
}


@cache
def alone(world, config: RunConfig):
    return run_mesh(world, config, 3)


@pytest.mark.parametrize("sharing", SHARINGS, ids=str)
@pytest.mark.parametrize("case", list(BITWISE))
def test_canonical_sums_are_the_same_bits(world, case, sharing):
    if case != "llama" and sharing["mesh.dp"] not in (3, 4):
        pytest.skip("one model with every number of ranks is enough")
    one, many = alone(world, BITWISE[case]), run_mesh(world, BITWISE[case].replace(**sharing), 3)
    assert many.losses == one.losses
    assert many.grad_norm == one.grad_norm
    for name, weight in one.weights.items():
        assert (many.weights[name] == weight).all(), name


class Told:
    """A stream that notes which samples were read."""

    def __init__(self, stream: Sequences):
        self.stream, self.ids = stream, list[int]()
        self.sequence_length, self.samples_per_epoch = stream.sequence_length, stream.samples_per_epoch

    def batch(self, first: int, count: int, part: int = 0, parts: int = 1) -> Batch:
        batch = self.stream.batch(first, count, part, parts)
        self.ids += batch.ids.tolist()
        return batch


def one_step(rank: int, config: RunConfig, folder: Path, path: str | None) -> tuple[str, float, list[int], list[Any]]:
    """Goes on from a checkpoint for a step: the next checkpoint, the loss, the samples of this rank, the weights."""
    stream = Told(Sequences(config))
    trainer = Trainer(make_plan(config, None), Mesh(MeshShape.of(config.mesh), rank), stream)
    if path is not None:
        trainer.load(path)
    loss = trainer.train_step()["loss"]
    return str(trainer.save(folder)), loss, stream.ids, pieces(trainer.state())


def test_a_run_that_shrinks_to_one_and_grows_back_is_the_undisturbed_one(world, tmp_path):
    """The weights to the bit, each loss, and each sample once."""
    config = tiny("dropped", **CANONICAL, **{"data_parallel.zero": 2})
    worlds, path, losses, read = (5, 4, 3, 2, 1, 2, 4), None, [], []
    for number, workers in enumerate(worlds):
        results = world.run(workers, one_step, config.replace(**{"mesh.dp": workers}), tmp_path / f"{number}", path)
        path, loss, _, _ = results[0]
        losses.append(loss)
        read += [each for result in results for each in result[2]]
    undisturbed = run_mesh(world, config, len(worlds))
    mine = whole([result[3] for result in results])
    assert losses == undisturbed.losses
    assert read == list(range(5 * len(worlds)))
    for name, weight in undisturbed.weights.items():
        assert (mine[name] == weight).all(), name


def evaluated(rank: int, config: RunConfig) -> tuple[float, int]:
    mesh = Mesh(MeshShape.of(config.mesh), rank)
    return Engine(make_plan(config, None), mesh).evaluate(batch_of(config, 0, mesh.coords.dp, mesh.shape.dp))


@pytest.mark.parametrize("zero", [1, 3])
def test_an_evaluation_is_the_twins(world, zero):
    config = tiny("llama", **FIVE, **{"mesh.pp": 2, "data_parallel.zero": zero})
    batch = batch_of(config)
    loss = Twin(bare(config)).gradients(batch)[0]
    for found, tokens in world.run(6, evaluated, config):
        assert tokens == int(batch.weights.sum())
        assert found / tokens == pytest.approx(loss, rel=1e-5)


def test_an_empty_micro_batch_counts_nothing():
    batch = batch_of(tiny("llama", **{"global_batch_size": 4}))
    own = [*micro_batches(batch, 2, torch.arange(12).numpy(), torch.device("cpu"))]
    filled = filled_up(own, 3)
    assert [each.empty for each in filled] == [False, False, True]
    assert not filled[2].weights.any()
    assert filled[1].weights.any()
    with pytest.raises(ValueError, match="2 micro-batches cannot be run as 1"):
        filled_up(own, 1)
