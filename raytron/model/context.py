"""What a forward pass needs to know beside its activations."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from raytron.parallel.random import dropout_mask
from raytron.parallel.recompute import EVERYTHING, Keep


class Context(NamedTuple):
    """Of one micro-batch on one rank."""

    samples: Tensor  # (B,) int64 sample ids: dropout is keyed by them
    rotary: tuple[Tensor, Tensor] | None  # cosines and sines of the whole sequence
    positions: Tensor  # (s,) int64: the positions of this rank's share of the sequence
    training: bool  # whether dropout applies
    keep: Keep = EVERYTHING  # how the block of the moment keeps what its backward needs

    def dropout(self, x: Tensor, probability: float, key: int) -> Tensor:
        """x (s,B,D) times this rank's share of the mask of `key`, in training."""
        if probability == 0 or not self.training:
            return x
        width, dtype = x.shape[-1], x.dtype
        return x * self.keep.constant(
            "dropout", lambda: dropout_mask(width, probability, key, self.samples, self.positions).to(dtype)
        )


def local_positions(length: int, parts: int, part: int, device: torch.device) -> Tensor:
    """(s,) the positions of share `part` of a sequence of `length` tokens cut in `parts`."""
    share = length // parts
    return torch.arange(part * share, (part + 1) * share, device=device)
