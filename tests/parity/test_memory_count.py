"""What the plan counts is what ranks hold: weights, gradients and optimizer state to the byte, on every rank; activations
within a hundredth and a receive buffer, between any two actions."""

from __future__ import annotations

import pytest
from models import LLAMA, batch_of, tiny

from raytron.parallel.mesh import Mesh
from raytron.plan.activations import Sizes
from raytron.plan.memory import state
from raytron.plan.mesh import MeshShape
from raytron.plan.parameters import rank_parameters
from raytron.plan.plan import make_plan
from raytron.training.engine import Engine
from raytron.training.measure import Meter, state_of

OFFLOAD = {"memory.offload_activations": True, "memory.offload_min_mb": 0.0}
ZB = {"mesh.pp": 2, "pipeline.schedule": "zb-h1"}


MIXTURE = {
    **LLAMA, "layers": 2,
    "experts": {"count": 4, "top_k": 2, "ffn": 24, "first_dense": 1, "shared_ffn": 16, "shared_gate": True,
                "aux_loss": 0.01, "z_loss": 0.001},
}  # fmt: skip


def owner_of(mesh, config):
    """This rank's index among those that share out dense parameters, and experts."""
    experts = mesh.experts.shard.index if config.model.experts.count else 0
    return mesh.dense.shard.index, experts


def hold(rank, config):
    """On one rank: parameters built and listed, state held and counted."""
    mesh = Mesh(MeshShape.of(config.mesh), rank)
    plan = make_plan(config, None)
    engine = Engine(plan, mesh)
    engine.step(batch_of(config, 0, mesh.coords.dp, mesh.shape.dp), 1e-3)
    listed = rank_parameters(config, plan.stages, plan.schedule.stages_of(mesh.coords.pp))
    built = [(p.full_name, p.cut.shape, tuple(map(tuple, p.cut.cuts)), p.cut.expert) for p in engine.model.params]
    return built, [tuple(p) for p in listed], state_of(engine), state(config, listed, "cpu", *owner_of(mesh, config))


STATES = {
    "one rank": tiny("qwen3"),
    "bf16, dp that divides no dimension": tiny(
        "gpt2", **{"mesh.dp": 3, "global_batch_size": 6, "micro_batch_size": 1, "precision.dtype": "bf16"}
    ),
    "tied copies, padded vocabulary": tiny("gpt2", **{"mesh.tp": 2, "mesh.pp": 2, "data_parallel.zero": 0}),
    "repeated KV heads": tiny("qwen3", **{"mesh.tp": 4}),
    "zero 2, muon, bf16 moments": tiny(
        "llama",
        **{"mesh.dp": 2, "data_parallel.zero": 2, "optimizer.name": "muon", "precision.moments": "bf16"},
    ),
    "zero 3": tiny("llama", **{"mesh.dp": 2, "data_parallel.zero": 3, "precision.dtype": "bf16", "mesh.pp": 2}),
    "zero 3, reduced once": tiny(
        "qwen3",
        **{"mesh.dp": 2, "mesh.tp": 2, "data_parallel.zero": 3, "data_parallel.reduce": "last_microbatch"},
    ),
    "replicas, lion": tiny("gpt2", **{"mesh.dp": 4, "mesh.replicate": 2, "optimizer.name": "lion"}),
    "experts": tiny(MIXTURE, **{"mesh.dp": 2, "mesh.tp": 2, "mesh.ep": 2}),
    "expert width, bf16": tiny(MIXTURE, **{"mesh.dp": 2, "mesh.tp": 2, "mesh.etp": 2, "precision.dtype": "bf16"}),
    "offload, frozen": tiny(
        "gpt2",
        **{"mesh.cp": 2, "data_parallel.offload": True},
        **{"optimizer.groups": [{"match": "embed.*", "freeze": True}]},
    ),
}


@pytest.mark.parametrize("config", list(STATES.values()), ids=list(STATES))
def test_state_is_counted_to_the_byte(world, config):
    for built, listed, held, counted in world.run(MeshShape.of(config.mesh).world, hold, config):
        assert built == listed
        assert held == counted


