"""Keys that mean something under a condition only, which is not met: said, never passed over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from operator import attrgetter
from typing import NamedTuple

from raytron.config import ExpertsConfig, RunConfig
from raytron.errors import Problem
from raytron.rules.words import as_yaml, one_of

DEFAULTS = RunConfig()


class Unused(NamedTuple):
    """Keys that mean something under a condition only. reads: the keys of the condition; both with blanks between."""

    keys: str
    reads: str
    used: Callable[[RunConfig], bool]
    where: str
    remedy: str

    def check(self, config: RunConfig) -> Iterator[Problem]:
        if self.used(config):
            return
        for key in self.keys.split():
            value, default = attrgetter(key)(config), attrgetter(key)(DEFAULTS)
            if value != default:
                what = f"{as_yaml(value)} has no effect {self.where}"
                yield Problem(key, what, f"leave it at {as_yaml(default)}, or {self.remedy}")


EXPERT_AXES = ("mesh.ep", "mesh.etp", "mesh.expert_dispatch")


def _optimizers(keys: str, *names: str) -> Unused:
    """Keys of some optimizers."""
    return Unused(
        keys,
        "optimizer.name",
        lambda config: config.optimizer.name in names,
        "with this optimizer",
        f"set optimizer.name to {one_of(names)}",
    )


UNUSED: tuple[Unused, ...] = (
    Unused(
        " ".join([*(f"model.experts.{key.name}" for key in fields(ExpertsConfig)), *EXPERT_AXES]),
        "model.experts.count",
        lambda config: config.model.experts.count > 0,
        "on a model without experts",
        "set model.experts.count to 2 or more",
    ),
    _optimizers("optimizer.beta1 optimizer.beta2", "adamw", "muon", "lion"),
    _optimizers("optimizer.eps", "adamw", "muon"),
    _optimizers("optimizer.momentum optimizer.nesterov", "muon", "sgd"),
    _optimizers("optimizer.newton_schulz optimizer.newton_schulz_steps", "muon"),
    Unused(
        "optimizer.decay_all",
        "optimizer.weight_decay optimizer.groups",
        lambda config: (
            config.optimizer.weight_decay > 0 or any(group.weight_decay for group in config.optimizer.groups)
        ),
        "where nothing decays",
        "set optimizer.weight_decay",
    ),
    Unused(
        "precision.loss_scale precision.loss_scale_window",
        "precision.dtype",
        lambda config: config.precision.dtype == "fp16",
        "on other types than fp16",
        "set precision.dtype to fp16",
    ),
    Unused(
        "data.too_long",
        "data.packing",
        lambda config: config.data.packing != "chop",
        "where documents are cut every sequence_length tokens",
        "set data.packing to best_fit or pad",
    ),
    Unused(
        "data.fim.spm_rate data.fim.prefix data.fim.middle data.fim.suffix",
        "data.fim.rate",
        lambda config: config.data.fim.rate > 0,
        "where no middle is filled in",
        "set data.fim.rate",
    ),
    Unused(
        "guard.on_spike guard.spike_window",
        "guard.spike",
        lambda config: config.guard.spike is not None,
        "where nothing counts as a leap",
        "set guard.spike",
    ),
    Unused(
        "guard.rollback_steps",
        "guard.on_nonfinite guard.on_spike",
        lambda config: "rollback" in (config.guard.on_nonfinite, config.guard.on_spike),
        "where nothing is rolled back",
        "set guard.on_nonfinite or guard.on_spike to rollback",
    ),
    Unused(
        "memory.recompute_parts",
        "memory.recompute",
        lambda config: config.memory.recompute == "selective",
        "where memory.recompute is not selective",
        "set memory.recompute to selective",
    ),
    Unused(
        "memory.offload_min_mb",
        "memory.offload_activations",
        lambda config: config.memory.offload_activations,
        "where no activations are offloaded",
        "set memory.offload_activations to true",
    ),
    Unused(
        "data_parallel.prefetch",
        "data_parallel.zero",
        lambda config: config.data_parallel.zero > 0,
        "under ZeRO 0, which gathers no weights",
        "set data_parallel.zero to 1, 2 or 3",
    ),
    Unused(
        "data_parallel.reduce",
        "data_parallel.zero",
        lambda config: config.data_parallel.zero == 3,
        "below ZeRO 3: ZeRO 0 and 1 reduce after the last micro-batch, ZeRO 2 after each",
        "set data_parallel.zero to 3",
    ),
    Unused(
        "mesh.expert_dispatch",
        "model.experts.count mesh.ep mesh.etp",
        lambda config: config.model.experts.count == 0 or config.mesh.ep * config.mesh.etp > 1,
        "where each rank has whole experts, and all of them",
        "set mesh.ep or mesh.etp to 2 or more",
    ),
    Unused(
        "model.max_positions",
        "model.positions",
        lambda config: config.model.positions == "learned",
        "where no positions are learned",
        "set model.positions to learned",
    ),
    Unused(
        "model.rope_theta",
        "model.positions",
        lambda config: config.model.positions == "rope",
        "with other positions than rope",
        "set model.positions to rope",
    ),
    Unused(
        "data.format data.metadata_keys data.on_bad_record data.tokenizer.backend",
        "data.dataset",
        lambda config: config.data.dataset is None,
        "where the data set is made already",
        "set data.dataset to null",
    ),
    Unused(
        "data.text_key",
        "data.format",
        lambda config: config.data.format == "text",
        "on conversations and pairs of them",
        "set data.format to text",
    ),
    Unused(
        "data.messages_key",
        "data.format",
        lambda config: config.data.format == "chat",
        "where records are no conversations",
        "set data.format to chat",
    ),
    Unused(
        "data.chat_template",
        "data.format",
        lambda config: config.data.format != "text",
        "where records are no conversations",
        "set data.format to chat or preference",
    ),
    Unused(
        "data.tokenizer.pattern",
        "data.tokenizer.path",
        lambda config: config.data.tokenizer.path is not None,
        "where a tokenizer is trained",
        "set data.tokenizer.path",
    ),
    Unused(
        "batch_ramp.increment",
        "batch_ramp.start",
        lambda config: config.batch_ramp.start is not None,
        "where the batch does not grow",
        "set batch_ramp.start",
    ),
    Unused(
        "elastic.grow_after_s elastic.pays_within_s",
        "elastic.min_workers elastic.max_workers",
        lambda config: config.elastic.on,
        "where the number of workers does not change",
        "set elastic.min_workers or elastic.max_workers",
    ),
    Unused(
        "observe.host",
        "observe.port",
        lambda config: config.observe.port is not None,
        "where nothing listens",
        "set observe.port",
    ),
    Unused(
        "lr.stable_fraction",
        "lr.decay lr.changes",
        lambda config: "wsd" in (config.lr.decay, *(change.decay for change in config.lr.changes)),
        "with other decays than wsd",
        "set lr.decay to wsd",
    ),
    Unused(
        "checkpoint.keep_every checkpoint.keep_best",
        "checkpoint.keep_last",
        lambda config: config.checkpoint.keep_last is not None,
        "where every checkpoint is kept",
        "set checkpoint.keep_last",
    ),
    Unused(
        "checkpoint.keep_best",
        "evaluate.every evaluate.batches",
        lambda config: config.evaluate.every is not None and config.evaluate.batches > 0,
        "where no checkpoint but the last is evaluated",
        "set evaluate.every, to a multiple of checkpoint.every",
    ),
    Unused(
        "data.blend_block data.stages",
        "data.blend",
        lambda config: bool(config.data.blend),
        "without a blend",
        "name the data sets of data.blend",
    ),
    Unused(
        "data.sources data.format data.metadata_keys data.shard_mb data.max_mb data.tokenizer.vocab "
        "data.tokenizer.train_mb",
        "data.blend",
        lambda config: not config.data.blend,
        "on the data sets of data.blend, which are tokenized already",
        "leave data.blend empty",
    ),
    Unused(
        "data.text_key data.on_bad_record data.validation_fraction data.tokenizer.backend",
        "data.blend",
        lambda config: not config.data.blend or config.data.reads_text,
        "on the data sets of data.blend, which are tokenized already",
        "leave data.blend empty, or name text in an entry's sources",
    ),
    Unused(
        "data.metadata_keys data.shard_mb",
        "data.source",
        lambda config: config.data.source == "tokens",
        "where no data set is made",
        "set data.source to tokens",
    ),
    Unused(
        "data.text_fill",
        "data.source data.blend",
        lambda config: config.data.reads_text,
        "where no text is tokenized as it is read",
        "set data.source to text",
    ),
    Unused(
        "data.validation",
        "evaluate.batches",
        lambda config: config.evaluate.batches > 0,
        "where evaluate.batches is 0",
        "set evaluate.batches to 1 or more",
    ),
    Unused(
        "evaluate.every",
        "evaluate.batches",
        lambda config: config.evaluate.batches > 0,
        "where evaluate.batches is 0",
        "set evaluate.batches to 1 or more",
    ),
)
