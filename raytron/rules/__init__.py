"""The rules between the values of a configuration, all checked at once.

`problems` goes through two tables: RANGES, of keys and the values they may have, and RULES, of relations between keys.
A relation is looked at only where the keys that it reads are themselves in order, so that one mistake is reported once
and no rule divides by zero. Each problem says where, what and the remedy, with the nearest values that would do.
Nothing is changed.
"""

from __future__ import annotations

from raytron.config import RunConfig, flatten, from_mapping, to_mapping
from raytron.errors import ConfigError, Problem
from raytron.rules import data, mesh, model, pipeline, ramp, run, updates
from raytron.rules.pipeline import chunks_given
from raytron.rules.ranges import RANGES
from raytron.rules.rule import Rule
from raytron.rules.unused import UNUSED

__all__ = ["RANGES", "RULES", "chunks_given", "problems"]

RULES: tuple[Rule, ...] = (
    *model.RULES, *mesh.RULES, *pipeline.RULES, *updates.RULES, *ramp.RULES, *data.RULES,
    *run.RULES,
    *((f"{row.keys} {row.reads}", row.check) for row in UNUSED),
)  # fmt: skip


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
