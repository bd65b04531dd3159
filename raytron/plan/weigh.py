"""What each stage costs: by FLOPs, or by the times that a run has measured.

Layers are cut by FLOPs, and a schedule is simulated with them until a run has measured. Embedding and loss head are weighed
like layers. The embedding's look-up has no FLOPs; it counts as one pass over the hidden channels. The attention itself has
no weights: its backward belongs to the input gradient alone.

Measured times are those of the stages of one run. For another cut, the time of a stage is shared out over what it holds in
proportion to FLOPs, and gathered anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from raytron.config import RunConfig
from raytron.plan import flops, split
from raytron.plan.actions import Op
from raytron.plan.cost import Cost
from raytron.plan.split import Range
from raytron.plan.times import Times
from raytron.stages import read_stages


class Items(NamedTuple):
    """What one operation costs: of the embedding, of each layer, of the loss head."""

    before: float
    layers: tuple[float, ...]
    after: float

    def by_stage(self, stages: Sequence[Range]) -> tuple[float, ...]:
        """The cost of each stage."""
        sums = [sum(self.layers[begin:end]) for begin, end in stages]
        sums[0] += self.before
        sums[-1] += self.after
        return tuple(sums)

    def scaled(self, stages: Sequence[Range], measured: Sequence[float]) -> Items:
        """The measured time of each stage, shared out."""
        factors = [time / cost if cost else 0.0 for time, cost in zip(measured, self.by_stage(stages), strict=True)]
        layers = [
            self.layers[layer] * factor
            for factor, (begin, end) in zip(factors, stages, strict=True)
            for layer in range(begin, end)
        ]
        return Items(self.before * factors[0], tuple(layers), self.after * factors[-1])


def stages_of(config: RunConfig, count: int) -> tuple[Range, ...]:
    """The layers of each of `count` stages: as configured, else balanced."""
    pipeline = config.pipeline
    if pipeline.layout is not None:
        return split.ranges(read_stages(pipeline.layout))
    if pipeline.split is not None:
        return split.ranges(pipeline.split)
    forward = weights(config)[Op.F]
    return split.ranges(split.balanced(forward.layers, count, forward.before, forward.after))


def weights(config: RunConfig) -> dict[Op, Items]:
    """FLOPs of F, I and W for one token."""
    model = config.model
    attention = flops.attention_forward_flops(model, config.sequence_length)
    layers = [flops.layer_forward_flops(model, config.sequence_length, layer) for layer in range(model.layers)]
    embedding, head = 2.0 * model.hidden, flops.head_forward_flops(model)
    each = {Op.F: 0.0, Op.I: attention, Op.W: -attention}
    return {op: Items(embedding, tuple(layer + more for layer in layers), head) for op, more in each.items()}


def stage_cost(config: RunConfig, stages: Sequence[Range], times: Times | None = None) -> Cost:
    """What one micro-batch costs in each stage, the mean forward of a stage being 1; transfers are free.

    times: as a run has measured them, maybe for other stages; None: by FLOPs.
    """
    forward, inputs, weight = _by_stage(config, stages, times)
    unit = mean_forward(config, stages, times) or 1.0
    forward, inputs, weight = (tuple(cost / unit for cost in costs) for costs in (forward, inputs, weight))
    return Cost(forward, inputs, weight)


def mean_forward(config: RunConfig, stages: Sequence[Range], times: Times | None = None) -> float:
    """What the unit of `stage_cost` is worth: FLOPs of one token, or the seconds that were measured."""
    forward = _by_stage(config, stages, times)[0]
    return sum(forward) / len(forward)


def _by_stage(config: RunConfig, stages: Sequence[Range], times: Times | None) -> tuple[tuple[float, ...], ...]:
    """The costs of F, I and W of each stage."""
    items = weights(config)
    if times is not None:
        items = {op: items[op].scaled(times.stages, measured) for op, measured in _measured(items, times).items()}
    return tuple(items[op].by_stage(stages) for op in (Op.F, Op.I, Op.W))


def _measured(items: dict[Op, Items], times: Times) -> dict[Op, list[float]]:
    """Seconds of F, I and W in each measured stage; a backward that was measured whole is cut in proportion to FLOPs."""
    parts = zip(items[Op.I].by_stage(times.stages), items[Op.W].by_stage(times.stages), strict=True)
    out: dict[Op, list[float]] = {Op.F: [], Op.I: [], Op.W: []}
    for stage, (inputs, weight) in enumerate(parts):
        forward, full, i, w = (times.seconds[op][stage] for op in Op)
        if i is None or w is None:
            full = full or 0.0
            i, w = (full * part / ((inputs + weight) or 1.0) for part in (inputs, weight))
        for op, value in ((Op.F, forward or 0.0), (Op.I, i), (Op.W, w)):
            out[op].append(value)
    return out
