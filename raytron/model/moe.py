"""A feed-forward layer made of experts, of which each token goes to a few (Shazeer et al., arXiv 1701.06538).

    x (s,B,D) ─┬─ router ─ dispatch ─ experts, each a feed-forward layer of width F ─ combine ─┬─ (s,B,D)
               └─ shared expert, through which every token goes, cut over tp ──────────────────┘

    up (E,2,F,D), gated (or (E,F,D))   down (E,D,F)        experts shared out over ep, F cut over etp
    shared: a FeedForward, perhaps weighed by sigmoid(x · g) (Qwen2-MoE)

The shared expert (DeepSeekMoE, arXiv 2401.06066) is computed while the tokens travel. Without sequence parallelism all tp
ranks hold the same tokens: then each takes a share of them through the experts, and the results are gathered.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn

from raytron.config import ModelConfig
from raytron.model.build import Builder
from raytron.model.context import Context
from raytron.model.mlp import ACTIVATIONS, FeedForward, activate
from raytron.model.router import Router
from raytron.parallel.expert import add_penalty, dispatch, give_share, grouped_linear, take_share


class MixtureOfExperts(nn.Module):
    """The feed-forward layer of one rank where a layer has experts."""

    def __init__(self, build: Builder, name: str, model: ModelConfig):
        super().__init__()
        assert build.experts is not None
        config = model.experts
        self.config, self.parallel, self.experts = config, build.parallel, build.experts
        self.activate = functools.partial(activate, ACTIVATIONS[model.activation], model.gated)
        std, small = model.init_std, model.init_std / math.sqrt(2 * model.layers)
        wide = (2, model.expert_ffn) if model.gated else (model.expert_ffn,)
        self.router = Router(build, f"{name}.router", model.hidden, config, std)
        self.up = build.expert(f"{name}.experts.up.weight", (config.count, *wide, model.hidden), std, dim=len(wide))
        self.down = build.expert(
            f"{name}.experts.down.weight", (config.count, model.hidden, model.expert_ffn), small, dim=2
        )
        self.shared = self.gate = None
        if config.shared_ffn:
            self.shared = FeedForward(build, f"{name}.shared", model, config.shared_ffn)
        if config.shared_gate:
            partial = self.parallel.sequence_parallel
            self.gate = build.normal(f"{name}.shared.gate.weight", (1, model.hidden), std, dim=None, partial=partial)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x (s,B,D) -> (s,B,D)."""
        repeated = self.parallel.size > 1 and not self.parallel.sequence_parallel
        own, positions = x, context.positions
        if repeated:
            own = take_share(x, self.parallel.group)
            positions = positions.chunk(self.parallel.size)[self.parallel.rank]
        routing = self.router(own, positions, context.training)
        way = dispatch(self.experts, routing.experts, routing.weights, routing.kept, self.config.count)
        way.start(own.flatten(0, 1))
        shared = self._shared(x, context)
        out = way.combine(self._experts(way.rows(), way.counts, context)).view(own.shape)
        if routing.penalty is not None:
            out = add_penalty(out, routing.penalty, self.experts)
        if repeated:
            out = give_share(out, self.parallel.group)
        return out if shared is None else out + shared

    def _experts(self, rows: Tensor, counts: list[int], context: Context) -> Tensor:
        """rows (R,D), sorted by expert -> (R,D), over etp a partial sum."""
        deferred = self.parallel.deferred
        wide = grouped_linear(rows, self.up, counts, deferred)
        wide = context.keep.region("activation", self.activate, wide)
        return grouped_linear(wide, self.down, counts, deferred)

    def _shared(self, x: Tensor, context: Context) -> Tensor | None:
        if self.shared is None:
            return None
        y: Tensor = self.shared(x, context)
        return y if self.gate is None else torch.sigmoid(x @ self.gate.t()) * y
