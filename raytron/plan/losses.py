"""What an elastic run would go on with after losses, on paper: a part of the page of its plan."""

from __future__ import annotations

from collections.abc import Iterator

from raytron.config import RunConfig
from raytron.errors import ConfigError
from raytron.plan import draw
from raytron.plan.cluster import ClusterShape
from raytron.plan.elastic import best_plan
from raytron.plan.mesh import MeshShape
from raytron.plan.meshes import Workers
from raytron.plan.plan import Plan
from raytron.plan.times import Times


def page(plan: Plan, times: Times | None = None) -> str:
    """What the run of a plan would go on with after the loss of some workers and nodes, as a table."""
    config, cluster = plan.config, plan.cluster
    nodes = (plan.mesh.world,) if cluster is None else _nodes(config, cluster)
    rows = []
    for lost, left in _losses(nodes):
        try:
            found = best_plan(config, left, cluster, times)
        except ConfigError as error:
            rows.append([f"  {lost}", "", "", "", error.problems[0].what])
            continue
        best = found.candidates[0]
        notes = [draw.plural(found.spares, "spare")] * (found.spares > 0)
        rows.append([f"  {lost}", str(best.mesh), best.dealt, best.step, ", ".join(notes)])
    most = "" if config.elastic.max_workers is None else f" and at most {config.elastic.max_workers}"
    bounds = f"at least {draw.plural(config.elastic.fewest, 'worker')}{most}"
    head = f"elastic   {bounds}; where some are lost:"
    return "\n".join([head, draw.table(["", "mesh", "micro-batches", "step", ""], rows)])


def _nodes(config: RunConfig, cluster: ClusterShape) -> Workers:
    """Workers for which each node has room, as many as the mesh takes."""
    device, left, out = cluster.device(config.cluster), MeshShape.of(config.mesh).world, []
    for node in cluster.nodes:
        out.append(min(left, node.slots(config.cluster, device)))
        left -= out[-1]
    return [count for count in out if count]


def _losses(nodes: Workers) -> Iterator[tuple[str, list[int]]]:
    """What may be lost, and what each node then has: 1, 2, 4, … workers of one node, 1, 2, 4, … nodes."""
    count = 1
    while count < nodes[-1]:
        yield draw.plural(count, "worker"), [*nodes[:-1], nodes[-1] - count]
        count *= 2
    count = 1
    while count < len(nodes):
        yield draw.plural(count, "node"), list(nodes[: len(nodes) - count])
        count *= 2
