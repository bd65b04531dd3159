"""The values that a key may have, whatever the others are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from raytron.errors import Problem


class Range(NamedTuple):
    """The values that a number may have: [low, high], without an end where it is open."""

    key: str
    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def check(self, value: Any) -> Iterator[Problem]:
        if value is None:
            return
        below = value < self.low or (self.open_low and value == self.low)
        above = value > self.high or (self.open_high and value == self.high)
        if below or above:
            yield Problem(self.key, f"{value} is {'too small' if below else 'too large'}", f"use {self}")

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"more than {self.low:g}" if self.open_low else f"{self.low:g} or more"
        low = f"more than {self.low:g}" if self.open_low else f"at least {self.low:g}"
        return f"{low} and {'less than' if self.open_high else 'at most'} {self.high:g}"


def _at_least(low: float, keys: str) -> list[Range]:
    return [Range(key, low) for key in keys.split()]


def _more_than_zero(keys: str) -> list[Range]:
    return [Range(key, 0, open_low=True) for key in keys.split()]


def _share(keys: str) -> list[Range]:
    return [Range(key, 0, 1, open_high=True) for key in keys.split()]


RANGES: tuple[Range, ...] = (
    *_at_least(1, "steps global_batch_size micro_batch_size sequence_length"),
    *_at_least(0, "seed"),
    *_at_least(1, "model.layers model.hidden model.heads model.kv_heads model.head_dim model.ffn model.max_positions"),
    *_at_least(1, "model.window"),
    *_at_least(2, "model.vocab"),
    *_more_than_zero("model.norm_eps model.rope_theta"),
    *_at_least(0, "model.init_std"),
    *_share("model.dropout model.attention_dropout"),
    *_at_least(0, "model.experts.count model.experts.shared_ffn model.experts.first_dense"),
    *_at_least(1, "model.experts.top_k model.experts.ffn model.experts.every"),
    *_at_least(1, "model.experts.groups model.experts.group_top_k"),
    *_at_least(0, "model.experts.aux_loss model.experts.z_loss model.experts.bias_rate"),
    *_more_than_zero("model.experts.scale model.experts.capacity_factor"),
    *_at_least(1, "mesh.pp mesh.dp mesh.replicate mesh.cp mesh.cp_all_to_all mesh.tp mesh.ep mesh.etp"),
    *_at_least(1, "pipeline.virtual_stages"),
    *_at_least(0, "data_parallel.prefetch"),
    *_more_than_zero("pipeline.memory_gb data_parallel.bucket_mb"),
    *_share("optimizer.beta1 optimizer.beta2 optimizer.momentum"),
    Range("optimizer.newton_schulz_steps", 1, 20),
    *_more_than_zero("precision.loss_scale"),
    *_at_least(1, "precision.loss_scale_window batch_ramp.start batch_ramp.increment observe.layer_norms"),
    *_at_least(0, "batch_ramp.samples"),
    *_at_least(1, "memory.recompute_every memory.loss_chunks"),
    *_at_least(0, "memory.offload_min_mb"),
    *_more_than_zero("optimizer.eps optimizer.clip_norm lr.peak"),
    *_at_least(0, "optimizer.weight_decay lr.final lr.warmup_steps"),
    *_at_least(1, "lr.decay_steps"),
    Range("lr.stable_fraction", 0, 1),
    Range("data.validation_fraction", 0, 1, open_low=True, open_high=True),
    Range("data.blend_block", 1, 1 << 20),
    Range("data.prefetch", 0, 64),
    Range("data.fim.rate", 0, 1),
    Range("data.fim.spm_rate", 0, 1),
    Range("data.text_fill", 0.1, 1),
    *_more_than_zero("data.shard_mb data.max_mb data.tokenizer.train_mb"),
    Range("data.tokenizer.vocab", 257),  # every byte and the end of a document
    *_at_least(1, "checkpoint.every checkpoint.keep_last checkpoint.keep_every checkpoint.keep_best"),
    *_at_least(1, "evaluate.every evaluate.prompt_tokens"),
    *_at_least(0, "evaluate.batches recovery.max_restarts recovery.spares elastic.grow_after_s"),
    *_at_least(1, "recovery.memory_every elastic.min_workers elastic.max_workers"),
    *_more_than_zero("recovery.heartbeat_s recovery.lease_s recovery.window_s elastic.pays_within_s"),
    *_more_than_zero("observe.peak_tflops cluster.cpus_per_worker cluster.timeout_s cluster.placement_timeout_s"),
    *_at_least(1, "cluster.threads_per_worker guard.rollback_steps guard.max_skipped guard.digest_every"),
    *_more_than_zero("guard.spike"),
    Range("guard.straggler_ratio", 1, open_low=True),
    *_at_least(10, "guard.spike_window"),
    Range("observe.port", 0, 65535),
)
