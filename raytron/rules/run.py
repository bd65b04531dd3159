"""Rules of a run as a whole: what is traced, texts, what may differ when it goes on."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator

from raytron.config import RunConfig, flatten, to_mapping
from raytron.errors import Problem
from raytron.rules.rule import Rule


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
        needed = key in (
            "name",
            "run_dir",
            "observe.host",
            "data.text_key",
            "data.messages_key",
            "data.tokenizer.eod",
            *FIM_TOKENS,
        )
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


# the keys that a relation reads, and the relation
RULES: tuple[Rule, ...] = (
    ("steps observe.trace_steps", _trace),
    ("", _texts),
    ("resume.allow", _resume),
)
