"""Builds what one rank of a mesh holds of the model: its pipeline stages, and how their parameters hang together."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from raytron.config import RunConfig
from raytron.model.balance import Balance
from raytron.model.build import Builder
from raytron.model.router import Router
from raytron.model.stage import Stage
from raytron.parallel.context import ContextParallel
from raytron.parallel.expert import ExpertParallel
from raytron.parallel.mesh import Group, Mesh
from raytron.parallel.offload import Offload
from raytron.parallel.parameter import Param
from raytron.parallel.shares import keep_share
from raytron.parallel.tensor import TensorParallel
from raytron.plan.mesh import Axis, Coords
from raytron.plan.plan import Plan
from raytron.plan.recompute import treatments

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Assembly:
    """One rank's part of the model."""

    stages: dict[int, Stage]  # by stage number, ascending
    params: list[Param]  # each once, in the order of the forward pass
    parallel: TensorParallel
    context_parallel: ContextParallel
    dtype: torch.dtype
    tied: tuple[Param, Group] | None  # an embedding with a copy on another rank, and the holders of the copies
    experts: ExpertParallel | None  # None: the model has none
    balance: Balance

    def uses(self, param: Param) -> int:
        """How many gradients one micro-batch brings a parameter: two for a table that embeds and also predicts."""
        tables = [
            table for stage in self.stages.values() for table in (stage.table if stage.first else None, stage.head)
        ]
        return max(1, sum(table is param for table in tables))


def assemble(plan: Plan, mesh: Mesh) -> Assembly:
    """The stages that the plan gives this rank, with their initial values."""
    config = plan.config
    dtype = DTYPES[config.precision.dtype]
    parallel = TensorParallel(mesh.tp, config.mesh.sequence_parallel)
    context_parallel = ContextParallel.of(mesh)
    copies = max(1, mesh.tp.size // config.model.num_kv_heads)
    mesh.neighbours(copies)  # the holders of a KV head: made by all ranks, also those without a layer
    experts = ExpertParallel(mesh, config.mesh) if config.model.experts.count else None
    build = Builder(
        parallel, context_parallel, mesh.place, config.seed, dtype, mesh.device, experts, partial(_shed, config, mesh)
    )
    offload = None
    if config.memory.offload_activations:
        offload = Offload(mesh.device, round(config.memory.offload_min_mb * 2**20))
    stages: dict[int, Stage] = {}
    last = len(plan.stages) - 1
    table: Param | None = None
    for number, (start, stop) in enumerate(plan.stages):
        if plan.schedule.rank_of[number] != mesh.coords.pp:
            continue
        stage = Stage(
            build,
            config.model,
            range(start, stop),
            first=number == 0,
            last=number == last,
            treatments=treatments(config.memory, number, number == last, stop - start),
            loss_chunks=config.memory.loss_chunks,
            offload=offload,
            embedding=table if config.model.tied_embeddings and number == last else None,
        )
        table = stage.table if number == 0 else table
        stages[number] = stage
    routers = [part for stage in stages.values() for part in stage.modules() if isinstance(part, Router)]
    balance = Balance(routers, config.model.expert_layers, config.model.experts, experts)
    tied = _tied(config, plan, mesh, stages)
    return Assembly(stages, build.params, parallel, context_parallel, dtype, tied, experts, balance)


def _shed(config: RunConfig, mesh: Mesh, param: Param) -> None:
    """ZeRO 3: of a new parameter only this rank's share stays."""
    axes: tuple[Axis, ...] = ("eshard",) if param.cut.expert else ("shard", "cp")
    owners = mesh.shape.size(*axes)
    if config.data_parallel.zero == 3 and owners > 1:
        keep_share(param, owners, mesh.shape.index(mesh.rank, *axes))


def _tied(config: RunConfig, plan: Plan, mesh: Mesh, stages: dict[int, Stage]) -> tuple[Param, Group] | None:
    first, last = plan.schedule.rank_of[0], plan.schedule.rank_of[-1]
    if not config.model.tied_embeddings or first == last:
        return None
    if mesh.coords.pp not in (first, last):
        mesh.stand_by()
        return None
    holders = tuple(sorted(mesh.shape.rank(Coords(pp, *mesh.coords[1:])) for pp in (first, last)))
    table = next(stage.table for stage in stages.values() if stage.table is not None)
    return table, mesh.group(holders)
