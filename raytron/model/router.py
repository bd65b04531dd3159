"""Which experts a token goes to, how much each counts, and what keeps the experts evenly loaded.

    logits (T,E) = x · Wᵀ in fp32  →  scores: softmax or sigmoid  →  (+ bias) → (groups) → top k  →  weights (T,k)

top k       of the scores; their weights divided by their sum where `normalize`, times `scale` (Mixtral, arXiv 2401.04088)
groups      experts in equal groups; a token chooses from the best `group_top_k` only, by the group's best score (softmax,
            DeepSeek-V2, arXiv 2405.04434) or the sum of its two best (sigmoid, DeepSeek-V3, arXiv 2412.19437)
bias        one number for each expert, added for choosing only; after each step it moves by `bias_rate` towards an even
            load (Wang et al., arXiv 2408.15664)
aux loss    E · Σ_e f_e · P_e of each sequence, 1 where even: f_e the share of its choices that fall on e, P_e the mean
            score, scores normalised to sum to 1 (Fedus et al., arXiv 2101.03961, by sequence as in DeepSeek-V2)
z-loss      the mean of log² Σ exp(logits), which keeps logits small (Zoph et al., arXiv 2202.08906)
capacity    of each sequence of S tokens an expert takes at most ⌈factor · S · k / E⌉; who stays is settled over the whole
            sequence, by weight or by position. The rest goes past this expert.

Nothing of this depends on the mesh or on the size of a micro-batch: what looks at more than one token looks at whole
sequences, whose parts on other ranks (sequence and context parallel) are counted in. Auxiliary losses are summed over all
tokens and divided by the number of those that count in the loss, just as the loss is; a token that does not count in the
loss is routed like any other.

Shapes: T = s · B tokens of a rank, s the local share of S, B micro-batch, E experts, k choices, D hidden.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from raytron.config import ExpertsConfig
from raytron.model.build import Builder
from raytron.parallel.collectives import all_gather, all_reduce
from raytron.parallel.expert import ExpertParallel, router_linear

MEASURES = ("dropped", "aux_loss", "z_loss")  # what a router sums up beside its load


class Routing(NamedTuple):
    """The choices of some tokens."""

    experts: Tensor  # (T,k) int64, the best first
    weights: Tensor  # (T,k) fp32
    kept: Tensor | None  # (T,k) bool: not dropped for want of room; None: all are
    penalty: Tensor | None  # fp32 scalar: auxiliary losses, times their weights, summed over tokens


def scores_of(logits: Tensor, config: ExpertsConfig) -> Tensor:
    """logits (T,E) fp32 -> (T,E)."""
    return logits.softmax(-1) if config.score == "softmax" else logits.sigmoid()


def choose(scores: Tensor, config: ExpertsConfig, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """scores (T,E), bias (E,) -> experts (T,k) int64, weights (T,k)."""
    wanted = scores.detach() if bias is None else scores.detach() + bias
    if config.group_top_k < config.groups:
        grouped = wanted.view(-1, config.groups, config.count // config.groups)
        best = min(2 if config.score == "sigmoid" else 1, grouped.shape[-1])
        group_scores = grouped.topk(best, -1).values.sum(-1)
        open_groups = torch.zeros_like(group_scores, dtype=torch.bool)
        open_groups.scatter_(1, group_scores.topk(config.group_top_k, -1).indices, True)
        wanted = grouped.masked_fill(~open_groups[..., None], -torch.inf).flatten(1)
    experts = wanted.topk(config.top_k, -1).indices
    weights = scores.gather(1, experts)
    if config.normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return experts, weights * config.scale


def capacity(config: ExpertsConfig, length: int) -> int:
    """Tokens that an expert takes of a sequence of `length`."""
    assert config.capacity_factor is not None
    return math.ceil(config.capacity_factor * length * config.top_k / config.count)


def within_capacity(experts: Tensor, weights: Tensor, positions: Tensor, config: ExpertsConfig) -> Tensor:
    """(S,B,k) bool: which choices of whole sequences find room.

    experts and weights: (S,B,k); positions: (S,) of the rows in the sequence. An expert takes the choices with the largest
    weights (of equal ones the earlier token's), or those of the earliest tokens.
    """
    length, batch, k = experts.shape
    order = torch.argsort(positions.repeat_interleave(batch * k), stable=True)
    if config.drop == "probability":
        order = order[torch.argsort(weights.detach().flatten()[order], descending=True, stable=True)]
    sequences = torch.arange(batch, device=experts.device)[None, :, None]
    room = (sequences * config.count + experts).flatten()  # one for each expert and sequence
    order = order[torch.argsort(room[order], stable=True)]
    sizes = torch.bincount(room, minlength=batch * config.count)
    first = (sizes.cumsum(0) - sizes)[room[order]]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(order.numel(), device=order.device) - first
    return (rank < capacity(config, length)).view(experts.shape)


class Router(nn.Module):
    """The router of one layer on one rank."""

    def __init__(self, build: Builder, name: str, hidden: int, config: ExpertsConfig, std: float):
        super().__init__()
        assert build.experts is not None
        self.config = config
        self.parallel: ExpertParallel = build.experts
        self.deferred = build.parallel.deferred
        self.name = name
        cut = build.parallel.size > 1  # each tp rank routes tokens of its own
        self.weight = build.normal(f"{name}.weight", (config.count, hidden), std, dim=None, partial=cut)
        self.bias = torch.zeros(config.count, device=build.device) if config.bias_rate > 0 else None
        self.sums = torch.zeros(config.count + len(MEASURES), dtype=torch.float64, device=build.device)

    def forward(self, x: Tensor, positions: Tensor, training: bool) -> Routing:
        """x (s,B,D), of sequence positions (s,)."""
        length = x.shape[0] * self.parallel.sequence.size
        logits = router_linear(x.flatten(0, 1), self.weight, self.deferred)
        scores = scores_of(logits, self.config)
        experts, weights = choose(scores, self.config, self.bias)
        kept = self._kept(experts, weights, positions, x.shape[1])
        if not (training and torch.is_grad_enabled()):  # recomputation runs twice, and counts once
            return Routing(experts, weights, kept, None)
        count = self.config.count
        self.sums[:count] += torch.bincount(experts.flatten(), minlength=count)
        if kept is not None:
            self.sums[count] += (~kept).sum()
        return Routing(experts, weights, kept, self._penalty(logits, scores, experts, length, x.shape[1]))

    def _kept(self, experts: Tensor, weights: Tensor, positions: Tensor, batch: int) -> Tensor | None:
        """(T,k) bool, settled over the whole sequence; None without a capacity."""
        if self.config.capacity_factor is None:
            return None
        group, shape = self.parallel.sequence, (-1, batch, self.config.top_k)
        whole = [all_gather(part, group) for part in (experts, weights.detach(), positions)]
        kept = within_capacity(whole[0].view(shape), whole[1].view(shape), whole[2], self.config)
        return kept.view(group.size, *experts.shape)[group.index]

    def _penalty(self, logits: Tensor, scores: Tensor, experts: Tensor, length: int, batch: int) -> Tensor | None:
        """The weighed auxiliary losses of this rank's tokens, summed over tokens; None without any."""
        config, penalty = self.config, None
        if config.aux_loss > 0:
            loss = self._balance_loss(scores, experts, length, batch)
            self.sums[-2] += loss.detach() * length
            penalty = config.aux_loss * length * loss
        if config.z_loss > 0:
            squares = logits.logsumexp(-1).square().sum()
            self.sums[-1] += squares.detach()
            penalty = config.z_loss * squares + (0 if penalty is None else penalty)
        return penalty

    def _balance_loss(self, scores: Tensor, experts: Tensor, length: int, batch: int) -> Tensor:
        """Σ over sequences of E · Σ_e f_e · P_e, of which P only counts this rank's tokens: summed over the ranks that share
        the sequences it is whole."""
        count, k = self.config.count, self.config.top_k
        if self.config.score == "sigmoid":
            scores = scores / (scores.sum(-1, keepdim=True) + 1e-20)
        sequences = torch.arange(batch, device=experts.device)[None, :, None] * count
        chosen = (experts.view(-1, batch, k) + sequences).flatten()
        f = all_reduce(torch.bincount(chosen, minlength=batch * count).float(), self.parallel.sequence)
        p = scores.view(-1, batch * count).sum(0)
        return (f * p).sum() * (count / (k * length * length))
