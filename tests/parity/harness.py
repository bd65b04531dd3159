"""Runs a configuration on the mesh that it names and gathers what came out, for comparison with the twin."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import numpy as np
import torch
from models import batch_of

from raytron.config import RunConfig
from raytron.optim.lr import learning_rate
from raytron.parallel.mesh import Mesh
from raytron.plan.mesh import MeshShape
from raytron.plan.plan import make_plan
from raytron.testing.twin import Twin
from raytron.testing.world import World
from raytron.training.engine import Engine


class Outcome(NamedTuple):
    gradients: dict[str, torch.Tensor]  # whole, of the first step
    grad_norm: float  # of the first step
    losses: list[float]
    weights: dict[str, torch.Tensor]  # whole, after the last step


def run_rank(rank: int, config: RunConfig, steps: int) -> tuple[list[Any], float, list[float], list[Any]]:
    """On one rank: the first step's owned gradients, then `steps` updates."""
    mesh = Mesh(MeshShape.of(config.mesh), rank)
    engine = Engine(make_plan(config, None), mesh)
    batches = [batch_of(config, step, mesh.coords.dp, mesh.shape.dp) for step in range(steps)]
    real = float(batch_of(config).weights.sum())
    engine.forward_backward(batches[0])
    mend = config.global_batch_size * config.sequence_length / real / engine.loss_scale.value
    gradients = pieces({o.param.full_name: o.slice(o.gradient * mend, mesh) for o in engine.buckets.owned})
    results = [
        engine.step(batch, learning_rate(config.lr, config.lr_horizon, step)) for step, batch in enumerate(batches)
    ]
    weights = {name: part for name, part in engine.optimizer.state().items() if name.startswith("model.")}
    return gradients, results[0].grad_norm, [result.loss for result in results], pieces(weights)


def pieces(slices: dict[str, Any]) -> list[Any]:
    """Slices as plain fp32 arrays, to send home."""
    return [
        (name.removeprefix("model."), part.shape, part.offsets, part.tensor.detach().float().numpy().copy())
        for name, part in slices.items()
    ]


def whole(parts: list[list[Any]]) -> dict[str, torch.Tensor]:
    """Pieces of all ranks as whole tensors; every element must be covered, and replicas must agree to the bit."""
    out: dict[str, np.ndarray] = {}
    for name, shape, offsets, values in (piece for part in parts for piece in part):
        target = out.setdefault(name, np.full(shape, np.nan, dtype=values.dtype))
        place = tuple(slice(at, at + size) for at, size in zip(offsets, values.shape, strict=True))
        known = ~np.isnan(target[place])
        assert np.array_equal(target[place][known], values[known]), f"replicas of {name} differ"
        target[place] = values
    for name, values in out.items():
        assert not np.isnan(values).any(), f"{name} is not covered"
    return {name: torch.from_numpy(values) for name, values in out.items()}


def run_mesh(world: World, config: RunConfig, steps: int) -> Outcome:
    """The configuration on its own mesh; all ranks must report the same losses."""
    results = world.run(MeshShape.of(config.mesh).world, run_rank, config, steps)
    assert all(result[2] == results[0][2] for result in results), "ranks report different losses"
    gradients = whole([result[0] for result in results])
    return Outcome(gradients, results[0][1], results[0][2], whole([result[3] for result in results]))


@functools.lru_cache(maxsize=32)
def run_twin(config: RunConfig, steps: int) -> Outcome:
    """The same on one device; `config` without its mesh, so that meshes share it."""
    twin = Twin(config)
    _, gradients = twin.gradients(batch_of(config))
    trained = [gradient for name, gradient in gradients.items() if not twin.optimizer.frozen(name)]
    norm = torch.cat([gradient.flatten() for gradient in trained]).double().norm().item()
    losses = twin.train(batch_of(config, step) for step in range(steps))
    return Outcome(gradients, norm, losses, {name: weight.detach() for name, weight in twin.weights.items()})


def bare(config: RunConfig) -> RunConfig:
    """Only what defines the model and its training: the twin's key."""
    plain = RunConfig()
    how = {"mesh": plain.mesh, "pipeline": plain.pipeline, "data_parallel": plain.data_parallel, "memory": plain.memory}
    return dataclasses.replace(config, **how, micro_batch_size=1, precision=plain.precision, determinism="mesh")


def check_equal(world: World, config: RunConfig, steps: int = 20) -> None:
    """First loss to 1e-6, each gradient tensor to ‖Δ‖/‖g‖ ≤ 1e-5, the norm, and the losses of all steps to 1e-5. Fails with
    all that is further off, so that one failure shows where it comes from."""
    found = differences(run_mesh(world, config, steps), run_twin(bare(config), steps))
    assert not found, "further off than allowed, relatively:\n" + "\n".join(found)


def differences(mine: Outcome, truth: Outcome) -> list[str]:
    """What is further off than `check_equal` allows, by name, with its relative difference and the limit."""
    assert mine.gradients.keys() == truth.gradients.keys()
    pairs = [(f"gradient of {name}", mine.gradients[name], truth.gradients[name], 1e-5) for name in truth.gradients]
    scalars = [("gradient norm", mine.grad_norm, truth.grad_norm, 1e-5)]
    losses = zip(mine.losses, truth.losses, strict=True)
    scalars += [(f"loss of step {n}", *both, 1e-6 if n == 1 else 1e-5) for n, both in enumerate(losses, 1)]
    pairs += [(name, *(torch.tensor(x, dtype=torch.float64) for x in both), limit) for name, *both, limit in scalars]
    out = []
    for name, ours, theirs, limit in pairs:
        difference, size = (ours.double() - theirs.double()).norm().item(), theirs.double().norm().item()
        if not difference <= limit * size:  # also where either is not a number
            out.append(f"    {name}: {difference / size if size else difference:.2e}, limit {limit:.0e}")
    return out
