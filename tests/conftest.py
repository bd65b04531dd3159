"""What all tests share, started when a test first asks for it: a pool of warm gloo ranks, and one local Ray."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import ray
from hypothesis import settings

from raytron.testing.world import World

settings.register_profile("raytron", deadline=None)  # a busy machine is not an error
settings.load_profile("raytron")


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    """A pool of ranks that each test re-meshes: `world.run(4, function, *arguments)`."""
    with World(timeout_s=180) as pool:
        yield pool


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """A Ray of the tests' own, with room for a few workers."""
    start_ray()
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def local_ray_again(request: pytest.FixtureRequest) -> None:
    """Starts it anew where a test before had to end it, for one of its own."""
    if "local_ray" in request.fixturenames and not ray.is_initialized():
        start_ray()


def start_ray() -> None:
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=150 * 2**20,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _system_config={"worker_niceness": 0, "preload_python_modules": ["torch"]},
    )
