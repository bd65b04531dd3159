"""Ray as Raytron uses it: join or start a cluster, and see what it has.

A cluster is joined when `cluster.address` or RAY_ADDRESS says so (inside a Ray job it does); otherwise a local Ray is
started, and stopped with the run.
"""

from __future__ import annotations

import logging
import os
import re
import socket
from dataclasses import dataclass
from typing import Any, NamedTuple

import ray
from ray import _raylet  # nothing public gives the token
from ray._private import state as ray_state  # no public call tells what is free on each node
from ray._raylet import Config as RayConfig  # type: ignore[attr-defined]  # nothing public rereads the environment

from raytron.actors import placement
from raytron.config import ClusterConfig
from raytron.errors import ClusterError
from raytron.plan.cluster import ClusterShape, NodeShape

NAMESPACE = "raytron"
STORE_BYTES = 512 * 2**20  # of a local Ray: descriptions travel through it, tensors don't
AUTH_MODE = "RAY_AUTH_MODE"
KNOCK_S = 10.0
PART_NAME = re.compile(r"raytron/(.+)/(?:worker-\d+|keeper-[0-9a-f]+-[0-9a-f]+)")
LOCAL_CPUS_PER_CORE, FEWEST_LOCAL_CPUS = 4, 8  # that a local Ray may say it has, for workers that share cores


@dataclass(frozen=True)
class Session:
    """A connection to Ray. local: a Ray of our own, which ends with it; owned: whether `close` disconnects."""

    address: str
    local: bool
    owned: bool

    def close(self) -> None:
        if self.owned and ray.is_initialized():
            ray.shutdown()


def own_room(config: ClusterConfig) -> ClusterShape | None:
    """What a local Ray of the run's own may hold: a few workers on each core, so that small meshes can be tried anywhere.
    None where a cluster will be joined, which knows for itself."""
    if ray.is_initialized() or config.address or os.environ.get("RAY_ADDRESS"):
        return None
    return ClusterShape.local(max(FEWEST_LOCAL_CPUS, LOCAL_CPUS_PER_CORE * (os.cpu_count() or 1)))


def connect(config: ClusterConfig, workers: int) -> Session:
    """Uses the connection that the process has, joins a cluster, or starts a local Ray with room for `workers`.

    Raises ClusterError where a cluster can't be reached.
    """
    if ray.is_initialized():
        return Session(ray.get_runtime_context().gcs_address, local=False, owned=False)
    address = config.address or os.environ.get("RAY_ADDRESS")
    if address:
        return join(address)
    cpus = max(os.cpu_count() or 1, round(workers * config.cpus_per_worker + 0.49) + 2)
    ray.init(
        address="local",
        namespace=NAMESPACE,
        num_cpus=cpus,
        include_dashboard=False,
        object_store_memory=STORE_BYTES,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _system_config={"worker_niceness": 0, "preload_python_modules": ["torch"]},
    )
    return Session(ray.get_runtime_context().gcs_address, local=True, owned=True)


def join(address: str) -> Session:
    """Joins a cluster. Raises ClusterError where none answers."""
    try:
        _knock(address)
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        remedy = (
            "remedy: start it (ray start --head), or unset cluster.address and RAY_ADDRESS to use this machine alone"
        )
        raise ClusterError(f"no Ray cluster answers at {address}: {error}\n    {remedy}") from None
    return Session(ray.get_runtime_context().gcs_address, local=False, owned=True)


def follow_auth(mode: str | None) -> None:
    """Talks to a Ray as whoever started it does: a local Ray asks for the token of its user, and `join` offers none."""
    if mode and AUTH_MODE not in os.environ:
        os.environ[AUTH_MODE] = mode
        RayConfig.initialize("")


def token() -> str:
    """What this Ray asks of its clients (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token); "" where it asks for
    nothing (RAY_AUTH_MODE)."""
    loader = getattr(_raylet, "AuthenticationTokenLoader", None)  # older versions of Ray ask for none
    return "" if loader is None else str(loader.instance().get_raw_token())


def controller_name(run: str) -> str:
    """The name of a run's controller in the namespace `raytron`."""
    return f"raytron/{run}"


def part_of(name: str) -> str | None:
    """The run that an actor is a worker or a keeper of, by their names; None: it is neither."""
    match = PART_NAME.fullmatch(name)
    return None if match is None else match[1]


def _knock(address: str) -> None:
    """Raises OSError at once where nothing listens on host:port, for which Ray would wait."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_S).close()


def survey() -> ClusterShape:
    """The living nodes, by address, with what they have in all."""
    return ClusterShape(tuple(_node(node, node["Resources"]) for node in living()))


class Free(NamedTuple):
    """What is free on a node now."""

    node_id: str
    shape: NodeShape


def free() -> list[Free]:
    """The living nodes with what is free on them now."""
    left = ray_state.available_resources_per_node()
    return [Free(node["NodeID"], _node(node, left.get(node["NodeID"], {}))) for node in living()]


def draining() -> dict[str, float]:
    """The nodes that Ray was told will leave, by id: the deadline in seconds since the epoch, 0 where none was given."""
    found = ray_state.state.get_draining_nodes()
    return {str(node): deadline_ms / 1e3 for node, deadline_ms in found.items()}


def living() -> list[dict[str, Any]]:
    """The nodes that Ray holds for alive, by address."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    return sorted(nodes, key=lambda node: (placement.address_key(node["NodeManagerAddress"]), node["NodeID"]))


def _node(node: dict[str, Any], resources: dict[str, float]) -> NodeShape:
    kinds = [key.partition(":")[2] for key in node["Resources"] if key.startswith("accelerator_type:")]
    return NodeShape(
        name=node["NodeManagerAddress"],
        cpus=resources.get("CPU", 0.0),
        gpus=resources.get("GPU", 0.0),
        memory_bytes=int(resources.get("memory", 0)),
        device_name=kinds[0] if kinds else None,
    )
