"""What all tests share: one pool of warm gloo ranks, started when a test first asks for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from raytron.testing.world import World


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    """A pool of ranks that each test re-meshes: `world.run(4, function, *arguments)`."""
    with World() as pool:
        yield pool
