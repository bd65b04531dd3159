"""The single-device truth of a mixture of experts: every expert computes every token, a table says how much each counts.

Written apart from `raytron.model.router`, and slow: plain loops over sequences and experts. Shapes: B batch, S sequence, D
hidden, E experts; activations (B, S, D), the table (B, S, E).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from raytron.config import ExpertsConfig

Apply = Callable[[Tensor, str], Tensor]  # x by the weights of a name


class Mixed(NamedTuple):
    """What a layer of experts gives."""

    y: Tensor  # (B,S,D)
    penalty: Tensor  # auxiliary losses, times their weights, summed over tokens
    load: Tensor  # (E,) how many choices fell on each expert


def mixture(
    x: Tensor,
    w: Mapping[str, Tensor],
    name: str,
    config: ExpertsConfig,
    bias: Tensor | None,
    act: Callable[..., Tensor],
) -> Mixed:
    """x (B,S,D) through the experts of layer `name`, whose weights are in `w`; act: the activation, of gate and up or of
    up alone."""
    logits = x @ w[f"{name}.router.weight"].t()
    scores = logits.softmax(-1) if config.score == "softmax" else logits.sigmoid()
    chosen = _chosen(scores.detach(), config, bias)
    table = torch.where(chosen, scores, 0.0)
    if config.normalize:
        table = table / (table.sum(-1, keepdim=True) + 1e-20)
    table = table * config.scale
    if config.capacity_factor is not None:
        table = table * _room(chosen, table.detach(), config)
    y = torch.zeros_like(x)
    for expert in range(config.count):
        up, down = (w[f"{name}.experts.{part}.weight"][expert] for part in ("up", "down"))
        y = y + table[..., expert, None] * _feed_forward(x, up, down, act)
    if config.shared_ffn:
        shared = _feed_forward(x, w[f"{name}.shared.up.weight"], w[f"{name}.shared.down.weight"], act)
        if config.shared_gate:
            shared = shared * torch.sigmoid(x @ w[f"{name}.shared.gate.weight"].t())
        y = y + shared
    return Mixed(y, _penalty(logits, scores, chosen, config), chosen.sum((0, 1)))


def _feed_forward(x: Tensor, up: Tensor, down: Tensor, act: Callable[..., Tensor]) -> Tensor:
    wide = act(x @ up[0].t(), x @ up[1].t()) if up.dim() == 3 else act(x @ up.t())
    return wide @ down.t()


def _chosen(scores: Tensor, config: ExpertsConfig, bias: Tensor | None) -> Tensor:
    """(B,S,E) bool: the experts of each token."""
    wanted = scores if bias is None else scores + bias
    size = config.count // config.groups
    groups = wanted.chunk(config.groups, -1)
    best = [g.sort(-1, descending=True).values[..., : 2 if config.score == "sigmoid" else 1].sum(-1) for g in groups]
    ranks = torch.stack(best, -1).argsort(-1, descending=True).argsort(-1)
    allowed = (ranks < config.group_top_k).repeat_interleave(size, -1)
    ranks = wanted.masked_fill(~allowed, -torch.inf).argsort(-1, descending=True).argsort(-1)
    return ranks < config.top_k


def _room(chosen: Tensor, table: Tensor, config: ExpertsConfig) -> Tensor:
    """(B,S,E): 1 where an expert takes a token, 0 where it is full; by sequence."""
    assert config.capacity_factor is not None
    limit = math.ceil(config.capacity_factor * chosen.shape[1] * config.top_k / config.count)
    room = torch.zeros_like(table)
    for b in range(chosen.shape[0]):
        for e in range(config.count):
            tokens = [s for s in range(chosen.shape[1]) if chosen[b, s, e]]
            if config.drop == "probability":
                tokens.sort(key=lambda s: -table[b, s, e].item())
            room[b, tokens[:limit], e] = 1
    return room


def _penalty(logits: Tensor, scores: Tensor, chosen: Tensor, config: ExpertsConfig) -> Tensor:
    length = logits.shape[1]
    shares = scores / scores.sum(-1, keepdim=True)
    f = chosen.float().mean(1) / config.top_k  # (B,E)
    balance = config.count * (f * shares.mean(1)).sum(-1)  # (B,)
    z = logits.exp().sum(-1).log().square()
    return config.aux_loss * length * balance.sum() + config.z_loss * z.sum()
