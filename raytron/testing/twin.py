"""The single-device truth: the same model in plain torch, with autograd and nothing parallel.

Every mesh is compared with it, and it is compared with Hugging Face's models. It shares with the product only what
defines a model rather than how it runs: initial values and dropout masks (`raytron.parallel.random`), the learning rate.
Shapes: B batch, S sequence, D hidden, H heads, h head_dim; activations (B, S, D).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from raytron.config import ModelConfig, RunConfig
from raytron.data.batch import Batch
from raytron.model.mlp import ACTIVATIONS
from raytron.optim.lr import learning_rate
from raytron.parallel.layout import Layout
from raytron.parallel.random import fill_normal, keep_mask, key_of, token_rows
from raytron.testing.mixture import mixture
from raytron.testing.optimizers import PlainOptimizer


def shapes(model: ModelConfig) -> dict[str, tuple[tuple[int, ...], float]]:
    """Every parameter's global shape and its initial value: a standard deviation, or -1 for ones."""
    heads, kv, width, hidden, std = model.heads, model.num_kv_heads, model.dim_per_head, model.hidden, model.init_std
    small = std / math.sqrt(2 * model.layers)
    out: dict[str, tuple[tuple[int, ...], float]] = {"embed.weight": ((model.vocab, hidden), std)}

    def norm(name: str, size: int, bias: bool) -> None:
        out[f"{name}.weight"] = ((size,), -1)
        if bias:
            out[f"{name}.bias"] = ((size,), 0)

    layernorm = model.norm == "layernorm"
    if model.positions == "learned":
        out["position.weight"] = ((model.max_positions, hidden), std)
    for index in range(model.layers):
        name = f"layers.{index}"
        norm(f"{name}.attention.norm", hidden, layernorm)
        out[f"{name}.attention.q.weight"] = ((heads, width, hidden), std)
        out[f"{name}.attention.kv.weight"] = ((kv, 2, width, hidden), std)
        out[f"{name}.attention.out.weight"] = ((hidden, heads * width), small)
        if model.qkv_bias:
            out[f"{name}.attention.q.bias"] = ((heads, width), 0)
            out[f"{name}.attention.kv.bias"] = ((kv, 2, width), 0)
        if model.qk_norm:
            norm(f"{name}.attention.q_norm", width, False)
            norm(f"{name}.attention.k_norm", width, False)
        norm(f"{name}.mlp.norm", hidden, layernorm)
        if model.bias:
            out[f"{name}.attention.out.bias"] = ((hidden,), 0)
        if model.has_experts(index):
            out.update(_expert_shapes(f"{name}.mlp", model, std, small))
            continue
        wide = (2, model.ffn) if model.gated else (model.ffn,)
        out[f"{name}.mlp.up.weight"] = ((*wide, hidden), std)
        out[f"{name}.mlp.down.weight"] = ((hidden, model.ffn), small)
        if model.bias:
            out[f"{name}.mlp.up.bias"] = (wide, 0)
            out[f"{name}.mlp.down.bias"] = ((hidden,), 0)
    norm("norm", hidden, layernorm)
    if not model.tied_embeddings:
        out["head.weight"] = ((model.vocab, hidden), std)
    return out


def places(tokens: Tensor, documents: Tensor | None) -> Tensor:
    """(B,S): the position of each of the tokens (B,S) in its document, or in the sequence."""
    at = torch.arange(tokens.shape[1]).expand(tokens.shape)
    if documents is None:
        return at
    same = (documents[:, :, None] == documents[:, None, :]) & (at[:, None, :] < at[:, :, None])
    return same.sum(-1)