def keep(rank, config):
    """On one rank: what is kept at most between actions, and what the plan says of it."""
    mesh, meter = Mesh(MeshShape.of(config.mesh), rank), Meter()
    plan = make_plan(config, None)
    engine = Engine(plan, mesh, watch=meter)
    batch = batch_of(config, 0, mesh.coords.dp, mesh.shape.dp)
    engine.forward_backward(batch)
    counted = plan.memory.ranks[mesh.coords.pp]
    return meter.measure(engine, batch).largest, counted.activations + counted.loss + counted.host


KEPT = {
    "llama": tiny("llama"),
    "gpt2, tp without sp": tiny("gpt2", **{"mesh.tp": 2, "mesh.sequence_parallel": False}),
    "qwen3, sp": tiny("qwen3", **{"mesh.tp": 2, "micro_batch_size": 1}),
    "dropped": tiny("dropped", **{"mesh.tp": 2}),
    "qwen3, bf16": tiny("qwen3", **{"precision.dtype": "bf16"}),
    "gpt2, bf16, selective": tiny("gpt2", **{"precision.dtype": "bf16", "memory.recompute": "selective"}),
    "ring": tiny("dropped", **{"mesh.cp": 2}),
    "all-to-all": tiny("qwen3", **{"mesh.cp": 2, "mesh.cp_all_to_all": 2}),
    "1f1b": tiny("llama", **{"mesh.pp": 2}),
    "zero bubble": tiny("gpt2", **{"mesh.pp": 4, "pipeline.schedule": "zb-h1"}),
    "zero bubble, chunks": tiny("llama", **ZB, **{"memory.loss_chunks": 3}),
    "zero bubble, full": tiny("llama", **ZB, **{"memory.recompute": "full"}),
    "V, bf16": tiny("qwen3", **{"mesh.pp": 2, "pipeline.schedule": "zb-v", "precision.dtype": "bf16"}),
    "V, full": tiny("gpt2", **{"mesh.pp": 2, "pipeline.schedule": "dualpipe-v", "memory.recompute": "full"}),
    "interleaved, selective": tiny(
        "dropped",
        **{"mesh.pp": 2, "pipeline.schedule": "interleaved", "pipeline.virtual_stages": 2},
        **{"memory.recompute": "selective"},
    ),
    "full": tiny("qwen3", **{"memory.recompute": "full", "mesh.pp": 2}),
    "every second, some stages": tiny(
        "gpt2",
        **{"memory.recompute": "full", "memory.recompute_every": 2, "memory.recompute_stages": [0], "mesh.pp": 2},
    ),
    "some parts": tiny("dropped", **{"memory.recompute": "selective", "memory.recompute_parts": ["norm", "dropout"]}),
    "offload": tiny("llama", **OFFLOAD, **{"mesh.pp": 2}),
    "offload, bf16, full": tiny("qwen3", **OFFLOAD, **{"precision.dtype": "bf16", "memory.recompute": "full"}),
    "experts": tiny(MIXTURE, **{"mesh.tp": 2}),
    "experts, zero bubble, selective": tiny(MIXTURE, **ZB, **{"memory.recompute": "selective"}),
    "chunks": tiny("gpt2", **{"memory.loss_chunks": 4, "mesh.tp": 2}),
}


@pytest.mark.parametrize("config", list(KEPT.values()), ids=list(KEPT))
def test_activations_are_counted(world, config):
    for kept, counted in world.run(MeshShape.of(config.mesh).world, keep, config):
        buffers = 2 * Sizes.of(config).residual if config.mesh.pp > 1 else 0  # of receives that none awaits any more
        assert -0.01 * kept <= counted - kept <= 0.01 * kept + buffers


def test_experts_that_are_loaded_unevenly_are_near(world):
    config = tiny(MIXTURE, **{"mesh.dp": 2, "mesh.ep": 2, "memory.recompute": "full"}, micro_batch_size=4)
    for kept, counted in world.run(2, keep, config):
        assert counted == pytest.approx(kept, rel=0.05)


@pytest.mark.parametrize("activation", ["relu", "relu2", "reglu", "geglu", "silu"])
def test_activations_of_every_activation(world, activation):
    for recompute in ("none", "selective"):
        config = tiny("llama", **{"model.activation": activation, "memory.recompute": recompute})
        ((kept, counted),) = world.run(1, keep, config)
        assert counted == pytest.approx(kept, rel=0.01), recompute
