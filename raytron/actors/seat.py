"""A seat: the place of one worker, in a bundle of a placement group."""

from __future__ import annotations

from typing import Any, NamedTuple

from ray.util.placement_group import placement_group_table


class Seat(NamedTuple):
    """Seats are numbered in the order of ranks; several may share a bundle."""

    number: int
    group: Any
    bundle: int

    @property
    def home(self) -> str:
        """The id of the node where it stands now."""
        return homes(self.group).get(self.bundle, "")


def homes(group: Any) -> dict[int, str]:
    """The node id of each bundle of a placement group."""
    table = placement_group_table(group)["bundles_to_node_id"]
    return {int(index): str(node) for index, node in table.items()}
