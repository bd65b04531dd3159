"""Greedy continuation of a prompt by one device, straight from a checkpoint.

The whole sequence is run again for each new token: a look at what a model has learned, not an inference engine.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch

from raytron.checkpoint.catalog import Generation, find
from raytron.checkpoint.checkpointer import facts as read_facts
from raytron.checkpoint.storage import scheme_of
from raytron.checkpoint.whole import read_whole
from raytron.config import RunConfig, from_mapping
from raytron.data.tokenizer import Tokenizer
from raytron.errors import CheckpointError
from raytron.model.assemble import assemble
from raytron.model.stage import Stage
from raytron.optim.sharded import WEIGHTS
from raytron.parallel.mesh import Mesh
from raytron.plan.mesh import MeshShape
from raytron.plan.plan import make_plan
from raytron.training.alone import alone


def generate(checkpoint: Path | str, prompt: str, tokens: int = 32) -> str:
    """The most likely `tokens` tokens after `prompt`, as text.

    checkpoint: a generation, a folder of them, or a run directory (its newest). Raises CheckpointError.
    """
    generation = find(checkpoint)
    eod = str(read_facts(generation)["config"]["data"]["tokenizer"]["eod"])
    tokenizer = Tokenizer(_tokenizer_of(generation), eod)
    model = load_model(generation)
    ids = tokenizer.encode(prompt) or [tokenizer.eod]
    made = greedy(model, ids, tokens, model.model.max_positions if model.position is not None else None)
    return tokenizer.decode(made)


def load_model(generation: Generation) -> Stage:
    """The whole model of a checkpoint as one stage on the CPU, in float32."""
    facts = read_facts(generation)
    assembly = assemble(make_plan(plain(from_mapping(facts["config"])), None), Mesh(MeshShape(), 0))
    weights = read_whole(generation, prefix=WEIGHTS)
    with torch.no_grad():
        for param in assembly.params:
            param.copy_(weights[param.full_name])
        for name, part in assembly.balance.state().items():
            part.tensor.copy_(weights[name])
    return assembly.stages[0]


def plain(config: RunConfig) -> RunConfig:
    """The same model on one device, without anything that says how a run's work is cut, rounded or updated."""
    default = RunConfig()
    return dataclasses.replace(
        alone(config), precision=default.precision, optimizer=default.optimizer, determinism=default.determinism
    )


@torch.no_grad()
def greedy(model: Stage, ids: list[int], count: int, limit: int | None = None) -> list[int]:
    """`count` further ids, each the likeliest after all before it; `limit`: positions that the model knows."""
    ids = list(ids)
    start = len(ids)
    for _ in range(count):
        seen = ids if limit is None else ids[-limit:]
        tokens = torch.tensor([seen])
        context = model.context(torch.zeros(1, dtype=torch.int64), len(seen), training=False)
        logits = model.logits(model(model.embed(tokens, context), context)[-1:])
        ids.append(int(np.argmax(logits[0, 0, : model.model.vocab].numpy())))
    return ids[start:]


def _tokenizer_of(generation: Generation) -> Path:
    """The tokenizer of the run that a generation belongs to: beside it, in a folder above it, or in the run's own."""
    near: list[Path] = []
    if scheme_of(generation.path) is None:
        near = [generation.path, *list(generation.path.resolve().parents)[:3]]
    for folder in (*near, Path(read_facts(generation)["config"]["run_dir"])):
        if (folder / "tokenizer.json").is_file():
            return folder / "tokenizer.json"
    raise CheckpointError(f"no tokenizer.json in {generation.path}, above it, or in the directory of its run")
