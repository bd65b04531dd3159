"""Mixtures of experts give the same on every mesh as a plain loop over experts on one device.

Each kind of model takes 20 steps on one device and over ep; on the other meshes 8 show the same in less time.
"""

from __future__ import annotations

from typing import Any

import pytest
from harness import check_equal, run_mesh
from models import LLAMA as LLAMA_4
from models import tiny

from raytron.config import RunConfig

LLAMA = {**LLAMA_4, "layers": 2}
MIXTRAL = {**LLAMA, "experts": {"count": 4, "top_k": 2, "ffn": 24}}
QWEN_MOE = {
    **LLAMA, "qkv_bias": True, "tied_embeddings": True,
    "experts": {
        "count": 8, "top_k": 3, "ffn": 12, "shared_ffn": 20, "shared_gate": True, "normalize": False, "every": 2,
        "aux_loss": 0.02, "z_loss": 0.001,
    },
}  # fmt: skip
DEEPSEEK = {
    **LLAMA,
    "experts": {
        "count": 8, "top_k": 2, "ffn": 16, "shared_ffn": 16, "first_dense": 1, "score": "sigmoid", "scale": 2.5,
        "groups": 4, "group_top_k": 2, "bias_rate": 0.01, "aux_loss": 0.001,
    },
}  # fmt: skip
SWITCH = {
    **LLAMA, "activation": "relu", "dropout": 0.1,
    "experts": {
        "count": 4, "top_k": 1, "normalize": False, "capacity_factor": 1.0, "drop": "position", "aux_loss": 0.05,
    },
}  # fmt: skip
CROWDED = {
    **LLAMA,
    "experts": {"count": 8, "top_k": 2, "ffn": 24, "capacity_factor": 1.1, "groups": 2, "group_top_k": 1},
}  # fmt: skip
MODELS = {"mixtral": MIXTRAL, "qwen": QWEN_MOE, "deepseek": DEEPSEEK, "switch": SWITCH, "crowded": CROWDED}

PLAIN = {"mesh.sequence_parallel": False}
GATHER = {"mesh.expert_dispatch": "all_gather"}
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in MODELS),
    *((name, {"mesh.dp": 2, "mesh.ep": 2}) for name in MODELS),
    ("mixtral", {"mesh.dp": 2}),
    ("mixtral", {"mesh.dp": 2, "mesh.ep": 2, **GATHER}),
    ("mixtral", {"mesh.tp": 2, "mesh.ep": 2, **PLAIN}),
    ("mixtral", {"mesh.tp": 4, "mesh.ep": 4, **GATHER}),
    ("mixtral", {"mesh.dp": 2, "mesh.tp": 2, "mesh.etp": 2, "data_parallel.zero": 0}),
    ("mixtral", {"mesh.dp": 2, "mesh.tp": 2, "mesh.ep": 2, "mesh.etp": 2, "data_parallel.zero": 2}),
    ("mixtral", {"mesh.dp": 2, "mesh.tp": 2, "mesh.ep": 2, "mesh.etp": 2, **GATHER, **PLAIN}),
    ("qwen", {"mesh.tp": 2, "mesh.etp": 2}),
    ("qwen", {"mesh.tp": 2, **PLAIN, "micro_batch_size": 1}),
    ("qwen", {"mesh.dp": 4, "mesh.ep": 4, "data_parallel.zero": 2, "micro_batch_size": 1}),
    ("qwen", {"mesh.pp": 2, "mesh.dp": 2, "mesh.ep": 2, "pipeline.schedule": "zb-h1", "data_parallel.zero": 2}),
    ("deepseek", {"mesh.tp": 2, "mesh.ep": 2}),
    ("deepseek", {"mesh.tp": 2, "mesh.dp": 2, "mesh.ep": 2, **GATHER, "data_parallel.zero": 2}),
    ("deepseek", {"mesh.pp": 4, "pipeline.schedule": "zb-h1", "model.layers": 4}),
    (
        "deepseek",
        {"mesh.pp": 2, "mesh.dp": 2, "mesh.tp": 2, "mesh.ep": 4, "pipeline.schedule": "interleaved",
         "pipeline.virtual_stages": 2, "data_parallel.zero": 2, "model.layers": 4},
    ),
    ("deepseek", {"mesh.dp": 4, "mesh.tp": 2, "mesh.ep": 2, "mesh.etp": 2, "data_parallel.zero": 1}),
    ("qwen", {"mesh.cp": 2, "mesh.ep": 2}),
    ("crowded", {"mesh.cp": 2, "mesh.tp": 2, "mesh.ep": 4}),
    ("switch", {"mesh.cp": 2, "mesh.cp_all_to_all": 2, "mesh.tp": 2, "mesh.ep": 2, "mesh.etp": 2, **PLAIN}),
    ("switch", {"mesh.tp": 2, "mesh.pp": 2, "pipeline.schedule": "zb-h1"}),
    ("switch", {"mesh.tp": 2, "mesh.dp": 2, "mesh.ep": 4, **PLAIN}),
    ("crowded", {"mesh.tp": 2, "mesh.dp": 2, "mesh.ep": 4, **GATHER}),
    ("crowded", {"mesh.tp": 4, "mesh.ep": 2, "mesh.etp": 2}),
    ("crowded", {"mesh.tp": 2, "mesh.dp": 4, "mesh.ep": 8, "data_parallel.zero": 2}),
]  # fmt: skip


def name_of(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "-".join(f"{key.split('.')[-1]}{value[key]}" for key in value) or "one"


@pytest.mark.parametrize(("model", "mesh"), CASES, ids=name_of)
def test_every_mesh_equals_a_loop_over_experts(world, model, mesh):
    check_equal(world, tiny(MODELS[model], **mesh), steps=20 if len(mesh) <= 2 else 8)


def test_the_same_mesh_twice_is_equal_to_the_bit(world):
    config: RunConfig = tiny(DEEPSEEK, **{"mesh.tp": 2, "mesh.dp": 2, "mesh.ep": 4})
    first, second = run_mesh(world, config, 3), run_mesh(world, config, 3)
    assert first.losses == second.losses
    assert all((first.weights[name] == second.weights[name]).all() for name in first.weights)
