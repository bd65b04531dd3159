"""The fork server: imports modules once, then becomes a worker for each caller of its socket, in a process of its own.

python -m raytron.testing.warm.server SOCKET MODULE ...      until the standard input ends
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
from typing import Any

READ_BYTES = 2**16


def serve(path: str, modules: list[str]) -> list[str]:
    """Forks for each caller. Returns in those processes alone: the command that each is to become."""
    for name in modules:
        importlib.import_module(name)
    if "ray" in sys.modules:
        sys.exit(f"{' or '.join(modules)} imports ray, which a worker has to do by itself")
    gc.collect()
    gc.freeze()  # pages that no collection touches stay shared
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    print("ready", flush=True)
    while True:
        if sys.stdin in select.select([listener, sys.stdin], [], [])[0]:
            sys.exit()
        call, _ = listener.accept()
        told, streams = heard(call)
        call.close()
        if os.fork() == 0:
            listener.close()
            return become(told, streams)
        for descriptor in streams:
            os.close(descriptor)


def heard(call: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """What a caller says of itself, and its three standard streams."""
    text, descriptors, _, _ = socket.recv_fds(call, READ_BYTES, 3)
    while part := call.recv(READ_BYTES):
        text += part
    return json.loads(text), descriptors


def become(told: dict[str, Any], streams: list[int]) -> list[str]:
    """Takes over a caller's streams, folder, environment and signals; its command."""
    os.setpgid(0, 0)  # a raylet ends the process group of a worker that is gone
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(told["folder"])
    os.environ.clear()
    os.environ.update(told["environment"])
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, told["blocked"])
    return list(told["command"])


if __name__ == "__main__":
    sys.argv = serve(sys.argv[1], sys.argv[2:])
    sys.path[0] = os.path.dirname(sys.argv[0])
    runpy.run_path(sys.argv[0], run_name="__main__")
