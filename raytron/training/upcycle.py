"""Sparse upcycling: a dense checkpoint becomes step 0 of a mixture of experts (Komatsuzaki et al., arXiv 2212.05055).

Each expert of a layer starts as a copy of the layer's dense feed-forward weights; the router is new, from the run's seed.
All else is copied as it is, and the optimizer starts anew. Where a token's weights sum to 1 (`normalize`, no `scale`) and no
expert is full, the model then computes what the dense one did; training takes the experts apart, since the router sends
them different tokens.

    dense   layers.3.mlp.up.weight (2,F,D)      →   layers.3.mlp.experts.up.weight (E,2,F,D), E equal copies
                                                     layers.3.mlp.router.weight (E,D), new
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from raytron.checkpoint.catalog import committed, find
from raytron.checkpoint.checkpointer import facts as read_facts
from raytron.checkpoint.checkpointer import save
from raytron.checkpoint.whole import read_whole
from raytron.config import ExpertsConfig, ModelConfig, RunConfig, from_mapping, to_mapping
from raytron.errors import ConfigError, Problem
from raytron.optim.sharded import WEIGHTS
from raytron.parallel.mesh import Mesh
from raytron.plan.mesh import MeshShape
from raytron.plan.plan import make_plan
from raytron.rules import problems
from raytron.training.alone import alone
from raytron.training.engine import Engine
from raytron.training.run_directory import RunDirectory


def upcycle(checkpoint: Path | str, config: RunConfig) -> Path:
    """Writes step 0 of the run `config`, made from a dense checkpoint, into its run directory; returns its path.

    checkpoint: a generation, a folder of them, or a run directory (its newest). The run then starts there, on any mesh. All
    is done in the host memory of this process. Raises ConfigError where the run's model is not the dense one with experts
    put in, or its directory has checkpoints already; CheckpointError where the checkpoint can't be read.
    """
    generation = find(checkpoint)
    dense = from_mapping(read_facts(generation)["config"]).model
    directory = RunDirectory.of(config).checkpoints
    found = [*problems(config), *_mismatches(dense, config.model)]
    if committed(directory):
        found.append(Problem("run_dir", f"{config.run_dir} has checkpoints already", "name a directory without"))
    if found:
        raise ConfigError(found)
    engine = Engine(make_plan(alone(config), None), Mesh(MeshShape(), 0))
    state = engine.state()
    names = [name.removeprefix(WEIGHTS) for name in state if name.startswith(WEIGHTS)]
    made = upcycled(read_whole(generation, prefix=WEIGHTS), names)
    with torch.no_grad():
        for name, weight in made.items():
            state[WEIGHTS + name].tensor.copy_(weight)
    facts = {"step": 0, "consumed": 0, "updates": 0, "seed": config.seed, "data": "", "mesh": str(MeshShape())}
    facts |= {"config": to_mapping(config), "upcycled": str(generation.path)}
    return save(directory, 0, state, facts)


def upcycled(weights: Mapping[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """Those of the named weights of a mixture that come from a dense model's `weights`; routers do not."""
    out = {}
    for name in names:
        source = name.replace(".mlp.experts.", ".mlp.")
        if source != name:  # (E, ...), each a copy
            out[name] = weights[source].unsqueeze(0)
        elif ".mlp.router." not in name:
            out[name] = weights[source]
    return out


def _mismatches(dense: ModelConfig, mixture: ModelConfig) -> Iterator[Problem]:
    """Why one model can't be made from the other."""
    if mixture.experts.count == 0:
        yield Problem("model.experts.count", "the run's model has no experts to make", "use 2 or more")
        return
    if dense.experts.count:
        yield Problem("checkpoint", "its model has experts already", "upcycle a dense one")
        return
    old, new = to_mapping(dense), to_mapping(dataclasses.replace(mixture, experts=ExpertsConfig()))
    for key in old:
        if old[key] != new[key]:
            yield Problem(f"model.{key}", f"{new[key]!r} here, {old[key]!r} in the dense model", f"use {old[key]!r}")
    if mixture.expert_ffn != dense.ffn:
        what = f"experts of width {mixture.expert_ffn} can't be copies of a layer of width {dense.ffn}"
        yield Problem("model.experts.ffn", what, "use null")
    if mixture.experts.shared_ffn:
        what = "a shared expert would add to what the copies give"
        yield Problem("model.experts.shared_ffn", what, "use 0")
