"""Random numbers that depend on what they are for, not on who draws them.

A counter-based generator: a number is a hash of (key, index), so that any rank can make any part of a tensor, in any
order, and two meshes that hold the same global element agree on it. The hash is the finaliser of SplitMix64 (Steele, Lea
and Flood, OOPSLA 2014), in wrapping 64-bit integer arithmetic, equal on every device.

    initial values    key = (seed, parameter name)                        index = global element number
    dropout           key = (seed, layer, site), sample id, position      index = channel
    rounding          key = (seed, tensor, update)                        index = global element number
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from raytron.parallel.layout import Layout, Place

_GOLDEN = -7046029254386353131  # 2^64 / golden ratio, as a signed number
_MULTIPLY_1 = -4658895280553007687
_MULTIPLY_2 = -7723592293110705685
_BLOCK = 1 << 20  # elements made at a time


def key_of(*parts: int | str) -> int:
    """A 64-bit key (signed) of some words and numbers; the same on every machine."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def mix(counter: Tensor) -> Tensor:
    """Hashes each element of an int64 tensor to 64 well-mixed bits; consumes its argument."""
    counter ^= _shift(counter, 30)
    counter *= _MULTIPLY_1
    counter ^= _shift(counter, 27)
    counter *= _MULTIPLY_2
    counter ^= _shift(counter, 31)
    return counter


def _shift(x: Tensor, count: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> count).bitwise_and_((1 << (64 - count)) - 1)


def uniform(key: int | Tensor, index: Tensor) -> Tensor:
    """float32 in (0, 1), of which 23 bits are random; key and index broadcast."""
    return to_unit(random_bits(key, index))


def to_unit(bits: Tensor) -> Tensor:
    """64 random bits as float32: (k + ½) / 2²³, so that every value is exact and none is 0 or 1."""
    return _shift(bits, 41).to(torch.float32).add_(0.5).mul_(2.0**-23)


def normal(key: int | Tensor, index: Tensor) -> Tensor:
    """float32 of the standard normal distribution, by inversion."""
    return uniform(key, index).mul_(2).sub_(1).erfinv_().mul_(math.sqrt(2))


@torch.no_grad()
def fill_normal(local: Tensor, layout: Layout, place: Place, key: int, std: float) -> None:
    """Fills a rank's local tensor with its slice of the global normal tensor; padding becomes zero."""
    local.zero_()
    part = layout.slice(local, place)
    rows = max(1, _BLOCK // max(1, part.tensor[:1].numel()))
    for first in range(0, part.tensor.shape[0], rows):
        block = part.tensor[first : first + rows]
        offsets = (part.offsets[0] + first, *part.offsets[1:])
        block.copy_(normal(key, element_numbers(part.shape, offsets, block.shape, local.device)).mul_(std))


def element_numbers(shape: Sequence[int], offsets: Sequence[int], sizes: Sequence[int], device: torch.device) -> Tensor:
    """int64 of `sizes`: the number that each element of a rectangle has in a contiguous global tensor of some shape."""
    strides = torch.empty(tuple(shape), device="meta").stride()
    index = torch.zeros((1,) * len(sizes), dtype=torch.int64, device=device)
    for dim, (size, offset, stride) in enumerate(zip(sizes, offsets, strides, strict=True)):
        steps = torch.arange(offset, offset + size, dtype=torch.int64, device=device) * stride
        index = index + steps.view([-1 if d == dim else 1 for d in range(len(sizes))])
    return index


def random_bits(key: int | Tensor, index: Tensor) -> Tensor:
    """64 random bits as int64; key and index broadcast."""
    return mix(index * _GOLDEN + key)


def keep_mask(probability: float, key: int, rows: Tensor, channels: Tensor) -> Tensor:
    """float32 mask of 0 or 1 / (1 - p), shape rows.shape + channels.shape.

    rows: int64, a hash or number for all but the last dimensions; channels: int64 (C,).
    """
    row_keys = mix(rows * _GOLDEN + key)
    keep = uniform(row_keys.unsqueeze(-1), channels) >= probability
    return keep.to(torch.float32).mul_(1 / (1 - probability))


def dropout_mask(width: int, probability: float, key: int, samples: Tensor, positions: Tensor) -> Tensor:
    """(S, B, width) float32: the factors 0 or 1 / (1 - p) of dropout (Srivastava et al., 2014). A factor depends on key,
    sample id, position and channel only.

    samples: (B,) int64 sample ids; positions: (S,) int64 positions in the whole sequence.
    """
    channels = torch.arange(width, device=samples.device)
    return keep_mask(probability, key, token_rows(samples, positions), channels)


def token_rows(samples: Tensor, positions: Tensor) -> Tensor:
    """(S, B) int64 that tells each token of each sample apart."""
    return mix(samples * _GOLDEN)[None, :] + positions[:, None]
