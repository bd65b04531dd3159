"""The best mesh for the workers that there are: what a run goes on with when some are lost, or others come.

The global batch, the micro-batch, the order of samples and the learning rate stay what they are, so only the mesh is
searched, by the length of a step on paper and within the memory of a device:

    1   tp, pp and cp as configured, and as many data-parallel ranks as there is room for; micro-batches that they can't
        share equally are dealt unevenly (`raytron.deal`)
    2   only where nothing of that fits: other tp, pp and cp, too (`raytron.plan.meshes`)

A step is as long as the simulated schedule of its fullest rank, in FLOPs of one rank, or as a run measured its actions.
What tp, cp and dp exchange is not counted, so among steps within 1 % of the shortest the mesh that is most like the
configured one wins, then the one with fewer workers (the others wait as spares), then the one that needs less memory.
Options are weighed in the order of a bound that none can beat, and the search ends where the bound is longer than the best
step found; what does not fit is not simulated, and of long schedules only the first part, which repeats. The same arguments
always give the same mesh.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from raytron.config import MeshConfig, RunConfig
from raytron.errors import ConfigError, Problem, ScheduleError
from raytron.plan import draw, flops
from raytron.plan.activations import Device
from raytron.plan.auto import resolved
from raytron.plan.cluster import ClusterShape
from raytron.plan.memory import estimate, least_state, stage_held
from raytron.plan.mesh import MeshShape
from raytron.plan.meshes import Option, Workers, as_configured, on_mesh, others, standing
from raytron.plan.plan import Plan, make_plan, memory_limit
from raytron.plan.schedule import generate
from raytron.plan.simulate import simulate
from raytron.plan.times import Times
from raytron.plan.weigh import mean_forward, stage_cost, stages_of
from raytron.rules import chunks_given

ALIKE = 0.01  # steps that differ by less count as equally long
SIMULATED = 24  # options that fit, at most
TRIED = 4  # numbers of data-parallel ranks that take equally long, at most
PERIODS = 3  # micro-batches for each pipeline rank that are simulated at most, where more follow in the same rhythm
SHOWN = 6


@dataclass(frozen=True)
class Candidate:
    """A mesh that was weighed. length: of a step, over that of the configured mesh; bytes: on the fullest device."""

    mesh: MeshShape
    most: int
    fewest: int
    length: float = math.inf
    bytes: int = 0
    why_not: str = ""

    @property
    def dealt(self) -> str:
        """How many micro-batches a rank runs."""
        return f"{self.most}" if self.most == self.fewest else f"{self.most} or {self.fewest}"

    @property
    def step(self) -> str:
        """The length of a step."""
        return "" if math.isinf(self.length) else f"{self.length:.2f}×"


@dataclass(frozen=True)
class Resized:
    """What to go on with. workers: that each node has; standing: that the mesh takes; candidates: the chosen one first."""

    plan: Plan
    workers: tuple[int, ...]
    standing: tuple[int, ...]
    candidates: tuple[Candidate, ...]

    @property
    def length(self) -> float:
        """Of a step, over that of the configured mesh."""
        return self.candidates[0].length

    @property
    def spares(self) -> int:
        """Workers that the mesh leaves over."""
        return sum(self.workers) - self.plan.mesh.world

    def __str__(self) -> str:
        best = self.candidates[0]
        spare = f", {self.spares} left as {'a spare' if self.spares == 1 else 'spares'}" if self.spares else ""
        head = f"elastic   {best.mesh} for {draw.plural(sum(self.workers), 'worker')}{spare}"
        rows = [
            [
                f"  {each.mesh}",
                f"{each.mesh.world}",
                each.dealt,
                each.step,
                draw.size(each.bytes) if each.bytes else "",
                each.why_not or "chosen",
            ]
            for each in self.candidates[:SHOWN]
        ]
        more = len(self.candidates) - SHOWN
        tail = [f"  and {more} more"] if more > 0 else []
        return "\n".join([head, draw.table(["", "workers", "micro-batches", "step", "bytes", "why not"], rows), *tail])


def best_plan(
    config: RunConfig, workers: int | Workers, cluster: ClusterShape | None = None, times: Times | None = None
) -> Resized:
    """The plan that `config`'s run goes on with on some workers.

    config: with the mesh that the run was made for; it stays the measure of all later ones. workers: on each node, or
    together. cluster: what is known of their devices; None: memory is bounded by pipeline.memory_gb alone. times: measured
    ones of the run. Raises ConfigError where there are too few workers, or no mesh is legal and fits.
    """
    nodes = (workers,) if isinstance(workers, int) else tuple(workers)
    used = _bounded(config, nodes)
    search = _Search(config, cluster, times)
    found = search.best(as_configured(config, used)) or search.best(
        sorted(others(config, used), key=lambda option: (option.bound(), search.unlike(option.meshes[0])))
    )
    if found is None:
        raise ConfigError([_nothing(config, sum(used), search)])
    best, made = found
    said = [best, *sorted(search.weighed, key=lambda each: (each.length, each.mesh.world))]
    return Resized(
        plan=make_plan(made, cluster, times),
        workers=nodes,
        standing=standing(used, best.mesh.tp, best.mesh.world),
        candidates=tuple(_explained(said)),
    )


class _Weighed(NamedTuple):
    """A candidate with its configuration."""

    candidate: Candidate
    config: RunConfig
    unlike: int  # how many of tp, pp, cp, ep and etp differ from the configured ones


class _Search:
    """Weighs options of one configuration."""

    def __init__(self, config: RunConfig, cluster: ClusterShape | None, times: Times | None):
        self.config, self.times = config, times
        self.device: Device = _device(config, cluster)
        self.weighed: list[Candidate] = []  # those that were not chosen, too
        self._lengths: dict[tuple[object, ...], float] = {}
        self.whole = self._length(_named(config))
        limit = memory_limit(config, cluster)  # the configured mesh was accepted with what it needs
        self.limit = None if limit is None else max(limit, self._bytes(_named(config)))

    def best(self, options: Iterable[Option]) -> tuple[Candidate, RunConfig] | None:
        """The best of options that come in the order of their bounds."""
        fitting: list[_Weighed] = []
        for option in options:
            shortest = min((each.candidate.length for each in fitting), default=math.inf)
            if len(fitting) == SIMULATED or self._bound(option) > shortest * (1 + ALIKE):
                break
            found = self._first_that_fits(option)
            if found is not None:
                fitting.append(found)
        if not fitting:
            return None
        shortest = min(each.candidate.length for each in fitting)
        near = [each for each in fitting if each.candidate.length <= shortest * (1 + ALIKE)]
        chosen = min(near, key=lambda each: (each.unlike, each.candidate.mesh.world, each.candidate.bytes))
        self.weighed.remove(chosen.candidate)
        return chosen.candidate, chosen.config

    def unlike(self, mesh: MeshConfig) -> int:
        """How many axes differ from the configured ones, dp aside."""
        return sum(getattr(mesh, axis) != getattr(self.config.mesh, axis) for axis in ("tp", "pp", "cp", "ep", "etp"))

    def _first_that_fits(self, option: Option) -> _Weighed | None:
        """The mesh with the fewest workers of those that take equally long; axes as configured go first."""
        for mesh in sorted(option.meshes, key=lambda mesh: (self.unlike(mesh), mesh.dp))[:TRIED]:
            candidate, moved = self._weigh(mesh)
            self.weighed.append(candidate)
            if moved is not None and not candidate.why_not:
                return _Weighed(candidate, moved, self.unlike(mesh))
        return None

    def _weigh(self, mesh: MeshConfig) -> tuple[Candidate, RunConfig | None]:
        """A mesh with what it needs and takes, or why it will not do."""
        deal = self.config.deal()._replace(ranks=mesh.dp)
        candidate = Candidate(MeshShape.of(mesh), deal.most, deal.fewest)
        least = least_state(replace(self.config, mesh=mesh))
        if self._too_large(least):
            return replace(candidate, bytes=least, why_not=f"needs more than {draw.size(least)}"), None
        moved = on_mesh(self.config, mesh)
        if moved is None:
            return replace(candidate, why_not="not legal"), None
        least += self._least_activations(_named(moved))
        if self._too_large(least):
            return replace(candidate, bytes=least, why_not=f"needs more than {draw.size(least)}"), None
        try:
            candidate = replace(candidate, bytes=self._bytes(_named(moved)))
            if self._too_large(candidate.bytes):
                return replace(candidate, why_not=f"needs {draw.size(candidate.bytes)}"), None
            return replace(candidate, length=self._length(_named(moved)) / self.whole), moved
        except ScheduleError as error:
            return replace(candidate, why_not=str(error)), None

    def _too_large(self, needed: int) -> bool:
        return self.limit is not None and needed > self.limit

    def _least_activations(self, config: RunConfig) -> int:
        """Bytes that the first pipeline rank keeps at least, where it has one stage: of a micro-batch for each rank."""
        if config.pipeline.chunks > 1:
            return 0
        held = stage_held(config, stages_of(config, config.mesh.pp), 0, self.device)
        return held.device * min(config.microbatches, config.mesh.pp)

    def _bytes(self, config: RunConfig) -> int:
        """On the fullest rank; what each micro-batch adds (under gpipe, or where sends stay) is the same for all."""
        part, rest = _first_part(config)
        held = self._held(config, part)
        if rest:
            before = self._held(config, part - config.mesh.pp)
            held = [now + rest * (now - then) // config.mesh.pp for now, then in zip(held, before, strict=True)]
        return max(held)

    def _held(self, config: RunConfig, microbatches: int) -> list[int]:
        """Bytes of each rank, in a schedule of some micro-batches."""
        stages = stages_of(config, config.mesh.pp * config.pipeline.chunks)
        name, chunks, cost = config.pipeline.schedule, config.pipeline.chunks, stage_cost(config, stages, self.times)
        memory = estimate(config, stages, generate(name, config.mesh.pp, chunks, microbatches, cost), self.device)
        return [rank.total + (rank.host if self.device == "cpu" else 0) for rank in memory.ranks]

    def _length(self, config: RunConfig) -> float:
        """Of a step on the rank with most micro-batches, in FLOPs of one token."""
        part, rest = _first_part(config)
        length = self._simulated(config, part)
        if rest:
            length += rest * (length - self._simulated(config, part - config.mesh.pp)) / config.mesh.pp
        return length / (config.mesh.tp * config.mesh.cp)

    def _simulated(self, config: RunConfig, microbatches: int) -> float:
        """The length of a schedule on ranks that are not cut by tp and cp."""
        pp, chunks, name = config.mesh.pp, config.pipeline.chunks, config.pipeline.schedule
        stages = stages_of(config, pp * chunks)
        key = (name, chunks, microbatches, stages)
        if key not in self._lengths:
            cost = stage_cost(config, stages, self.times)
            line = simulate(generate(name, pp, chunks, microbatches, cost), cost)
            span = line.own_span if config.optimizer.at_once else line.makespan
            self._lengths[key] = span * mean_forward(config, stages)
        return self._lengths[key]

    def _bound(self, option: Option) -> float:
        """No step of an option is shorter, over that of the configured mesh; nothing is known of measured actions."""
        if self.times is not None:
            return 0.0
        model, length = self.config.model, self.config.sequence_length
        return option.bound() * flops.flops_per_token(model, length) / self.whole


def _first_part(config: RunConfig) -> tuple[int, int]:
    """How many micro-batches are simulated, and how many follow."""
    part = min(config.microbatches, PERIODS * config.mesh.pp)
    return part, config.microbatches - part


def _named(config: RunConfig) -> RunConfig:
    """With one schedule in place of `auto`: the plan that is made in the end chooses."""
    if config.pipeline.schedule != "auto":
        return config
    chunks = chunks_given(config) or 1
    return resolved(config, "1f1b" if chunks == 1 else "interleaved", chunks)


def _device(config: RunConfig, cluster: ClusterShape | None) -> Device:
    wanted = config.cluster.device if cluster is None else cluster.device(config.cluster)
    return "cuda" if wanted == "cuda" else "cpu"


def _bounded(config: RunConfig, workers: Workers) -> tuple[int, ...]:
    """At most elastic.max_workers, from the first nodes on. Raises ConfigError for fewer than elastic.min_workers."""
    there, fewest = sum(workers), config.elastic.fewest
    if there < fewest:
        what = (
            f"the run needs {draw.plural(fewest, 'worker')} at least, and there {'is' if there == 1 else 'are'} {there}"
        )
        raise ConfigError([Problem("elastic.min_workers", what, f"wait for {fewest - there} more, or lower it")])
    left, out = config.elastic.most(there), []
    for count in workers:
        out.append(min(left, count))
        left -= out[-1]
    return tuple(out)


def _nothing(config: RunConfig, workers: int, search: _Search) -> Problem:
    """Why no mesh will do."""
    sized = [each for each in search.weighed if each.bytes]
    least = min(sized, key=lambda each: (each.why_not.startswith("needs more"), each.bytes), default=None)
    what = f"no mesh for {draw.plural(workers, 'worker')} is legal"
    remedy = "wait for more workers, or change model.heads, model.layers or the batch"
    if least is not None:
        room = "" if search.limit is None else f", and a device may hold {draw.size(search.limit)}"
        what = f"no mesh for {draw.plural(workers, 'worker')} fits: {least.mesh} {least.why_not}{room}"
        remedy = "wait for more workers, or set memory.recompute to full, a higher data_parallel.zero or offload"
    return Problem("elastic.min_workers", what, remedy)


def _explained(candidates: Sequence[Candidate]) -> Iterator[Candidate]:
    """With the reason of each that lost to the first."""
    best = candidates[0]
    yield best
    for each in candidates[1:]:
        slower = each.length / best.length - 1
        if each.why_not:
            yield each
        elif slower > ALIKE:
            yield replace(each, why_not=f"{100 * slower:.1f} % slower")
        else:
            more = each.mesh.world - best.mesh.world
            yield replace(
                each, why_not=f"as fast, {draw.plural(more, 'worker')} more" if more > 0 else "as fast, less like"
            )
