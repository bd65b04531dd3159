"""Which workers share a node, and which nodes share a placement group: arithmetic, without Ray.

Ranks fill whole nodes, one bundle for each node. A placement group can't be resized, and removing one kills its actors;
so each is the smallest set of whole nodes that holds whole replicas, and a replica can leave without its neighbours:

    PP1·DP4·TP4 on nodes of 8    node 0: replicas 0, 1 | node 1: replicas 2, 3      two groups
    PP1·DP4·TP3 on nodes of 4    node 0: 0 0 0 1 | node 1: 1 1 2 2 | node 2: …      one group: replicas cross nodes
    PP2·DP4·TP4 on nodes of 8    nodes 0, 2: replicas 0, 1 | nodes 1, 3: replicas 2, 3      two groups
"""

from __future__ import annotations

import ipaddress
import itertools
from collections.abc import Sequence
from typing import NamedTuple

from raytron.config import ClusterConfig
from raytron.plan.cluster import ClusterShape, NodeShape
from raytron.plan.mesh import MeshShape


class Bundle(NamedTuple):
    """The workers of one node, before the node is known: ranks [first, first + workers)."""

    first: int
    workers: int


def fill(world: int, slots: Sequence[int]) -> list[Bundle]:
    """Cuts `world` ranks over nodes with so many slots, the largest first. Raises ValueError where they don't fit."""
    bundles: list[Bundle] = []
    left = world
    for size in sorted(slots, reverse=True):
        if left and size:
            bundles.append(Bundle(world - left, min(left, size)))
            left -= bundles[-1].workers
    if left:
        raise ValueError(f"{world} workers don't fit in {sum(slots)} slots")
    return bundles


def groups(mesh: MeshShape, bundles: Sequence[Bundle]) -> list[list[Bundle]]:
    """The smallest sets of bundles that hold whole replicas, in the order of their first ranks."""
    root = list(range(len(bundles)))  # the lowest bundle that a bundle is known to stand together with
    home = [index for index, bundle in enumerate(bundles) for _ in range(bundle.workers)]

    def top(index: int) -> int:
        while root[index] != index:
            index = root[index]
        return index

    for replica in mesh.groups("pp", "cp", "tp"):
        for one, other in itertools.pairwise(replica):
            low, high = sorted((top(home[one]), top(home[other])))
            root[high] = low
    sets: dict[int, list[Bundle]] = {}
    for index, bundle in enumerate(bundles):
        sets.setdefault(top(index), []).append(bundle)
    return list(sets.values())


def seats(sets: Sequence[Sequence[Bundle]], homes: Sequence[Sequence[str]]) -> dict[int, tuple[int, int]]:
    """Of each rank, the placement group and the bundle in it, once it is known where they stand.

    homes: the node address of each bundle of each group. Where Ray put a bundle promises nothing, so groups of one shape,
    and bundles of one size in a group, are dealt out anew: lower ranks to lower addresses.
    """

    def shape(group: int) -> tuple[int, ...]:
        return tuple(sorted(bundle.workers for bundle in sets[group]))

    everyone = range(len(sets))
    wanted = sorted(everyone, key=lambda group: (shape(group), sets[group][0].first))
    standing = sorted(everyone, key=lambda group: (shape(group), min(map(address_key, homes[group]))))
    found: dict[int, tuple[int, int]] = {}
    for role, group in zip(wanted, standing, strict=True):
        roles = sorted(sets[role], key=lambda bundle: (bundle.workers, bundle.first))
        size = [bundle.workers for bundle in sets[group]]
        places = sorted(range(len(size)), key=lambda index: (size[index], address_key(homes[group][index]), index))
        for bundle, index in zip(roles, places, strict=True):
            found.update((rank, (group, index)) for rank in range(bundle.first, bundle.first + bundle.workers))
    return found


def resources(bundle: Bundle, config: ClusterConfig, device: str) -> dict[str, float]:
    """What a bundle asks of its node."""
    wanted = {"CPU": bundle.workers * config.cpus_per_worker}
    return {**wanted, "GPU": float(bundle.workers)} if device == "cuda" else wanted


def slots(cluster: ClusterShape, config: ClusterConfig) -> list[int]:
    """How many workers each node holds."""
    device = cluster.device(config)
    return [node.slots(config, device) for node in cluster.nodes]


def missing(wanted: Sequence[dict[str, float]], free: Sequence[NodeShape]) -> str:
    """What stands in the way of some bundles, given what is free on each node now: one line for a human."""
    asked = ", ".join(_amounts(bundle) for bundle in wanted)
    has = "; ".join(f"{node.name}: {_amounts({'CPU': node.cpus, 'GPU': node.gpus})} free" for node in free)
    return f"wanted on one node each: {asked}; there is {has or 'no node'}"


def _amounts(resources: dict[str, float]) -> str:
    shown = [f"{amount:g} {name}" for name, amount in resources.items() if amount or name == "CPU"]
    return " and ".join(shown)


def address_key(ip: str) -> tuple[int, bytes]:
    """Sorts IP addresses by their numbers; what is no address comes last."""
    try:
        address = ipaddress.ip_address(ip)
    except ValueError:
        return 9, ip.encode()
    return address.version, address.packed
