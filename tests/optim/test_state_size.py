"""The bytes of state that a plan tells are those that an optimizer holds. torch's AdamW also counts steps."""

import pytest
import torch

from raytron.config import from_mapping
from raytron.optim.adamw import FusedAdamW
from raytron.optim.sharded import WEIGHTS
from raytron.parallel.mesh import Mesh
from raytron.plan.mesh import MeshShape
from raytron.plan.plan import make_plan
from raytron.training.engine import Engine

BASE = {"model": {"layers": 2, "hidden": 16, "heads": 2, "kv_heads": 1, "ffn": 24, "vocab": 31, "qk_norm": True},
        "sequence_length": 6, "global_batch_size": 4, "data": {"dataset": "random"}}  # fmt: skip
EXPERTS = {"model.experts.count": 4, "model.experts.shared_ffn": 8, "model.experts.shared_gate": True}


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("moments", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["adamw", "muon", "lion", "sgd"])
def test_a_plan_counts_what_is_held(name, moments, dtype):
    check_state({"optimizer.name": name, "precision.moments": moments, "precision.dtype": dtype})


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_with_experts_too(name):
    check_state({"optimizer.name": name, "precision.dtype": "bf16", **EXPERTS})


def check_state(changes):
    dtype = changes["precision.dtype"]
    plan = make_plan(from_mapping(BASE).replace(**changes), None)
    engine = Engine(plan, Mesh(MeshShape(), 0))
    held = [part.tensor for key, part in engine.optimizer.state().items() if not key.startswith(WEIGHTS)]
    held += [
        torch.zeros(1) for each in engine.optimizer.optimizers if isinstance(each, FusedAdamW) for _ in each.shares
    ]
    if dtype != "fp32":
        held += [share.master for share in engine.optimizer.shares]
    assert sum(tensor.numel() * tensor.element_size() for tensor in held) == plan.memory.ranks[0].optimizer
