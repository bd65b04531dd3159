"""Documents packed into samples train the model as each of them alone would."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from making import make_dataset

from raytron.config import RunConfig, from_mapping
from raytron.data.shards import Dataset, open_dataset
from raytron.data.stream import open_stream
from raytron.parallel.mesh import Mesh
from raytron.plan.mesh import MeshShape
from raytron.plan.plan import make_plan
from raytron.testing.twin import Twin
from raytron.testing.world import World
from raytron.training.engine import Engine

LENGTHS = [13, 2, 5, 9, 3, 12, 4, 7, 6, 8, 1, 10, 3, 2]  # none longer than a sample, so that none is cut


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    draw = np.random.default_rng(5)
    documents = [[*draw.integers(1, 67, length - 1).tolist(), 0] for length in LENGTHS]
    return make_dataset(tmp_path_factory.mktemp("packed"), [documents], vocab=67)


def configured(packing: str, samples: int, **changes: Any) -> RunConfig:
    model = {"layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 48, "vocab": 67}
    base = {
        "sequence_length": 12,
        "global_batch_size": samples,
        "model": model,
        "data": {"packing": packing, "dataset": "not-read"},
    }
    return from_mapping(base).replace(**changes)


def each_alone(dataset: Dataset, config: RunConfig) -> tuple[float, int, float]:
    """Σ loss over the labels of every document in a sequence of its own, their number, and the norm of the gradient of the
    mean loss."""
    shard, twin = dataset.read(dataset.entries("train")[0]), Twin(config)
    total, count = torch.zeros(()), 0
    for start, stop in zip(shard.offsets[:-1], shard.offsets[1:], strict=True):
        tokens = torch.from_numpy(shard.tokens[start:stop].astype(np.int64))[None]
        if tokens.shape[1] > 1:
            logits = twin.logits(tokens[:, :-1])
            total = total + F.cross_entropy(logits[0], tokens[0, 1:], reduction="sum")
            count += tokens.shape[1] - 1
    (total / count).backward()  # type: ignore[no-untyped-call]
    gradients = [weight.grad.flatten() for weight in twin.weights.values() if weight.grad is not None]
    return total.item(), count, torch.cat(gradients).double().norm().item()


@pytest.mark.parametrize(("packing", "samples"), [("best_fit", 7), ("pad", 13)])
def test_a_step_over_all_bins_is_that_of_each_document_alone(dataset: Dataset, packing: str, samples: int) -> None:
    config = configured(packing, samples)
    stream = open_stream(config, dataset, "train")
    assert stream.samples_per_epoch == samples
    result = Engine(make_plan(config, None), Mesh(MeshShape(), 0)).step(stream.batch(0, samples), 0.0)
    loss, tokens, norm = each_alone(dataset, config)
    assert result.tokens == tokens == sum(LENGTHS) - len(LENGTHS)
    assert result.loss == pytest.approx(loss / tokens, rel=1e-6)
    assert result.grad_norm == pytest.approx(norm, rel=1e-5)


def evaluate(rank: int, config: RunConfig, folder: str) -> tuple[float, int]:
    mesh = Mesh(MeshShape.of(config.mesh), rank)
    stream = open_stream(config, open_dataset(folder), "train")
    batch = stream.batch(0, config.global_batch_size, mesh.coords.dp, mesh.shape.dp)
    return Engine(make_plan(config, None), mesh).evaluate(batch)


@pytest.mark.parametrize("mesh", [{"mesh.cp": 2}, {"mesh.tp": 2, "mesh.dp": 2}, {"mesh.pp": 2, "mesh.cp": 2}])
def test_on_a_mesh_too(world: World, dataset: Dataset, mesh: dict[str, int]) -> None:
    config = configured("best_fit", 7, **mesh)
    expected, tokens, _ = each_alone(dataset, config)
    for loss, counted in world.run(MeshShape.of(config.mesh).world, evaluate, config, str(dataset.path)):
        assert counted == tokens
        assert loss == pytest.approx(expected, rel=1e-6)
