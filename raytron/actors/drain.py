"""Ray's own word for a node that will leave: drained. Whoever knows tells Ray, and the run asks Ray alone.

Ray has no public interface for either; these are the calls of `ray drain-node` and of its own training library. Nothing ends
the node at its deadline: that is for whoever sent the notice.
"""

from __future__ import annotations

import ray
from ray._private import state as ray_state
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

from raytron.actors.metadata import Kind, sources
from raytron.actors.notices import Notice, SourceError, Watcher


def drain(notice: Notice) -> None:
    """Tells Ray that a node will leave; a notice that is not certain is not told. Raises RuntimeError where Ray refuses."""
    if not notice.certain:
        return
    client = GcsClient(address=ray.get_runtime_context().gcs_address)
    reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline_ms = 0 if notice.deadline is None else max(1, int(notice.deadline * 1e3))
    accepted, why = client.drain_node(notice.node, reason, notice.reason, deadline_ms)
    if not accepted:
        raise RuntimeError(f"Ray does not drain node {notice.node}: {why}")


def listen(kind: Kind, node: str) -> Watcher:
    """Starts to listen, on this node, for what its cloud says, and to tell Ray of it. node: by its id of Ray's. One for each
    node is enough; `close` ends it."""
    watcher = Watcher(lambda: sources(kind, node), drain)
    watcher.start()
    return watcher


class RayDrain:
    """A source: whether somebody has told Ray that a node will leave."""

    def __init__(self, node: str):
        self.node = node

    def poll(self) -> Notice | None:
        try:
            deadlines = ray_state.state.get_draining_nodes()
        except Exception as error:
            raise SourceError(f"Ray does not say which nodes are drained: {type(error).__name__}: {error}") from None
        if self.node not in deadlines:
            return None
        deadline = deadlines[self.node] / 1e3 or None
        return Notice(self.node, deadline, "Ray drains it")
