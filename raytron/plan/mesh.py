"""The shape of a mesh: arithmetic between ranks and coordinates, on the driver, without a device.

Ranks are numbered with tp innermost and pp outermost, so that the ranks that talk most stand next to each other:

    rank = ((pp · DP + dp) · CP + cp) · TP + tp

A group over some axes holds the ranks that differ in those axes only, ascending.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal, NamedTuple

from raytron.config import MeshConfig

Axis = Literal["pp", "dp", "cp", "tp"]
AXES: tuple[Axis, ...] = ("pp", "dp", "cp", "tp")  # outermost first


class Coords(NamedTuple):
    """Where a rank stands on each axis."""

    pp: int
    dp: int
    cp: int
    tp: int

    def __str__(self) -> str:
        return ",".join(f"{axis}={at}" for axis, at in zip(AXES, self, strict=True))


@dataclass(frozen=True)
class MeshShape:
    """Sizes of the axes; each is at least 1. Raises ValueError otherwise."""

    pp: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        if min(self.sizes) < 1 or self.ep < 1:
            raise ValueError(f"every axis of a mesh needs at least one rank, not {self}")

    @classmethod
    def of(cls, config: MeshConfig) -> MeshShape:
        return cls(pp=config.pp, dp=config.dp, cp=config.cp, tp=config.tp, ep=config.ep)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return (self.pp, self.dp, self.cp, self.tp)

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.pp * self.dp * self.cp * self.tp

    def size(self, *axes: Axis) -> int:
        """Number of ranks in a group over `axes`."""
        count = 1
        for axis in axes:
            count *= getattr(self, axis)
        return count

    def coords(self, rank: int) -> Coords:
        """The coordinates of a rank. Raises ValueError for a rank outside the mesh."""
        if not 0 <= rank < self.world:
            raise ValueError(f"rank {rank} is outside a mesh of {self.world} ranks")
        at = []
        for size in reversed(self.sizes):
            rank, here = divmod(rank, size)
            at.append(here)
        return Coords(*reversed(at))

    def rank(self, coords: Coords) -> int:
        """The rank at some coordinates. Raises ValueError for coordinates outside the mesh."""
        rank = 0
        for at, size in zip(coords, self.sizes, strict=True):
            if not 0 <= at < size:
                raise ValueError(f"coordinates {coords} are outside the mesh {self}")
            rank = rank * size + at
        return rank

    def group(self, rank: int, *axes: Axis) -> tuple[int, ...]:
        """The ranks of the group over `axes` that holds `rank`, ascending."""
        here = self.coords(rank)
        ranges = [range(getattr(self, axis)) if axis in axes else (getattr(here, axis),) for axis in AXES]
        return tuple(self.rank(Coords(*at)) for at in itertools.product(*ranges))

    def groups(self, *axes: Axis) -> list[tuple[int, ...]]:
        """All groups over `axes`, by their first rank; together they hold each rank once."""
        return sorted({self.group(rank, *axes) for rank in range(self.world)})

    def __str__(self) -> str:
        return "PP{}·DP{}·CP{}·TP{}".format(*self.sizes)
