"""Layers to pipeline stages: the cut whose slowest stage is the fastest possible.

A pipeline runs at the pace of its slowest stage, so the cut minimises the largest stage cost, exactly: with
best(s, j) the smallest possible largest cost of the first j layers in s stages,

    best(s, j) = min over i of max( best(s-1, i), cost of layers i..j )

The first term grows with i and the second falls, so the best i is where they cross, found by bisection. Among the cuts
that reach the minimum, the one with the smallest sum of squared costs is taken: the most even one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

Range = tuple[int, int]  # layers [first, one past the last)


def balanced(costs: Sequence[float], stages: int, before: float = 0.0, after: float = 0.0) -> tuple[int, ...]:
    """How many layers each stage takes, given the cost of each layer (not negative), so that the slowest is fastest.

    before, after: the cost of what opens the first stage and closes the last (embedding and loss head). It is weighed like
    a layer: the first or the last stage may have no other where that is best, as with a large vocabulary. Every other stage
    gets at least one layer. Raises ValueError where there are fewer layers than stages, or for a negative cost.
    """
    if not 1 <= stages <= len(costs):
        raise ValueError(f"{len(costs)} layers cannot fill {stages} stages")
    if min(*costs, before, after) < 0:
        raise ValueError("a cost can't be negative")
    if len({*costs, before + costs[0], after + costs[0]}) == 1 and len(costs) % stages == 0:
        return (len(costs) // stages,) * stages
    opens, closes = before > 0, after > 0
    items = [*([before] if opens else []), *costs, *([after] if closes else [])]
    total = (0.0, *accumulate(items))
    sizes = list(_most_even(total, stages, _smallest_maximum(total, stages)))
    sizes[0] -= opens
    sizes[-1] -= closes
    return tuple(sizes)


def ranges(sizes: Sequence[int]) -> tuple[Range, ...]:
    """The layers [a, b) of each stage from how many it has."""
    ends = list(accumulate(sizes))
    return tuple((end - size, end) for end, size in zip(ends, sizes, strict=True))


def _smallest_maximum(total: Sequence[float], stages: int) -> float:
    """The smallest possible cost of the most costly stage; `total` holds the costs of the first j layers."""
    layers = len(total) - 1
    best = list(total)
    for stage in range(2, stages + 1):
        longer = [math.inf] * (layers + 1)
        for j in range(stage, layers + 1):
            low, high = stage - 1, j - 1  # the first i from which the stages before cost more than this one
            while low < high:
                middle = (low + high) // 2
                if best[middle] >= total[j] - total[middle]:
                    high = middle
                else:
                    low = middle + 1
            near = (low, max(stage - 1, low - 1))
            longer[j] = min(max(best[i], total[j] - total[i]) for i in near)
        best = longer
    return best[layers]


def _most_even(total: Sequence[float], stages: int, limit: float) -> tuple[int, ...]:
    """The cut with the smallest sum of squared stage costs in which no stage costs more than `limit`."""
    layers = len(total) - 1
    limit *= 1 + 1e-12
    best = [0.0] + [math.inf] * layers
    cuts: list[list[int]] = []
    for stage in range(1, stages + 1):
        longer, cut = [math.inf] * (layers + 1), [0] * (layers + 1)
        for j in range(stage, layers - (stages - stage) + 1):
            for i in range(j - 1, stage - 2, -1):
                cost = total[j] - total[i]
                if cost > limit:
                    break
                if best[i] + cost * cost < longer[j]:
                    longer[j], cut[j] = best[i] + cost * cost, i
        best = longer
        cuts.append(cut)
    sizes, j = [], layers
    for cut in reversed(cuts):
        sizes.append(j - cut[j])
        j = cut[j]
    return tuple(reversed(sizes))
