"""Who of a run is gone: nodes and ranks, as lines and Ray tell; giving them up, and calling back those who are left.

    lines break, or Ray says a node is dead ──► it is given up, with all that lives there ──► who waits for it is freed
                                                                                                      │
                              killed, at the limit ◄── does not ── every survivor leaves the mesh ◄───┘

What comes next, on which mesh and from which state, is the matter of others (`raytron.actors.controller`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from raytron.actors.cluster import draining, living
from raytron.actors.gang import Gang
from raytron.actors.lines import Lines
from raytron.actors.recovery import WorkersLost
from raytron.actors.tiers import Memory
from raytron.actors.worker import Left, worker_name

Say = Callable[..., None]  # (kind of event, message, **facts)


class Casualties:
    """Of one gang and its keepers. nodes: those of the newest mesh."""

    def __init__(self, gang: Gang, memory: Memory, lines: Lines, say: Say):
        self.gang, self.memory, self.lines, self.say = gang, memory, lines, say
        self.nodes: set[str] = set()

    def look(self) -> WorkersLost | None:
        """The ranks that lines say are gone; nodes without a rank are given up without a word."""
        found = self.lines.gone(self._homes())
        if not found.nodes and not found.names:
            return None
        away = self.gang.ranks_on(found.nodes)
        late = [rank for rank, member in self.gang.ranks.items() if worker_name(member.number) in found.names]
        if away:
            preempted = found.nodes <= set(draining())
            why = "the node is gone" if len(found.nodes) == 1 else "their nodes are gone"
            return WorkersLost({*away, *late}, why, preempted=preempted)
        self._give_up(found.nodes)
        return WorkersLost(late, "the connection broke, and Ray says nothing") if late else None

    def call_back(self, epoch: int, ranks: Iterable[int], park: bool, finish: bool, limit_s: float) -> list[Left]:
        """After a loss of some ranks: all others leave the mesh of an epoch; who does not within `limit_s` is killed.

        park, finish: see `Worker.leave`.
        """
        self._give_up(self._dead(settle=True))
        self.gang.drop([self.gang.ranks[rank] for rank in ranks if rank in self.gang.ranks])
        if not finish:
            self.gang.abandon(epoch)
        return self.gang.call_back(park, finish, limit_s, lambda: self._give_up(self._dead()))

    def _dead(self, *, settle: bool = False) -> set[str]:
        """Nodes of this run that are dead by what lines tell, or Ray. settle: see `Lines.gone`."""
        homes = self._homes()
        alive = {str(node["NodeID"]) for node in living()}
        return set(self.lines.gone(homes, settle=settle).nodes) | ({*homes.values(), *self.nodes} - alive)

    def _homes(self) -> dict[str, str]:
        """The node of each process that has a line, by the names that these have there."""
        members = self.gang.members.values()
        homes = {worker_name(each.number): each.facts.node_id for each in members if each.facts is not None}
        return homes | {line: node for node, line in self.memory.line_of.items()}

    def _give_up(self, nodes: Collection[str]) -> None:
        """All that lives on some nodes; nobody there is asked any more, and the ranks that wait for them are freed."""
        if not nodes:
            return
        staying = {node["NodeManagerAddress"] for node in living() if node["NodeID"] not in nodes}
        gone = {self.gang.address(node) for node in nodes} - staying
        for node in nodes:
            self.say("node", f"node {self.gang.address(node)} is gone", node=node)
            self.gang.lose(node)
            self.memory.lose(node)
        self.nodes -= set(nodes)
        self.gang.free(gone)
