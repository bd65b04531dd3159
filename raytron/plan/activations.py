"""What one micro-batch keeps on a rank from its forward to its backward: each storage, in bytes.

A block without recomputation, T tokens on a rank, t of them in its share under sequence parallelism, hidden D, local query
and KV heads H and K of width h, local feed-forward width F, e bytes an element:

    norm, twice     input t·D·e    statistics t·4    output t·D·e, the linear layer's input
    attention       q T·H·h·e    k T·K·h·e    k and v in one storage T·2K·h·e    output T·H·h·e    log-sum-exp T·H·4
    feed-forward    gate and up T·2F·e    act(gate) T·F·e    their product T·F·e        (not gated: T·F·e twice)
    dropout         two masks t·D·e

Recomputed parts keep their input alone: a norm its input, attention q and k, v as they were projected, the activation
gate and up, dropout nothing; a whole block its input.

After I and until W (zero-bubble schedules) a block keeps instead what its weight gradients are made of, recomputed or
not: the input of each linear layer and the gradient of its output.

Where it depends on the kernel, this says what torch really keeps: on a CPU the statistics of a layer norm have the
input's type. Attention keeps the same with every kernel.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from raytron.config import ModelConfig, NormName, RunConfig
from raytron.plan.recompute import WHOLE, parts_of

Device = Literal["cpu", "cuda"]
ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
FP32, INDEX, FLAG = 4, 8, 1  # bytes of a float32, an int64, a bool


class Sizes(NamedTuple):
    """What a micro-batch and the model measure on one rank."""

    tokens: int  # T
    share: int  # t
    hidden: int
    heads: int  # local
    kv_heads: int  # local
    width: int  # of a head
    vocab: int  # local rows
    item: int  # bytes of an activation's element

    @classmethod
    def of(cls, config: RunConfig) -> Sizes:
        model, mesh = config.model, config.mesh
        tokens = config.micro_batch_size * (config.sequence_length // mesh.cp)
        return cls(
            tokens=tokens,
            share=tokens // (mesh.tp if mesh.sequence_parallel else 1),
            hidden=model.hidden,
            heads=model.heads // mesh.tp,
            kv_heads=max(1, model.num_kv_heads // mesh.tp),
            width=model.dim_per_head,
            vocab=-(-model.vocab // mesh.tp),
            item=ITEM_BYTES[config.precision.dtype],
        )

    @property
    def residual(self) -> int:
        """Bytes of the activations between blocks (s,B,D)."""
        return self.share * self.hidden * self.item


def block(config: RunConfig, layer: int, parts: frozenset[str], device: Device) -> list[int]:
    """The storages that the block of one layer keeps, with these parts recomputed."""
    model, sizes = config.model, Sizes.of(config)
    if WHOLE in parts:
        return [sizes.residual]
    kept = []
    for _ in range(2):
        if "norm" in parts:
            kept += [sizes.residual]
        else:
            kept += [*_norm(model.norm, sizes.share, sizes.hidden, sizes.item, device), sizes.residual]
    kept += _attention(config, sizes, "attention" in parts, device)
    if model.dropout > 0 and "dropout" not in parts:
        kept += [sizes.residual] * 2
    if model.has_experts(layer):
        return kept + _mixture(config, sizes, "activation" in parts)
    return kept + _feed_forward(model, sizes.tokens * (model.ffn // config.mesh.tp) * sizes.item, "activation" in parts)


def block_deferred(config: RunConfig, layer: int) -> list[int]:
    """What the block of one layer keeps from I to W: inputs and gradients of outputs of its linear layers."""
    model, sizes = config.model, Sizes.of(config)
    token = sizes.tokens * sizes.item
    projected = token * (sizes.heads + 2 * sizes.kv_heads) * sizes.width
    mixed, whole = token * sizes.heads * sizes.width, token * sizes.hidden
    kept = [sizes.residual, projected, mixed, whole, sizes.residual]
    if model.has_experts(layer):
        return kept + _mixture_deferred(config, sizes)
    return [*kept, *_feed_forward_deferred(model, token * (model.ffn // config.mesh.tp)), whole]


def first(config: RunConfig) -> list[int]:
    """What the embedding keeps."""
    model, mesh, sizes = config.model, config.mesh, Sizes.of(config)
    kept = [sizes.tokens * (INDEX + FLAG)] if mesh.tp > 1 else []  # rows of the local table, and whose they are
    return kept + ([sizes.residual] if model.dropout > 0 else [])


def last(config: RunConfig, device: Device) -> list[int]:
    """What the final norm keeps."""
    model, sizes = config.model, Sizes.of(config)
    return [*_norm(model.norm, sizes.share, sizes.hidden, sizes.item, device), sizes.residual]


def loss(config: RunConfig) -> int:
    """What the loss keeps beside the input of the head: of each token its softmax, or in pieces two sums."""
    sizes = Sizes.of(config)
    if config.memory.loss_chunks > 1:
        return sizes.tokens * 3 * FP32
    return sizes.tokens * (sizes.vocab * FP32 + INDEX + FLAG + 3 * FP32)


def loss_deferred(config: RunConfig) -> int:
    """What the head keeps from I to W: its input and the gradient of the logits; in pieces nothing is put off."""
    sizes = Sizes.of(config)
    if config.memory.loss_chunks > 1:
        return 0
    return sizes.residual + sizes.tokens * sizes.vocab * sizes.item


def working(config: RunConfig, device: Device) -> int:
    """An estimate of the most that an action takes beside what is kept: a block that runs again, or in its backward the
    gradients around the feed-forward layer; or the logits before they are a softmax, and their gradient after."""
    model, sizes = config.model, Sizes.of(config)
    parts, last_layer = parts_of(config.memory), model.layers - 1  # with experts, if any layer has
    everything = sum(block(config, last_layer, frozenset(), device))
    again = everything - sum(block(config, last_layer, parts, device)) if parts else 0
    narrow = sizes.tokens * (model.ffn // config.mesh.tp) * sizes.item
    if model.has_experts(last_layer):
        narrow = _rows(config, sizes) * (model.expert_ffn // config.mesh.etp) * sizes.item
    gradients = (3 if model.gated else 2) * narrow + 2 * sizes.tokens * sizes.hidden * sizes.item
    tokens = -(-sizes.tokens // config.memory.loss_chunks)
    other = (
        0 if sizes.item == FP32 else sizes.item
    )  # logits in float32 become their softmax, and their gradient, in place
    logits = tokens * sizes.vocab * (other if config.memory.loss_chunks == 1 else FP32 + sizes.item + other)
    return max(again + gradients, logits)


def _norm(kind: NormName, rows: int, width: int, item: int, device: Device) -> list[int]:
    """What a norm of `rows` vectors keeps, its input included, without its output."""
    values = rows * width
    if kind == "layernorm":
        statistic = rows * (item if device == "cpu" else FP32)
        return [values * item, statistic, statistic]
    return [values * item, rows * FP32]


def _attention(config: RunConfig, sizes: Sizes, recomputed: bool, device: Device) -> list[int]:
    """From the projections to the input of the output projection, that included unless recomputed."""
    model, token = config.model, sizes.tokens * sizes.item
    query, pair = token * sizes.heads * sizes.width, 2 * token * sizes.kv_heads * sizes.width
    if recomputed:
        return [query, pair]
    parts = config.mesh.cp_all_to_all
    if parts > 1:  # q, k and v came in one storage; KV heads fewer than the parts are repeated; output before and after
        pair_of_all = pair * max(1, parts // sizes.kv_heads)
        kept = [query + pair_of_all, query, query, sizes.tokens * sizes.heads * FP32]
    else:
        kept = [query, query, sizes.tokens * sizes.heads * FP32]  # q and the output, and the sums of exponentials
    if model.qk_norm:
        rows = (sizes.tokens * sizes.heads, sizes.tokens * sizes.kv_heads)
        inside = [_norm("rmsnorm", count, sizes.width, sizes.item, device) for count in rows]
        inside[1][0] = pair  # k is a part of what is projected together with v
        kept += [size for norm in inside for size in norm]
    if parts == 1:
        kept += [pair] if not model.qk_norm else []  # v is a part of it, too
        kept += [pair // 2] if model.qk_norm or model.positions == "rope" else []  # k in a storage of its own
    return kept


def _feed_forward(model: ModelConfig, narrow: int, recomputed: bool) -> list[int]:
    """From the first projection to the input of the second, that included unless recomputed. narrow: T·F·e."""
    wide = 2 * narrow if model.gated else narrow
    if recomputed:
        return [wide]
    if model.activation == "relu":
        return [narrow]  # its backward looks at its output
    if model.gated or model.activation == "relu2":
        return [wide, narrow, narrow] if model.gated else [narrow, narrow]
    return [wide, narrow]


def _feed_forward_deferred(model: ModelConfig, narrow: int) -> list[int]:
    """Of a feed-forward layer without its input and without the gradient of its output. narrow: T·F·e."""
    return [2 * narrow if model.gated else narrow, narrow]


def _rows(config: RunConfig, sizes: Sizes) -> int:
    """Rows that a rank's experts compute where all are loaded evenly and none drops a token."""
    return sizes.tokens // config.mesh.tp * config.model.experts.top_k * config.mesh.etp


