"""What a cluster offers, as a value: the planner compares a mesh with it without asking the cluster."""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass

from raytron.config import ClusterConfig
from raytron.errors import ConfigError, Problem


@dataclass(frozen=True)
class NodeShape:
    """One node. cpus and gpus as its scheduler counts them; memory_bytes of the host; device_name of its GPUs."""

    name: str
    cpus: float
    gpus: float = 0
    memory_bytes: int = 0
    device_name: str | None = None

    def slots(self, config: ClusterConfig, device: str) -> int:
        """How many workers fit."""
        by_cpu = int(self.cpus / config.cpus_per_worker + 1e-9)
        return min(by_cpu, int(self.gpus)) if device == "cuda" else by_cpu

    def __str__(self) -> str:
        gpus = f", {self.gpus:g} GPUs" + (f" ({self.device_name})" if self.device_name else "") if self.gpus else ""
        return f"{self.name}: {self.cpus:g} CPUs{gpus}"


@dataclass(frozen=True)
class ClusterShape:
    """The nodes of a cluster."""

    nodes: tuple[NodeShape, ...]

    @classmethod
    def local(cls, cpus: float) -> ClusterShape:
        """One node without GPUs: what a run has that starts a local cluster of its own."""
        return cls((NodeShape(socket.gethostname(), cpus),))

    @property
    def cpus(self) -> float:
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> float:
        return sum(node.gpus for node in self.nodes)

    @property
    def device_name(self) -> str | None:
        """The name of the GPUs, where all nodes with GPUs have the same."""
        names = {node.device_name for node in self.nodes if node.gpus}
        return names.pop() if len(names) == 1 else None

    def device(self, config: ClusterConfig) -> str:
        """cpu or cuda: as configured, and where that is `auto`, cuda if the cluster has a GPU."""
        if config.device != "auto":
            return config.device
        return "cuda" if self.gpus else "cpu"

    def slots(self, config: ClusterConfig) -> int:
        """How many workers fit on all nodes."""
        return sum(node.slots(config, self.device(config)) for node in self.nodes)

    def worker_memory(self, config: ClusterConfig) -> int | None:
        """Bytes that the smallest device, or on CPUs a worker's share of the smallest node, has; None where unknown."""
        device = self.device(config)
        if device == "cuda":
            known = [_device_memory(node.device_name) for node in self.nodes if node.gpus]
        else:
            known = [node.memory_bytes // max(1, node.slots(config, device)) or None for node in self.nodes]
        return None if None in known else min((size for size in known if size is not None), default=None)

    def __str__(self) -> str:
        count = len(self.nodes)
        gpus = f", {self.gpus:g} GPUs" if self.gpus else ""
        return f"{count} node{'s' if count != 1 else ''} with {self.cpus:g} CPUs{gpus}"


# GB as their makers state them; the first name that matches counts
_MEMORY = (
    (r"GB300|B300", 288), (r"GB200", 186), (r"B200", 180), (r"GH200", 96), (r"H200", 141), (r"H100 NVL", 94), (r"H20\b", 96),
    (r"H100|H800", 80), (r"A100.*40|A100-PCIE-40", 40), (r"A100|A800", 80), (r"A40\b|L40", 48), (r"A10G?\b|L4\b", 24),
    (r"RTX 4090", 24), (r"V100.*16", 16), (r"V100", 32), (r"T4\b", 16),
)  # fmt: skip


def _device_memory(name: str | None) -> int | None:
    """Bytes of a GPU by its name."""
    return next((size * 10**9 for pattern, size in _MEMORY if name and re.search(pattern, name, re.IGNORECASE)), None)


def on_paper(text: str) -> ClusterShape:
    """A cluster that need not exist: `512xH100`, on nodes of 8 GPUs; `64xA100:4`, on nodes of 4; `4xcpu`, one node.

    Raises ConfigError for another text.
    """
    match = re.fullmatch(r"([1-9]\d*)x([A-Za-z][\w -]*?)(?::([1-9]\d*))?", text)
    if match is None:
        raise ConfigError([Problem("--on", f"{text!r} names no hardware", "write e.g. 512xH100, 64xA100:4 or 4xcpu")])
    count, device, each = int(match[1]), match[2], int(match[3] or 8)
    if device.lower() == "cpu":
        return ClusterShape((NodeShape("node-0", count),))
    sizes = [min(each, count - first) for first in range(0, count, each)]
    return ClusterShape(tuple(NodeShape(f"node-{at}", 16 * size, size, 0, device) for at, size in enumerate(sizes)))


def too_small(cluster: ClusterShape, config: ClusterConfig, world: int, mesh: str) -> list[Problem]:
    """A problem if `world` workers don't fit: what the cluster has, what the mesh needs, and what would fit."""
    slots, device = cluster.slots(config), cluster.device(config)
    if world <= slots:
        return []
    each = f"{config.cpus_per_worker:g} CPU" + (" and 1 GPU" if device == "cuda" else "")
    what = f"{mesh} needs {world} workers of {each} each, and the cluster ({cluster}) has room for {slots}"
    remedies = [f"use a mesh of at most {slots} workers" if slots else "add nodes"]
    if device == "cuda" and cluster.gpus < world:
        remedies.append(f"add {world - cluster.gpus:g} GPUs")
        if config.device == "auto":
            remedies.append("set cluster.device to cpu")
    else:
        largest = cluster.cpus / world
        remedies.append(f"add nodes, or set cluster.cpus_per_worker to {_floor(largest):g} or less")
    return [Problem("mesh", what, ", or ".join(remedies))]


def _floor(value: float) -> float:
    """A little less than a positive value, in at most three decimals."""
    return max(0.001, int(value * 1000) / 1000)