def _expert_shapes(name: str, model: ModelConfig, std: float, small: float) -> dict[str, tuple[tuple[int, ...], float]]:
    """The parameters of a layer of experts."""
    experts, hidden, gated = model.experts, model.hidden, (2,) if model.gated else ()
    out: dict[str, tuple[tuple[int, ...], float]] = {
        f"{name}.router.weight": ((experts.count, hidden), std),
        f"{name}.experts.up.weight": ((experts.count, *gated, model.expert_ffn, hidden), std),
        f"{name}.experts.down.weight": ((experts.count, hidden, model.expert_ffn), small),
    }
    if experts.shared_ffn:
        out[f"{name}.shared.up.weight"] = ((*gated, experts.shared_ffn, hidden), std)
        out[f"{name}.shared.down.weight"] = ((hidden, experts.shared_ffn), small)
    if experts.shared_gate:
        out[f"{name}.shared.gate.weight"] = ((1, hidden), std)
    return out


class Twin:
    """The whole model of a configuration on one device, in float32."""

    def __init__(self, config: RunConfig):
        self.config, self.model = config, config.model
        self.weights: dict[str, Tensor] = {}
        self.biases = {  # of routers; moved after each update, by the loads of its batch
            f"layers.{index}.mlp": torch.zeros(self.model.experts.count)
            for index in range(self.model.layers)
            if self.model.experts.bias_rate > 0 and self.model.has_experts(index)
        }
        self.loads: dict[str, Tensor] = {}
        self.penalty = torch.zeros(())  # auxiliary losses of the last forward, summed over tokens
        for name, (shape, std) in shapes(config.model).items():
            value = torch.ones(shape) if std == -1 else torch.zeros(shape)
            if std > 0:
                fill_normal(value, Layout(shape), {}, key_of(config.seed, "init", name), std)
            self.weights[name] = value.requires_grad_()
        self.optimizer = PlainOptimizer(config, self.weights)

    def logits(
        self,
        tokens: Tensor,
        samples: Tensor | None = None,
        training: bool = False,
        documents: Tensor | None = None,
    ) -> Tensor:
        """tokens (B,S), and the document of each, if they are kept apart -> (B,S,V)."""
        model, w = self.model, self.weights
        samples = torch.zeros(len(tokens), dtype=torch.int64) if samples is None else samples
        x = w["embed.weight"][tokens]
        self.penalty = torch.zeros(())
        if model.positions == "learned":
            x = x + w["position.weight"][places(tokens, documents)]
        x = self._drop(x, ("embed", "dropout"), samples, training)
        for index in range(model.layers):
            name = f"layers.{index}"
            y = self._norm(x, f"{name}.attention.norm")
            y = self._attention(y, f"{name}.attention", samples, training, documents)
            x = x + self._drop(y, (name, "attention"), samples, training)
            y = self._norm(x, f"{name}.mlp.norm")
            y = (self._mixture if model.has_experts(index) else self._feed_forward)(y, f"{name}.mlp")
            x = x + self._drop(y, (name, "mlp"), samples, training)
        head = w["embed.weight"] if model.tied_embeddings else w["head.weight"]
        return self._norm(x, "norm") @ head.t()

    def loss(self, batch: Batch, training: bool = True) -> Tensor:
        """Σ weight · cross-entropy / Σ weight."""
        samples, tokens, labels, weights = (torch.from_numpy(part) for part in batch[:4])
        documents = None if batch.documents is None else torch.from_numpy(np.asarray(batch.documents))
        logits = self.logits(tokens, samples, training, documents)
        each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        return (each * weights.flatten()).sum() / weights.sum()

    def gradients(self, batch: Batch) -> tuple[float, dict[str, Tensor]]:
        """The loss of a batch and every weight's gradient."""
        for weight in self.weights.values():
            weight.grad = None
        loss = self.loss(batch)
        (loss + self.penalty / float(batch.weights.sum())).backward()  # type: ignore[no-untyped-call]
        return loss.item(), {name: w.grad.clone() for name, w in self.weights.items() if w.grad is not None}

    def train(self, batches: Iterable[Batch], first: int = 0) -> list[float]:
        """One update for each batch; the losses before each."""
        losses = []
        for step, batch in enumerate(batches, first):
            loss, _ = self.gradients(batch)
            trained = [weight for name, weight in self.weights.items() if not self.optimizer.frozen(name)]
            if self.config.optimizer.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(trained, self.config.optimizer.clip_norm)
            self.optimizer.step(learning_rate(self.config.lr, self.config.lr_horizon, step))
            for name, bias in self.biases.items():
                load = self.loads[name].float()
                bias += self.model.experts.bias_rate * torch.sign(load.mean() - load)
            losses.append(loss)
        return losses

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias")
        if bias is not None:
            x = x - x.mean(-1, keepdim=True)
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.model.norm_eps) * weight
        return x if bias is None else x + bias

    def _linear(self, x: Tensor, name: str) -> Tensor:
        """x (..., K) by a weight (..., K) -> (..., the weight's other dimensions)."""
        weight, bias = self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias")
        y: Tensor = torch.tensordot(x, weight, dims=([-1], [weight.dim() - 1]))
        return y if bias is None else y + bias

    def _attention(
        self, x: Tensor, name: str, samples: Tensor, training: bool, documents: Tensor | None = None
    ) -> Tensor:
        model, length = self.model, x.shape[1]
        q = self._linear(x, f"{name}.q")  # (B,S,H,h)
        k, v = self._linear(x, f"{name}.kv").unbind(3)  # (B,S,KV,h)
        if model.qk_norm:
            q, k = self._norm(q, f"{name}.q_norm"), self._norm(k, f"{name}.k_norm")
        if model.positions == "rope":
            at = places(x[..., 0], documents)
            q, k = self._rotate(q, at), self._rotate(k, at)
        repeat = model.heads // model.num_kv_heads
        k, v = k.repeat_interleave(repeat, 2), v.repeat_interleave(repeat, 2)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(model.dim_per_head)
        distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
        hidden = (distance < 0) | (distance >= (model.window or length))
        if documents is not None:
            hidden = hidden | (documents[:, None, :, None] != documents[:, None, None, :])
        probabilities = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        if training and model.attention_dropout > 0:
            probabilities = probabilities * self._attention_mask(name, samples, length)
        mixed = torch.einsum("bhqk,bkhd->bqhd", probabilities, v).flatten(2)
        return self._linear(mixed, f"{name}.out")

    def _attention_mask(self, name: str, samples: Tensor, length: int) -> Tensor:
        tokens = token_rows(samples, torch.arange(length)).t()
        rows = tokens[:, None, :] * self.model.heads + torch.arange(self.model.heads)[None, :, None]
        key = key_of(self.config.seed, name, "probabilities")
        return keep_mask(self.model.attention_dropout, key, rows, torch.arange(length))

    def _rotate(self, x: Tensor, at: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        angles = at[..., None] * self.model.rope_theta ** -(torch.arange(half) / half)
        turned = torch.view_as_complex(torch.stack([x[..., :half], x[..., half:]], -1).contiguous())
        turned = torch.view_as_real(turned * torch.polar(torch.ones_like(angles), angles)[:, :, None])
        return torch.cat([turned[..., 0], turned[..., 1]], -1)

    def _feed_forward(self, x: Tensor, name: str) -> Tensor:
        wide = self._linear(x, f"{name}.up")
        act = ACTIVATIONS[self.model.activation]
        wide = act(wide[..., 0, :]) * wide[..., 1, :] if self.model.gated else act(wide)
        return self._linear(wide, f"{name}.down")

    def _mixture(self, x: Tensor, name: str) -> Tensor:
        act = ACTIVATIONS[self.model.activation]
        gated = (lambda gate, up: act(gate) * up) if self.model.gated else act
        mixed = mixture(x, self.weights, name, self.model.experts, self.biases.get(name), gated)
        self.penalty = self.penalty + mixed.penalty
        self.loads[name] = mixed.load
        return mixed.y

    def _drop(self, x: Tensor, site: tuple[str, str], samples: Tensor, training: bool) -> Tensor:
        if not training or self.model.dropout == 0:
            return x
        rows = token_rows(samples, torch.arange(x.shape[1])).t()
        key = key_of(self.config.seed, *site)
        return x * keep_mask(self.model.dropout, key, rows, torch.arange(x.shape[-1]))
