"""Chooses a schedule: simulates every legal one and takes the fastest that fits in memory.

Legal is what the rules admit for this model, mesh and batch. Where `pipeline.virtual_stages` is null, schedules with more
than one model chunk on a rank are tried with 2, 3, 4, 6 and 8 chunks, as far as there are layers for them; stages that are
given (`split` or `layout`) say how many there are. Each is cut, generated, simulated and weighed on its own:

    1   what does not fit in the memory of a device is out (`pipeline.memory_gb`, else 90 % of what the cluster has)
    2   the shortest makespan (or own span, see below) wins
    3   of those within 1 % of it, the one that needs the least memory, then the one with the fewest chunks

Costs are FLOPs, or the times that a run has measured; a Choice says which. Where every rank updates at once
(`optimizer.at_once`) the longest span of a single rank counts in place of the makespan: what a rank idles before its first
action it can spend on the last ones of the step before. Else the gradient norm lets every rank wait for the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from raytron.config import SCHEDULE_CHUNKS, RunConfig
from raytron.errors import ConfigError, Problem
from raytron.plan import draw
from raytron.plan.memory import estimate
from raytron.plan.schedule import generate
from raytron.plan.simulate import simulate
from raytron.plan.times import Times
from raytron.plan.weigh import stage_cost, stages_of
from raytron.rules import chunks_given, problems

CHUNKS = (2, 3, 4, 6, 8)  # that are tried for schedules that take any number
ALIKE = 0.01  # makespans that differ by less count as equal


@dataclass(frozen=True)
class Candidate:
    """One schedule with its chunks on a rank. makespan, own_span: in mean forwards of a rank's whole share.

    live: micro-batches (of a rank's whole share) in flight on the fullest rank. why_not: why it was not chosen; empty for
    the one that was.
    """

    name: str
    chunks: int
    makespan: float = 0.0
    own_span: float = 0.0
    bubble: float = 0.0
    live: float = 0.0
    bytes: int = 0
    why_not: str = ""

    def __str__(self) -> str:
        return self.name if self.chunks == 1 else f"{self.name} ×{self.chunks}"


@dataclass(frozen=True)
class Choice:
    """What was tried, the chosen one first, then by makespan, then what is not legal. limit: bytes, None: no bound."""

    candidates: tuple[Candidate, ...]
    limit: int | None
    source: str
    by_own_span: bool = False

    def length(self, candidate: Candidate) -> float:
        """What a step takes with a candidate."""
        return candidate.own_span if self.by_own_span else candidate.makespan

    @property
    def best(self) -> Candidate:
        return self.candidates[0]

    def __str__(self) -> str:
        tried = [candidate for candidate in self.candidates if candidate.makespan]
        bound = "without a memory bound" if self.limit is None else f"within {draw.size(self.limit)} on a device"
        fitting = [candidate for candidate in tried if not candidate.why_not.startswith("needs")]
        what = "own span" if self.by_own_span else "makespan"
        shortest = self.length(self.best) == min(map(self.length, fitting))
        why = f"the shortest {what}" if shortest else f"the least memory within 1 % of the shortest {what}"
        head = f"auto      {self.best}: {why} of {len(tried)} legal schedules {bound}, by {self.source}"
        shown = {candidate.name: candidate for candidate in reversed(self.candidates)}  # the best of each name
        rows = [_row(candidate) for candidate in self.candidates if shown[candidate.name] is candidate]
        return "\n".join([head, draw.table(["", "makespan", "own span", "bubble", "live", "bytes", "why not"], rows)])


def choose(
    config: RunConfig,
    limit: int | None = None,
    times: Times | None = None,
    report: Callable[[str], None] | None = None,
) -> Choice:
    """The best schedule of a configuration whose schedule is `auto`.

    limit: bytes that a device may hold; None: any. times: measured ones; None: by FLOPs. report: is told what is simulated.
    Raises ConfigError where no schedule is legal, or none fits.
    """
    tried: list[Candidate] = []
    illegal: list[Candidate] = []
    options = list(_options(config))
    for number, (name, chunks) in enumerate(options, 1):
        own = resolved(config, name, chunks)
        found = problems(own)
        if found:
            illegal.append(Candidate(name, chunks, why_not=found[0].what))
            continue
        if report is not None:
            report(f"simulating {name} with {draw.plural(chunks, 'chunk')} ({number} of {len(options)})")
        tried.append(_measure(own, times))
    if not tried:
        what = "no schedule is legal here: " + "; ".join(f"{item}: {item.why_not}" for item in illegal)
        raise ConfigError([Problem("pipeline.schedule", what, "change the mesh, the stages or the batch")])
    fits = [item for item in tried if limit is None or item.bytes <= limit]
    if limit is not None and not fits:
        least = min(tried, key=lambda item: item.bytes)
        what = f"no schedule fits in {draw.size(limit)}: {least} needs the least, {draw.size(least.bytes)}"
        remedy = "use more ranks (mesh.pp, mesh.tp), memory.recompute, or a smaller micro_batch_size"
        raise ConfigError([Problem("pipeline.memory_gb", what, remedy)])
    source = "FLOPs" if times is None else str(times)
    choice = Choice((), limit, source, config.optimizer.at_once)
    fastest = min(map(choice.length, fits))
    near = [item for item in fits if choice.length(item) <= fastest * (1 + ALIKE)]
    best = min(near, key=lambda item: (item.bytes, item.chunks, choice.length(item)))
    others = sorted((item for item in tried if item is not best), key=choice.length)
    said = []
    for item in others:
        slower = choice.length(item) / choice.length(best) - 1
        said.append(replace(item, why_not=_why_not(item, best, limit, item in near, slower)))
    return replace(choice, candidates=(best, *said, *illegal))


def resolved(config: RunConfig, name: str, chunks: int) -> RunConfig:
    """The configuration with one schedule in place of `auto`."""
    return config.replace(**{"pipeline.schedule": name, "pipeline.virtual_stages": chunks})


def _options(config: RunConfig) -> Iterator[tuple[str, int]]:
    pp, told, given = config.mesh.pp, config.pipeline.virtual_stages, chunks_given(config)
    room = [count for count in CHUNKS if count * pp <= config.model.layers] or [2]
    many = sorted({*room, given}) if given is not None and given > 1 else room
    for name, (least, most) in SCHEDULE_CHUNKS.items():
        if name == "auto":
            continue
        for chunks in [least] if least == most else many:
            if told is None or told == chunks:
                yield name, chunks


def _measure(config: RunConfig, times: Times | None) -> Candidate:
    pp, chunks = config.mesh.pp, config.pipeline.chunks
    stages = stages_of(config, pp * chunks)
    cost = stage_cost(config, stages, times)
    schedule = generate(config.pipeline.schedule, pp, chunks, config.microbatches, cost)
    line = simulate(schedule, cost)
    return Candidate(
        name=schedule.name,
        chunks=chunks,
        makespan=line.makespan / chunks,
        own_span=line.own_span / chunks,
        bubble=line.bubble,
        live=max(line.peak_at_weight_grad) / chunks,
        bytes=estimate(config, stages, schedule).largest,
    )


def _why_not(item: Candidate, best: Candidate, limit: int | None, near: bool, slower: float) -> str:
    """Why a candidate was not chosen."""
    if limit is not None and item.bytes > limit:
        return f"needs {draw.size(item.bytes)}"
    if near:
        return "as fast, " + ("more memory" if item.bytes > best.bytes else "no less memory")
    return f"{100 * slower:.1f} % slower"


def _row(item: Candidate) -> list[str]:
    if not item.makespan:
        return [f"  {item}", "", "", "", "", "", item.why_not]
    figures = [f"{item.makespan:.2f}", f"{item.own_span:.2f}", f"{100 * item.bubble:.1f} %", f"{item.live:g}"]
    return [f"  {item}", *figures, draw.size(item.bytes), item.why_not or "chosen"]
