"""The names of a model's parameters, known before the model is made: for globs over them, and norms by layer.

embed.weight  [position.weight]  layers.{i}.attention.* layers.{i}.mlp.*  norm.*  [head.weight]
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from raytron.config import ModelConfig, ParameterGroup, RunConfig
from raytron.errors import Problem
from raytron.plan.parameters import rank_parameters


def parameter_names(model: ModelConfig) -> tuple[str, ...]:
    """The full names of all parameters, in the order of the forward pass."""
    parameters = rank_parameters(RunConfig(model=model), [(0, model.layers)], [0])
    return tuple(parameter.name for parameter in parameters)


def layer_of(name: str) -> str:
    """What a parameter is counted with: "layers.3" for one of layer 3, else its first word: "embed", "norm", "head"."""
    words = name.split(".")
    return ".".join(words[:2]) if words[0] == "layers" else words[0]


def layers_of(model: ModelConfig) -> tuple[str, ...]:
    """Everything that `layer_of` names, in the order of the forward pass."""
    return tuple(dict.fromkeys(map(layer_of, parameter_names(model))))


def unmatched(groups: Sequence[ParameterGroup], model: ModelConfig) -> list[Problem]:
    """A problem for each group whose glob matches none of the model's parameters, with names like it, or only such as
    earlier groups match; and one where together they freeze everything."""
    names = parameter_names(model)
    left, found = set(names), []
    for index, group in enumerate(groups):
        where, matched = f"optimizer.groups[{index}].match", {name for name in names if fnmatchcase(name, group.match)}
        if not matched:
            found.append(Problem(where, f"{group.match!r} matches no parameter", _like(group.match, names)))
        elif not matched & left:
            what = f"earlier groups match all that {group.match!r} matches"
            found.append(Problem(where, what, "put it first: the first group that matches a name holds"))
        left -= matched
    if all(group_of(name, groups).freeze for name in names):
        found.append(Problem("optimizer.groups", "they freeze every parameter", "leave some to train"))
    return found


def group_of(name: str, groups: Sequence[ParameterGroup]) -> ParameterGroup:
    """The first group that matches a full name, or one that changes nothing."""
    return next((group for group in groups if fnmatchcase(name, group.match)), ParameterGroup())


def _like(pattern: str, names: Sequence[str]) -> str:
    wanted = re.sub(r"[*?\[\]!]", "", pattern)
    close = difflib.get_close_matches(wanted, names, n=3, cutoff=0.3) or list(names[:3])
    return f"use a glob that matches a name such as {', '.join(close)}"
