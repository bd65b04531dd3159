"""Rectangles that must tile a tensor: each element covered once, no more and no less.

Boxes that stay inside a shape, do not overlap, and whose volumes sum up to the shape's volume cover it exactly. Overlap
is found by a sweep along the dimension with the most cuts, so that n slices of a tensor cut one way cost n log n.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


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
    pair = _overlap(boxes)
    if pair:
        return f"{pair[0]} and {pair[1]} overlap"
    covered, volume = sum(box.volume for box in boxes), math.prod(shape)
    if covered != volume:
        return f"{volume - covered} of {volume} elements of the shape {tuple(shape)} are covered by nobody"
    return None


def _overlap(boxes: Sequence[Box]) -> tuple[Box, Box] | None:
    """Two boxes that share an element, or None."""
    if len(boxes) < 2:
        return None
    if not boxes[0].offsets:
        return boxes[0], boxes[1]
    dim = max(range(len(boxes[0].offsets)), key=lambda d: len({box.offsets[d] for box in boxes}))
    active: list[Box] = []
    for box in sorted(boxes, key=lambda box: (box.offsets[dim], box.offsets, [-size for size in box.sizes])):
        active = [other for other in active if other.offsets[dim] + other.sizes[dim] > box.offsets[dim]]
        for other in active:
            if box.meets(other):
                return other, box
        active.append(box)
    return None
