"""Rules of a batch that grows: every size on the way obeys what the full one obeys."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from raytron.config import RunConfig, divisors
from raytron.errors import Problem
from raytron.rules import mesh, model, pipeline, updates
from raytron.rules.rule import Rule
from raytron.rules.words import any_of, counted


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
        near = any_of([step for step in steps if step % unit == 0] or steps, ramp.increment)
        yield Problem("batch_ramp.increment", what, f"use {near}")
        return
    found = list(_ramp_levels(config))
    yield from found
    rise = len(config.batch_sizes) - 1
    if ramp.samples < rise and not found:
        what = f"{ramp.samples} sequences are too few for {counted(rise, 'batch sizes')} below {full}"
        yield Problem("batch_ramp.samples", what, f"use {max(rise, ramp.start)} or more")


def _ramp_levels(config: RunConfig) -> Iterator[Problem]:
    """Every batch size on the way obeys what the full one obeys; the first that does not is told."""
    tables = (*model.RULES, *mesh.RULES, *pipeline.RULES, *updates.RULES)
    checks = [check for reads, check in tables if "global_batch_size" in reads.split()]
    told = {problem.where for check in checks for problem in check(config)}
    for size in config.batch_sizes[:-1]:
        level = dataclasses.replace(config, global_batch_size=size)
        found = [problem for check in checks for problem in check(level) if problem.where not in told]
        if found:
            where = "batch_ramp.start" if size == config.batch_ramp.start else "batch_ramp.increment"
            what = f"on the way to {config.global_batch_size}: {found[0].what}"
            yield Problem(where, what, f"where it makes {size} {found[0].remedy}")
            return


# the keys that a relation reads, and the relation
RULES: tuple[Rule, ...] = (
    (
        "global_batch_size micro_batch_size mesh.dp mesh.replicate mesh.pp mesh.cp mesh.tp mesh.ep mesh.etp "
        "batch_ramp.start batch_ramp.increment batch_ramp.samples",
        _batch_ramp,
    ),
)
