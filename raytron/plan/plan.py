"""The plan of a run: everything that is decided before a device is touched, as one value.

`make_plan` checks a configuration, cuts the layers into stages, generates the schedule, proves on paper that it ends, and
counts bytes and FLOPs. Workers get the plan and hold no policy of their own; to go on with other resources is to make
another plan.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby

from raytron.config import LearningRateConfig, RunConfig
from raytron.errors import ConfigError, Problem, ScheduleError
from raytron.plan import draw, fit, flops
from raytron.plan.activations import Device
from raytron.plan.auto import Choice, choose, resolved
from raytron.plan.cluster import ClusterShape, NodeShape, too_small
from raytron.plan.memory import Memory, estimate
from raytron.plan.mesh import MeshShape
from raytron.plan.names import unmatched
from raytron.plan.schedule import Schedule, forward_only, generate
from raytron.plan.simulate import Cost, Timeline, simulate
from raytron.plan.times import Times
from raytron.plan.weigh import stage_cost, stages_of
from raytron.rules import problems

SWITCH = 0.02  # share of a step that another schedule has to gain
USABLE = 0.9  # of a device's memory: the rest is fragmentation, workspaces and what the framework takes

__all__ = ["ClusterShape", "NodeShape", "Plan", "make_plan", "replan"]


@dataclass(frozen=True)
class Plan:
    """What every worker of a run carries out.

    stages: the layers [a, b) of each global stage. schedule: of the data-parallel rank 0, of which none has more
    micro-batches. evaluation: the same with forwards alone and the same placement. memory: bytes on each pipeline rank.
    timeline: the simulated schedule; its unit is the mean forward of a stage. choice: what was tried where the schedule is
    `auto`.
    """

    config: RunConfig
    mesh: MeshShape
    stages: tuple[tuple[int, int], ...]
    schedule: Schedule
    evaluation: Schedule
    memory: Memory
    timeline: Timeline
    cluster: ClusterShape | None = None
    choice: Choice | None = None

    def schedule_for(self, sequences: int, dp: int = 0) -> Schedule:
        """The schedule of the data-parallel rank `dp` in a step with a global batch of some size: on the way up a batch ramp
        there are fewer micro-batches, and the last ranks may have one less (`raytron.deal`)."""
        config = self.config
        microbatches = config.microbatches_run(dp, sequences)
        if microbatches == self.schedule.microbatches:
            return self.schedule
        chunks = len(self.stages) // self.mesh.pp
        return _generated(self.schedule.name, self.mesh.pp, chunks, microbatches, stage_cost(config, self.stages))

    def evaluation_for(self, dp: int) -> Schedule:
        """The schedule of the data-parallel rank `dp` in an evaluation."""
        return _forwards(self.schedule.rank_of, self.config.microbatches_run(dp))

    def retuned(self, lr: LearningRateConfig) -> Plan:
        """The same with another learning rate, which nothing else of a plan depends on."""
        return replace(self, config=replace(self.config, lr=lr))

    @property
    def tokens_per_step(self) -> int:
        """Tokens of all ranks in one optimizer step."""
        return self.config.global_batch_size * self.config.sequence_length

    @property
    def bubble(self) -> float:
        """The expected share of a step's forwards and backwards in which the busiest pipeline rank is idle."""
        return self.timeline.bubble

    @property
    def flops_per_token(self) -> float:
        """Model FLOPs of training for each token, by `raytron.plan.flops.FORMULA`."""
        return flops.flops_per_token(self.config.model, self.config.sequence_length)

    @property
    def device(self) -> Device:
        """What the ranks run on: as the cluster decides, without one as configured, and then `auto` is a CPU."""
        return _device(self.config, self.cluster)

    @property
    def alternatives(self) -> dict[str, Memory]:
        """The memory of this plan with other treatments of activations."""
        return fit.compared(self.config, self.stages, self.schedule, self.device)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is allowed but will hardly do well on the plan's cluster."""
        return () if self.cluster is None else tuple(_warnings(self, self.cluster))

    def __str__(self) -> str:
        parts = [_head(self), _pipeline(self), _bytes(self), _work(self)]
        return "\n\n".join([*parts, *(f"warning: {text}" for text in self.warnings)])