def _mixture(config: RunConfig, sizes: Sizes, recomputed: bool) -> list[int]:
    """A mixture of experts, evenly loaded. Its experts' second layers take the activation again where it is recomputed;
    beside what experts keep, the router keeps the scores, and what travels its weights, its order and what came back."""
    model, mesh, experts = config.model, config.mesh, config.model.experts
    own, rows = sizes.tokens // mesh.tp, _rows(config, sizes)
    gathered = own * (mesh.ep * mesh.etp if mesh.expert_dispatch == "all_gather" else 1)
    pairs, wide = own * experts.top_k, rows * sizes.hidden * sizes.item
    kept = [own * experts.count * FP32]  # scores
    if experts.z_loss > 0:
        kept += [own * experts.count * FP32, own * FP32]
    kept += [pairs * INDEX, pairs * FP32]  # choices and their weights
    kept += [pairs * FP32, own * FP32] if experts.normalize else []
    kept += [rows // mesh.etp * INDEX, gathered * experts.top_k * INDEX]  # the order of pairs, and the way back
    kept += [rows * INDEX] if mesh.ep * mesh.etp > 1 and mesh.expert_dispatch == "all_to_all" else []
    kept += [wide, *_feed_forward(model, rows * (model.expert_ffn // mesh.etp) * sizes.item, recomputed)]
    kept += [wide // mesh.etp]  # what came back
    if experts.shared_ffn:
        kept += _feed_forward(model, sizes.tokens * (experts.shared_ffn // mesh.tp) * sizes.item, recomputed)
    if experts.shared_gate:
        kept += [sizes.share * sizes.item, sizes.residual]
    return kept


def _mixture_deferred(config: RunConfig, sizes: Sizes) -> list[int]:
    model, mesh, experts = config.model, config.mesh, config.model.experts
    own, rows = sizes.tokens // mesh.tp, _rows(config, sizes)
    wide = rows * sizes.hidden * sizes.item
    kept = [own * experts.count * FP32, wide, wide]
    kept += _feed_forward_deferred(model, rows * (model.expert_ffn // mesh.etp) * sizes.item)
    if experts.shared_ffn:
        kept += _feed_forward_deferred(model, sizes.tokens * (experts.shared_ffn // mesh.tp) * sizes.item)
        kept += [sizes.tokens * sizes.hidden * sizes.item]
    return kept
