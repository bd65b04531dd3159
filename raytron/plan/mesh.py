"""The shape of a mesh: arithmetic between ranks and coordinates, on the driver, without a device.

Ranks are numbered with tp innermost and pp outermost, so that the ranks that talk most stand next to each other:

    rank = ((pp · DP + dp) · CP + cp) · TP + tp

Two axes are made of two each, the outer first: dp = replicate · shard, cp = ring · all_to_all. Experts fold the ranks of one
pp plane anew, on a grid of their own, so that a dense layer and its experts need not be cut alike:

    dense     pp · replicate · shard · ring · all_to_all · tp
    expert    pp · replicate · eshard · ep · etp                  edp = replicate · eshard

A group over some axes holds the ranks that differ in those axes only, ascending.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from raytron.config import MeshConfig

Axis = Literal[
    "pp", "dp", "cp", "tp", "replicate", "shard", "ring", "all_to_all", "edp", "eshard", "ep", "etp"
]  # fmt: skip
AXES: tuple[Axis, ...] = ("pp", "dp", "cp", "tp")  # outermost first
PARTS: dict[Axis, tuple[Axis, Axis]] = {
    "dp": ("replicate", "shard"), "cp": ("ring", "all_to_all"), "edp": ("replicate", "eshard"),
}  # fmt: skip
DENSE_GRID: tuple[Axis, ...] = ("pp", "replicate", "shard", "ring", "all_to_all", "tp")
EXPERT_GRID: tuple[Axis, ...] = ("pp", "replicate", "eshard", "ep", "etp")


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
    """Sizes of the axes; each is at least 1.

    replicate: of dp, all_to_all (`cp_all_to_all`): of cp. Raises ValueError for an empty axis and for sizes that do not
    divide: replicate dp, all-to-all cp, and replicate · ep · etp the dp · cp · tp ranks of a plane.
    """

    pp: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    etp: int = 1
    replicate: int = 1
    cp_all_to_all: int = 1

    def __post_init__(self) -> None:
        if min(*self.sizes, self.ep, self.etp, self.replicate, self.cp_all_to_all) < 1:
            raise ValueError(f"every axis of a mesh needs at least one rank, not {self}")
        if self.dp % self.replicate or self.cp % self.cp_all_to_all:
            raise ValueError(f"{self.replicate} must divide dp and {self.cp_all_to_all} cp in {self}")
        if self.dp * self.cp * self.tp % (self.replicate * self.ep * self.etp):
            raise ValueError(
                f"the experts' axes do not fold the {self.dp * self.cp * self.tp} ranks of a plane of {self}"
            )

    @classmethod
    def of(cls, config: MeshConfig) -> MeshShape:
        return cls(**{item.name: getattr(config, item.name) for item in dataclasses.fields(cls)})

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return (self.pp, self.dp, self.cp, self.tp)

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.pp * self.dp * self.cp * self.tp

    def size(self, *axes: Axis) -> int:
        """Number of ranks in a group over `axes`."""
        sizes = self._grid_sizes
        return math.prod(sizes[part] for axis in axes for part in PARTS.get(axis, (axis,)))

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
        """The ranks of the group over `axes` that holds `rank`, ascending.

        Raises ValueError for a rank outside the mesh, and for axes that no one of the two grids has.
        """
        self.coords(rank)
        parts = {part for axis in axes for part in PARTS.get(axis, (axis,))}
        grid = next((grid for grid in (DENSE_GRID, EXPERT_GRID) if parts <= set(grid)), None)
        if grid is None:
            raise ValueError(f"{', '.join(axes)} are axes of no one grid: {DENSE_GRID} or {EXPERT_GRID}")
        stride, offsets, first = 1, [0], rank
        for axis in reversed(grid):
            size = self._grid_sizes[axis]
            if axis in parts:
                first -= rank // stride % size * stride
                offsets = [step * stride + offset for step in range(size) for offset in offsets]
            stride *= size
        return tuple(first + offset for offset in offsets)

    def index(self, rank: int, *axes: Axis) -> int:
        """Where a rank stands in its group over `axes`."""
        return self.group(rank, *axes).index(rank)

    @property
    def _grid_sizes(self) -> dict[Axis, int]:
        """The size of every axis that is not made of others."""
        plane = self.dp * self.cp * self.tp
        return {
            "pp": self.pp, "replicate": self.replicate, "shard": self.dp // self.replicate,
            "ring": self.cp // self.cp_all_to_all, "all_to_all": self.cp_all_to_all, "tp": self.tp,
            "eshard": plane // (self.replicate * self.ep * self.etp), "ep": self.ep, "etp": self.etp,
        }  # fmt: skip

    def groups(self, *axes: Axis) -> list[tuple[int, ...]]:
        """All groups over `axes`, by their first rank; together they hold each rank once."""
        return sorted({self.group(rank, *axes) for rank in range(self.world)})

    def __str__(self) -> str:
        experts = f"·EP{self.ep}" if self.ep > 1 else ""
        return "PP{}·DP{}·CP{}·TP{}".format(*self.sizes) + experts + (f"·ETP{self.etp}" if self.etp > 1 else "")