def make_plan(
    config: RunConfig,
    cluster: ClusterShape | None,
    times: Times | None = None,
    report: Callable[[str], None] | None = None,
) -> Plan:
    """The plan of a run on a cluster; None: without regard to one.

    times: measured ones, for the choice of a schedule and its timeline; None: by FLOPs. report: is told what `auto`
    simulates. Raises ConfigError with every problem of the configuration, a mesh that is larger than the cluster included.
    """
    found = problems(config)
    if not {problem.where.partition(".")[0] for problem in found} & {"model", "optimizer"}:
        found += unmatched(config.optimizer.groups, config.model)
    if cluster is not None and not {"mesh", "cluster"} & {problem.where.split(".")[0] for problem in found}:
        mesh = MeshShape.of(config.mesh)
        found += too_small(cluster, config.cluster, mesh.world, str(mesh))
    if found:
        raise ConfigError(found)
    choice, chosen, device = None, config, _device(config, cluster)
    if config.pipeline.schedule == "auto":
        choice = choose(config.replace(**{"cluster.device": device}), memory_limit(config, cluster), times, report)
        chosen = resolved(config, choice.best.name, choice.best.chunks)
    pp, chunks = config.mesh.pp, chosen.pipeline.chunks
    stages = stages_of(chosen, pp * chunks)
    cost = stage_cost(chosen, stages, times)
    schedule = generate(chosen.pipeline.schedule, pp, chunks, config.microbatches, cost)
    evaluation = _forwards(schedule.rank_of, config.microbatches)
    plan = Plan(
        config=config,
        mesh=MeshShape.of(config.mesh),
        stages=stages,
        schedule=schedule,
        evaluation=evaluation,
        memory=estimate(chosen, stages, schedule, device),
        timeline=simulate(schedule, cost),
        cluster=cluster,
        choice=choice,
    )
    found = list(_fewer_microbatches(plan))
    if found:
        raise ConfigError(found)
    return plan


def _fewer_microbatches(plan: Plan) -> Iterator[Problem]:
    """The first batch size on the way up a ramp that the schedule does not take: `auto` chooses for the full one. That of
    the ranks that have one micro-batch less is proved, too."""
    plan.evaluation_for(plan.mesh.dp - 1)
    plan.schedule_for(plan.config.global_batch_size, plan.mesh.dp - 1)
    for size in plan.config.batch_sizes[:-1]:
        try:
            for dp in (0, plan.mesh.dp - 1):
                plan.schedule_for(size, dp)
        except ScheduleError as error:
            what = f"{plan.schedule.name} is for the full batch, and with {size} sequences: {error}"
            yield Problem("batch_ramp.start", what, "name another pipeline.schedule, such as 1f1b, or start higher")
            return


def replan(plan: Plan, times: Times, report: Callable[[str], None] | None = None) -> tuple[Plan, str]:
    """Chooses anew, with measured times, for a plan whose schedule was chosen: the plan to go on with, and why.

    It is the same plan unless another schedule is faster by SWITCH: to change is to save, and to build anew.
    """
    other = make_plan(plan.config, plan.cluster, times, report)
    assert plan.choice is not None
    assert other.choice is not None
    was, best = plan.choice.best, other.choice.best
    now = next(item for item in other.choice.candidates if (item.name, item.chunks) == (was.name, was.chunks))
    gain = 1 - other.choice.length(best) / other.choice.length(now)
    if best is now or gain < SWITCH:
        return plan, f"{was} stays: by {times}, {best} would be {100 * max(0.0, gain):.1f} % faster"
    return other, f"{best} after {was}: {100 * gain:.1f} % faster by {times}"


def memory_limit(config: RunConfig, cluster: ClusterShape | None) -> int | None:
    """Bytes that a worker may fill, where that is said or known."""
    if config.pipeline.memory_gb is not None:
        return round(config.pipeline.memory_gb * 2**30)
    known = None if cluster is None else cluster.worker_memory(config.cluster)
    return None if known is None else round(USABLE * known)


def _device(config: RunConfig, cluster: ClusterShape | None) -> Device:
    wanted = config.cluster.device if cluster is None else cluster.device(config.cluster)
    return "cuda" if wanted == "cuda" else "cpu"


@functools.lru_cache(maxsize=64)
def _generated(name: str, pp: int, chunks: int, microbatches: int, cost: Cost) -> Schedule:
    schedule = generate(name, pp, chunks, microbatches, cost)
    simulate(schedule)
    return schedule


@functools.lru_cache(maxsize=64)
def _forwards(rank_of: tuple[int, ...], microbatches: int) -> Schedule:
    schedule = forward_only(rank_of, microbatches)
    simulate(schedule)
    return schedule


def _warnings(plan: Plan, cluster: ClusterShape) -> Iterator[str]:
    config = plan.config
    if plan.device == "cuda":
        gpus = max(int(node.gpus) for node in cluster.nodes)
        if plan.mesh.tp > gpus:
            yield f"tensor parallel over {plan.mesh.tp} ranks crosses nodes, the largest of which has {gpus} GPUs"
    limit = memory_limit(config, cluster)
    yield from fit.warnings(config, limit, plan.device, plan.memory, lambda: plan.alternatives)


def _head(plan: Plan) -> str:
    config, model, mesh = plan.config, plan.config.model, plan.mesh
    heads = f"{model.heads} heads" + (f" ({model.num_kv_heads} KV)" if model.num_kv_heads != model.heads else "")
    where = f" on {plan.cluster}" if plan.cluster is not None else ""
    along = ", sequence parallel" if config.mesh.sequence_parallel and mesh.tp > 1 else ""
    lines = [
        f"{config.name}: {draw.counted(flops.parameters(model))} parameters{_active(plan)}, "
        f"{draw.plural(config.steps, 'step')} of "
        f"{plan.tokens_per_step:,} tokens",
        f"model     {model.layers} layers, hidden {model.hidden}, {heads}, feed-forward {model.ffn} "
        f"{model.activation}, vocabulary {model.vocab}",
        *_experts(plan),
        f"mesh      {mesh}: {draw.plural(mesh.world, 'worker')}{where}",
        f"state     ZeRO {config.data_parallel.zero}{along}, {config.precision.dtype}",
        f"batch     {config.global_batch_size} sequences of {config.sequence_length} tokens = "
        f"{_dealt(plan)}{_ramp(plan)}",
    ]
    return "\n".join(lines)


