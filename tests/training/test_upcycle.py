"""A dense checkpoint becomes a mixture that computes the same, on any mesh."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from raytron.checkpoint.checkpointer import save
from raytron.checkpoint.whole import read_whole
from raytron.config import RunConfig, from_mapping, to_mapping
from raytron.errors import ConfigError
from raytron.parallel.mesh import Mesh
from raytron.plan.mesh import MeshShape
from raytron.plan.plan import make_plan
from raytron.training.engine import Engine
from raytron.training.generate import load_model
from raytron.training.upcycle import upcycle

DENSE = from_mapping(
    {
        "model": {"layers": 3, "hidden": 32, "heads": 4, "ffn": 48, "vocab": 67},
        "sequence_length": 16, "global_batch_size": 2, "data": {"dataset": "not-read"},
    }
)  # fmt: skip


def mixture(folder: Path, **changes: object) -> RunConfig:
    experts = {"model.experts.count": 4, "model.experts.first_dense": 1, "model.experts.bias_rate": 0.001}
    return DENSE.replace(**{"run_dir": str(folder), "seed": 5, "mesh.dp": 2, "mesh.ep": 2, **experts, **changes})


@pytest.fixture
def dense(tmp_path):
    """A checkpoint of a dense model."""
    engine = Engine(make_plan(DENSE, None), Mesh(MeshShape(), 0))
    return save(tmp_path / "dense", 7, engine.state(), {"step": 7, "config": to_mapping(DENSE)})


def logits(path: Path) -> torch.Tensor:
    model = load_model(path)
    tokens = torch.arange(16)[None]
    context = model.context(torch.zeros(1, dtype=torch.int64), 16, training=False)
    return model.logits(model(model.embed(tokens, context), context)).detach()


def test_the_mixture_computes_what_the_dense_model_did(dense, tmp_path):
    made = upcycle(
        dense, mixture(tmp_path / "mixture", **{"observe.gradient_noise": True, "data_parallel.prefetch": 2})
    )
    torch.testing.assert_close(logits(made), logits(dense), rtol=1e-5, atol=1e-5)
    weights, source = read_whole(made), read_whole(dense)
    for expert in range(4):
        assert torch.equal(weights["layers.1.mlp.experts.up.weight"][expert], source["layers.1.mlp.up.weight"])
        assert torch.equal(weights["layers.2.mlp.experts.down.weight"][expert], source["layers.2.mlp.down.weight"])
    assert torch.equal(weights["layers.0.mlp.up.weight"], source["layers.0.mlp.up.weight"])
    assert weights["layers.1.mlp.router.weight"].std() > 0.01
    assert read_whole(made, "adam.m.")["layers.1.mlp.experts.up.weight"].abs().max() == 0


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"model.experts.ffn": 16}, "model.experts.ffn"),
        ({"model.experts.shared_ffn": 16}, "model.experts.shared_ffn"),
        ({"model.layers": 4}, "model.layers"),
        ({"model.experts": {}, "mesh.ep": 1}, "model.experts.count"),
    ],
)
def test_what_is_no_copy_of_the_dense_model_is_refused(dense, tmp_path, changes, where):
    with pytest.raises(ConfigError) as caught:
        upcycle(dense, mixture(tmp_path / "mixture").replace(**changes))
    assert [problem.where for problem in caught.value.problems] == [where]


def test_a_run_that_has_begun_is_left_alone(dense, tmp_path):
    upcycle(dense, mixture(tmp_path / "mixture"))
    with pytest.raises(ConfigError, match="has checkpoints already"):
        upcycle(dense, mixture(tmp_path / "mixture"))
    with pytest.raises(ConfigError, match="experts already"):
        upcycle(tmp_path / "mixture", mixture(tmp_path / "other"))
