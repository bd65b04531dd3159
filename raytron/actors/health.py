"""Ranks that are slow or wrong: told of, and where that is asked for or needed, replaced.

    slow     busy for much longer than its peers, again and again      told; evicted with `guard.evict_stragglers`
    wrong    its parameters differ from the majority's                 replaced; the run goes back to what all agreed on
    one of   two hold different parameters                             the steps since are run again from there, and whoever
    two                                                                does otherwise than the first time is replaced

Whether it is time to act is asked between looks at the ranks (`take`), never in the middle of a recovery.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from raytron.config import GuardConfig
from raytron.errors import ClusterError
from raytron.observe.busy import Busy
from raytron.observe.records import Record
from raytron.observe.replicas import Check, verdict
from raytron.observe.stragglers import Stragglers
from raytron.plan.plan import Plan

Say = Callable[..., None]  # (kind of event, message, **facts)


class Sick(NamedTuple):
    """Ranks to replace, perhaps none, and the newest step that may be gone on from; None: any."""

    ranks: tuple[int, ...]
    why: str
    back_to: int | None


class Health:
    """Of one run. retrace: whether ranks are to record what tells them apart, because steps are run again."""

    def __init__(self, config: GuardConfig, say: Say):
        self.config, self.say = config, say
        self._hosts: dict[int, str] = {}
        self._stragglers: Stragglers | None = None
        self._agreed = 0  # the newest step that all replicas agreed on, or were made alike at
        self._doubt: Check | None = None
        self._sick: Sick | None = None

    @property
    def retrace(self) -> bool:
        return self._doubt is not None

    def begin(self, plan: Plan, step: int, hosts: dict[int, str]) -> None:
        """An epoch begins at a step, which all ranks have read alike."""
        ratio = self.config.straggler_ratio
        self._stragglers = None if ratio is None or plan.mesh.world == 1 else Stragglers.of(plan, ratio)
        self._hosts, self._agreed, self._sick = hosts, step, None
        if self._doubt is not None and plan.mesh.world != len(self._doubt.trails):
            self._doubt = None  # another mesh can't be compared with the first run

    def busy(self, rank: int, steps: Iterable[Busy]) -> None:
        """How long a rank was busy in some steps."""
        if self._stragglers is None:
            return
        for change in self._stragglers.heard(rank, [(each.step, each.busy_s) for each in steps]):
            kind = "straggler" if change.slow else "keeps_pace"
            text = f"{change}, on {self._hosts.get(change.rank, '?')}"
            self.say(kind, text, rank=change.rank, host=self._hosts.get(change.rank), ratio=round(change.ratio, 2))
            if change.slow and self.config.evict_stragglers:
                self._sick = Sick((change.rank,), f"too slow: {change}", None)

    def record(self, record: Record) -> None:
        """A committed step; takes the comparison of replicas out of its record."""
        told: dict[str, Any] | None = record.pop("replicas", None)
        if told is None:
            return
        check = Check.read(told)
        if self._doubt is not None and self._doubt.step == check.step:
            self._compare(self._doubt, check)
        elif check.agrees:
            self._agreed = check.step
        else:
            self.say("replicas", str(check), step=check.step, faulty=check.faulty, suspects=check.suspects)
            self._doubt = None if check.faulty and not check.suspects else check
            self._sick = Sick(check.faulty, str(check), self._agreed)

    def _compare(self, first: Check, second: Check) -> None:
        self._doubt = None
        found = verdict(first, second)
        hosts = {rank: self._hosts.get(rank) for rank in found.ranks}
        self.say("verdict", f"run again up to step {second.step}: {found.why}", step=second.step, hosts=hosts)
        if found.ranks:
            self._sick = Sick(found.ranks, found.why, None if second.agrees else self._agreed)
        elif not second.agrees:
            raise ClusterError(f"replicas differ after step {second.step}, twice: {found.why}")

    def absolve(self) -> None:
        """What was found was nobody's fault."""
        self._doubt = self._sick = None

    def take(self) -> Sick | None:
        """What to act upon now."""
        sick, self._sick = self._sick, None
        return sick
