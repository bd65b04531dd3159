"""What a rule between keys is."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from raytron.config import RunConfig
from raytron.errors import Problem

Rule = tuple[str, Callable[[RunConfig], Iterator[Problem]]]  # the keys that it reads, and what it finds