def _dealt(plan: Plan) -> str:
    """The micro-batches of the replicas."""
    config, deal = plan.config, plan.config.deal()
    if deal.most == deal.fewest:
        return f"{draw.plural(deal.ranks, 'replica')} × {deal.most} micro-batches × {config.micro_batch_size}"
    empty = ", filled up with empty ones" if config.lockstep else ""
    return f"{deal.total} micro-batches × {config.micro_batch_size}: {deal} replicas{empty}"


def _active(plan: Plan) -> str:
    """How many of the parameters a token goes through, where they are not all."""
    model = plan.config.model
    return f" ({draw.counted(flops.active_parameters(model))} active)" if model.experts.count else ""


def _experts(plan: Plan) -> list[str]:
    """What the layers of experts are and how they are cut, in one line; none without experts."""
    model, mesh, experts = plan.config.model, plan.mesh, plan.config.model.experts
    if experts.count == 0:
        return []
    shared = f" and a shared one of {experts.shared_ffn}" if experts.shared_ffn else ""
    room = "dropless" if experts.capacity_factor is None else f"capacity factor {experts.capacity_factor:g}"
    fold = (
        f"a plane's {mesh.dp * mesh.cp * mesh.tp} ranks fold as edp {mesh.size('edp')} · ep {mesh.ep} · etp {mesh.etp}"
    )
    return [
        f"experts   in {draw.plural(model.expert_layers, 'layer')}, {experts.top_k} of {experts.count} of width "
        f"{model.expert_ffn}{shared}, {room}; {fold}"
    ]


def _ramp(plan: Plan) -> str:
    """How the batch gets there, where it does not begin at its full size."""
    config = plan.config
    if config.batch_ramp.start is None:
        return ""
    return f", from {config.batch_ramp.start} over the first {config.batch_ramp.samples:,} sequences"


def _pipeline(plan: Plan) -> str:
    runs = [(size, len(list(same))) for size, same in groupby(end - begin for begin, end in plan.stages)]
    shown = " ".join(f"{size}" if count == 1 else f"{count}×{size}" for size, count in runs)
    pipeline = plan.config.pipeline
    how = "balanced by cost" if pipeline.split is None and pipeline.layout is None else "as configured"
    head = [
        f"stages    {shown} layers, {how} with embedding and loss head",
        f"schedule  {plan.schedule.name}, expected bubble {100 * plan.bubble:.1f} % of the busiest rank, "
        f"{100 * plan.timeline.mean_idle:.1f} % over all ranks",
    ]
    if plan.mesh.pp == 1:
        return "\n".join(head)
    chunks = len(plan.stages) // plan.mesh.pp
    spans = f"makespan {plan.timeline.makespan / chunks:.2f}, a rank's own span {plan.timeline.own_span / chunks:.2f}"
    head.append(
        f"          {spans}: in mean forwards of a rank, for {draw.plural(plan.schedule.microbatches, 'micro-batch')}"
    )
    if plan.choice is not None:
        head.append(str(plan.choice))
    return "\n".join([*head, draw.schedule_text(plan.schedule, rows=8)])


def _bytes(plan: Plan) -> str:
    columns = ["weights", "gradients", "optimizer", "activations", "loss", "working", "total"]
    ranks = plan.memory.ranks
    if any(rank.host for rank in ranks):
        columns.append("host")
    rows = []
    for index in range(len(ranks)) if len(ranks) <= 8 else (*range(7), len(ranks) - 1):
        name = f"pipeline rank {index}" if plan.mesh.pp > 1 else "each rank"
        peak = f"{plan.timeline.peak_at_weight_grad[index]}"
        rows.append([name, peak, *(draw.size(getattr(ranks[index], column)) for column in columns)])
    if len(ranks) > 8:
        rows.insert(7, ["…", *[""] * (1 + len(columns))])
    note = "bytes on a device; live: micro-batches in flight at most; working: beside it within an action, an estimate"
    return "\n".join(
        [draw.table(["memory", "live", *columns], rows), note, "", fit.table(plan.memory, plan.alternatives)]
    )


def _work(plan: Plan) -> str:
    model, length = plan.config.model, plan.config.sequence_length
    full = flops.flops_per_token(model, length, full_attention=True)
    lines = [
        f"work      {draw.amount(plan.flops_per_token, 'FLOP')} per token, "
        f"{draw.amount(plan.flops_per_token * plan.tokens_per_step, 'FLOP')} per step "
        f"(not counting causality: {draw.amount(full, 'FLOP')} per token)",
        f"          = {flops.FORMULA}",
        f"          = {flops.formula(model, length)}",
    ]
    return "\n".join(lines)
