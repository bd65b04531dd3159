"""Rectangles that must tile a tensor: each element covered once, no more and no less.

Count each box's corners with alternating signs, and those inside cancel out where boxes meet without gap or overlap:

    +───-+───-      +────────-
    │   ││   │  →   │        │     What remains is the mixed derivative of how often each point is covered, so boxes tile a
    -───+-───+      -────────+     shape exactly if the corners of the shape itself remain, and no others.

That costs n · 2^d for n boxes with d dimensions cut, whoever made them up. Only where it fails, the reason is searched for,
and not for long.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

MOST_CUTS = 8  # dimensions of one tensor that are cut
PATIENCE = 1_000_000  # pairs of boxes that are compared to name two that overlap


class Box(NamedTuple):
    """A rectangle in a tensor's global coordinates."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def volume(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.sizes)

    def inside(self, shape: Sequence[int]) -> bool:
        """Whether the box has as many dimensions as `shape` and lies within it."""
        if not len(self.offsets) == len(self.sizes) == len(shape):
            return False
        return all(
            offset >= 0 and size >= 0 and offset + size <= whole
            for offset, size, whole in zip(self.offsets, self.sizes, shape, strict=True)
        )

    def meets(self, other: Box) -> bool:
        """Whether the two boxes, of equally many dimensions, share an element."""
        return all(
            a < b + other_size and b < a + size
            for a, size, b, other_size in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        )

    def __str__(self) -> str:
        if len(self.offsets) != len(self.sizes):
            return f"of sizes {self.sizes} at offsets {self.offsets}"
        ranges = (f"{offset}:{offset + size}" for offset, size in zip(self.offsets, self.sizes, strict=True))
        return f"[{', '.join(ranges)}]"


def coverage_problem(shape: Sequence[int], boxes: Sequence[Box]) -> str | None:
    """Why `boxes` (none of them empty) do not cover `shape` exactly; None where they do."""
    for box in boxes:
        if not box.inside(shape):
            return f"{box} lies outside the shape {tuple(shape)}"
    covered, volume = sum(box.volume for box in boxes), math.prod(shape)
    cut = [dim for dim, size in enumerate(shape) if any(box.sizes[dim] != size for box in boxes)]
    if len(cut) > MOST_CUTS:
        return f"{len(cut)} dimensions are cut, and {MOST_CUTS} at most can be"
    if covered == volume and (
        not boxes or _corners(boxes, cut) == _corners([Box((0,) * len(shape), tuple(shape))], cut)
    ):
        return None
    pair = _overlap(boxes)
    if pair:
        return f"{pair[0]} and {pair[1]} overlap"
    if covered >= volume:
        return f"{len(boxes)} boxes overlap somewhere in the shape {tuple(shape)}"
    return f"{volume - covered} of {volume} elements of the shape {tuple(shape)} are covered by nobody"


def _corners(boxes: Sequence[Box], dims: Sequence[int]) -> Counter[tuple[int, ...]]:
    """How often each point is a corner of boxes, by its sign; those that cancel out are left out."""
    signs = [math.prod(signs) for signs in itertools.product((1, -1), repeat=len(dims))]
    count: Counter[tuple[int, ...]] = Counter()
    for box in boxes:
        ends = [(box.offsets[dim], box.offsets[dim] + box.sizes[dim]) for dim in dims]
        for corner, sign in zip(itertools.product(*ends), signs, strict=True):
            count[corner] += sign
    return Counter({corner: number for corner, number in count.items() if number})


def _overlap(boxes: Sequence[Box]) -> tuple[Box, Box] | None:
    """Two boxes that share an element; None where there are none, or they are not found soon."""
    if len(boxes) < 2:
        return None
    if not boxes[0].offsets:
        return boxes[0], boxes[1]
    dim = max(range(len(boxes[0].offsets)), key=lambda d: len({box.offsets[d] for box in boxes}))
    active: list[Box] = []
    compared = 0
    for box in sorted(boxes, key=lambda box: (box.offsets[dim], box.offsets, [-size for size in box.sizes])):
        active = [other for other in active if other.offsets[dim] + other.sizes[dim] > box.offsets[dim]]
        compared += len(active)
        if compared > PATIENCE:
            return None
        for other in active:
            if box.meets(other):
                return other, box
        active.append(box)
    return None
