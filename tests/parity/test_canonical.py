"""`determinism: canonical`: the same bits on 1, 2, 3 and 4 data-parallel ranks, however they share out state."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from harness import check_equal, run_mesh
from models import tiny
from test_experts import DEEPSEEK, MIXTRAL

from raytron.config import RunConfig

STEPS = 4
CANONICAL = {
    "determinism": "canonical",
    "cluster.threads_per_worker": 1,
    "global_batch_size": 12,
    "micro_batch_size": 1,
}
RANKS: list[dict[str, Any]] = [
    {"mesh.dp": 1},
    {"mesh.dp": 2, "data_parallel.zero": 0},
    {"mesh.dp": 2, "data_parallel.zero": 2},
    {"mesh.dp": 3, "data_parallel.zero": 1},
    {"mesh.dp": 4, "data_parallel.zero": 3},
    {"mesh.dp": 4, "data_parallel.zero": 3, "mesh.replicate": 2},
    {"mesh.dp": 4, "data_parallel.offload": True},
]
OTHERS = {
    "llama": tiny("llama", **CANONICAL),
    "gpt2, tied": tiny("gpt2", **CANONICAL),
    "dropped in bf16": tiny("dropped", **CANONICAL, **{"precision.dtype": "bf16"}),
    "qwen3, tp": tiny("qwen3", **CANONICAL, **{"mesh.tp": 2}),
    "qwen3, ring, documents": tiny("qwen3", **CANONICAL, **{"mesh.cp": 2, "data.document_mask": True}),
    "gpt2, zb-h1, tied over stages": tiny("gpt2", **CANONICAL, **{"mesh.pp": 2, "pipeline.schedule": "zb-h1"}),
    "experts": tiny(MIXTRAL, **CANONICAL),
    "experts, tp": tiny(DEEPSEEK, **CANONICAL, **{"mesh.tp": 2}),
    "gpt2, interleaved": tiny(
        "gpt2", **CANONICAL, **{"mesh.pp": 2, "pipeline.schedule": "interleaved", "pipeline.virtual_stages": 2}
    ),
}


@cache
def alone(world, config: RunConfig):
    return run_mesh(world, config, STEPS)


@pytest.mark.parametrize("ranks", RANKS[1:], ids=str)
@pytest.mark.parametrize("model", ["llama", "gpt2, tied"])
def test_every_sharing_gives_the_same_bits(world, model, ranks):
    check_same_bits(world, OTHERS[model], ranks)


@pytest.mark.parametrize("ranks", [RANKS[2], RANKS[3]], ids=str)
@pytest.mark.parametrize("model", list(OTHERS)[2:])
def test_every_model_and_schedule_gives_the_same_bits(world, model, ranks):
    check_same_bits(world, OTHERS[model], ranks)


def check_same_bits(world, config: RunConfig, ranks: dict[str, Any]) -> None:
    one, many = alone(world, config), run_mesh(world, config.replace(**ranks), STEPS)
    assert many.losses == one.losses
    assert many.grad_norm == one.grad_norm
    for name, weight in one.weights.items():
        assert (many.weights[name] == weight).all(), name


def test_without_it_they_differ(world):
    """Else the tests above would show nothing."""
    config = OTHERS["llama"].replace(determinism="mesh")
    one, many = alone(world, config), run_mesh(world, config.replace(**RANKS[3]), STEPS)
    assert any((many.weights[name] != weight).any() for name, weight in one.weights.items())


def test_it_is_still_the_same_model(world):
    check_equal(world, tiny("gpt2", **CANONICAL, **{"mesh.dp": 2, "data_parallel.zero": 2}))
