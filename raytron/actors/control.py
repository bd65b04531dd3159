"""The concurrency group of methods that answer at any time, whatever the actor's main work is doing."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import ray

F = TypeVar("F", bound=Callable[..., object])
GROUP = "ctl"


def control(function: F) -> F:
    """Marks a method of an actor as one of the group `ctl`."""
    return cast(F, ray.method(concurrency_group=GROUP)(function))
