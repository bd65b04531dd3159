"""Switches warm processes on for the Rays that this process starts.

with Warm("raytron.training.open"):
    ray.init(address="local")
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from ray._private import ray_constants  # nothing public says how workers are started


class Warm:
    """A fork server. modules: what workers are to have imported, and that does not import Ray."""

    def __init__(self, *modules: str):
        self.modules = modules

    def __enter__(self) -> Warm:
        self._folder = tempfile.TemporaryDirectory(prefix="raytron-warm-")
        start = Path(self._folder.name) / "start.py"
        start.symlink_to(Path(__file__).with_name("start.py"))
        self._server = subprocess.Popen(
            [sys.executable, "-m", "raytron.testing.warm.server", start.with_name("socket"), *self.modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},  # as Ray has it for its workers; read when torch is imported
            start_new_session=True,
        )
        assert self._server.stdout is not None
        if not self._server.stdout.readline():
            raise RuntimeError(f"the fork server ended with code {self._server.wait()} before it could serve")
        self._usual = ray_constants.SETUP_WORKER_FILENAME
        ray_constants.SETUP_WORKER_FILENAME = str(start)  # joined to a folder of Ray's, where an absolute path wins
        return self

    @property
    def pid(self) -> int:
        """The process that workers are forked off."""
        return self._server.pid

    def __exit__(self, *exception: object) -> None:
        ray_constants.SETUP_WORKER_FILENAME = self._usual
        self._server.communicate()  # it ends with its input
        self._folder.cleanup()
