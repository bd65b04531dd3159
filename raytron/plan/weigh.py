"""What each stage costs, by FLOPs: what layers are cut by, and what a schedule is simulated with until a run has measured.

Embedding and loss head are weighed like layers. The embedding's look-up has no FLOPs; it counts as one pass over the hidden
channels. The attention itself has no weights: its backward belongs to the input gradient alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from raytron.config import RunConfig
from raytron.plan import flops, split
from raytron.plan.cost import Cost
from raytron.plan.split import Range
from raytron.stages import read_stages


def stages_of(config: RunConfig, count: int) -> tuple[Range, ...]:
    """The layers of each of `count` stages: as configured, else balanced."""
    pipeline = config.pipeline
    if pipeline.layout is not None:
        return split.ranges(read_stages(pipeline.layout))
    if pipeline.split is not None:
        return split.ranges(pipeline.split)
    before, layers, after = weights(config)
    return split.ranges(split.balanced(layers, count, before, after))


def weights(config: RunConfig) -> tuple[float, list[float], float]:
    """Forward FLOPs for one token: of the embedding, of each layer, of the loss head."""
    model = config.model
    layers = [flops.layer_forward_flops(model, config.sequence_length)] * model.layers
    return 2.0 * model.hidden, layers, flops.head_forward_flops(model)


def stage_cost(config: RunConfig, stages: Sequence[Range], comm: float = 0.0) -> Cost:
    """What one micro-batch costs in each stage, the mean forward of a stage being 1. comm: of a transfer, in that unit."""
    before, layers, after = weights(config)
    attention = flops.attention_forward_flops(config.model, config.sequence_length)
    forward = [sum(layers[begin:end]) for begin, end in stages]
    forward[0] += before
    forward[-1] += after
    scores = [attention * (end - begin) for begin, end in stages]
    unit = sum(forward) / len(forward)
    pairs = list(zip(forward, scores, strict=True))
    return Cost(
        forward=tuple(f / unit for f in forward),
        input_grad=tuple((f + s) / unit for f, s in pairs),
        weight_grad=tuple((f - s) / unit for f, s in pairs),
        comm=comm,
    )
