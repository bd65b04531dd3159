"""Which weights a stage needs when: its embedding, its blocks one after another, its last norm, its head.

    embedding ─► block ─► block ─► … ─► norm ─► head           a row of units (`raytron.parallel.weights`)

An embedding's backward needs no weights. A table that also is the head belongs to the embedding's unit and to the head's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from torch import Tensor, nn

from raytron.model.stage import Stage
from raytron.parallel.parameter import Param
from raytron.parallel.weights import Gathering

Around = Callable[..., Tensor]  # (function, *arguments) -> function(*arguments), with its weights there


def blocks(stages: Iterable[Stage]) -> list[list[Param]]:
    """The parameters of stages by what uses them, in the order of the forward pass."""
    out: list[list[Param]] = []
    for stage in stages:
        out += [_embedding(stage), *map(_params, stage.layers), _params(stage.norm), _head(stage)]
    return [block for block in out if block]


class StageWeights:
    """Gathers the weights of one stage around their use, if they are shared out at all."""

    def __init__(self, stage: Stage, gathering: Gathering):
        self.embedding: Around = _plain
        self.head: Around = _plain
        if not gathering.needed:
            return
        row = gathering.new_row()
        if stage.first:
            self.embedding = partial(gathering.run, gathering.unit(row, _embedding(stage), backward=False))
        for layer in stage.layers:
            gathering.watch(layer, gathering.unit(row, _params(layer)))
        if stage.norm is not None:
            gathering.watch(stage.norm, gathering.unit(row, _params(stage.norm)))
        if stage.last:
            self.head = partial(gathering.run, gathering.unit(row, _head(stage)))


def _plain(function: Callable[..., Tensor], *arguments: object) -> Tensor:
    return function(*arguments)


def _params(module: nn.Module | None) -> list[Param]:
    return [param for param in module.parameters() if isinstance(param, Param)] if module is not None else []


def _embedding(stage: Stage) -> list[Param]:
    return [param for param in (stage.table, stage.position) if param is not None] if stage.first else []


def _head(stage: Stage) -> list[Param]:
    return [stage.head] if stage.head is not None else []
