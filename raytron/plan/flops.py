"""Parameters and floating point operations of a model, and how well a device is used.

Model FLOPs of training, for each token (a multiply and an add are two; forward 2, backward 4 for each weight):

    6 · (weights of the layers' matrices + of the loss head)  +  12 · layers · heads · head_dim · mean context

The mean context of causal attention over S tokens is S/2, so that its term is 6 · layers · heads · head_dim · S; with a
sliding window of w < S tokens it is w − w²/(2S). The input embedding is a look-up and does not count; nor do norms,
biases, or anything computed twice. Of a layer of experts those matrices count through which a token goes: the router, its
top_k experts and the shared one; what an expert drops or a mesh sends does not. Counting attention as if it were not causal
(as PaLM, arXiv 2204.02311, and many since) gives more FLOPs for the same work: `full_attention` tells by how much, so that
figures of others can be compared.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from raytron.config import ModelConfig

FORMULA = "6·(layer matrices + head) + 12·layers·heads·head_dim·context, context = S/2 (window w: w − w²/2S)"

# dense bf16 FLOP/s as their makers state them, without sparsity; the first name that matches counts
_PEAKS = (
    (r"GH200|H200|H800", 989.4e12),
    (r"H100 NVL", 835.0e12),
    (r"H100 PCIE", 756.0e12),
    (r"H100", 989.4e12),
    (r"H20", 148.0e12),
    (r"GB300|GB200", 2450.0e12),
    (r"B300|B200", 2250.0e12),
    (r"A100|A800", 312.0e12),
    (r"A40", 149.7e12),
    (r"A10G", 70.0e12),
    (r"A10", 125.0e12),
    (r"L40S", 362.0e12),
    (r"L4", 121.0e12),
    (r"RTX 4090", 165.2e12),
    (r"MI300X", 1307.4e12),
)


@dataclass(frozen=True)
class LayerParameters:
    """Weights of one decoder layer, by kind."""

    attention: int
    ffn: int  # the dense feed-forward layer, or router and shared expert
    other: int  # norms and biases
    experts: int = 0  # all of them
    chosen: int = 0  # the experts that one token goes to

    @property
    def matrices(self) -> int:
        """Those through which a token goes."""
        return self.attention + self.ffn + self.chosen

    @property
    def total(self) -> int:
        return self.attention + self.ffn + self.experts + self.other


def layer_parameters(model: ModelConfig, layer: int = 0) -> LayerParameters:
    """Parameters of layer number `layer`."""
    query, pair = model.heads * model.dim_per_head, 2 * model.num_kv_heads * model.dim_per_head
    attention, other = model.hidden * (2 * query + pair), 2 * norm_parameters(model)
    if model.qkv_bias:
        other += query + pair
    if model.qk_norm:
        other += 2 * model.dim_per_head
    if model.has_experts(layer):
        apart, experts = local_mixture_parameters(model)
        chosen = experts // model.experts.count * model.experts.top_k
        return LayerParameters(attention, apart, other, experts, chosen)
    if model.bias:
        other += _halves(model) * model.ffn + 2 * model.hidden
    return LayerParameters(attention, feed_forward_parameters(model, model.ffn), other)


def feed_forward_parameters(model: ModelConfig, width: int) -> int:
    """The matrices of a feed-forward layer of some width."""
    return model.hidden * width * (_halves(model) + 1)


def _halves(model: ModelConfig) -> int:
    """How many up projections a feed-forward layer has."""
    return 2 if model.gated else 1


def local_mixture_parameters(model: ModelConfig, tp: int = 1, ep: int = 1, etp: int = 1) -> tuple[int, int]:
    """Parameters of the feed-forward part of one layer of experts on one rank: (dense ones, whose gradients are summed over
    dp · cp: router, shared expert and its gate; those of experts, whose gradients are summed over edp)."""
    experts = model.experts
    dense = experts.count * model.hidden + feed_forward_parameters(model, experts.shared_ffn // tp)
    dense += model.hidden if experts.shared_gate else 0
    return dense, experts.count // ep * feed_forward_parameters(model, model.expert_ffn // etp)


def norm_parameters(model: ModelConfig) -> int:
    """Parameters of one norm over the hidden width."""
    return model.hidden * (2 if model.norm == "layernorm" else 1)


def position_parameters(model: ModelConfig) -> int:
    return model.max_positions * model.hidden if model.positions == "learned" else 0


def parameters(model: ModelConfig) -> int:
    """All parameters of the model; a tied embedding counts once."""
    tables = model.vocab * model.hidden * (1 if model.tied_embeddings else 2)
    ends = tables + position_parameters(model) + norm_parameters(model)
    return sum(layer_parameters(model, layer).total for layer in range(model.layers)) + ends


def active_parameters(model: ModelConfig) -> int:
    """The parameters through which one token goes; less than all where a model has experts."""
    layers = [layer_parameters(model, layer) for layer in range(model.layers)]
    return parameters(model) - sum(layer.experts - layer.chosen for layer in layers)


def mean_context(model: ModelConfig, sequence_length: int) -> float:
    """How many tokens a token attends to on average; half the sequence if no window is set."""
    window = min(model.window or sequence_length, sequence_length)
    return window - window * window / (2 * sequence_length)


def layer_forward_flops(model: ModelConfig, sequence_length: int, layer: int = 0) -> float:
    """Of the forward of layer number `layer`, for each token."""
    return 2 * layer_parameters(model, layer).matrices + attention_forward_flops(model, sequence_length)


def attention_forward_flops(model: ModelConfig, sequence_length: int) -> float:
    """Of the scores and their sum over values in one layer, for each token; these have no weights."""
    return 4 * model.heads * model.dim_per_head * mean_context(model, sequence_length)


def head_forward_flops(model: ModelConfig) -> float:
    """Of the logits, for each token."""
    return 2.0 * model.hidden * model.vocab


def flops_per_token(model: ModelConfig, sequence_length: int, *, full_attention: bool = False) -> float:
    """Model FLOPs of training (forward and backward) for each token, by FORMULA; full_attention: with context = S."""
    forward = sum(layer_forward_flops(model, sequence_length, layer) for layer in range(model.layers))
    forward += head_forward_flops(model)
    if full_attention:
        missing = sequence_length - mean_context(model, sequence_length)
        forward += model.layers * 4 * model.heads * model.dim_per_head * missing
    return 3 * forward


def formula(model: ModelConfig, sequence_length: int) -> str:
    """FORMULA with this model's numbers."""
    each = Counter(layer_parameters(model, layer).matrices for layer in range(model.layers))
    layers = " + ".join(f"{count}·{matrices:,}" for matrices, count in each.items())
    head = model.hidden * model.vocab
    context = mean_context(model, sequence_length)
    attention = f"12·{model.layers}·{model.heads}·{model.dim_per_head}·{context:,.0f}"
    return f"6·({layers} + {head:,}) + {attention}"


def peak_flops(device_name: str | None, dtype: str = "bf16") -> float | None:
    """The peak FLOP/s of a device for dense bf16 matrices; None where it is not known, as for other types and CPUs."""
    if device_name is None or dtype != "bf16":
        return None
    for pattern, peak in _PEAKS:
        if re.search(rf"(?<![A-Z0-9])(?:{pattern})(?![A-Z0-9])", device_name.upper()):
            return peak
    return None


def mfu(tokens_per_s: float, flops_per_token: float, devices: int, peak_flops: float) -> float:
    """Model FLOPs utilisation: the share of the devices' peak that goes into the model's own FLOPs (PaLM's measure)."""
    return tokens_per_s * flops_per_token / (devices * peak_flops)
