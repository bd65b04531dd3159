"""Cutting sequences over ranks, and keeping documents apart, gives what one device gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from harness import bare, check_equal, run_mesh, run_twin
from models import batch_of, tiny

from raytron.parallel.mesh import Mesh
from raytron.plan.mesh import MeshShape
from raytron.plan.plan import make_plan
from raytron.testing.twin import Twin
from raytron.training.engine import Engine

RING, EXCHANGE = {"mesh.cp": 2}, {"mesh.cp": 2, "mesh.cp_all_to_all": 2}
HYBRID = {"mesh.cp": 4, "mesh.cp_all_to_all": 2}
APART = {"data.document_mask": True}
WIDE = {"sequence_length": 16}  # 12 tokens are not enough for two chunks for each of four ranks

CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "ring": ("llama", RING),
    "ring of four": ("llama", {"mesh.cp": 4, **WIDE}),
    "all-to-all": ("llama", EXCHANGE),
    "all-to-all, repeated KV heads": ("llama", {"mesh.cp": 4, "mesh.cp_all_to_all": 4}),
    "hybrid": ("llama", {**HYBRID}),
    "ring, window": ("qwen3", RING),
    "all-to-all, window": ("qwen3", EXCHANGE),
    "hybrid, window": ("qwen3", {**HYBRID}),
    "ring, learned positions": ("gpt2", RING),
    "ring, dropout": ("dropped", RING),
    "all-to-all, dropout": ("dropped", EXCHANGE),
    "hybrid, dropout, tp": ("dropped", {**HYBRID, "mesh.tp": 2, **WIDE}),
    "documents": ("llama", APART),
    "documents, window": ("qwen3", APART),
    "documents, learned positions, dropout": ("dropped", APART),
    "documents, sequence parallel": ("gpt2", {**APART, "mesh.tp": 2, "mesh.dp": 2}),
    "documents, pipeline": ("llama", {**APART, "mesh.pp": 2, "mesh.dp": 2, "data_parallel.zero": 2}),
    "ring, documents": ("llama", {**RING, **APART}),
    "ring of four, documents, window": ("qwen3", {"mesh.cp": 4, **WIDE, **APART}),
    "all-to-all, documents, learned positions": ("gpt2", {**EXCHANGE, **APART}),
    "hybrid, documents, dropout": ("dropped", {**HYBRID, **APART}),
    "ring, tp with sequence parallelism": ("llama", {**RING, "mesh.tp": 2}),
    "ring, tp without": ("gpt2", {**RING, "mesh.tp": 2, "mesh.sequence_parallel": False}),
    "ring, tp, documents": ("qwen3", {**RING, **APART, "mesh.tp": 2}),
    "all-to-all, tp, KV heads repeated twice": ("llama", {**EXCHANGE, "mesh.tp": 2, "model.kv_heads": 1}),
    "ring, pp": ("llama", {**RING, "mesh.pp": 2, "pipeline.schedule": "zb-h1"}),
    "ring, pp, documents, tied": (
        "gpt2",
        {**RING, **APART, "mesh.pp": 2, "pipeline.schedule": "interleaved", "pipeline.virtual_stages": 2},
    ),
    "ring, dp, ZeRO 2": ("llama", {**RING, "mesh.dp": 2, "data_parallel.zero": 2}),
    "ring, dp, tp": ("qwen3", {**RING, **APART, "mesh.dp": 2, "mesh.tp": 2, "micro_batch_size": 1}),
    "ring, pp, dp": ("dropped", {**RING, "mesh.pp": 2, "mesh.dp": 2}),
    "ring, recompute": ("dropped", {**RING, **APART, "memory.recompute": "full"}),
    "hybrid, recompute of attention": ("qwen3", {**HYBRID, "memory.recompute": "selective", "memory.loss_chunks": 2}),
    "ring, DualPipeV": ("llama", {**RING, "mesh.pp": 2, "pipeline.schedule": "dualpipe-v"}),
    "ring, replicas": ("llama", {**RING, "mesh.dp": 2, "mesh.replicate": 2}),
    "ring, ZeRO 3": ("llama", {**RING, "mesh.dp": 2, "data_parallel.zero": 3}),
    "hybrid, ZeRO 3, tied": ("gpt2", {**HYBRID, **APART, "data_parallel.zero": 3, "memory.recompute": "full"}),
    "hybrid, pp": ("llama", {**HYBRID, **APART, "mesh.pp": 2}),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_one_device(world, name):
    model, changes = CASES[name]
    check_equal(world, tiny(model, **changes), steps=20 if name in ("ring", "all-to-all", "documents") else 4)


def evaluate(rank, config):
    mesh = Mesh(MeshShape.of(config.mesh), rank)
    return Engine(make_plan(config, None), mesh).evaluate(batch_of(config, 3, mesh.coords.dp, mesh.shape.dp))


def test_evaluation_counts_each_token_once(world):
    config = tiny("dropped", **{**HYBRID, **APART, "mesh.dp": 2})
    results = world.run(8, evaluate, config)
    batch = batch_of(config, 3)
    with torch.no_grad():
        expected = Twin(config).loss(batch, training=False).item()
    for loss, tokens in results:
        assert tokens == batch.weights.sum()
        assert loss / tokens == pytest.approx(expected, rel=1e-6)


def test_bf16_on_a_ring_stays_near_fp32(world):
    config = tiny("qwen3", **{**HYBRID, **APART, "precision.dtype": "bf16"})
    mine, truth = run_mesh(world, config, 5), run_twin(bare(config), 5)
    assert max(abs(a - b) for a, b in zip(mine.losses, truth.losses, strict=True)) < 0.02
    for name, gradient in truth.gradients.items():
        assert (mine.gradients[name] - gradient).norm() <= 0.1 * gradient.norm(), name


@pytest.mark.parametrize("model", ["llama", "gpt2", "qwen3"])
def test_the_twin_keeps_documents_apart(model):
    """Documents packed in one sequence give the logits that each gives alone."""
    config = tiny(model, **APART)
    twin, batch = Twin(config), batch_of(config)
    tokens, documents = torch.from_numpy(batch.tokens), torch.from_numpy(np.asarray(batch.documents))
    with torch.no_grad():
        packed = twin.logits(tokens, documents=documents)
        for row, numbers in enumerate(documents):
            for number in numbers.unique():
                at = numbers == number
                assert (twin.logits(tokens[row, at][None])[0] - packed[row, at]).abs().max() < 1e-5
