"""The rules between the values of a configuration, all checked at once.

`problems` goes through two tables: RANGES, of keys and the values they may have, and RULES, of relations between keys.
A relation is looked at only where the keys that it reads are themselves in order, so that one mistake is reported once
and no rule divides by zero. Each problem says where, what and the remedy, with the nearest values that would do.
Nothing is changed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, get_args

from raytron.config import (
    SCHEDULE_CHUNKS,
    V_SHAPED,
    RecomputePart,
    RunConfig,
    divisors,
    flatten,
    from_mapping,
    to_mapping,
)
from raytron.errors import ConfigError, Problem
from raytron.stages import read_stages


def problems(config: RunConfig) -> list[Problem]:
    """Every rule that a configuration breaks; empty if it is in order. Neither the cluster nor the data is looked at."""
    config, found = _typed(config)
    values = flatten(to_mapping(config))
    wrong = {problem.where for problem in found}
    found += [problem for rule in RANGES if rule.key not in wrong for problem in rule.check(values[rule.key])]
    wrong = {problem.where for problem in found}
    for reads, check in RULES:
        if wrong.isdisjoint(reads.split()):
            found += check(config)
    return found


def _typed(config: RunConfig) -> tuple[RunConfig, list[Problem]]:
    """The configuration with values of the right types, and what had to be left out for it (built in Python, not read)."""
    mapping = to_mapping(config)
    try:
        return from_mapping(mapping), []
    except ConfigError as error:
        for problem in error.problems:
            section = mapping
            for part in problem.where.split("."):
                key = part.partition("[")[0]
                if part == key and isinstance(section.get(key), dict):
                    section = section[key]
                else:
                    section.pop(key, None)
                    break
        return from_mapping(mapping), list(error.problems)


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
    Range("data.text_fill", 0.1, 1),
    Range("data.prefetch", 0, 64),
    Range("data.fim.rate", 0, 1),
    Range("data.fim.spm_rate", 0, 1),
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
)


def _divide(count: int, name: str, parts: int) -> str:
    return f"{_counted(count, name)} cannot be cut in {parts} equal parts"


def _counted(count: int, names: str) -> str:
    """A number of things, whose first plural becomes a singular where there is one of them."""
    name = re.sub(r"s\b", "", names, count=1)
    return f"{count} {name if count == 1 else names}"


def _any_of(values: Iterable[int], near: int) -> str:
    """The values nearest to one, at most six, as a phrase."""
    nearest = sorted(sorted(set(values), key=lambda value: abs(value - near))[:6])
    if len(nearest) < 2:
        return "".join(map(str, nearest))
    return ", ".join(map(str, nearest[:-1])) + f" or {nearest[-1]}"


def _one_of(names: Sequence[str], word: str = "or") -> str:
    """Names as a phrase."""
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + f" {word} {names[-1]}"


def _around(value: int, step: int) -> str:
    """The nearest multiples of `step`, at least one of it."""
    below = value // step * step
    return _any_of([number for number in (below, below + step) if number > 0], value)


def _tp_widths(config: RunConfig) -> list[int]:
    """Every tp that the model and the sequence admit."""
    model, sequence = config.model, config.sequence_length
    return [
        tp
        for tp in divisors(model.heads)
        if _kv_fits(model.num_kv_heads, tp)
        and model.ffn % tp == 0
        and _exchange_fits(config, tp, config.mesh.cp_all_to_all)
        and sequence % _sequence_unit(config, tp, config.mesh.cp_all_to_all) == 0
    ]


def _exchange_fits(config: RunConfig, tp: int, parts: int) -> bool:
    """Whether what tp leaves a rank of the heads can be exchanged for sequence over `parts` ranks."""
    model = config.model
    return model.heads // tp % parts == 0 and _kv_fits(max(1, model.num_kv_heads // tp), parts)


def _sequence_unit(config: RunConfig, tp: int, parts: int) -> int:
    """What divides the length of a sequence: its equal shares, and on a ring two chunks for each rank."""
    mesh = config.mesh
    ring = mesh.cp // parts
    return math.lcm(mesh.cp * (tp if mesh.sequence_parallel else 1), 2 * ring if ring > 1 else 1)


def _kv_fits(kv_heads: int, tp: int) -> bool:
    return kv_heads % tp == 0 or tp % kv_heads == 0


def _head_width(config: RunConfig) -> Iterator[Problem]:
    model = config.model
    if model.head_dim is None and model.hidden % model.heads:
        legal = _any_of(divisors(model.hidden), model.heads)
        what = _divide(model.hidden, "hidden channels", model.heads) + ", one for each head"
        yield Problem("model.heads", what, f"use {legal}, or set model.head_dim")


def _kv_heads(config: RunConfig) -> Iterator[Problem]:
    heads, kv_heads = config.model.heads, config.model.num_kv_heads
    if heads % kv_heads:
        what = f"{heads} heads cannot share {kv_heads} KV heads equally"
        yield Problem("model.kv_heads", what, f"use {_any_of(divisors(heads), kv_heads)}")


def _rotary(config: RunConfig) -> Iterator[Problem]:
    width = config.model.dim_per_head
    if config.model.positions == "rope" and width % 2:
        near = _any_of([n for n in (width - 1, width + 1) if n > 0], width)
        what = f"rotary positions turn pairs of channels, and a head has {width}"
        yield Problem("model.head_dim", what, f"use {near}, or other positions than rope")


def _tensor_parallel(config: RunConfig) -> Iterator[Problem]:
    model, tp = config.model, config.mesh.tp
    use = f"use {_any_of(_tp_widths(config) or [1], tp)}"
    if model.heads % tp:
        yield Problem("mesh.tp", _divide(model.heads, "heads", tp), use)
    elif not _kv_fits(model.num_kv_heads, tp):
        what = (
            f"{_counted(model.num_kv_heads, 'KV heads')} can neither be cut in {tp} equal parts "
            f"nor repeated equally over {tp} ranks"
        )
        yield Problem("mesh.tp", what, use)
    if model.ffn % tp:
        what = _divide(model.ffn, "feed-forward channels", tp)
        more = "" if model.heads % tp else f", or set model.ffn to {_around(model.ffn, tp)}"
        yield Problem("mesh.tp", what, f"{use}{more}")


def _sequence(config: RunConfig) -> Iterator[Problem]:
    mesh, length = config.mesh, config.sequence_length
    unit = _sequence_unit(config, mesh.tp, mesh.cp_all_to_all)
    if mesh.cp % mesh.cp_all_to_all or length % unit == 0:
        return
    use = f"use {_around(length, unit)}"
    if mesh.cp == 1:
        remedy = f"{use}, or set mesh.sequence_parallel to false"
        yield Problem("sequence_length", _divide(length, "tokens", unit) + " under sequence parallelism", remedy)
        return
    ring = mesh.cp // mesh.cp_all_to_all
    cuts = [f"2 chunks for each of {ring} ranks of a ring"] * (ring > 1)
    cuts += [f"{mesh.cp_all_to_all} parts for the all-to-all"] * (mesh.cp_all_to_all > 1)
    cuts += [f"{mesh.tp} shares for sequence parallelism"] * (mesh.sequence_parallel and mesh.tp > 1)
    yield Problem("sequence_length", f"{length} tokens cannot be cut equally: {', '.join(cuts)}", use)


def _all_to_all(config: RunConfig) -> Iterator[Problem]:
    model, mesh = config.model, config.mesh
    parts, tp = mesh.cp_all_to_all, mesh.tp
    if model.heads % tp or not _kv_fits(model.num_kv_heads, tp):
        return
    legal = _any_of([n for n in divisors(mesh.cp) if _exchange_fits(config, tp, n)], parts)
    if mesh.cp % parts:
        yield Problem("mesh.cp_all_to_all", _divide(mesh.cp, "context-parallel ranks", parts), f"use {legal}")
    elif not _exchange_fits(config, tp, parts):
        heads, kv_heads = model.heads // tp, max(1, model.num_kv_heads // tp)
        share = f"{_counted(heads, 'heads')} and {_counted(kv_heads, 'KV heads')} of a rank"
        what = f"{share} cannot be exchanged equally over {parts} ranks"
        yield Problem("mesh.cp_all_to_all", what, f"use {legal}; a ring takes the rest of mesh.cp")


def _positions(config: RunConfig) -> Iterator[Problem]:
    rows = config.model.max_positions
    if config.model.positions != "learned":
        return
    if config.sequence_length > rows:
        what = f"{config.sequence_length} tokens are more than the {rows} learned positions"
        remedy = f"use at most {rows}, or set model.max_positions to {config.sequence_length}"
        yield Problem("sequence_length", what, remedy)
    if config.evaluate.prompt is not None and config.evaluate.prompt_tokens >= rows:
        what = f"{config.evaluate.prompt_tokens} tokens and a prompt are more than the {rows} learned positions"
        yield Problem("evaluate.prompt_tokens", what, f"use less than {rows}")


def _experts_unused(config: RunConfig) -> Iterator[Problem]:
    if config.model.experts.count > 0:
        return
    values, defaults = flatten(to_mapping(config)), flatten(to_mapping(RunConfig()))
    needy = [key for key in values if key.startswith("model.experts.")]
    for key in (*needy, "mesh.ep", "mesh.etp", "mesh.expert_dispatch"):
        if values[key] != defaults[key]:
            what = f"{values[key]!r} has no effect on a model without experts"
            yield Problem(key, what, f"leave it at {_yaml(defaults[key])}, or set model.experts.count to 2 or more")


def _expert_choice(config: RunConfig) -> Iterator[Problem]:
    experts = config.model.experts
    if experts.count == 0:
        return
    if experts.count % experts.groups:
        what = _divide(experts.count, "experts", experts.groups)
        yield Problem("model.experts.groups", what, f"use {_any_of(divisors(experts.count), experts.groups)}")
        return
    if experts.group_top_k > experts.groups:
        what = f"{experts.group_top_k} of {_counted(experts.groups, 'groups')} cannot be chosen"
        yield Problem("model.experts.group_top_k", what, f"use at most {experts.groups}")
        return
    choice = experts.group_top_k * (experts.count // experts.groups)
    if experts.top_k > choice:
        each = experts.count // experts.groups
        of = f", {_counted(experts.group_top_k, 'groups')} of {each}" if experts.groups > 1 else ""
        what = f"a token cannot go to {experts.top_k} of {_counted(choice, 'experts')}{of}"
        alone = " with model.experts.normalize false" if choice == 1 and experts.normalize else ""
        wider = f", or raise model.experts.group_top_k to {-(-experts.top_k // each)}"
        more = wider if choice < experts.top_k <= experts.count and experts.groups > 1 else ""
        yield Problem("model.experts.top_k", what, f"use at most {choice}{alone}{more}")
    elif experts.top_k == 1 and experts.normalize:
        what = "a token's only expert weighs 1 whatever the router says, which then learns nothing from the loss"
        more = ", or set model.experts.top_k to 2 or more" if choice > 1 else ""
        yield Problem("model.experts.normalize", what, f"use false{more}")
    if experts.drop != "probability" and experts.capacity_factor is None:
        what = "nothing is dropped where experts have no capacity"
        yield Problem("model.experts.drop", what, "use probability, or set model.experts.capacity_factor")
    if experts.shared_gate and not experts.shared_ffn:
        what = "there is no shared expert for the gate to weigh"
        yield Problem("model.experts.shared_gate", what, "use false, or set model.experts.shared_ffn")


def _expert_layers(config: RunConfig) -> Iterator[Problem]:
    model = config.model
    if model.experts.count == 0:
        return
    if model.expert_layers == 0:
        first, every = model.experts.first_dense, model.experts.every
        layers = _counted(model.layers, "layers")
        what = f"none of {layers} has experts, {first} being dense at first and then {every - 1} of {every}"
        if first >= model.layers >= every:
            yield Problem("model.experts.first_dense", what, f"use at most {model.layers - every}")
        elif first >= model.layers:
            remedy = f"use at most {model.layers}, and 0 for model.experts.first_dense"
            yield Problem("model.experts.every", what, remedy)
        else:
            yield Problem("model.experts.every", what, f"use at most {model.layers - first}")
    if model.bias:
        yield Problem("model.bias", "experts have no biases", "use false, or set model.experts.count to 0")


def _expert_parallel(config: RunConfig) -> Iterator[Problem]:
    model, mesh = config.model, config.mesh
    if model.experts.count == 0:
        return
    plane = mesh.dp * mesh.cp * mesh.tp
    widths = [etp for etp in divisors(plane) if model.expert_ffn % etp == 0]
    if model.expert_ffn % mesh.etp:
        what = _divide(model.expert_ffn, "channels of an expert", mesh.etp)
        yield Problem("mesh.etp", what, f"use {_any_of(widths, mesh.etp)}")
    elif plane % (mesh.etp * mesh.replicate):
        ranks = f"{_counted(plane, 'ranks')} (dp · cp · tp)"
        what = f"{ranks} cannot be folded with etp {mesh.etp} and replicate {mesh.replicate}"
        legal = [etp for etp in widths if plane % (etp * mesh.replicate) == 0]
        yield Problem("mesh.etp", what, f"use {_any_of(legal, mesh.etp)}" if legal else "set mesh.replicate to 1")
    else:
        room = plane // (mesh.etp * mesh.replicate)
        if model.experts.count % mesh.ep or room % mesh.ep:
            legal = [ep for ep in divisors(room) if model.experts.count % ep == 0]
            folds = [name for name in ("etp", "replicate") if getattr(mesh, name) > 1]
            ranks = f"{_counted(room, 'ranks')} ({' / '.join(['dp · cp · tp', *folds])})"
            what = f"{_counted(model.experts.count, 'experts')} and {ranks} cannot both be cut in {mesh.ep} equal parts"
            yield Problem("mesh.ep", what, f"use {_any_of(legal, mesh.ep)}")
    if model.experts.shared_ffn % mesh.tp:
        what = _divide(model.experts.shared_ffn, "channels of the shared expert", mesh.tp)
        yield Problem("model.experts.shared_ffn", what, f"use {_around(model.experts.shared_ffn, mesh.tp)}")
    local, tp = config.sequence_length // mesh.cp, mesh.tp
    if not mesh.sequence_parallel and local % tp:
        what = f"{_divide(local, 'tokens', tp)}, of which each tp rank takes one through the experts"
        yield Problem("sequence_length", what, f"use {_around(config.sequence_length, tp * mesh.cp)}")


def _yaml(value: Any) -> str:
    return "null" if value is None else str(value).lower()


def _stages(config: RunConfig) -> Iterator[Problem]:
    layers, pp, chunks = config.model.layers, config.mesh.pp, chunks_given(config) or config.pipeline.chunks
    stages, (where, split) = pp * chunks, _given_stages(config)
    if layers < stages and split is None:
        what = f"{_counted(layers, 'layers')} cannot fill {stages} stages (pp {pp} × {chunks} virtual)"
        remedy = f"use at most {_counted(layers, 'stages')}, or at least {stages} layers"
        yield Problem("mesh.pp" if chunks == 1 else "pipeline.virtual_stages", what, remedy)
    if split is None:
        return
    if config.pipeline.split is not None and config.pipeline.layout is not None:
        yield Problem("pipeline.layout", "stands beside pipeline.split", "set one of them to null")
    if len(split) != stages:
        given, wanted = _entries(len(split)), _entries(stages)
        what = f"{given} for {_counted(stages, 'stages')} (pp {pp} × {chunks} virtual)"
        yield Problem(where, what, f"give {wanted}, or null for a balanced split")
    elif any(size < 0 for size in split):
        yield Problem(where, f"{list(split)} has a negative number of layers", "give each 0 or more")
    elif empty := _empty_ranks(config.pipeline.schedule, split, pp):
        what = f"{list(split)} leaves {_one_of([f'rank {rank}' for rank in empty], 'and')} with nothing"
        yield Problem(where, what, "give one of its stages a layer")
    if split and sum(split) != layers:
        what = f"{' + '.join(map(str, split))} = {_counted(sum(split), 'layers')}, and the model has {layers}"
        yield Problem(where, what, f"let them sum to {layers}, or set null for a balanced split")


def _entries(count: int) -> str:
    return "1 entry" if count == 1 else f"{count} entries"


def chunks_given(config: RunConfig) -> int | None:
    """The model chunks on a rank that the configuration asks for; None where the schedule decides. Under `auto` the stages
    that are given say how many there are, as far as they are equally many on each rank."""
    pipeline, pp, (_, split) = config.pipeline, config.mesh.pp, _given_stages(config)
    if pipeline.virtual_stages is None and pipeline.schedule == "auto" and split and pp > 1 and len(split) % pp == 0:
        return len(split) // pp
    return pipeline.virtual_stages


def _given_stages(config: RunConfig) -> tuple[str, tuple[int, ...] | None]:
    """Which key gives the layers of each stage, and what it says; None where it is for the plan to decide."""
    if config.pipeline.layout is None:
        return "pipeline.split", config.pipeline.split
    with contextlib.suppress(ConfigError):
        return "pipeline.layout", read_stages(config.pipeline.layout)
    return "pipeline.layout", None


def _layout(config: RunConfig) -> Iterator[Problem]:
    if config.pipeline.layout is not None:
        try:
            read_stages(config.pipeline.layout)
        except ConfigError as error:
            yield from error.problems


def _empty_ranks(schedule: str, split: Sequence[int], pp: int) -> list[int]:
    """Pipeline ranks that would hold no parameter."""
    filled = {0, len(split) - 1, *(stage for stage, size in enumerate(split) if size)}
    ranks = {_rank_of(stage, len(split), pp, schedule in V_SHAPED) for stage in filled}
    return [rank for rank in range(pp) if rank not in ranks]


def _rank_of(stage: int, stages: int, pp: int, v: bool) -> int:
    return stages - 1 - stage if v and stage >= pp else stage % pp


def _batch(config: RunConfig) -> Iterator[Problem]:
    micro, dp, batch = config.micro_batch_size, config.mesh.dp, config.global_batch_size
    if batch % micro:
        what = f"{_counted(batch, 'sequences')} cannot be cut in micro-batches of {micro}"
        yield Problem("global_batch_size", what, f"use {_around(batch, micro)}")
    elif batch < micro * dp:
        what = f"{batch} sequences in micro-batches of {micro} do not give each of {dp} data-parallel ranks one"
        smaller = ", or a smaller micro_batch_size" if batch >= dp else ""
        yield Problem(
            "global_batch_size", what, f"use {micro * dp} or more, or mesh.dp of at most {batch // micro}{smaller}"
        )


def _elastic(config: RunConfig) -> Iterator[Problem]:
    elastic, mesh = config.elastic, config.mesh
    least, most, world = elastic.min_workers, elastic.max_workers, mesh.pp * mesh.dp * mesh.cp * mesh.tp
    if least is not None and most is not None and least > most:
        yield Problem("elastic.min_workers", f"{least} is more than max_workers, {most}", f"use at most {most}")
    elif most is not None and world > most:
        what = f"the mesh has {_counted(world, 'workers')}, and at most {most} are asked for"
        yield Problem("elastic.max_workers", what, f"use {world} or more, or a smaller mesh")


def _replicas(config: RunConfig) -> Iterator[Problem]:
    dp, replicate = config.mesh.dp, config.mesh.replicate
    if dp % replicate:
        what = _divide(dp, "data-parallel ranks", replicate)
        yield Problem("mesh.replicate", what, f"use {_any_of(divisors(dp), replicate)}")
    elif replicate > 1 and config.data_parallel.zero == 0:
        what = "ZeRO 0 shares out nothing, so every data-parallel rank is a replica"
        yield Problem("mesh.replicate", what, "use 1, or set data_parallel.zero to 1, 2 or 3")


def _at_once(config: RunConfig) -> Iterator[Problem]:
    if not config.optimizer.at_once:
        return
    if config.optimizer.clip_norm is not None:
        what = "an update at once does not wait for the gradient norm that optimizer.clip_norm limits"
        yield Problem("optimizer.clip_norm", what, "use null, or set optimizer.at_once to false")
    if config.precision.dtype == "fp16":
        what = "fp16 gradients overflow now and then, and each time an update at once would be made in vain"
        yield Problem("optimizer.at_once", what, "use false, or precision.dtype bf16")
    if config.determinism == "canonical":
        what = "determinism: canonical waits for the largest gradient of all ranks at every step"
        yield Problem("optimizer.at_once", what, "use false, or set determinism to mesh")
    for key, value, plain in (
        ("guard.on_nonfinite", config.guard.on_nonfinite, "skip"),
        ("guard.on_spike", config.guard.on_spike, "keep"),
    ):
        if value != plain:
            what = "where ranks update at once a step is not run again, so no policy can follow from it"
            yield Problem(key, what, f"use {plain}, or set optimizer.at_once to false")


def _canonical(config: RunConfig) -> Iterator[Problem]:
    if config.determinism != "canonical":
        return
    if config.cluster.threads_per_worker is None:
        what = "determinism: canonical needs one number of threads, which sums in matrix products depend on"
        yield Problem("cluster.threads_per_worker", what, "use 1, or another number that stays the same")
    if config.data_parallel.reduce_dtype != "fp32":
        what = "sums that are rounded on their way depend on which rank made them, against determinism: canonical"
        yield Problem("data_parallel.reduce_dtype", what, "use fp32, or set determinism to mesh")
    if config.data_parallel.reduce is not None:
        what = "determinism: canonical keeps its sums to the end of a step, whatever is asked for"
        yield Problem("data_parallel.reduce", what, "leave it at null, or set determinism to mesh")
    for axis in ("ep", "etp"):
        if getattr(config.mesh, axis) > 1:
            what = "ranks that share out experts add up tokens of several micro-batches, against determinism: canonical"
            yield Problem(f"mesh.{axis}", what, "use 1, or set determinism to mesh")


def _schedule(config: RunConfig) -> Iterator[Problem]:
    name, chunks, pp = config.pipeline.schedule, config.pipeline.chunks, config.mesh.pp
    least, most = SCHEDULE_CHUNKS[name]
    if chunks < least or (most is not None and chunks > most):
        takes = "one model chunk" if most == 1 else "two model chunks" if most == 2 else "more than one model chunk"
        fits = [other for other, (low, high) in SCHEDULE_CHUNKS.items() if low <= chunks <= (high or chunks)]
        ranks = " with mesh.pp of 2 or more" if pp < 2 <= chunks else ""
        what = f"{name} has {takes} on a rank, and {chunks} {'is' if chunks == 1 else 'are'} asked for"
        remedy = f"use {least if most else f'{least} or more'}, or set pipeline.schedule to {_one_of(fits)}{ranks}"
        yield Problem("pipeline.virtual_stages", what, remedy)
    if least > 1 and pp < 2:
        remedy = "set mesh.pp to 2 or more, or use 1f1b"
        yield Problem("pipeline.schedule", f"{name} needs more than one pipeline rank", remedy)
    if name == "auto" and chunks > 1 and pp < 2:
        what = f"no schedule has {chunks} model chunks on the only pipeline rank"
        yield Problem("pipeline.virtual_stages", what, "use 1 or null, or set mesh.pp to 2 or more")


def _schedule_batch(config: RunConfig) -> Iterator[Problem]:
    pp, unit, batch = config.mesh.pp, config.micro_batch_size * config.mesh.dp, config.global_batch_size
    if batch % config.micro_batch_size or batch < unit or config.pipeline.schedule != "dualpipe-v":
        return
    fewest = config.microbatches_run(config.mesh.dp - 1)
    if pp > 1 and fewest < 2 * pp:
        verb = "is" if fewest == 1 else "are"
        what = f"dualpipe-v needs at least {2 * pp} micro-batches (2 · pp), and there {verb} {fewest}"
        what += " on the last data-parallel rank" if fewest < config.microbatches else ""
        yield Problem("global_batch_size", what, f"use {unit * 2 * pp} or more, or pipeline.schedule zb-v")


def _recompute(config: RunConfig) -> Iterator[Problem]:
    memory, stages = config.memory, config.mesh.pp * (chunks_given(config) or config.pipeline.chunks)
    if memory.recompute == "none":
        for key, value, neutral in (("every", memory.recompute_every, 1), ("stages", memory.recompute_stages, None)):
            if value != neutral:
                remedy = (
                    f"set memory.recompute to selective or full, or this to {'null' if neutral is None else neutral}"
                )
                yield Problem(f"memory.recompute_{key}", "nothing is recomputed (memory.recompute is none)", remedy)
    if memory.recompute == "selective" and not memory.recompute_parts:
        remedy = "name some of " + ", ".join(get_args(RecomputePart)) + ", or set memory.recompute to none"
        yield Problem("memory.recompute_parts", "names no part of a block", remedy)
    if memory.recompute == "selective" and set(memory.recompute_parts) == {"dropout"} and not config.model.dropout:
        what = "the model has no dropout, the only part that is named"
        yield Problem("memory.recompute_parts", what, "name other parts too, or set memory.recompute to none")
    unknown = [stage for stage in memory.recompute_stages or () if not 0 <= stage < stages]
    if unknown or memory.recompute_stages == ():
        what = f"there is no stage {', '.join(map(str, unknown))}" if unknown else "names no stage"
        yield Problem("memory.recompute_stages", what, f"name some of 0 to {stages - 1}, or null for all")


def _loss_chunks(config: RunConfig) -> Iterator[Problem]:
    chunks = config.memory.loss_chunks
    tokens = config.sequence_length // config.mesh.cp // (config.mesh.tp if config.mesh.sequence_parallel else 1)
    if chunks > max(1, tokens):
        what = f"a rank's share of the sequence has {tokens} tokens, which are not enough for {chunks} pieces"
        yield Problem("memory.loss_chunks", what, f"use at most {max(1, tokens)}")


def _learning_rate(config: RunConfig) -> Iterator[Problem]:
    rate = config.lr
    if rate.warmup_steps and rate.warmup_steps >= config.lr_horizon:
        horizon = _counted(config.lr_horizon, "steps")
        what = (
            f"a warmup of {_counted(rate.warmup_steps, 'steps')} leaves nothing of the {horizon} of the learning rate"
        )
        remedy = (
            f"use at most {config.lr_horizon - 1}, or raise {'steps' if rate.decay_steps is None else 'lr.decay_steps'}"
        )
        yield Problem("lr.warmup_steps", what, remedy)
    if rate.decay in ("cosine", "linear", "wsd") and rate.final > rate.peak:
        yield Problem("lr.final", f"{rate.final:g} is above the peak {rate.peak:g}", f"use at most {rate.peak:g}")


def _parameter_groups(config: RunConfig) -> Iterator[Problem]:
    for index, group in enumerate(config.optimizer.groups):
        where = f"optimizer.groups[{index}]"
        if group.lr < 0:
            yield Problem(f"{where}.lr", f"{group.lr:g} is too small", "use 0 or more")
        if group.weight_decay is not None and group.weight_decay < 0:
            yield Problem(f"{where}.weight_decay", f"{group.weight_decay:g} is too small", "use 0 or more, or null")
        for key, value, neutral in (("lr", group.lr, 1), ("weight_decay", group.weight_decay, None)):
            if group.freeze and value != neutral:
                what = f"{value:g} has no effect on parameters that are frozen"
                yield Problem(f"{where}.{key}", what, f"leave it at {_yaml(neutral)}, or set freeze to false")
        earlier = [other.match for other in config.optimizer.groups[:index]]
        if group.match in earlier or "*" in earlier:
            first = "*" if "*" in earlier else group.match
            what = f"{group.match!r} comes after {first!r}, which matches all of it"
            yield Problem(f"{where}.match", what, "put it first: the first group that matches a name holds")


def _rounding(config: RunConfig) -> Iterator[Problem]:
    precision = config.precision
    if precision.stochastic_rounding and "bf16" not in (precision.dtype, precision.moments):
        what = "nothing is rounded to bf16"
        yield Problem("precision.stochastic_rounding", what, "use false, or bf16 for precision.dtype or moments")


def _batch_ramp(config: RunConfig) -> Iterator[Problem]:
    ramp, full = config.batch_ramp, config.global_batch_size
    if ramp.start is None:
        if ramp.samples:
            yield Problem("batch_ramp.start", "is null, and batch_ramp.samples is set", "name the first batch size")
        return
    if ramp.start >= full:
        what = f"{ramp.start} sequences are no rise to the global batch of {full}"
        yield Problem("batch_ramp.start", what, f"use less than {full}, or null")
        return
    if (full - ramp.start) % ramp.increment:
        what = f"steps of {ramp.increment} don't lead from {ramp.start} to {full}"
        unit = config.micro_batch_size
        steps = divisors(full - ramp.start)
        near = _any_of([step for step in steps if step % unit == 0] or steps, ramp.increment)
        yield Problem("batch_ramp.increment", what, f"use {near}")
        return
    found = list(_ramp_levels(config))
    yield from found
    rise = len(config.batch_sizes) - 1
    if ramp.samples < rise and not found:
        what = f"{ramp.samples} sequences are too few for {_counted(rise, 'batch sizes')} below {full}"
        yield Problem("batch_ramp.samples", what, f"use {max(rise, ramp.start)} or more")


def _ramp_levels(config: RunConfig) -> Iterator[Problem]:
    """Every batch size on the way obeys what the full one obeys; the first that does not is told."""
    others = (_batch_ramp, _data_stages)
    checks = [check for reads, check in RULES if "global_batch_size" in reads.split() and check not in others]
    told = {problem.where for check in checks for problem in check(config)}
    for size in config.batch_sizes[:-1]:
        level = dataclasses.replace(config, global_batch_size=size)
        found = [problem for check in checks for problem in check(level) if problem.where not in told]
        if found:
            where = "batch_ramp.start" if size == config.batch_ramp.start else "batch_ramp.increment"
            what = f"on the way to {config.global_batch_size}: {found[0].what}"
            yield Problem(where, what, f"where it makes {size} {found[0].remedy}")
            return


def _gradient_noise(config: RunConfig) -> Iterator[Problem]:
    if not config.observe.gradient_noise:
        return
    if config.mesh.dp == 1:
        what = "the noise is seen between data-parallel ranks, and there is one"
        yield Problem("observe.gradient_noise", what, "use false, or mesh.dp of 2 or more")
    if config.data_parallel.reduces_each:
        what = "where each micro-batch's gradients are reduced, no rank ever holds its own gradient of the whole step"
        remedy = "use false, or data_parallel.zero of 0 or 1, or ZeRO 3 with data_parallel.reduce: last_microbatch"
        yield Problem("observe.gradient_noise", what, remedy)
    if config.determinism == "canonical":
        what = "determinism: canonical sums micro-batches by its own tree, and no rank its own gradient"
        yield Problem("observe.gradient_noise", what, "use false, or determinism: mesh")
    if config.mesh.cp > 1:
        what = "context-parallel ranks see parts of the same sequences"
        yield Problem("observe.gradient_noise", what, "use false, or mesh.cp of 1")


def _data(config: RunConfig) -> Iterator[Problem]:
    data, vocab = config.data, config.model.vocab
    if data.dataset is not None or data.blend:
        return
    if not data.sources:
        yield Problem("data.sources", "no data set and no sources", "name files, or python-stdlib, or set data.dataset")
    if data.tokenizer.path is None and data.tokenizer.vocab > vocab:
        what = f"a tokenizer of {data.tokenizer.vocab} tokens makes ids beyond the model's vocabulary of {vocab}"
        remedy = f"use at most {vocab}, or set model.vocab to {data.tokenizer.vocab}"
        yield Problem("data.tokenizer.vocab" if vocab >= 257 else "model.vocab", what, remedy)


WEIGHTS_SUM = 1e-3  # how far from 1 weights may be, for they are written by hand
LEAST_SHARE = 1 + 1e-6  # samples of a block that a source has at least, with room for rounding


def _blend(config: RunConfig) -> Iterator[Problem]:
    data = config.data
    if not data.blend:
        return
    if data.dataset is not None:
        what = "a run reads one data set or a blend, and data.dataset names one"
        yield Problem(
            "data.blend", what, "set data.dataset to null and name it in data.blend, or leave data.blend empty"
        )
    for number, source in enumerate(data.blend):
        where = f"data.blend[{number}]"
        if not source.dataset.strip() and not source.sources:
            yield Problem(f"{where}.dataset", "is empty", "name the folder of a tokenized data set, or text in sources")
        if source.dataset.strip() and source.sources:
            what = "names a tokenized data set and text, which is tokenized as it is read"
            yield Problem(where, what, "leave dataset or sources empty")
        if source.max_epochs is not None and source.max_epochs <= 0:
            yield Problem(f"{where}.max_epochs", f"{source.max_epochs:g} is too small", "use more than 0, or null")
        late = any(number < len(stage.weights) and stage.weights[number] > 0 for stage in data.stages)
        if source.weight == 0 and not late:
            yield Problem(f"{where}.weight", "is 0 in every stage: it is never read", "give it a weight, or remove it")
    yield from _weights("data.blend", [source.weight for source in data.blend], data.blend_block)


def _weights(where: str, weights: Sequence[float], block: int) -> Iterator[Problem]:
    """Shares of samples: not negative, together 1, and enough for whole samples in a block."""
    if min(weights, default=0) < 0:
        yield Problem(where, f"a weight of {min(weights):g} is too small", "use 0 or more")
        return
    total = sum(weights)
    if abs(total - 1) > WEIGHTS_SUM:
        normal = ", ".join(f"{weight / total:.6g}" for weight in weights) if total > 0 else "weights that sum to 1"
        yield Problem(where, f"the weights sum to {total:g}, not to 1", f"use {normal}")
        return
    for number, weight in enumerate(weights):
        share = weight / total
        if 0 < share * block < LEAST_SHARE:
            larger = 1 << math.ceil(math.log2(LEAST_SHARE / share))
            what = f"the weight {weight:g} of source {number} is less than one sample in a block of {block}"
            bigger = f", or data.blend_block of {larger}" if larger <= 1 << 20 else ""
            yield Problem(where, what, f"use 0, or at least {math.ceil(LEAST_SHARE / block * 1e7) / 1e7:g}{bigger}")


def _text(config: RunConfig) -> Iterator[Problem]:
    """What text that is tokenized as it is read does not go with."""
    data = config.data
    if data.source == "text" and data.dataset is not None:
        what = "text is tokenized as it is read, and data.dataset names a data set that is tokenized already"
        yield Problem("data.source", what, "set data.dataset to null, or data.source to tokens")
    if data.source == "text" and data.blend:
        remedy = "use tokens, and name the text in `sources` of an entry of data.blend"
        yield Problem("data.source", "each entry of a blend says for itself whether it is text", remedy)
        return
    if not data.reads_text:
        return
    before = "or set data.source to tokens" if not data.blend else "or tokenize the text first (raytron tokenize)"
    if data.packing == "best_fit":
        what = (
            "best_fit packs documents by their tokens, which text that is tokenized as it is read does not tell before"
        )
        yield Problem("data.packing", what, f"use chop or pad, {before}")
    if data.packing == "pad" and data.too_long == "drop":
        what = "which documents are too long is not known before their text is tokenized"
        yield Problem("data.too_long", what, f"use cut, {before}")
    if data.format != "text" and not data.blend:
        what = f"{data.format} becomes tokens and loss spans of whole conversations, which only a data set keeps"
        yield Problem("data.format", what, f"use text, {before}")
    if data.blend and data.tokenizer.path is None:
        what = "text in a blend is tokenized as it is read, and no tokenizer is given"
        yield Problem("data.tokenizer.path", what, "give that of the other entries, such as DATASET/tokenizer.json")


def _data_stages(config: RunConfig) -> Iterator[Problem]:
    data = config.data
    if not data.blend:
        return
    before = 0
    for number, stage in enumerate(data.stages):
        where = f"data.stages[{number}]"
        starts = [start for start in (stage.start_step, stage.start_sample) if start is not None]
        if len(starts) != 1:
            what = "names both a step and a sample" if starts else "does not say when it begins"
            yield Problem(where, what, "set one of start_step and start_sample")
            continue
        key = "start_step" if stage.start_sample is None else "start_sample"
        start = config.samples_after(starts[0]) if key == "start_step" else starts[0]
        if start <= before:
            what = f"begins with sample {start}, and the stage before it with sample {before}"
            yield Problem(f"{where}.{key}", what, "order stages by their beginning, which is after the first sample")
        before = max(before, start)
        if len(stage.weights) != len(data.blend):
            what = f"{_counted(len(stage.weights), 'weights')} for {_counted(len(data.blend), 'entries')} of data.blend"
            yield Problem(f"{where}.weights", what, "give one for each, 0 for a source that is not read")
        else:
            yield from _weights(f"{where}.weights", stage.weights, data.blend_block)


def _validation_sets(config: RunConfig) -> Iterator[Problem]:
    names = [each.name for each in config.data.validation]
    for number, each in enumerate(config.data.validation):
        where = f"data.validation[{number}]"
        if not re.fullmatch(r"[\w.-]+", each.name):
            remedy = "use letters, digits, and . _ - only: losses are told by it"
            yield Problem(f"{where}.name", f"{each.name!r} is no name", remedy)
        elif each.name in names[:number]:
            yield Problem(f"{where}.name", f"{each.name!r} is taken", "give each validation set a name of its own")
        if not each.dataset.strip():
            yield Problem(f"{where}.dataset", "is empty", "name the folder of a tokenized data set")


def _objective(config: RunConfig) -> Iterator[Problem]:
    wanted = config.data.objective
    if wanted != "causal":
        what = f"{wanted} asks for attention to both sides; the models here are causal decoders"
        module = {"masked": "raytron.data.masked", "span_corruption": "raytron.data.corruption"}[wanted]
        yield Problem("data.objective", what, f"use causal, or make such samples for another model with {module}")
    if config.data.format == "preference":
        what = "a causal model would learn the rejected side of each pair like the chosen one"
        yield Problem("data.format", what, "train on text or chat; raytron tokenize makes data sets of pairs")


def _fill_in_the_middle(config: RunConfig) -> Iterator[Problem]:
    fim = config.data.fim
    names = [fim.prefix, fim.middle, fim.suffix]
    if fim.rate > 0 and len(set(names)) < len(names):
        what = f"the tokens before prefix, middle and suffix are not three: {', '.join(names)}"
        yield Problem("data.fim", what, "name three tokens that the tokenizer has")
    if fim.rate > 0 and config.data.dataset is None and config.data.tokenizer.path is None:
        what = f"a tokenizer that is trained on the corpus has no tokens {', '.join(names)}"
        yield Problem("data.fim.rate", what, "use 0, or set data.tokenizer.path to a tokenizer that has them")


def _metadata(config: RunConfig) -> Iterator[Problem]:
    data, keys = config.data, config.data.metadata_keys
    told = {"text": (data.text_key,), "chat": (data.messages_key,), "preference": ("prompt", "chosen", "rejected")}
    for name in told[data.format]:
        if name in keys:
            what = f"{name!r} holds the text, which becomes tokens"
            yield Problem("data.metadata_keys", what, "leave it out")
    if len(set(keys)) < len(keys) or not all(key.strip() for key in keys):
        yield Problem("data.metadata_keys", "a name is empty or there twice", "name each field once")


def _trace(config: RunConfig) -> Iterator[Problem]:
    steps = config.observe.trace_steps
    if steps is not None and (len(steps) != 2 or not 1 <= steps[0] <= steps[1]):
        what = f"{list(steps)} are no first and last step"
        yield Problem("observe.trace_steps", what, "use two numbers from 1, such as [2, 4], or null")
    elif steps is not None and steps[0] > config.steps:
        what = f"the run ends after step {config.steps}, before step {steps[0]}"
        yield Problem("observe.trace_steps", what, f"begin at {config.steps} at most, raise steps, or use null")


FIM_TOKENS = ("data.fim.prefix", "data.fim.middle", "data.fim.suffix")


def _texts(config: RunConfig) -> Iterator[Problem]:
    for key, value in flatten(to_mapping(config)).items():
        needed = key in ("name", "run_dir", "data.text_key", "data.messages_key", "data.tokenizer.eod", *FIM_TOKENS)
        optional = key in (
            "data.dataset", "data.chat_template", "data.tokenizer.path", "data.tokenizer.pattern",
            "evaluate.prompt", "cluster.address",
        )  # fmt: skip
        if (needed or (optional and value is not None)) and not str(value).strip():
            yield Problem(key, "is empty", "give a text" + ("" if needed else ", or null"))


def _resume(config: RunConfig) -> Iterator[Problem]:
    keys = [*flatten(to_mapping(config)), *(item.name for item in dataclasses.fields(config))]
    for key in config.resume.allow:
        if key not in keys:
            close = difflib.get_close_matches(key, keys, n=1, cutoff=0.4)
            remedy = f"did you mean {close[0]}?" if close else "name keys of the configuration, such as lr.peak"
            yield Problem("resume.allow", f"{key!r} is no key of a configuration", remedy)


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
        values, defaults = flatten(to_mapping(config)), flatten(to_mapping(RunConfig()))
        for key in self.keys.split():
            if values[key] != defaults[key]:
                what = f"{_yaml(values[key])} has no effect {self.where}"
                yield Problem(key, what, f"leave it at {_yaml(defaults[key])}, or {self.remedy}")


def _optimizers(keys: str, *names: str) -> Unused:
    """Keys of some optimizers."""
    return Unused(
        keys,
        "optimizer.name",
        lambda config: config.optimizer.name in names,
        "with this optimizer",
        f"set optimizer.name to {_one_of(names)}",
    )


UNUSED: tuple[Unused, ...] = (
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
        "lr.stable_fraction",
        "lr.decay",
        lambda config: config.lr.decay == "wsd",
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

_HEADS = "model.hidden model.heads model.kv_heads model.head_dim"

# the keys that a relation reads, and the relation
RULES: Sequence[tuple[str, Callable[[RunConfig], Iterator[Problem]]]] = (
    ("model.hidden model.heads model.head_dim", _head_width),
    ("model.heads model.kv_heads", _kv_heads),
    (f"{_HEADS} model.positions", _rotary),
    (
        f"{_HEADS} model.ffn mesh.tp mesh.cp mesh.cp_all_to_all sequence_length mesh.sequence_parallel",
        _tensor_parallel,
    ),
    ("sequence_length mesh.tp mesh.cp mesh.cp_all_to_all mesh.sequence_parallel", _sequence),
    (f"{_HEADS} mesh.tp mesh.cp mesh.cp_all_to_all", _all_to_all),
    ("sequence_length model.max_positions model.positions evaluate.prompt_tokens", _positions),
    ("model.experts.count", _experts_unused),
    (
        "model.experts.count model.experts.top_k model.experts.groups model.experts.group_top_k "
        "model.experts.normalize model.experts.drop model.experts.capacity_factor model.experts.shared_gate "
        "model.experts.shared_ffn",
        _expert_choice,
    ),
    ("model.layers model.experts.count model.experts.first_dense model.experts.every model.bias", _expert_layers),
    (
        "model.experts.count model.experts.ffn model.ffn model.experts.shared_ffn mesh.dp mesh.cp mesh.tp mesh.ep "
        "mesh.etp mesh.replicate mesh.sequence_parallel sequence_length",
        _expert_parallel,
    ),
    ("model.layers mesh.pp pipeline.virtual_stages pipeline.split pipeline.layout", _stages),
    ("pipeline.layout", _layout),
    ("steps observe.trace_steps", _trace),
    ("global_batch_size micro_batch_size mesh.dp", _batch),
    ("mesh.dp mesh.replicate data_parallel.zero", _replicas),
    ("mesh.pp mesh.dp mesh.cp mesh.tp elastic.min_workers elastic.max_workers", _elastic),
    (
        "optimizer.at_once optimizer.clip_norm precision.dtype determinism guard.on_nonfinite guard.on_spike",
        _at_once,
    ),
    ("", _canonical),
    ("mesh.pp pipeline.virtual_stages pipeline.schedule", _schedule),
    (
        "global_batch_size micro_batch_size mesh.dp mesh.replicate mesh.pp mesh.cp mesh.tp mesh.ep mesh.etp "
        "data_parallel.zero determinism pipeline.schedule",
        _schedule_batch,
    ),
    ("mesh.pp pipeline.virtual_stages memory.recompute_every", _recompute),
    ("sequence_length mesh.tp mesh.cp mesh.sequence_parallel memory.loss_chunks", _loss_chunks),
    ("steps lr.peak lr.final lr.warmup_steps lr.decay_steps lr.decay", _learning_rate),
    ("optimizer.groups", _parameter_groups),
    ("precision.dtype precision.moments precision.stochastic_rounding", _rounding),
    (
        "global_batch_size micro_batch_size mesh.dp mesh.replicate mesh.pp mesh.cp mesh.tp mesh.ep mesh.etp "
        "batch_ramp.start batch_ramp.increment batch_ramp.samples",
        _batch_ramp,
    ),
    ("observe.gradient_noise mesh.dp mesh.cp data_parallel.zero data_parallel.reduce determinism", _gradient_noise),
    ("data.sources data.dataset data.tokenizer.path data.tokenizer.vocab model.vocab", _data),
    ("data.blend data.blend_block data.stages data.dataset", _blend),
    (
        "data.source data.dataset data.blend data.packing data.too_long data.format data.tokenizer.path",
        _text,
    ),
    (
        "data.blend data.blend_block data.stages steps global_batch_size batch_ramp.start batch_ramp.increment "
        "batch_ramp.samples",
        _data_stages,
    ),
    ("data.validation", _validation_sets),
    ("data.objective", _objective),
    (
        "data.fim.rate data.fim.prefix data.fim.middle data.fim.suffix data.dataset data.tokenizer.path",
        _fill_in_the_middle,
    ),
    ("data.metadata_keys data.format data.text_key data.messages_key", _metadata),
    ("", _texts),
    *((f"{row.keys} {row.reads}", row.check) for row in UNUSED),
    ("resume.allow", _resume),
)
