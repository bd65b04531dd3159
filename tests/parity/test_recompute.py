"""Less memory changes no result: recomputation, offload and a chunked loss give what a plain run gives.

The same function of the same input gives the same bits, so most are equal to the bit. Two are not: an RMS norm on a CPU is
made of several operations, whose gradients meet the residual's in another order when they come as one; and sums over
chunks are taken in another order.
"""

from __future__ import annotations

import functools

import pytest
import torch
from harness import check_equal, run_mesh
from models import LLAMA, tiny

FULL = {"memory.recompute": "full"}
EVERY_SECOND = {**FULL, "memory.recompute_every": 2}
SELECTIVE = {"memory.recompute": "selective"}
OFFLOAD = {"memory.offload_activations": True, "memory.offload_min_mb": 0.0}
CHUNKS = {"memory.loss_chunks": 3}
ALL_OF_IT = {**SELECTIVE, **OFFLOAD, **CHUNKS, "memory.recompute_stages": [1], "memory.recompute_parts": ["norm"]}

MESHES = {
    "one": {},
    "tp": {"mesh.tp": 2, "mesh.sequence_parallel": False},
    "sp": {"mesh.tp": 2},
    "pp-zb": {"mesh.pp": 2, "pipeline.schedule": "zb-h1"},
    "zero2": {"mesh.dp": 2, "data_parallel.zero": 2, "pipeline.schedule": "zb-h1", "mesh.pp": 2},
    "zero3": {"mesh.dp": 2, "data_parallel.zero": 3},
    "cp": {"mesh.cp": 4, "mesh.cp_all_to_all": 2},
}


@functools.cache
def plain(world, model, mesh):
    return run_mesh(world, tiny(model, **MESHES[mesh]), 3)


def furthest(mine, truth):
    """The largest ‖Δ‖/‖g‖ of a gradient tensor."""
    return max((mine[name] - truth[name]).norm().item() / truth[name].norm().item() for name in truth)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("memory", [FULL, SELECTIVE, {**EVERY_SECOND, **OFFLOAD}], ids=["full", "selective", "second"])
@pytest.mark.parametrize("model", ["dropped", "gpt2"])
def test_equal_to_the_bit(world, model, memory, mesh):
    mine, truth = run_mesh(world, tiny(model, **MESHES[mesh], **memory), 3), plain(world, model, mesh)
    assert mine.losses == truth.losses
    assert all(torch.equal(mine.gradients[name], truth.gradients[name]) for name in truth.gradients)
    assert all(torch.equal(mine.weights[name], truth.weights[name]) for name in truth.weights)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("memory", [SELECTIVE, CHUNKS, {**FULL, **OFFLOAD, **CHUNKS}], ids=["norm", "chunks", "all"])
def test_equal_but_for_the_order_of_sums(world, memory, mesh):
    mine, truth = run_mesh(world, tiny("qwen3", **MESHES[mesh], **memory), 3), plain(world, "qwen3", mesh)
    assert mine.losses == pytest.approx(truth.losses, rel=1e-6)
    assert furthest(mine.gradients, truth.gradients) < 1e-6


TWINS = {
    "full, interleaved": tiny(
        "llama", **FULL, **{"mesh.pp": 2, "pipeline.schedule": "interleaved", "pipeline.virtual_stages": 2}
    ),
    "selective, repeated KV heads": tiny("qwen3", **SELECTIVE, **{"mesh.tp": 4}),
    "chunks of an uneven sequence, tied": tiny("gpt2", **{"memory.loss_chunks": 5, "mesh.tp": 2, "mesh.dp": 2}),
    "one stage of two": tiny("dropped", **ALL_OF_IT, **{"mesh.pp": 2, "mesh.tp": 2, "pipeline.schedule": "zb-h1"}),
}


@pytest.mark.parametrize("config", list(TWINS.values()), ids=list(TWINS))
def test_equal_to_one_device(world, config):
    check_equal(world, config, 10)


@pytest.mark.parametrize("memory", [FULL, {**SELECTIVE, **OFFLOAD}], ids=["full", "selective"])
def test_experts(world, memory):
    """Tokens go to the same experts when a block runs again, and are counted once."""
    experts = {"count": 4, "top_k": 2, "ffn": 24, "aux_loss": 0.01, "bias_rate": 0.01, "capacity_factor": 1.2}
    model = {**LLAMA, "layers": 2, "norm": "layernorm", "experts": experts}
    mesh = {"mesh.dp": 2, "mesh.ep": 2, "pipeline.schedule": "zb-h1"}
    mine, truth = run_mesh(world, tiny(model, **mesh, **memory), 3), run_mesh(world, tiny(model, **mesh), 3)
    assert mine.losses == pytest.approx(truth.losses, rel=1e-6)
    assert furthest(mine.gradients, truth.gradients) < 1e-6


def test_bf16_is_equal_to_the_bit(world):
    bf16 = {"precision.dtype": "bf16", "mesh.tp": 2}
    mine = run_mesh(world, tiny("gpt2", **bf16, **SELECTIVE, **OFFLOAD), 3)
    assert mine.losses == run_mesh(world, tiny("gpt2", **bf16), 3).losses
