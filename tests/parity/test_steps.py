"""The trainer's step: a batch that grows, norms by layer, the gradient noise scale; and resuming with every optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import bare, pieces, whole
from models import batch_of, tiny

from raytron.config import RunConfig
from raytron.data.batch import Batch
from raytron.errors import CheckpointError
from raytron.optim.lr import learning_rate
from raytron.parallel.mesh import Mesh
from raytron.plan.mesh import MeshShape
from raytron.plan.plan import make_plan
from raytron.testing.twin import Twin
from raytron.training.trainer import Trainer


class Sequences:
    """The tests' random tokens by sample id, in batches of any size."""

    def __init__(self, config: RunConfig):
        self.config = config.replace(global_batch_size=1, **{"batch_ramp.start": None, "batch_ramp.samples": 0})
        self.sequence_length, self.samples_per_epoch = config.sequence_length, 1 << 40

    def batch(self, first: int, count: int, part: int = 0, parts: int = 1) -> Batch:
        share = range(first + part * count // parts, first + (part + 1) * count // parts)
        columns = zip(*(batch_of(self.config, number) for number in share), strict=True)
        return Batch(*(None if parts[0] is None else np.concatenate(parts) for parts in columns))


def trainer_of(rank: int, config: RunConfig) -> Trainer:
    return Trainer(make_plan(config, None), Mesh(MeshShape.of(config.mesh), rank), Sequences(config))


def records(rank: int, config: RunConfig, steps: int) -> tuple[list[dict[str, Any]], int]:
    trainer = trainer_of(rank, config)
    return [trainer.train_step() for _ in range(steps)], trainer.consumed


RAMP = {"global_batch_size": 12, "micro_batch_size": 1, "batch_ramp.start": 4, "batch_ramp.increment": 4,
        "batch_ramp.samples": 16}  # fmt: skip
SIZES = [4, 4, 8, 12, 12, 12]


@pytest.mark.parametrize(
    "mesh",
    [
        {},
        {"mesh.dp": 2, "mesh.pp": 2},
        {"mesh.tp": 2, "mesh.dp": 2},
        {"mesh.dp": 3},  # 4, 8 and 12 micro-batches
        {"mesh.dp": 3, "data_parallel.zero": 3},
    ],
    ids=str,
)
def test_a_growing_batch_is_the_twins(world, mesh):
    config = tiny("dropped", **RAMP, **mesh)
    (mine, consumed), *_ = world.run(MeshShape.of(config.mesh).world, records, config, len(SIZES))
    assert [record["sequences"] for record in mine] == SIZES
    assert consumed == sum(SIZES)
    stream, starts = Sequences(config), np.cumsum([0, *SIZES[:-1]]).tolist()
    truth = Twin(bare(config)).train(stream.batch(start, size) for start, size in zip(starts, SIZES, strict=True))
    assert [record["loss"] for record in mine] == pytest.approx(truth, rel=1e-5)
    assert [record["lr"] for record in mine] == [learning_rate(config.lr, 20, step) for step in range(len(SIZES))]


def test_norms_by_layer(world):
    config = tiny("gpt2", **{"mesh.tp": 2, "mesh.pp": 2, "mesh.dp": 2, "observe.layer_norms": 2})
    (mine, _), *_ = world.run(8, records, config, 2)
    assert not [key for key in mine[0] if key.startswith("grad_norm/")]
    twin = Twin(bare(config))
    twin.train([batch_of(config)])
    _, gradients = twin.gradients(batch_of(config, 1))
    squares: dict[str, float] = {}
    for name, gradient in gradients.items():
        words = name.split(".")
        layer = ".".join(words[:2]) if words[0] == "layers" else words[0]
        squares[layer] = squares.get(layer, 0.0) + gradient.square().sum().item()
    for layer, square in squares.items():
        assert mine[1][f"grad_norm/{layer}"] == pytest.approx(square**0.5, rel=1e-4), layer
    assert mine[1]["grad_norm"] == pytest.approx(sum(squares.values()) ** 0.5, rel=1e-4)
    assert len([key for key in mine[1] if key.startswith("grad_norm/")]) == len(squares)


@pytest.mark.parametrize(
    "mesh",
    [
        {"mesh.dp": 2},
        {"mesh.dp": 2, "mesh.tp": 2, "mesh.pp": 2, "data_parallel.zero": 0},
        {"mesh.dp": 2, "data_parallel.zero": 3, "data_parallel.reduce": "last_microbatch"},
        {"mesh.dp": 3},  # 4, 2 and 2 sequences
    ],
    ids=str,
)
def test_gradient_noise(world, mesh):
    """From the gradients of shares of the batch and of all; parameters that are summed over tp are not counted."""
    config = tiny("llama", **{"observe.gradient_noise": True}, **mesh)
    everything_counts = lambda batch: batch._replace(weights=np.ones_like(batch.weights))  # noqa: E731
    results = world.run(MeshShape.of(config.mesh).world, noises, config)
    assert all(result == results[0] for result in results)
    twin = Twin(bare(config))
    counted = [name for name in twin.weights if config.mesh.tp == 1 or not name.endswith("norm.weight")]

    def square(*parts: int) -> float:
        _, gradients = twin.gradients(everything_counts(batch_of(config, 0, *parts)))
        return sum(gradients[name].square().sum().item() for name in counted)

    ranks, sizes = config.mesh.dp, {2: (4, 4), 3: (4, 2, 2)}[config.mesh.dp]
    small, big = sum(square(part, ranks) for part in range(ranks)) / ranks, square(0, 1)
    trace = (small - big) / (sum(1 / size for size in sizes) / ranks - 1 / 8)
    signal = big - trace / 8
    assert results[0] == pytest.approx((trace, signal, trace / signal), rel=1e-4)


def noises(rank: int, config: RunConfig) -> tuple[float, float, float]:
    trainer = trainer_of(rank, config)
    batch = batch_of(config, 0, trainer.mesh.coords.dp, trainer.mesh.shape.dp)
    result = trainer.engine.step(batch._replace(weights=np.ones_like(batch.weights)), 1e-3)
    assert result.noise is not None
    return tuple(result.noise)


# ---- checkpoints

KINDS: dict[str, dict[str, Any]] = {
    "muon": {"optimizer.name": "muon"},
    "lion": {"optimizer.name": "lion", "precision.moments": "bf16", "precision.stochastic_rounding": True},
    "sgd in fp16": {"optimizer.name": "sgd", "precision.dtype": "fp16", "precision.loss_scale": 128.0},
}
PREFIXES = {"muon": {"model", "muon", "adam"}, "lion": {"model", "lion"}, "sgd in fp16": {"model", "sgd"}}


def save(rank: int, config: RunConfig, folder: Path) -> tuple[list[Any], str, dict[str, Any], list[float]]:
    trainer = trainer_of(rank, config)
    for _ in range(3):
        trainer.train_step()
    state, path = pieces(trainer.state()), trainer.save(folder)
    return state, str(path), trainer.facts(), [trainer.train_step()["loss"] for _ in range(2)]


def load(rank: int, config: RunConfig, path: str) -> tuple[list[Any], dict[str, Any], list[float]]:
    trainer = trainer_of(rank, config)
    trainer.load(path)
    return pieces(trainer.state()), trainer.facts(), [trainer.train_step()["loss"] for _ in range(2)]


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_optimizer_goes_on_on_other_meshes(world, tmp_path, kind):
    first = tiny("llama", **KINDS[kind], **{"mesh.tp": 2, "mesh.dp": 2})
    results = world.run(4, save, first, tmp_path)
    state, path, facts, losses = whole([result[0] for result in results]), *results[0][1:]
    assert facts["updates"] == 3
    for mesh in (
        {"mesh.tp": 2, "mesh.dp": 2},
        {},
        {"mesh.pp": 2, "mesh.dp": 2, "data_parallel.zero": 2},
        {"mesh.tp": 4},
    ):
        config = tiny("llama", **KINDS[kind], **mesh)
        results = world.run(MeshShape.of(config.mesh).world, load, config, path)
        mine = whole([result[0] for result in results])
        assert mine.keys() == state.keys()
        assert all(torch.equal(mine[name], state[name]) for name in state)
        assert {key: results[0][1][key] for key in ("updates", "loss_scale", "skipped_steps")} == {
            key: facts[key] for key in ("updates", "loss_scale", "skipped_steps")
        }
        exact = config.mesh == first.mesh
        assert results[0][2] == (
            losses if exact else pytest.approx(losses, rel=2e-3 if "16" in str(KINDS[kind]) else 1e-5)
        )


def refuse(rank: int, config: RunConfig, path: str) -> str:
    trainer = trainer_of(rank, config)
    with pytest.raises(CheckpointError) as caught:
        trainer.load(path)
    return str(caught.value)


def test_state_of_another_kind_is_refused(world, tmp_path):
    """Another optimizer is told by its name; a parameter that was frozen, by what there is not of it."""
    frozen = tiny("llama", **{"optimizer.groups": [{"match": "norm.*", "freeze": True}]})
    (_, path, _, _), *_ = world.run(1, save, frozen, tmp_path)
    (message,) = world.run(1, refuse, tiny("llama", **{"optimizer.name": "lion"}), path)
    assert "the state of adamw" in message
    assert "go on with lion" in message
    (message,) = world.run(1, refuse, tiny("llama"), path)
    assert "adam.m.norm.weight" in message
    assert "adam.m.head.weight" not in message
