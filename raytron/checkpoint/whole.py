"""A model's full tensors in one process, from a checkpoint of any mesh: to generate text, to export, to compare."""

from __future__ import annotations

from pathlib import Path

import torch

from raytron.checkpoint.catalog import Generation, open_generation
from raytron.checkpoint.checkpointer import load_alone
from raytron.checkpoint.planner import DTYPE_OF_NAME
from raytron.errors import CheckpointError
from raytron.parallel.layout import Slice


def read_whole(generation: Generation | Path | str, prefix: str = "model.") -> dict[str, torch.Tensor]:
    """Verified full tensors whose names begin with `prefix`, under their names without it, in host memory.

    Raises CheckpointError where a file that holds part of them does not verify, or no name begins with `prefix`.
    """
    if not isinstance(generation, Generation):
        generation = open_generation(generation)
    stored = {name: tensor for name, tensor in generation.records.tensors.items() if name.startswith(prefix)}
    if not stored:
        raise CheckpointError(f"{generation.path}: holds no tensor whose name begins with {prefix!r}")
    slices = {
        name: Slice(
            tensor.shape, (0,) * len(tensor.shape), torch.empty(tensor.shape, dtype=DTYPE_OF_NAME[tensor.dtype])
        )
        for name, tensor in stored.items()
    }
    load_alone(generation, slices, partial=True)
    return {name.removeprefix(prefix): piece.tensor for name, piece in slices.items()}
