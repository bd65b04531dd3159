"""The names of a model's parameters, where they are needed beyond one rank's own: by layer, and over all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist


def layer_of(name: str) -> str:
    """What a parameter is counted with: "layers.3" for one of layer 3, else its first word: "embed", "norm", "head"."""
    words = name.split(".")
    return ".".join(words[:2]) if words[0] == "layers" else words[0]


def names_of_all(names: Sequence[str], group: dist.ProcessGroup | None) -> list[str]:
    """The names that the ranks of a group hold together, each once, in one order on all ranks; None: one rank."""
    if group is None:
        return list(names)
    everyone: list[list[str]] = [[] for _ in range(group.size())]
    dist.all_gather_object(everyone, list(names), group=group)
    return list(dict.fromkeys(name for part in everyone for name in part))
