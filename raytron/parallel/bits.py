"""Fingerprints of tensors: integer arithmetic over their bits, exact in any order, and fast everywhere.

A tensor is read as 64-bit words, two fp32 or four bf16 numbers each.

    total         Σ words                                                        mod 2^64
    fingerprint   Σ over blocks of odd(block) · Σ words · odd(place in the block)    mod 2^64

One flipped bit changes either for certain: the difference is a power of two below 2^64 times odd numbers, which is not 0.
What a total misses is the order of words; what a fingerprint misses, once in about 2^64, is several changes that cancel out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raytron.parallel.random import key_of, random_bits

BLOCK = 1 << 17  # words that are weighed at a time


def words(x: Tensor) -> tuple[Tensor, Tensor]:
    """A tensor of any shape as int64: all whole words, and one word of what is left, padded with zeros."""
    flat, per = x.detach().contiguous().view(-1), 8 // x.element_size()
    whole = flat.numel() // per * per
    body = flat[:whole]
    if body.storage_offset() % per:
        body = body.clone()
    rest = flat.new_zeros(per)
    rest[: flat.numel() - whole] = flat[whole:]
    return body.view(torch.int64), rest.view(torch.int64)


def total(x: Tensor) -> Tensor:
    """int64 scalar, on the tensor's device."""
    body, rest = words(x)
    return body.sum() + rest.sum()


def odd_numbers(device: torch.device) -> Tensor:
    """(BLOCK,) int64: well-mixed, the same everywhere."""
    return random_bits(key_of("fingerprint"), torch.arange(BLOCK, device=device)) | 1


def fingerprint(x: Tensor, weights: Tensor) -> Tensor:
    """int64 scalar, on the tensor's device. weights: `odd_numbers`."""
    body, rest = words(x)
    out = torch.zeros((), dtype=torch.int64, device=x.device)
    for number, part in enumerate((rest, *torch.split(body, len(weights)))):
        out += (part * weights[: len(part)]).sum() * (2 * number + 1)
    return out
