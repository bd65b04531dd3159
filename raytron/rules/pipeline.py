"""Rules of a pipeline: stages, schedules, and what a rank recomputes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import get_args

from raytron.config import SCHEDULE_CHUNKS, V_SHAPED, RecomputePart, RunConfig
from raytron.errors import ConfigError, Problem
from raytron.rules.rule import Rule
from raytron.rules.words import counted, entries, one_of
from raytron.stages import read_stages


def _stages(config: RunConfig) -> Iterator[Problem]:
    layers, pp, chunks = config.model.layers, config.mesh.pp, chunks_given(config) or config.pipeline.chunks
    stages, (where, split) = pp * chunks, _given_stages(config)
    if layers < stages and split is None:
        what = f"{counted(layers, 'layers')} cannot fill {stages} stages (pp {pp} × {chunks} virtual)"
        remedy = f"use at most {counted(layers, 'stages')}, or at least {stages} layers"
        yield Problem("mesh.pp" if chunks == 1 else "pipeline.virtual_stages", what, remedy)
    if split is None:
        return
    if config.pipeline.split is not None and config.pipeline.layout is not None:
        yield Problem("pipeline.layout", "stands beside pipeline.split", "set one of them to null")
    if len(split) != stages:
        given, wanted = entries(len(split)), entries(stages)
        what = f"{given} for {counted(stages, 'stages')} (pp {pp} × {chunks} virtual)"
        yield Problem(where, what, f"give {wanted}, or null for a balanced split")
    elif any(size < 0 for size in split):
        yield Problem(where, f"{list(split)} has a negative number of layers", "give each 0 or more")
    elif empty := _empty_ranks(config.pipeline.schedule, split, pp):
        what = f"{list(split)} leaves {one_of([f'rank {rank}' for rank in empty], 'and')} with nothing"
        yield Problem(where, what, "give one of its stages a layer")
    if split and sum(split) != layers:
        what = f"{' + '.join(map(str, split))} = {counted(sum(split), 'layers')}, and the model has {layers}"
        yield Problem(where, what, f"let them sum to {layers}, or set null for a balanced split")


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


def _schedule(config: RunConfig) -> Iterator[Problem]:
    name, chunks, pp = config.pipeline.schedule, config.pipeline.chunks, config.mesh.pp
    least, most = SCHEDULE_CHUNKS[name]
    if chunks < least or (most is not None and chunks > most):
        takes = "one model chunk" if most == 1 else "two model chunks" if most == 2 else "more than one model chunk"
        fits = [other for other, (low, high) in SCHEDULE_CHUNKS.items() if low <= chunks <= (high or chunks)]
        ranks = " with mesh.pp of 2 or more" if pp < 2 <= chunks else ""
        what = f"{name} has {takes} on a rank, and {chunks} {'is' if chunks == 1 else 'are'} asked for"
        remedy = f"use {least if most else f'{least} or more'}, or set pipeline.schedule to {one_of(fits)}{ranks}"
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


# the keys that a relation reads, and the relation
RULES: tuple[Rule, ...] = (
    ("model.layers mesh.pp pipeline.virtual_stages pipeline.split pipeline.layout", _stages),
    ("pipeline.layout", _layout),
    ("mesh.pp pipeline.virtual_stages pipeline.schedule", _schedule),
    (
        "global_batch_size micro_batch_size mesh.dp mesh.replicate mesh.pp mesh.cp mesh.tp mesh.ep mesh.etp "
        "data_parallel.zero determinism pipeline.schedule",
        _schedule_batch,
    ),
    ("mesh.pp pipeline.virtual_stages memory.recompute_every", _recompute),
    ("sequence_length mesh.tp mesh.cp mesh.sequence_parallel memory.loss_chunks", _loss_chunks),
)
