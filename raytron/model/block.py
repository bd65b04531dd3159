"""One decoder layer: x + attention(norm(x)), then x + feed_forward(norm(x)), with dropout on both branches.

The feed-forward layer is dense or a mixture of experts, layer by layer (`ModelConfig.has_experts`).
"""

from __future__ import annotations

from torch import Tensor, nn

from raytron.config import ModelConfig
from raytron.model.attention import Attention
from raytron.model.build import Builder
from raytron.model.context import Context
from raytron.model.mlp import FeedForward
from raytron.model.moe import MixtureOfExperts
from raytron.model.norm import Norm
from raytron.parallel.random import key_of


class Block(nn.Module):
    """Decoder layer number `index` of one rank."""

    def __init__(self, build: Builder, index: int, model: ModelConfig):
        super().__init__()
        name = f"layers.{index}"
        partial = build.parallel.sequence_parallel
        self.probability = model.dropout
        self.keys = [key_of(build.seed, name, site) for site in ("attention", "mlp")]
        self.attention_norm = Norm(
            build, f"{name}.attention.norm", model.hidden, model.norm, model.norm_eps, partial=partial
        )
        self.attention = Attention(build, f"{name}.attention", model)
        self.mlp_norm = Norm(build, f"{name}.mlp.norm", model.hidden, model.norm, model.norm_eps, partial=partial)
        self.mlp: FeedForward | MixtureOfExperts
        if model.has_experts(index):
            self.mlp = MixtureOfExperts(build, f"{name}.mlp", model)
        else:
            self.mlp = FeedForward(build, f"{name}.mlp", model)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x (s,B,D) -> (s,B,D)."""
        normed = context.keep.region("norm", self.attention_norm, x)
        x = x + context.dropout(self.attention(normed, context), self.probability, self.keys[0])
        normed = context.keep.region("norm", self.mlp_norm, x)
        return x + context.dropout(self.mlp(normed, context), self.probability, self.keys[1])
