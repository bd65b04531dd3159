"""Every way to share out state over data-parallel ranks gives what one device gives, and keeps what it should free."""

from __future__ import annotations

import pytest
from harness import check_equal
from models import tiny

ZERO3 = {"mesh.dp": 2, "data_parallel.zero": 3}
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
