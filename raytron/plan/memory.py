"""Bytes on each rank, before a device is touched.

Weights, gradients and optimizer state are counted parameter by parameter (`raytron.plan.parameters`), as the run rounds
them, for n elements of a parameter on a rank (its slice over tp or ep · etp, padding included) and D ranks that share it
out (ZeRO 1 and up: shard · cp, for experts eshard), where a share is the widest dimension cut in D and rounded up:

    weights      n · (2 bf16, fp16 | 4 fp32); ZeRO 3 keeps the share of that
    gradients    4n, fp32 sums (where each micro-batch's are reduced, as in ZeRO 2 and 3: only while it goes back), and
                 4 · share where D > 1
    optimizer    an fp32 master of the owned share, unless that stands alone in fp32 already, and its moments: two with
                 AdamW, one with Lion, SGD and Muon (whose other parameters are AdamW's), in fp32 or bf16; AdamW in fp32
                 also counts its steps, 4 bytes for each parameter; none for what is frozen

`optimizer.at_once` keeps masters and moments a second time, as they were a step ago, from the first step on.
Offload keeps gradient shares and optimizer state in host memory. `determinism: canonical` keeps partial sums of
micro-batches: about log₂ of their number.

Activations are what micro-batches keep between actions (`raytron.plan.activations`), followed through the rank's own row
(`raytron.plan.live`). `working` is what an action needs beside, at most, and comes on top: an estimate. Not counted: the
allocator's fragmentation, kernels' workspaces, and what the framework itself takes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

from raytron.config import RunConfig
from raytron.deal import Deal
from raytron.plan import activations, flops
from raytron.plan.activations import FP32, ITEM_BYTES, Device, Sizes
from raytron.plan.live import Held, incoming, kept_after_each
from raytron.plan.mesh import MeshShape
from raytron.plan.names import group_of
from raytron.plan.parameters import Parameter, elements, rank_parameters
from raytron.plan.recompute import Treatment, treatments
from raytron.plan.schedule import Schedule
from raytron.plan.split import Range

MEBIBYTE = 1 << 20
BUCKETS_UNDER_WAY = 3  # of gradients: two that are reduced, and the next
MOMENTS = {"adamw": 2, "muon": 1, "lion": 1, "sgd": 1}


@dataclass(frozen=True)
class RankMemory:
    """Bytes on every rank of one pipeline coordinate; `parameters` is a number of elements.

    activations and loss: at most between two actions. host: what is offloaded, all together.
    """

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    working: int
    host: int

    @property
    def total(self) -> int:
        """On the device."""
        return sum(getattr(self, item.name) for item in fields(self)[1:-1])


@dataclass(frozen=True)
class Memory:
    """By pipeline rank; of the ranks of one pipeline coordinate the one that owns most."""

    ranks: tuple[RankMemory, ...]

    @property
    def largest(self) -> int:
        """Bytes on the fullest rank's device."""
        return max(rank.total for rank in self.ranks)


class State(NamedTuple):
    """Bytes that stay from step to step, or as the sums of gradients through each; host: what of them is offloaded."""

    weights: int
    gradients: int
    optimizer: int
    host: int = 0


def estimate(config: RunConfig, stages: Sequence[Range], schedule: Schedule, device: Device | None = None) -> Memory:
    """Bytes on each pipeline rank when `schedule` runs over `stages`. device: None: as configured, `auto` being a CPU."""
    device = device or ("cuda" if config.cluster.device == "cuda" else "cpu")
    held = [stage_held(config, stages, stage, device) for stage in range(len(stages))]
    return Memory(tuple(_rank(config, stages, schedule, rank, held, device) for rank in range(schedule.num_ranks)))


