"""How rules speak: phrases out of numbers and names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any


def divided(count: int, name: str, parts: int) -> str:
    return f"{counted(count, name)} cannot be cut in {parts} equal parts"


def counted(count: int, names: str) -> str:
    """A number of things, whose first plural becomes a singular where there is one of them."""
    name = re.sub(r"s\b", "", names, count=1)
    return f"{count} {name if count == 1 else names}"


def any_of(values: Iterable[int], near: int) -> str:
    """The values nearest to one, at most six, as a phrase."""
    nearest = sorted(sorted(set(values), key=lambda value: abs(value - near))[:6])
    if len(nearest) < 2:
        return "".join(map(str, nearest))
    return ", ".join(map(str, nearest[:-1])) + f" or {nearest[-1]}"


def one_of(names: Sequence[str], word: str = "or") -> str:
    """Names as a phrase."""
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + f" {word} {names[-1]}"


def around(value: int, step: int) -> str:
    """The nearest multiples of `step`, at least one of it."""
    below = value // step * step
    return any_of([number for number in (below, below + step) if number > 0], value)


def as_yaml(value: Any) -> str:
    if isinstance(value, tuple):
        value = list(value)
    return "null" if value is None else str(value).lower()


def entries(count: int) -> str:
    return "1 entry" if count == 1 else f"{count} entries"
