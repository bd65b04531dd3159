"""What a forward pass needs to know beside its activations.

A token has two positions: the one in its sequence, by which dropout is keyed, and the one that the model is told, which
begins anew where a document begins. They differ only where documents are kept apart.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from raytron.parallel.context import Seen
from raytron.parallel.random import dropout_mask
from raytron.parallel.recompute import EVERYTHING, Keep


class Documents(NamedTuple):
    """The documents of one micro-batch, that attention keeps apart."""

    starts: list[list[int]]  # of each sample, ascending from 0: where its documents begin in the sequence
    positions: Tensor  # (B, S / cp) int64: of each token that this rank holds, in its document


class Context(NamedTuple):
    """Of one micro-batch on one rank. S / cp tokens of a sequence are on a rank, s of them under sequence parallelism."""

    samples: Tensor  # (B,) int64 sample ids: dropout is keyed by them
    rotary: tuple[Tensor, Tensor] | None  # cosines and sines of the rank's tokens, (S / cp, 1 or B, 1, head_dim / 2)
    positions: Tensor  # (s,) int64: in the sequence
    places: Tensor  # (s,) or (s,B) int64: in the document
    seen: Seen  # what the rank's queries see of the keys that come by
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