def _rank(
    config: RunConfig, stages: Sequence[Range], schedule: Schedule, rank: int, held: Sequence[Held], device: Device
) -> RankMemory:
    mesh, message = MeshShape.of(config.mesh), Sizes.of(config).residual
    parameters = rank_parameters(config, stages, schedule.stages_of(rank))
    row = kept_after_each(schedule, rank, held, message, sends_stay=device == "cpu")
    most = max(row, key=lambda kept: kept.device + kept.loss)
    kept = most.device + incoming(schedule, rank) * message
    weights, gradients, optimizer, host = state(config, parameters, device)
    return RankMemory(
        parameters=elements(parameters, mesh),
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=kept,
        loss=most.loss,
        working=activations.working(config, device) + _travelling(config, parameters),
        host=host + max(kept.host for kept in row),
    )


def state(
    config: RunConfig, parameters: Sequence[Parameter], device: Device, owner: int = 0, expert_owner: int = 0
) -> State:
    """Of a rank that holds these parameters. owner, expert_owner: its index among those that share them out."""
    how, item = config.data_parallel, ITEM_BYTES[config.precision.dtype]
    canonical = config.determinism == "canonical"
    weights = sums = shares = optimizer = 0
    for parameter in parameters:
        cut = _Cut.of(config, parameter, expert_owner if parameter.expert else owner)
        weights += item * (cut.share if how.zero == 3 and cut.owners > 1 else cut.elements)
        sums += FP32 * cut.elements * (partial_sums(config.deal()) if canonical else 1)
        shares += FP32 * cut.share if cut.owners > 1 or how.offload or canonical else 0
        if how.reduces_each and cut.owners > 1 and not canonical:
            sums -= FP32 * cut.elements
        alone = cut.owned == cut.elements or (how.zero == 3 and cut.owners > 1)
        if config.precision.dtype != "fp32" or not alone or (how.offload and device == "cuda"):
            optimizer += FP32 * cut.owned
        optimizer += _moments(config, parameter, cut.owned)
        if config.optimizer.at_once:
            optimizer += FP32 * cut.owned + _moments(config, parameter, cut.owned) - _moments(config, parameter, 0)
    if how.offload:
        return State(weights, sums, 0, shares + optimizer)
    return State(weights, sums + shares, optimizer)


def least_state(config: RunConfig) -> int:
    """Bytes that the fullest rank's weights, gradients and optimizer state take at least, without looking at parameters."""
    model, mesh, how = config.model, MeshShape.of(config.mesh), config.data_parallel
    of_experts = model.expert_layers * model.experts.count * model.hidden * model.expert_ffn * (3 if model.gated else 2)
    dense = (flops.parameters(model) - of_experts) / (mesh.pp * mesh.tp)
    kinds = ((dense, mesh.size("shard", "cp")), (of_experts / (mesh.pp * mesh.ep * mesh.etp), mesh.size("eshard")))
    needed = 0.0
    for count, ranks in kinds:
        owners = ranks if _shares_out(config) else 1
        needed += count * ITEM_BYTES[config.precision.dtype] / (owners if how.zero == 3 else 1)
        needed += count * (0 if how.reduces_each and owners > 1 else FP32)
        if not how.offload and not any(group.freeze for group in config.optimizer.groups):
            needed += count * MOMENTS[config.optimizer.name] * ITEM_BYTES[config.precision.moments] / owners
    return int(needed)


@functools.cache
def partial_sums(deal: Deal) -> int:
    """The most sums of micro-batches that a rank holds under `determinism: canonical`, which adds them by one tree over
    their numbers (`raytron.parallel.tree`)."""
    return max(_held_at_most(deal.of(rank), deal.total) for rank in range(deal.ranks))


def _held_at_most(terms: range, count: int) -> int:
    held: set[tuple[int, int]] = set()
    most = 0
    for number in terms:
        level, most = 0, max(most, len(held) + 1)
        while 1 << level < count:
            beside = number ^ 1
            if beside << level < count:
                if (level, beside) not in held:
                    break
                held.remove((level, beside))
            level, number = level + 1, number >> 1
        held.add((level, number))
    return most


