"""What decides which samples a run reads: its sources by their digests, and the weights of its stages, in samples.

A checkpoint records the recipe that it was trained by. A run may go on with another one where both name the same samples
up to the point that was reached:

    recorded   A 0.7, B 0.3 ─────────────────────────►
    now        A 0.7, B 0.3 ──────────┊ 5000: A 0.5, B 0.2, C 0.3 ─────►     goes on from any sample up to 5000
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raytron.config import RunConfig
from raytron.data.blend import UNIT, BlendOrder, Stage, whole_weights


@dataclass(frozen=True)
class Recipe:
    """sources: a digest of each data set; None: one that no sample is of. stages: by ascending start, the first from 0."""

    sources: tuple[str | None, ...]
    stages: tuple[Stage, ...]
    block: int  # samples among which each source has its exact share; 0: there is one source at a time

    @classmethod
    def of(cls, config: RunConfig, digests: Sequence[str]) -> Recipe:
        """That of a configuration whose data sets have these digests, in the order of `data.blend`."""
        if not config.data.blend:
            return cls(tuple(digests), (Stage(0, (UNIT,)),), 0)
        return cls(tuple(digests), stages_of(config), config.data.blend_block)

    @classmethod
    def recorded(cls, facts: Mapping[str, Any]) -> Recipe | None:
        """That of a checkpoint, from its facts; None where it says nothing of its data."""
        digest, recipe = facts.get("data"), facts.get("data_recipe")
        if not digest:
            return None
        if recipe is None:
            return cls((str(digest),), (Stage(0, (UNIT,)),), 0)
        stages = tuple(Stage(int(start), tuple(map(int, weights))) for start, weights in recipe["stages"])
        return cls(tuple(recipe["sources"]), stages, int(recipe["block"]))

    def order(self, sizes: Sequence[int], seed: int) -> BlendOrder:
        """The order of samples. sizes: of each source."""
        return BlendOrder(tuple(sizes), self.stages, seed, max(self.block, 1))

    @property
    def hash(self) -> str:
        """One digest: of one source its own, else of all that the recipe says."""
        if len(self.sources) == 1:
            return str(self.sources[0])
        text = json.dumps(self.facts(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def facts(self) -> dict[str, Any]:
        """What a checkpoint records; `recorded` reads it."""
        stages = [[stage.start, list(stage.weights)] for stage in self.stages]
        return {"sources": list(self.sources), "stages": stages, "block": self.block}

    def up_to(self, samples: int) -> Recipe:
        """All that decides the first `samples` samples, and nothing else: equal recipes give equal samples."""
        stages = [stage for stage in self.stages if stage.start < samples]
        used = {source for stage in stages for source, weight in enumerate(stage.weights) if weight}
        count = max(used, default=-1) + 1
        sources = tuple(self.sources[source] if source in used else None for source in range(count))
        mixed = any(sum(weight > 0 for weight in stage.weights) > 1 for stage in stages)
        trimmed = [Stage(stage.start, (*stage.weights, *[0] * count)[:count]) for stage in stages]
        return Recipe(sources, tuple(trimmed), self.block if mixed else 0)

    def difference(self, other: Recipe, samples: int) -> str | None:
        """How the first `samples` samples of another recipe differ from this one's; None where they do not."""
        mine, others = self.up_to(samples), other.up_to(samples)
        if mine == others:
            return None
        for number, (before, now) in enumerate(zip(mine.sources, others.sources, strict=False)):
            if before != now:
                return f"source {number} was {_short(before)} and is {_short(now)}"
        if len(mine.sources) != len(others.sources):
            return f"there were {len(mine.sources)} sources and are {len(others.sources)}"
        if mine.block != others.block:
            return f"data.blend_block was {mine.block} and is {others.block}"
        for before_stage, stage in zip(mine.stages, others.stages, strict=False):
            if before_stage != stage:
                return f"{_stage_text(before_stage)} was a stage, and now it is {_stage_text(stage)}"
        return f"there were {len(mine.stages)} stages up to sample {samples} and are {len(others.stages)}"


def stages_of(config: RunConfig) -> tuple[Stage, ...]:
    """The stages of a blend, in samples. Raises ValueError where weights have no sum."""
    first = Stage(0, whole_weights([source.weight for source in config.data.blend]))
    later = (
        Stage(start_of(config, number), whole_weights(stage.weights)) for number, stage in enumerate(config.data.stages)
    )
    return (first, *later)


def start_of(config: RunConfig, number: int) -> int:
    """The sample id that `data.stages[number]` begins with."""
    stage = config.data.stages[number]
    if stage.start_sample is not None:
        return stage.start_sample
    return config.samples_after(stage.start_step or 0)


def _short(digest: str | None) -> str:
    return "not read" if digest is None else f"{digest[:12]}…"


def _stage_text(stage: Stage) -> str:
    return f"{', '.join(f'{weight / UNIT:.4g}' for weight in stage.weights)} from sample {stage.start} on"
