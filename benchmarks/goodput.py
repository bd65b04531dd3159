"""How much of a spot fleet's time becomes training: python benchmarks/goodput.py

An event simulation. A trace says how many nodes there are when; a policy, what each change costs. Training goes on with
whole replicas (`--group` nodes each), at a speed in proportion to the nodes at work:

    nodes      ▁▁▁▁████████████▅▅▅▅▅▅▅▅▅▅████████████
    a loss                     │stop│redo│train
    a gain                               │wait│stop│train
    goodput = node-seconds of work that was kept / node-seconds that were there

A change that comes while a run stands still makes it begin to stop anew. A loss takes back what was done since the last
commit: a checkpoint, or a step. What a policy costs is measured where benchmarks/results/recovery.json says so, else
assumed; each row of the result says which.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

HERE = Path(__file__).parent
TRACES = HERE / "traces"
MEASURED = HERE / "results" / "recovery.json"
HOUR, DAY = 3600.0, 86400.0


class Change(NamedTuple):
    """From `at` seconds on there are `nodes`."""

    at: float
    nodes: int


@dataclass(frozen=True)
class Trace:
    """changes: ascending in time, the first at 0; ends_s: when it ends."""

    name: str
    changes: tuple[Change, ...]
    ends_s: float

    @property
    def available(self) -> float:
        """Node-seconds."""
        ends = [change.at for change in self.changes[1:]] + [self.ends_s]
        return sum(change.nodes * (end - change.at) for change, end in zip(self.changes, ends, strict=True))

    @property
    def losses(self) -> int:
        """How often there were fewer nodes than before."""
        return sum(b.nodes < a.nodes for a, b in zip(self.changes, self.changes[1:], strict=False))


@dataclass(frozen=True)
class Policy:
    """What a change costs.

    loss_s, grow_s: how long training stands still after a loss, after a gain. commit_s: between commits in time of training;
    0: nothing is ever redone. notice: a loss is told of before, so that nothing is redone. stop_always: a gain stops the run
    although it makes no further replica. grow_after_s: for so long the room has to stay. grow_loses: to grow is to restart
    from the last commit. source: of these figures.
    """

    name: str
    loss_s: float
    grow_s: float
    commit_s: float = 0.0
    notice: bool = False
    stop_always: bool = True
    grow_after_s: float = 0.0
    grow_loses: bool = False
    source: str = "assumed"


class Outcome(NamedTuple):
    """Shares of the node-seconds that were there; stops: how many there were."""

    goodput: float
    idle: float  # nodes that make no whole replica
    stopped: float
    redone: float
    stops: int


class _Run:
    """One policy on one trace."""

    def __init__(self, trace: Trace, policy: Policy, group: int):
        self.trace, self.policy, self.group = trace, policy, group
        self.now = self.until = 0.0  # it stands still until
        self.nodes = self.used = 0
        self.room_since: float | None = None
        self.kept = self.unsaved = self.idle = self.stopped = self.redone = 0.0
        self.since_commit = 0.0
        self.stops = 0

    def result(self) -> Outcome:
        first = self.trace.changes[0]
        self.nodes, self.used = first.nodes, self._whole(first.nodes)
        for change in self.trace.changes[1:]:
            self._pass(change.at)
            self._change(change.nodes)
        self._pass(self.trace.ends_s)
        whole = self.trace.available or 1.0
        kept = self.kept + self.unsaved
        return Outcome(kept / whole, self.idle / whole, self.stopped / whole, self.redone / whole, self.stops)

    def _whole(self, nodes: int) -> int:
        return nodes // self.group * self.group

    def _pass(self, to: float) -> None:
        """Time passes, without a change of nodes."""
        grow_at = math.inf if self.room_since is None else self.room_since + self.policy.grow_after_s
        if grow_at <= to:
            self._train(max(grow_at, self.now))
            self._grow()
        self._train(to)

    def _train(self, to: float) -> None:
        """Stands still as long as it has to, then trains and commits."""
        still = min(max(self.until - self.now, 0.0), to - self.now)
        work = to - self.now - still
        self.idle += (self.nodes - self.used) * (to - self.now)
        self.stopped += self.used * still
        self.now = to
        if self.policy.commit_s == 0:
            self.kept += self.used * work
            return
        commits = int((self.since_commit + work) / self.policy.commit_s)
        if commits:
            self.since_commit += work - commits * self.policy.commit_s
            self.kept += self.unsaved + self.used * (work - self.since_commit)
            self.unsaved = self.used * self.since_commit
        else:
            self.since_commit += work
            self.unsaved += self.used * work

    def _change(self, nodes: int) -> None:
        lost, self.nodes = nodes < self.nodes, nodes
        if lost:
            self._stop(self.policy.loss_s, loses=not self.policy.notice)
            return
        if self.policy.stop_always or self._whole(nodes) > self.used:
            self.room_since = self.now if self.room_since is None else self.room_since
            if self.policy.grow_after_s == 0:
                self._grow()

    def _grow(self) -> None:
        self._stop(self.policy.grow_s, loses=self.policy.grow_loses)

    def _stop(self, seconds: float, *, loses: bool) -> None:
        if loses:
            self.redone += self.unsaved
        else:
            self.kept += self.unsaved
        self.unsaved = self.since_commit = 0.0
        self.used, self.room_since = self._whole(self.nodes), None
        self.until = self.now + seconds
        self.stops += 1


def simulate(trace: Trace, policy: Policy, group: int) -> Outcome:
    """What becomes of a trace under a policy, with replicas of `group` nodes."""
    return _Run(trace, policy, group).result()


# ---- traces


def read_trace(path: Path) -> Trace:
    """Lines `milliseconds,nodes`; of several at one time the last counts, and the last line ends the trace."""
    with path.open(newline="") as file:
        rows = [(int(at) / 1000, int(nodes)) for at, nodes in csv.reader(file)]
    changes = tuple(Change(at, nodes) for at, nodes in dict(rows).items())
    return Trace(path.stem, changes, rows[-1][0])


def synthetic(
    name: str, *, nodes: int, per_hour: float, sizes: Sequence[float], back_s: float, hours: float, seed: int
) -> Trace:
    """Losses at random times (a Poisson process), of 1, 2, … nodes at once with the weights `sizes`; each lost node is
    replaced after a time of its own, `back_s` on average (exponential)."""
    rng = np.random.default_rng(seed)
    ends, at = hours * HOUR, 0.0
    weights = np.array(sizes) / sum(sizes)
    steps: list[tuple[float, int]] = []
    while (at := at + rng.exponential(HOUR / per_hour)) < ends:
        count = 1 + int(rng.choice(len(weights), p=weights))
        steps.append((at, -count))
        steps += [(at + rng.exponential(back_s), 1) for _ in range(count)]
    changes, there = [Change(0.0, nodes)], nodes
    for when, change in sorted(step for step in steps if step[0] < ends):
        there += change
        changes.append(Change(when, max(there, 0)))
    return Trace(name, tuple(changes), ends)


AT_ONCE = (39, 13, 15, 7, 1, 4)  # losses of 1 to 6 nodes in the published trace


def traces(seed: int) -> list[tuple[Trace, int]]:
    """Each with the nodes of a replica."""
    spot = synthetic("6.8 losses an hour, 32 nodes, up to 6 at once", nodes=32, per_hour=6.8, sizes=AT_ONCE,
                     back_s=2000, hours=11, seed=seed)  # fmt: skip
    often = synthetic(
        "a loss every 10 minutes, 32 nodes", nodes=32, per_hour=6, sizes=(1,), back_s=1200, hours=24, seed=seed
    )
    llama = synthetic("Llama 3: 419 in 54 days, 2048 nodes", nodes=2048, per_hour=419 / (54 * 24), sizes=(1,),
                      back_s=600, hours=54 * 24, seed=seed)  # fmt: skip
    return [(spot, 4), (often, 4), (llama, 16)]


# ---- policies

ASSUMED = {"loss_s": 15.0, "notice_s": 5.0, "grow_s": 10.0, "step_s": 10.0}
RESTART_S = 120.0  # to start a job anew: a scheduler, processes, imports, a checkpoint that is read
BEFORE = {  # percent, by an earlier simulation of the published trace, in other code
    "restart, checkpoint every 30 min": 5, "restart, checkpoint every 5 min": 36, "120 s recovery": 58, "40 s recovery": 79,
    "20 s recovery": 86, "15 s after a loss, 10 s to grow": 88, "with notices, 5 s": 92, "nothing lost but odd nodes": 94,
}  # fmt: skip


def fixed() -> list[Policy]:
    """Recoveries that take so long, each change being one; to restart is also to go back to the last checkpoint."""
    restart = Policy("", RESTART_S, RESTART_S, grow_loses=True)
    return [
        replace(restart, name="restart, checkpoint every 30 min", commit_s=1800),
        replace(restart, name="restart, checkpoint every 5 min", commit_s=300),
        Policy("120 s recovery", 120, 120),
        Policy("40 s recovery", 40, 40),
        Policy("20 s recovery", 20, 20),
        Policy("15 s after a loss, 10 s to grow", 15, 10),
        Policy("with notices, 5 s", 5, 5),
        Policy("nothing lost but odd nodes", 0, 0, stop_always=False),
    ]


def raytron(constants: dict[str, float], source: str) -> list[Policy]:
    """Raytron: a step is redone, nodes that make no replica wait as spares, and room has to stay before it grows."""
    own = Policy("Raytron", constants["loss_s"], constants["grow_s"], commit_s=constants["step_s"], stop_always=False,
                 grow_after_s=30.0, source=source)  # fmt: skip
    return [own, replace(own, name="Raytron, with notices", loss_s=constants["notice_s"], notice=True)]


def constants_of(path: Path, given: dict[str, float | None]) -> tuple[dict[str, float], str]:
    """Seconds by name, and where they come from: arguments, else `constants` of a recovery benchmark, else assumed."""
    found = json.loads(path.read_text())["constants"] if path.exists() else {}
    measured = {key: float(found[key]) for key in ASSUMED if key in found}
    told = {key: value for key, value in given.items() if value is not None}
    names = [("measured", measured), ("given", told)]
    source = "; ".join(f"{name}: {', '.join(values)}" for name, values in names if values)
    return ASSUMED | measured | told, source or "assumed"


# ---- the benchmark


def rows_of(trace: Iterable[Trace], policies: Sequence[Policy], group: int) -> list[dict[str, object]]:
    """The means over some traces of one kind."""
    every = list(trace)
    out = []
    for policy in policies:
        outcomes = [simulate(one, policy, group) for one in every]
        means = {key: round(float(np.mean([getattr(each, key) for each in outcomes])), 4) for key in Outcome._fields}
        out.append({"policy": policy.name, **means, "costs": asdict(policy)})
    return out


def table(name: str, rows: Sequence[dict[str, object]], before: dict[str, int]) -> str:
    head = f"  {'policy':<34} {'goodput':>8} {'before':>9} {'stopped':>8} {'redone':>8} {'idle':>8} {'stops':>7}"
    lines = [name, head]
    for row in rows:
        shares = {key: f"{100 * float(str(row[key])):.1f} %" for key in ("goodput", "stopped", "redone", "idle")}
        known = f"{before[str(row['policy'])]} %" if row["policy"] in before else ""
        lines.append(
            f"  {row['policy']:<34} {shares['goodput']:>8} {known:>9} {shares['stopped']:>8} "
            f"{shares['redone']:>8} {shares['idle']:>8} {float(str(row['stops'])):>7.0f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, default=TRACES / "parcae_aws_p3.csv")
    parser.add_argument("--group", type=int, default=4, help="nodes of a replica, in that trace")
    parser.add_argument("--seeds", type=int, default=5, help="synthetic traces of each kind")
    for key, value in ASSUMED.items():
        parser.add_argument(
            f"--{key.replace('_', '-')}", type=float, default=None, help=f"else as measured, else {value:g}"
        )
    given = parser.parse_args()
    constants, source = constants_of(MEASURED, {key: getattr(given, key) for key in ASSUMED})
    policies = [*fixed(), *raytron(constants, source)]
    published = read_trace(given.trace)
    results = {published.name: rows_of([published], policies, given.group)}
    kinds = zip(*(traces(seed) for seed in range(given.seeds)), strict=True)
    for kind in kinds:
        results[kind[0][0].name] = rows_of([trace for trace, _ in kind], policies, kind[0][1])
    for name, rows in results.items():
        print(table(name, rows, BEFORE if name == published.name else {}), end="\n\n")
    facts = {
        "constants": constants,
        "source": source,
        "restart_s": RESTART_S,
        "group": given.group,
        "seeds": given.seeds,
    }
    text = json.dumps({**facts, "before_percent": BEFORE, "results": results}, indent=2)
    (HERE / "results" / "goodput.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