class _Cut(NamedTuple):
    """How one parameter is shared out; all but the number of owners in elements."""

    owners: int
    elements: int  # on a rank
    share: int  # rounded up
    owned: int  # by the rank in question

    @classmethod
    def of(cls, config: RunConfig, parameter: Parameter, owner: int) -> _Cut:
        mesh = MeshShape.of(config.mesh)
        shape = parameter.local_shape(mesh)
        widest, count = max(shape), math.prod(shape)
        owners = (mesh.size("eshard") if parameter.expert else mesh.size("shard", "cp")) if _shares_out(config) else 1
        width = -(-widest // owners)
        length = max(0, min(width, widest - width * (owner if owners > 1 else 0)))
        return cls(owners, count, count // widest * width, count // widest * length)


def _shares_out(config: RunConfig) -> bool:
    return config.data_parallel.zero > 0


def _moments(config: RunConfig, parameter: Parameter, count: int) -> int:
    """Bytes of the optimizer's running averages over `count` elements of a parameter."""
    name, bits = config.optimizer.name, config.precision.moments
    if group_of(parameter.name, config.optimizer.groups).freeze:
        return 0
    if name == "muon" and not parameter.is_hidden_matrix:
        name = "adamw"
    steps = FP32 if name == "adamw" and bits == "fp32" and config.determinism == "mesh" else 0
    return count * MOMENTS[name] * ITEM_BYTES[bits] + steps


def _travelling(config: RunConfig, parameters: Sequence[Parameter]) -> int:
    """An estimate of the bytes of gradients and weights on their way: of gradients the buckets whose sums wait to be
    reduced or travel, laid out by owners; with ZeRO 3 of weights the blocks that are gathered."""
    cuts = [_Cut.of(config, parameter, 0) for parameter in parameters]
    blocks: dict[str, int] = {}
    for parameter, cut in zip(parameters, cuts, strict=True):
        name = ".".join(parameter.name.split(".")[:2]) if parameter.name.startswith("layers.") else parameter.name
        blocks[name] = blocks.get(name, 0) + (cut.elements if cut.owners > 1 else 0)
    how, largest = config.data_parallel, max(blocks.values(), default=0)
    bucket = largest if how.zero == 3 else max(how.bucket_mb * MEBIBYTE / FP32, *(cut.elements for cut in cuts))
    under_way = (BUCKETS_UNDER_WAY + (1 if how.reduces_each else 0)) * bucket
    gradients = FP32 * min(under_way, sum(blocks.values()))
    weights = (2 + how.prefetch) * largest * ITEM_BYTES[config.precision.dtype] if how.zero == 3 else 0
    return round(gradients + weights)


def stage_held(config: RunConfig, stages: Sequence[Range], stage: int, device: Device) -> Held:
    """What one micro-batch keeps in one stage."""
    begin, end = stages[stage]
    last = stage == len(stages) - 1
    here = host = deferred = 0
    for layer, treatment in enumerate(treatments(config.memory, stage, last, end - begin), begin):
        smallest = config.memory.offload_min_mb * MEBIBYTE if treatment.offload else math.inf
        storages = activations.block(config, layer, treatment.parts, device)
        here += sum(size for size in storages if size < smallest)
        host += sum(size for size in storages if size >= smallest)
        deferred += sum(activations.block_deferred(config, layer))
    here += sum(activations.first(config)) if stage == 0 else _input(config, stage, last, end - begin)
    here += sum(activations.last(config, device)) if last else 0
    loss = (activations.loss(config), activations.loss_deferred(config)) if last else (0, 0)
    return Held(here, host, deferred, *loss)


def _input(config: RunConfig, stage: int, last: bool, layers: int) -> int:
    """Bytes of a stage's input that its first block does not count; it waits on the device, whatever the block keeps."""
    treatment = next(iter(treatments(config.memory, stage, last, layers)), Treatment())
    residual = Sizes.of(config).residual
    offloaded = treatment.offload and residual >= config.memory.offload_min_mb * MEBIBYTE
    return residual if offloaded else 0
