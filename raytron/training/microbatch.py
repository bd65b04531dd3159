"""Cuts a dp rank's share of a step into micro-batches, and each sequence into what this cp rank holds of it.

Where ranks talk to each other within a micro-batch and one has fewer than another, it adds *empty* ones: the tokens of its
last, none of which counts in the loss nor in anything else. It would have waited as long for the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raytron.data.batch import Batch
from raytron.model.context import Documents


class MicroBatch(NamedTuple):
    """B sequences of `length` tokens, of each of which this rank holds s = length / cp. Tensors are on the device."""

    samples: Tensor  # (B,) int64
    tokens: Tensor  # (B,s) int64
    labels: Tensor  # (B,s) int64
    weights: Tensor  # (B,s) float32
    length: int
    documents: Documents | None  # None: not kept apart
    empty: bool = False  # only keeps step with other ranks


def micro_batches(batch: Batch, size: int, held: NDArray[np.int64], device: torch.device) -> Iterator[MicroBatch]:
    """Micro-batches of `size` sequences each; held (s,): the positions of a sequence that this rank holds."""
    length = batch.tokens.shape[1]
    parts: list[NDArray[Any]] = [batch.tokens, batch.labels, batch.weights]
    if batch.documents is not None:
        parts.append(batch.documents.positions())
    if len(held) < length:
        parts = [part[:, held] for part in parts]
    tensors = [torch.from_numpy(part).to(device, non_blocking=True) for part in (batch.ids, *parts)]
    for number, pieces in enumerate(zip(*(torch.split(tensor, size) for tensor in tensors), strict=True)):
        documents = None
        if batch.documents is not None:
            starts = [batch.documents[row].tolist() for row in range(number * size, number * size + len(pieces[0]))]
            documents = Documents(starts, pieces[4])
        samples, tokens, labels, weights = pieces[:4]
        yield MicroBatch(samples, tokens, labels, weights, length, documents)


def filled_up(batches: list[MicroBatch], count: int) -> list[MicroBatch]:
    """`count` micro-batches, those that are missing empty. Raises ValueError for more than `count`, and for none."""
    if not 0 < len(batches) <= count:
        raise ValueError(f"a share of {len(batches)} micro-batches cannot be run as {count}")
    last = batches[-1]
    empty = last._replace(weights=torch.zeros_like(last.weights), empty=True)
    return batches + [empty] * (count - len(batches))
