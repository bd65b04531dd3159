"""Every parameter of a model as a value: its name, its shape, how the mesh cuts it. No tensor is made.

The list says what `raytron.model` builds, in the same order, which is the order of the forward pass; a test holds the two
together. From it the plan counts weights, gradients and optimizer state to the byte.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from raytron.config import ModelConfig, RunConfig
from raytron.plan.mesh import Axis, MeshShape
from raytron.plan.split import Range


class Parameter(NamedTuple):
    """One parameter. cuts: (mesh axis, tensor dimension, how many neighbouring ranks hold the same slice)."""

    name: str
    shape: tuple[int, ...]  # of the whole
    cuts: tuple[tuple[Axis, int, int], ...] = ()
    expert: bool = False  # of experts: data parallel over edp

    def local_shape(self, mesh: MeshShape) -> tuple[int, ...]:
        """What every rank allocates, padding included."""
        shape = list(self.shape)
        for axis, dim, repeat in self.cuts:
            shape[dim] = -(-shape[dim] // max(1, mesh.size(axis) // repeat))
        return tuple(shape)

    @property
    def is_hidden_matrix(self) -> bool:
        """Whether Muon updates it where it is chosen."""
        if not (self.name.startswith("layers.") and self.name.endswith(".weight")) or len(self.shape) < 2:
            return False
        rows = math.prod(self.shape[:-1]) if ".attention." in self.name else self.shape[-2]
        if self.name.endswith(".attention.kv.weight"):
            rows //= 2  # keys and values are two
        return min(rows, self.shape[-1]) > 1


def rank_parameters(config: RunConfig, stages: Sequence[Range], own: Sequence[int]) -> list[Parameter]:
    """The parameters of a rank that holds the stages `own`, each once."""
    found: dict[str, Parameter] = {}
    for stage in own:
        for parameter in stage_parameters(config, stages, stage):
            found.setdefault(parameter.name, parameter)  # a tied table that one rank embeds and predicts with
    return list(found.values())


def stage_parameters(config: RunConfig, stages: Sequence[Range], stage: int) -> Iterator[Parameter]:
    """The parameters of one stage, in the order of the forward pass."""
    model, first, last = config.model, stage == 0, stage == len(stages) - 1
    if first or (last and model.tied_embeddings):
        yield _cut("embed.weight", (model.vocab, model.hidden), 0)
    if first and model.positions == "learned":
        yield Parameter("position.weight", (model.max_positions, model.hidden))
    for index in range(*stages[stage]):
        yield from _layer(model, index, config.mesh.tp)
    if last:
        yield from _norm(model, "norm")
        if not model.tied_embeddings:
            yield _cut("head.weight", (model.vocab, model.hidden), 0)


def elements(parameters: Sequence[Parameter], mesh: MeshShape) -> int:
    """Elements that a rank allocates for some parameters."""
    return sum(math.prod(parameter.local_shape(mesh)) for parameter in parameters)


def _cut(name: str, shape: tuple[int, ...], dim: int, repeat: int = 1) -> Parameter:
    return Parameter(name, shape, (("tp", dim, repeat),))


def _layer(model: ModelConfig, index: int, tp: int) -> Iterator[Parameter]:
    name = f"layers.{index}"
    yield from _norm(model, f"{name}.attention.norm")
    yield from _attention(model, f"{name}.attention", max(1, tp // model.num_kv_heads))
    yield from _norm(model, f"{name}.mlp.norm")
    if model.has_experts(index):
        yield from _mixture(model, f"{name}.mlp")
    else:
        yield from _feed_forward(model, f"{name}.mlp", model.ffn)


def _norm(model: ModelConfig, name: str) -> Iterator[Parameter]:
    yield Parameter(f"{name}.weight", (model.hidden,))
    if model.norm == "layernorm":
        yield Parameter(f"{name}.bias", (model.hidden,))


def _attention(model: ModelConfig, name: str, repeat: int) -> Iterator[Parameter]:
    heads, kv_heads, width = model.heads, model.num_kv_heads, model.dim_per_head
    yield _cut(f"{name}.q.weight", (heads, width, model.hidden), 0)
    yield _cut(f"{name}.kv.weight", (kv_heads, 2, width, model.hidden), 0, repeat)
    yield _cut(f"{name}.out.weight", (model.hidden, heads * width), 1)
    if model.qkv_bias:
        yield _cut(f"{name}.q.bias", (heads, width), 0)
        yield _cut(f"{name}.kv.bias", (kv_heads, 2, width), 0, repeat)
    if model.bias:
        yield Parameter(f"{name}.out.bias", (model.hidden,))
    if model.qk_norm:
        yield Parameter(f"{name}.q_norm.weight", (width,))
        yield Parameter(f"{name}.k_norm.weight", (width,))


def _feed_forward(model: ModelConfig, name: str, width: int) -> Iterator[Parameter]:
    wide = (2, width) if model.gated else (width,)
    yield _cut(f"{name}.up.weight", (*wide, model.hidden), len(wide) - 1)
    yield _cut(f"{name}.down.weight", (model.hidden, width), 1)
    if model.bias:
        yield _cut(f"{name}.up.bias", wide, len(wide) - 1)
        yield Parameter(f"{name}.down.bias", (model.hidden,))


def _mixture(model: ModelConfig, name: str) -> Iterator[Parameter]:
    experts, width = model.experts, model.expert_ffn
    wide = (2, width) if model.gated else (width,)
    up, down = (experts.count, *wide, model.hidden), (experts.count, model.hidden, width)
    yield Parameter(f"{name}.router.weight", (experts.count, model.hidden))
    yield Parameter(f"{name}.experts.up.weight", up, (("ep", 0, 1), ("etp", len(wide), 1)), expert=True)
    yield Parameter(f"{name}.experts.down.weight", down, (("ep", 0, 1), ("etp", 2, 1)), expert=True)
    if experts.shared_ffn:
        yield from _feed_forward(model, f"{name}.shared", experts.shared_ffn)
    if experts.shared_gate:
        yield Parameter(f"{name}.shared.gate.weight", (1, model.hidden))
