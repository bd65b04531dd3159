"""Bytes on each rank, before a device is touched.

Exact, for N parameters on a rank (its share over tp and its stages; vocab rows padded to a multiple of tp, KV heads
repeated where tp is larger, a tied table held by the first and the last stage) and D data-parallel ranks:

    weights      N · (2 bf16, fp16 | 4 fp32)
    gradients    fp32 sums: ZeRO 0: 4N     1: 4N + 4N/D where D > 1     2: 4N/D + one bucket where D > 1
    optimizer    two fp32 moments, 8N/D (ZeRO 0: 8N), and an fp32 master, 4N/D, unless the weights are fp32 and whole;
                 moments in bf16 take half; Lion and SGD keep one moment, and Muon one of each hidden matrix

Shares over D are rounded up for each parameter in the run; here they are not. Estimated, for the activations that the
backward of one layer needs, in elements, with T tokens in a micro-batch, s = T/tp under sequence parallelism (else T), and
local heads H, KV heads K of width d and feed-forward width f:

    4·s·hidden (both norms: in, out) + T·(2H + 2K)·d (q, k, v, mixed) + T·f·(4 gated | 2 plain) + T·H fp32 (log-sum-exp)
    + T·(H + K)·d with QK norm + 2·s·hidden with dropout + T·S·H·(2 fp32 + 1) with attention dropout

times the micro-batches in flight, from F to W in the rank's own row. The last stage adds 2·s·hidden for its norm, and
under `loss` the fp32 softmax T·vocab/tp of each micro-batch in flight, and once the logits. Not counted: the allocator's
fragmentation, communication buffers, kernel workspaces, and what the framework itself takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from raytron.config import ModelConfig, RunConfig
from raytron.plan.flops import norm_parameters, position_parameters
from raytron.plan.schedule import Op, Schedule
from raytron.plan.simulate import peak
from raytron.plan.split import Range

ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
MOMENTS = {"adamw": 2, "muon": 2, "lion": 1, "sgd": 1}  # of each element; muon: one of a hidden matrix's


@dataclass(frozen=True)
class RankMemory:
    """Bytes on every rank of one pipeline coordinate; `parameters` is a number of elements."""

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int

    @property
    def total(self) -> int:
        return sum(getattr(self, item.name) for item in fields(self)[1:])


@dataclass(frozen=True)
class Memory:
    """By pipeline rank; the data and tensor parallel ranks of one pipeline rank are alike."""

    ranks: tuple[RankMemory, ...]

    @property
    def largest(self) -> int:
        """Bytes on the fullest rank."""
        return max(rank.total for rank in self.ranks)


def estimate(config: RunConfig, stages: Sequence[Range], schedule: Schedule) -> Memory:
    """Bytes on each pipeline rank when `schedule` runs over `stages`."""
    return Memory(tuple(_rank(config, stages, schedule, rank) for rank in range(schedule.num_ranks)))


def _rank(config: RunConfig, stages: Sequence[Range], schedule: Schedule, rank: int) -> RankMemory:
    own = schedule.stages_of(rank)
    last = len(stages) - 1
    elements = sum(stage_parameters(config, stages, stage) for stage in own)
    item = ITEM_BYTES[config.precision.dtype]
    held = [_stage_activations(config, stages, stage) for stage in range(len(stages))]
    loss = 0.0
    if last in own:
        logits = _tokens(config) * padded_vocab_share(config.model.vocab, config.mesh.tp)
        row = tuple(action for action in schedule.rows[rank] if action.stage == last)
        loss = logits * (4 * peak(row) + item)
    layers = sum(end - begin for begin, end in (stages[stage] for stage in own))
    gradients, optimizer = _state(config, elements, layers * local_layer_matrices(config.model, config.mesh.tp))
    activations = peak(schedule.rows[rank], Op.W, held)
    return RankMemory(elements, elements * item, gradients, optimizer, round(activations), round(loss))


def _state(config: RunConfig, elements: int, matrices: int) -> tuple[int, int]:
    """Bytes of gradients and optimizer state for some parameters, of which `matrices` are hidden matrices'."""
    zero, dp = config.data_parallel.zero, config.mesh.dp
    sharded = zero > 0 and dp > 1
    share = -(-elements // dp) if sharded else elements
    gradients = 4 * elements
    if sharded and zero == 1:
        gradients += 4 * share
    elif sharded:
        gradients = 4 * share + min(4 * elements, round(config.data_parallel.bucket_mb * 2**20))
    master = sharded or config.precision.dtype != "fp32"
    moments = MOMENTS[config.optimizer.name] * share
    if config.optimizer.name == "muon":
        moments -= -(-matrices // dp) if sharded else matrices
    return gradients, share * (4 if master else 0) + moments * ITEM_BYTES[config.precision.moments]


def padded_vocab_share(vocab: int, tp: int) -> int:
    """Rows of the vocabulary on each tp rank: the vocabulary is padded to a multiple of tp and no further."""
    return -(-vocab // tp)


def local_kv_heads(model: ModelConfig, tp: int) -> int:
    """KV heads on each tp rank: at least one, repeated over ranks where tp is larger than their number."""
    return max(1, model.num_kv_heads // tp)


def local_layer_parameters(model: ModelConfig, tp: int) -> int:
    """Parameters of one layer on one tp rank."""
    width = model.dim_per_head
    rows, wide = _projected_rows(model, tp), _wide(model, tp)
    count = local_layer_matrices(model, tp) + 2 * norm_parameters(model)
    if model.qkv_bias:
        count += rows
    if model.bias:
        count += wide + 2 * model.hidden
    if model.qk_norm:
        count += 2 * width
    return count


def local_layer_matrices(model: ModelConfig, tp: int) -> int:
    """Parameters of the matrices of one layer on one tp rank."""
    mixed, ffn = model.heads // tp * model.dim_per_head, model.ffn // tp
    return model.hidden * (_projected_rows(model, tp) + mixed + _wide(model, tp) + ffn)


def _projected_rows(model: ModelConfig, tp: int) -> int:
    """Of q, k and v."""
    return (model.heads // tp + 2 * local_kv_heads(model, tp)) * model.dim_per_head


def _wide(model: ModelConfig, tp: int) -> int:
    """Of the feed-forward layer's first half."""
    return model.ffn // tp * (2 if model.gated else 1)


def stage_parameters(config: RunConfig, stages: Sequence[Range], stage: int) -> int:
    """Parameters of one stage on one tp rank. A tied table on a single stage counts once."""
    model, tp = config.model, config.mesh.tp
    first, last = stage == 0, stage == len(stages) - 1
    begin, end = stages[stage]
    table = padded_vocab_share(model.vocab, tp) * model.hidden
    count = (end - begin) * local_layer_parameters(model, tp)
    if first:
        count += table + position_parameters(model)
    if last:
        count += norm_parameters(model)
        count += 0 if first and model.tied_embeddings else table
    return count


def _tokens(config: RunConfig) -> int:
    return config.micro_batch_size * config.sequence_length


def _kept_tokens(config: RunConfig) -> int:
    """Tokens of the residual stream on a tp rank."""
    return _tokens(config) // (config.mesh.tp if config.mesh.sequence_parallel else 1)


def layer_activations(config: RunConfig) -> int:
    """Bytes that one layer keeps for its backward, for one micro-batch on one rank."""
    model, tp, tokens, kept = config.model, config.mesh.tp, _tokens(config), _kept_tokens(config)
    width, heads, kv_heads = model.dim_per_head, model.heads // tp, local_kv_heads(model, tp)
    elements = 4 * kept * model.hidden
    elements += tokens * (2 * heads + 2 * kv_heads) * width
    elements += tokens * (model.ffn // tp) * (4 if model.gated else 2)
    in_fp32 = tokens * heads
    if model.qk_norm:
        elements += tokens * (heads + kv_heads) * width
    if model.dropout > 0:
        elements += 2 * kept * model.hidden
    if model.attention_dropout > 0:
        scores = tokens * config.sequence_length * heads
        elements, in_fp32 = elements + scores, in_fp32 + 2 * scores
    return elements * ITEM_BYTES[config.precision.dtype] + 4 * in_fp32


def _stage_activations(config: RunConfig, stages: Sequence[Range], stage: int) -> float:
    """Bytes that one stage keeps for one micro-batch, without the loss."""
    begin, end = stages[stage]
    held = (end - begin) * layer_activations(config)
    if stage == len(stages) - 1:
        held += 2 * _kept_tokens(config) * config.model.hidden * ITEM_BYTES[config.precision.dtype]
    return held
