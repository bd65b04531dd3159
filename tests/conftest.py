"""What all tests share, started when a test first asks for it: a pool of warm gloo ranks, and one local Ray."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from typing import Any

import fsspec
import pytest
import ray
from hypothesis import settings

from raytron.testing.warm.pool import Warm
from raytron.testing.world import World

settings.register_profile("raytron", deadline=None)  # a busy machine is not an error
settings.load_profile("raytron")


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    """A pool of ranks that each test re-meshes: `world.run(4, function, *arguments)`."""
    with World(timeout_s=180) as pool:
        yield pool


@pytest.fixture(scope="module")
def s3_client() -> Iterator[Any]:
    """A client of an S3 server of this machine, which fsspec talks to as well."""
    import boto3  # these two take seconds, which most tests need not wait for
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "someone",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(key, value)
        yield boto3.client("s3")
    server.stop()


@pytest.fixture(scope="module")
def google_bucket() -> Iterator[str]:
    """A bucket on an emulator of Google's storage, which fsspec talks to as well. Where gcsfs and gcp-storage-emulator are
    not installed, as without asking for them they are not, its tests are skipped."""
    how = "pip install gcsfs gcp-storage-emulator"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # of gcsfs: asks for what the emulator has not
        pytest.importorskip("gcsfs", reason=how)
        emulator = pytest.importorskip("gcp_storage_emulator.server", reason=how)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        address = f"http://127.0.0.1:{port}"
        patch.setenv("STORAGE_EMULATOR_HOST", address)
        for scheme in ("gs", "gcs"):
            patch.setitem(fsspec.config.conf, scheme, {"token": "anon", "endpoint_url": address})
        fsspec.get_filesystem_class("gs").clear_instance_cache()
        server = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
        server.start()
        yield "gs://bucket"
        server.stop()
        fsspec.get_filesystem_class("gs").clear_instance_cache()


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    """Workers of the Rays that this process starts have torch and Raytron at once."""
    with Warm("raytron.training.trainer", "pyarrow.dataset") as server:
        yield server


@pytest.fixture(scope="session")
def local_ray(warm: Warm) -> Iterator[None]:
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
